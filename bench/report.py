"""Result rows as the README's tables and plots.

`python -m bench.report [--operator NAME] [--pairs B...] [--threads N] [--plots FOLDER]`
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import rows
from bench.contrastive import H200_TFLOPS

Row = dict[str, Any]
COLUMNS = ("operator", "case", "shape", "dtype", "p50 ms", "p20-p80 ms", "peak MiB", "share", "machine", "commit")
# (operator, B, D) of the documented bars on a GPU; one without a row is listed as not measured.
GPU_BARS = (
    *(("fused_itc_loss", 65536, D) for D in (256, 512, 768, 1024)),
    ("fused_itc_loss", 4096, 768),
    ("fused_itc_loss", 262144, 768),
    ("fused_itc_loss", 1048576, 768),
    ("fused_siglip_loss", 65536, 768),
)
GPU = "H200"
SHAPE = (*"BPKTDHV", "preset", "beams", "tokens")


def table(measured: Iterable[Row]) -> str:
    """Markdown table of the newest row of each case, shape and machine."""
    newest = {_key(row): row for row in map(_uniform, measured) if "p50_ms" in row}
    return _markdown(COLUMNS, map(_cells, sorted(newest.values(), key=_place)))


def _place(row: Row) -> tuple:
    # Shapes of one operator may name a preset or a size.
    shape = tuple((isinstance(value, str), value) for value in _shape(row))
    return row["machine"], row["operator"], shape, row.get("dtype", ""), row["p50_ms"]


def unmeasured(measured: Iterable[Row]) -> str:
    """Markdown table of the documented sizes on a GPU that have no row."""
    found = {(r["operator"], r.get("B"), r.get("D")) for r in measured if GPU in r["machine"] and "p50_ms" in r}
    missing = [bar for bar in GPU_BARS if bar not in found]
    lines = ([operator, f"B {B}, D {D}", "bfloat16", GPU, "not measured"] for operator, B, D in missing)
    return _markdown(("operator", "shape", "dtype", "machine", "p50 ms"), lines) if missing else ""


def accuracy(measured: Iterable[Row]) -> str:
    """Markdown table of the newest errors of each loss against fp64."""
    newest = {(*_key(r), r["scale"]): r for r in measured if "gradient_errors" in r}
    names = list(dict.fromkeys(name for r in newest.values() for name in r["gradient_errors"]))
    columns = "regime", "shape", "dtype", "scale", *names, "machine", "commit"
    lines = (
        [
            row["case"].removeprefix("accuracy, "),
            _shape_text(row),
            row["dtype"],
            f"{row['scale']:g}",
            *(f"{row['gradient_errors'][n]:.1e}" if n in row["gradient_errors"] else "" for n in names),
            _where(row),
            row["commit"],
        ]
        for row in newest.values()
    )
    return _markdown(columns, lines) if newest else ""


def plots(measured: Iterable[Row], folder: Path) -> list[Path]:
    """Time and memory over B, log-log, with the time that the matrix products need at the device's rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    newest = {_key(row): row for row in measured if row.get("operator") == "fused_itc_loss" and "p50_ms" in row}
    written = []
    for machine, D, dtype in sorted({(_where(r), r["D"], r["dtype"]) for r in newest.values()}):
        chosen = [r for r in newest.values() if (_where(r), r["D"], r["dtype"]) == (machine, D, dtype)]
        if len({r["B"] for r in chosen}) < 3:
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for axis, field, label in zip(axes, ("p50_ms", "peak_mib"), ("forward and backward, ms", "peak memory, MiB")):
            for case in sorted({r["case"] for r in chosen if not r["case"].endswith(("forward", "graph", "products"))}):
                points = sorted((r["B"], r[field]) for r in chosen if r["case"] == case and field in r)
                if points:
                    axis.plot(*zip(*points), marker="o", linewidth=2.5 if case == "ours" else 1.2, label=case)
            axis.set(xscale="log", yscale="log", xlabel="B, pairs", ylabel=label)
            axis.grid(which="both", alpha=0.2)
        # The least time: of the four products alone, at the device's rate or as measured beside the losses.
        limit = sorted((r["B"], r["p50_ms"]) for r in chosen if r["case"] == "products")
        if GPU in machine:
            limit = [(B, 8 * B * B * D / (H200_TFLOPS * 1e12) * 1e3) for B in sorted({r["B"] for r in chosen})]
        axes[0].plot(*zip(*limit), "k--", linewidth=1, label="four products alone")
        # The least memory of what holds the logits: the logits, once.
        sizes = sorted({r["B"] for r in chosen})
        held = [B * B * (4 if dtype == "float32" else 2) / 2**20 for B in sizes]
        axes[1].plot(sizes, held, "k:", linewidth=1, label="one matrix of logits")
        for axis in axes:
            axis.legend(frameon=False)
            axis.set_xticks(sizes, [f"{B:,}" for B in sizes], rotation=30, minor=False)
            axis.set_xticks([], minor=True)
        figure.suptitle(f"contrastive loss, D = {D}, {dtype}, {machine}")
        name = "_".join("".join(c if c.isalnum() else " " for c in machine.split(", torch")[0]).lower().split())
        written.append(folder / f"itc_{D}_{dtype}_{name}.png")
        figure.savefig(written[-1], dpi=150)
        pyplot.close(figure)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plots", type=Path, help="folder to write plots to")
    parser.add_argument("--operator", help="rows of this operator only")
    parser.add_argument("--pairs", type=int, nargs="+", help="rows of these numbers of pairs only")
    parser.add_argument("--threads", type=int, help="rows of this number of threads only")
    options = parser.parse_args()
    measured = [row for row in rows.read() if not options.operator or row.get("operator") == options.operator]
    if not measured:
        print("bench.report: there are no such rows below bench/results", file=sys.stderr)
        return 1
    wanted = {"B": options.pairs, "cores": options.threads and [options.threads]}
    chosen = [row for row in measured if all(not v or row.get(name) in v for name, v in wanted.items())]
    print("\n\n".join(filter(None, (table(chosen), accuracy(chosen), unmeasured(measured)))))
    if options.plots:
        for path in plots(measured, options.plots):
            print(path, file=sys.stderr)
    return 0


