"""Puts the `--help` of a command in the place of `<!-- help: command -->` while the site is built."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"<!-- help: (\w+) -->", lambda found: folded(found[1]), markdown)


def folded(command: str) -> str:
    """The help as a block that opens on a click."""
    lines = ["```text", *help_of(command).splitlines(), "```"]
    return f'??? note "All options of `{command}`"\n\n' + "".join(f"    {line}\n" for line in lines)


def help_of(command: str) -> str:
    from sycoca.__main__ import parser

    # argparse wraps at the width of the terminal.
    os.environ["COLUMNS"] = "82"
    commands = next(action for action in parser()._actions if action.dest == "command")
    return commands.choices[command].format_help()
