"""A study's figures: every seed with mean and standard deviation, and what happened over training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.study_table import MEASURES

_SHOWN = ("recall", "nats", "coverage")
_STEPS, _COMPUTE = "#1f4e9c", "#d9822b"


def draw(table: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of a table.

    Args:
        table: from `train.study_table.tabulate`.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = table["rows"]
    shown = [name for name in _SHOWN if any(name in row["equal_steps"] for row in rows)] or ["recall"]
    height = 1.2 + 0.34 * len(rows)
    figure = Figure(figsize=(4.2 * len(shown) + 2.2, height + 3.4), layout="constrained")
    grid = figure.add_gridspec(2, len(shown), height_ratios=(height, 3.2))
    first = None
    for column, name in enumerate(shown):
        axes = figure.add_subplot(grid[0, column], sharey=first)
        _bars(axes, rows, name)
        if first is None:
            first = axes
            axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
            axes.invert_yaxis()
        else:
            axes.tick_params(labelleft=False)
        _curves(figure.add_subplot(grid[1, column]), rows, name)
    handles, labels = figure.axes[1].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(4, len(handles)), fontsize=7, frameon=False
        )
    seeds = len(table["seeds"])
    told = f"mean and standard deviation over {seeds} seeds" if seeds > 1 else "one seed: no ordering"
    figure.suptitle(f"{table['name']}: {told}; blue at equal steps, orange at equal compute", fontsize=10)
    figure.savefig(path, dpi=120)


def _bars(axes: Any, rows: list[dict], name: str) -> None:
    for place, row in enumerate(rows):
        for offset, cells, colour in ((-0.13, row["equal_steps"], _STEPS), (0.13, row["equal_compute"], _COMPUTE)):
            if name not in cells:
                continue
            cell = cells[name]
            axes.plot(cell["values"], [place + offset] * len(cell["values"]), ".", color=colour, alpha=0.45)
            axes.errorbar(cell["mean"], place + offset, xerr=cell["sd"], fmt="o", ms=5, capsize=3, color=colour)
    _chance(axes.axvline, rows, name)
    heading, more, _ = MEASURES[name]
    axes.set_xlabel(f"{heading}, {'more' if more else 'less'} is better", fontsize=9)
    axes.grid(axis="x", alpha=0.25)


def _curves(axes: Any, rows: list[dict], name: str) -> None:
    for number, row in enumerate(rows):
        if name in row["track"]:
            # Ten colours of the cycle; further rows are told apart by their dashes.
            style = ("-", "--", ":")[number // 10 % 3]
            axes.plot(
                row["track"]["step"], row["track"][name], style, marker=".", color=f"C{number % 10}", label=row["name"]
            )
    _chance(axes.axhline, rows, name)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(MEASURES[name][0], fontsize=9)
    axes.grid(alpha=0.25)


def _chance(line: Any, rows: list[dict], name: str) -> None:
    """What a random choice reaches."""
    values = [
        row["equal_steps"][f"{name}_{kind}"]["mean"]
        for row in rows
        for kind in ("random", "chance")
        if f"{name}_{kind}" in row["equal_steps"]
    ]
    # Rows that differ in it have no line in common.
    if values and max(values) - min(values) < 0.01:
        line(sum(values) / len(values), color="grey", linestyle=":", linewidth=1)
