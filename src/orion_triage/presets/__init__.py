"""Settings files that ship with the project."""
