"""Studies: the same training in several forms and seeds, and a table of how they compare.

python -m train.study main
"""

import argparse
import json
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from sycoca.config import ConfigError
from train.command_line import Parser, split_overrides
from train.durable import write_atomically
from train.exits import EXIT_SAVED, EXIT_STOPPED, of_the_system, refused
from train.recipe import chosen
from train.study_page import fill
from train.study_plan import Plan, plans, read_plan, shown
from train.study_results import read_result
from train.study_runs import Ended, carry_out, command_of
from train.study_table import markdown, tabulate


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m train.study",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains the rows of a plan, each with several seeds, and compares them. Run again it goes on where "
        "it was stopped.",
        epilog="examples:\n"
        "  python -m train.study main\n"
        "  python -m train.study table5 --limit 30\n"
        '  python -m train.study main --row CoCa --row "SyCoCa, local" --seeds 0 train.steps=50\n',
    )
    p.add_argument("plan", help=f"one of {', '.join(plans())}, or the .toml of a plan")
    p.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of runs, results and tables")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    p.add_argument("--limit", type=float, metavar="MINUTES", help="stop after so long; the same command goes on")
    p.add_argument("--row", action="append", metavar="NAME", help="only this row; may be given several times")
    p.add_argument("--seeds", type=int, nargs="+", metavar="N", help="instead of the plan's")
    p.add_argument("--list", action="store_true", help="print the runs, what is done and their commands, and stop")
    p.add_argument("--table", action="store_true", help="train nothing, make the table of what is there")
    p.add_argument("--page", type=Path, metavar="MD", help="write the table between its marks in this page, too")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="overrides for all rows, such as train.steps=50")
    return p


def study(argv: list[str]) -> int:
    """Trains, and writes <out>/<plan>/table.md, table.json and figures.png; returns the exit code."""
    args = parser().parse_intermixed_args(argv)
    for option, value in (("--jobs", args.jobs), ("--limit", args.limit)):
        if value is not None and value <= 0:
            raise ConfigError(f"{option} {value}: needs to be above 0")
    plan = read_plan(args.plan, only=args.row, seeds=args.seeds)
    if args.overrides:
        overrides = split_overrides(args.overrides, chosen(plan.base, False))
        plan = read_plan(args.plan, only=args.row, seeds=args.seeds, overrides=overrides)
    if args.list:
        print("\n".join(listed(plan, args.out)))
        return 0
    code = 0 if args.table else train(plan, args.out, args.jobs, args.limit)
    table = tabulate(plan, {run.key: result for run in plan.runs if (result := read_result(args.out, run))})
    folder = args.out / plan.name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "table.json", json.dumps(table, indent=1) + "\n")
    write_atomically(folder / "table.md", f"# {plan.name}\n\n{plan.about}\n\n{markdown(table, 'figures.png')}")
    from train.study_figure import draw

    draw(table, folder / "figures.png")
    print(f"\n{markdown(table)}\nleft in {folder}: figures.png, table.json, table.md", flush=True)
    if args.page is not None:
        fill(args.page, table, folder)
        print(f"written into {args.page}", flush=True)
    return code


def train(plan: Plan, out: Path, jobs: int, limit_minutes: float | None) -> int:
    """Trains what is missing and tells of it; returns the exit code."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    keys = {run.key for run in plan.runs}
    total, done, failed = len(keys), len({run.key for run in plan.runs if read_result(out, run)}), []
    print(f"{plan.name}: {total} runs, {done} done, {jobs} at a time; {out}", flush=True)

    def ended(end: Ended) -> None:
        nonlocal done
        done += end.reason is None
        if end.reason is not None and not end.reason.endswith("goes on with it"):
            failed.append(end)
        what = end.reason or f"done in {end.wall_s:.0f} s"
        print(f"[{done}/{total}] {end.run.row}, seed {end.run.seed}: {what}", flush=True)

    try:
        limit_s = None if limit_minutes is None else 60 * limit_minutes
        missing = carry_out(plan, out, jobs=jobs, limit_s=limit_s, stopped=lambda: bool(asked), ended=ended)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if missing:
        print(f"{missing} runs without a result; the same command goes on", file=sys.stderr, flush=True)
    return EXIT_STOPPED if failed else EXIT_SAVED if missing else 0


def listed(plan: Plan, out: Path) -> list[str]:
    """A line for each run: whether it is done, and what trains it."""
    lines = []
    for run in plan.runs:
        state = "done" if read_result(out, run) else "to do"
        lines.append(f"{state}  {run.row}, seed {run.seed}\n       {shown(command_of(plan, run, out))}")
    return lines


def main() -> int:
    try:
        return study(sys.argv[1:])
    except (ConfigError, OSError) as error:
        if isinstance(error, OSError):
            error = ConfigError(of_the_system(error))
        return refused(error)


if __name__ == "__main__":
    sys.exit(main())
