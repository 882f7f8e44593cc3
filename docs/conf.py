"""Sphinx settings. The build (make docs) reads these Markdown files and nothing from a network."""

project = "ORION triage"
extensions = ["myst_parser"]
exclude_patterns = ["conf.py", "*.py"]
myst_heading_anchors = 3  # links name headings as GitHub does: page.md#heading
nitpicky = True

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["layout.css"]

# The second pass of make docs lists the addresses of other sites; without a network none can be asked.
linkcheck_ignore = [r"https?://"]
