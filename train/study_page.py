"""The place for a study in a page: between its marks stands what the table beside the page says, and nothing else.

<!-- study: NAME -->  ...  <!-- /study: NAME -->
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sycoca.config import ConfigError, nearest
from train.durable import write_atomically
from train.study_table import markdown

_MARK = re.compile(r"<!-- study: ([\w-]+) -->\n(.*?)<!-- /study: \1 -->", re.DOTALL)


def places(text: str) -> dict[str, str]:
    """Name -> what stands between the marks of each study in a page."""
    return dict(_MARK.findall(text))


def beside(page: Path, name: str, ending: str) -> Path:
    """Where a study's table (json) or figures (png) lie, beside a page."""
    return page.with_name(f"{page.stem}_{name}.{ending}")


def rendered(page: Path, table: Mapping[str, Any]) -> str:
    """What stands between the marks."""
    return f"\n{markdown(table, beside(page, table['name'], 'png').name)}\n"


def fill(page: Path, table: Mapping[str, Any], folder: Path) -> None:
    """Writes a table into a page, and its data and figures beside it.

    Args:
        page: with the marks of the study.
        table: from `train.study_table.tabulate`.
        folder: with figures.png.

    Raises:
        ConfigError: the page has no such marks.
        OSError: it cannot be read or written.
    """
    text, name = page.read_text(encoding="utf-8"), table["name"]
    if name not in (known := places(text)):
        raise ConfigError(f"--page {page}: has no '<!-- study: {name} -->' and its end{nearest(name, known)}")
    whole = f"<!-- study: {name} -->\n{rendered(page, table)}<!-- /study: {name} -->"
    changed = _MARK.sub(lambda found: whole if found[1] == name else found[0], text)
    write_atomically(beside(page, name, "json"), json.dumps(table, indent=1) + "\n")
    shutil.copyfile(folder / "figures.png", beside(page, name, "png"))
    write_atomically(page, changed)
