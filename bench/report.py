"""Result rows as the README's tables and plots: `python -m bench.report [--plots FOLDER] [--operator NAME]`."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import rows
from bench.contrastive import H200_TFLOPS

Row = dict[str, Any]
COLUMNS = ("operator", "case", "shape", "dtype", "p50 ms", "p20-p80 ms", "peak MiB", "share", "machine", "commit")


def table(measured: Iterable[Row]) -> str:
    """Markdown table of the newest row of each case, shape and machine."""
    newest = {_key(row): row for row in map(_uniform, measured) if "p50_ms" in row}
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for row in sorted(newest.values(), key=lambda row: (row["machine"], row["operator"], *_shape(row), row["p50_ms"])):
        lines.append("| " + " | ".join(_cells(row)) + " |")
    return "\n".join(lines)


def plots(measured: Iterable[Row], folder: Path) -> list[Path]:
    """Time and memory over B, log-log, with the time that the matrix products need at the device's rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    newest = {_key(row): row for row in measured if row.get("operator") == "fused_itc_loss" and "p50_ms" in row}
    written = []
    for machine, D, dtype in sorted({(r["machine"], r["D"], r["dtype"]) for r in newest.values()}):
        chosen = [r for r in newest.values() if (r["machine"], r["D"], r["dtype"]) == (machine, D, dtype)]
        if len({r["B"] for r in chosen}) < 3:
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for axis, field, label in zip(axes, ("p50_ms", "peak_mib"), ("forward and backward, ms", "peak memory, MiB")):
            for case in sorted({r["case"] for r in chosen if "forward" not in r["case"]}):
                points = sorted((r["B"], r[field]) for r in chosen if r["case"] == case and field in r)
                if points:
                    axis.plot(*zip(*points), marker="o", linewidth=2.5 if case == "ours" else 1.2, label=case)
            axis.set(xscale="log", yscale="log", xlabel="B, pairs", ylabel=label)
            axis.grid(which="both", alpha=0.2)
        if "H200" in machine:
            sizes = sorted({r["B"] for r in chosen})
            limit = [8 * B * B * D / (H200_TFLOPS * 1e12) * 1e3 for B in sizes]
            axes[0].plot(sizes, limit, "k--", linewidth=1, label="four products")
        axes[0].legend(frameon=False)
        figure.suptitle(f"contrastive loss, D = {D}, {dtype}, {machine}")
        written.append(folder / f"itc_{D}_{dtype}_{''.join(c for c in machine if c.isalnum())}.png")
        figure.savefig(written[-1], dpi=150)
        pyplot.close(figure)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plots", type=Path, help="folder to write plots to")
    parser.add_argument("--operator", help="rows of this operator only")
    options = parser.parse_args()
    measured = [row for row in rows.read() if not options.operator or row.get("operator") == options.operator]
    if not measured:
        print("bench.report: there are no rows below bench/results", file=sys.stderr)
        return 1
    print(table(measured))
    if options.plots:
        for path in plots(measured, options.plots):
            print(path, file=sys.stderr)
    return 0


def _uniform(row: Row) -> Row:
    """The row with the names that the table uses."""
    names = {"implementation": "case", "batch": "B"}
    return {names.get(name, name): value for name, value in row.items()}


def _shape(row: Row) -> tuple:
    return tuple(row[letter] for letter in "BPKTDHV" if letter in row)


def _key(row: Row) -> tuple:
    return row["machine"], row["operator"], row["case"], _shape(row), row.get("dtype")


def _cells(row: Row) -> list[str]:
    shape = ", ".join(f"{letter} {row[letter]}" for letter in "BPKTDHV" if letter in row)
    if "share_of_limit" in row:
        share = f"{100 * row['share_of_limit']:.0f} % of the product rate"
    elif "copy_share" in row:
        share = f"{100 * row['copy_share']:.0f} % of the copy rate"
    else:
        share = f"{row['over_products']:.2f} x products" if "over_products" in row else ""
    peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
    spread = f"{row['p20_ms']:.3g}-{row['p80_ms']:.3g}"
    where = row["machine"], row["commit"]
    return [
        row["operator"],
        row["case"],
        shape,
        row.get("dtype", ""),
        f"{row['p50_ms']:.4g}",
        spread,
        peak,
        share,
        *where,
    ]


if __name__ == "__main__":
    sys.exit(main())
