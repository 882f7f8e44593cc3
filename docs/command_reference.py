"""Prints docs/commands.md from the command line itself.

python docs/command_reference.py > docs/commands.md
"""

import html
import re
import subprocess
import sys


def reference() -> str:
    """Every command's help in Markdown, as Typer writes it.

    Left out: lists of subcommands, whose descriptions Typer cuts off at 45 characters; the page's menu has them all.
    """
    command = [sys.executable, "-m", "typer", "orion_triage.cli", "utils", "docs", "--name", "orion"]
    text = subprocess.run([*command, "--title", "Commands"], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n?", "", text)
    text = re.sub(r"^Example: (.*)$", r"Example: `\1`", text, flags=re.MULTILINE)
    return html.unescape(text).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