def _uniform(row: Row) -> Row:
    """The row with the names that the table uses."""
    names = {"implementation": "case", "impl": "case", "batch": "B", "images": "B"}
    return {names.get(name, name): value for name, value in row.items()}


def _shape(row: Row) -> tuple:
    return tuple(row[name] for name in SHAPE if name in row)


def _key(row: Row) -> tuple:
    return row["machine"], row.get("cores"), row["operator"], row["case"], _shape(row), row.get("dtype")


def _where(row: Row) -> str:
    """Machine, threads and versions."""
    parts = (
        row["machine"],
        f"{row['cores']} threads" if "cores" in row else "",
        f"torch {row['torch']}" if "torch" in row else "",
    )
    return ", ".join(filter(None, parts)).replace("1 threads", "1 thread")


def _shape_text(row: Row) -> str:
    return ", ".join(f"{name} {row[name]}" for name in SHAPE if name in row)


def _markdown(columns: Iterable[str], lines: Iterable[list[str]]) -> str:
    columns = list(columns)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *lines))


def _cells(row: Row) -> list[str]:
    shape = _shape_text(row)
    if "share_of_limit" in row:
        share = f"{100 * row['share_of_limit']:.0f} % of the product rate"
    elif "copy_share" in row:
        share = f"{100 * row['copy_share']:.0f} % of the copy rate"
    else:
        share = f"{row['over_products']:.2f} x products" if "over_products" in row else ""
    peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
    spread = f"{row['p20_ms']:.3g}-{row['p80_ms']:.3g}" if "p20_ms" in row else ""
    where = _where(row), row["commit"]
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
