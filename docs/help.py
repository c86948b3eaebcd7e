"""Puts the `--help` of a command in the place of `<!-- help: command -->` while the site is built."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"<!-- help: (\w+) -->", lambda found: f"```text\n{help_of(found[1])}```\n", markdown)


def help_of(command: str) -> str:
    from sycoca.__main__ import parser

    # argparse wraps at the width of the terminal.
    os.environ["COLUMNS"] = "100"
    commands = next(action for action in parser()._actions if action.dest == "command")
    return commands.choices[command].format_help()
