"""Tables of studies: every row's mean and standard deviation over seeds, at equal steps and at equal compute.

cost of a step     processor seconds of training, mean over a row's runs
budget             the least cost of a row's whole run
equal compute      a measure at the step where the row has spent the budget, between two evaluations on the line
                   through them; None before the first
a claim holds      where the means differ by more than sqrt(s1^2 + s2^2), s the rows' standard deviations; at equal
                   compute the budget is that of the cheaper one of its two rows

One seed has no standard deviation and supports no claim.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from train.study_plan import Plan

# Name -> (heading, whether more is better, digits).
MEASURES = {
    "recall": ("mean recall", True, 3),
    "mTR": ("mTR", True, 3),
    "mIR": ("mIR", True, 3),
    "nats": ("nats per token", False, 3),
    "coverage": ("coverage", True, 3),
    "boxes": ("Acc@0.5 of boxes", True, 3),
}
_JUDGED = ("recall", "nats")
_ALIKE = ("coverage_random", "recall_chance", "auc", "coverage_shuffled", "boxes_best")
HOLDS, AGAINST, OPEN, ONE_SEED, ABSENT = (
    "holds",
    "the other way round",
    "within one standard deviation",
    "one seed, no ordering",
    "not known",
)


def tabulate(plan: Plan, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of a study as plain data.

    Args:
        plan: the study.
        results: what is kept of its runs, by digest; those that are missing are left out.

    Returns:
        What `markdown` and the figures show.
    """
    found = {row: [results[run.key] for run in plan.of(row) if run.key in results] for row in plan.rows}
    costs = {row: _cost(runs) for row, runs in found.items()}
    totals = {row: costs[row] * runs[0]["steps"] for row, runs in found.items() if costs[row] is not None}
    budget = min(totals.values(), default=None)

    def spent(row: str, budget: float | None) -> dict[str, Any]:
        """The measures of a row where it has spent a budget."""
        step = None if budget is None or costs[row] is None else budget / costs[row]
        return {"step": step, **_cells([_at(run, step) for run in found[row]] if step else [])}

    def claim(better: str, worse: str, measure: str) -> dict[str, Any]:
        both = [totals[row] for row in (better, worse) if row in totals]
        cheaper = min(both) if len(both) == 2 else None
        final = [_cells([run["final"] for run in found[row]]) for row in (better, worse)]
        even = [spent(row, cheaper) for row in (better, worse)]
        seeds = len(plan.seeds)
        compared = {"equal_steps": _compared(*final, measure, seeds), "equal_compute": _compared(*even, measure, seeds)}
        return {"better": better, "worse": worse, "measure": measure, **compared}

    def told(pair: tuple[str, str], measure: str) -> bool:
        """Whether both rows learn what is measured, as far as is known."""
        return all(not found[row] or any(measure in run["final"] for run in found[row]) for row in pair)

    rows = []
    for row, runs in found.items():
        rows.append(
            {
                "name": row,
                "seeds": len(runs),
                "planned": len(plan.of(row)),
                "steps": runs[0]["steps"] if runs else None,
                "step_cpu_ms": None if costs[row] is None else 1000 * costs[row],
                "wall_s": _mean([run["wall_s"] for run in runs]),
                "equal_steps": _cells([run["final"] for run in runs]),
                "equal_compute": spent(row, budget),
                "track": _track(runs),
            }
        )
    cheapest = min(totals, key=totals.get) if totals else None
    environments = [run["environment"] for runs in found.values() for run in runs]
    return {
        "name": plan.name,
        "about": plan.about,
        "base": plan.base,
        "seeds": list(plan.seeds),
        "budget_cpu_s": budget,
        "cheapest": cheapest,
        "environment": {key: sorted({str(e[key]) for e in environments}) for key in (environments or [{}])[0]},
        "rows": rows,
        "claims": [claim(*pair, measure) for pair in plan.claims for measure in _JUDGED if told(pair, measure)],
    }


def _cost(runs: Sequence[dict]) -> float | None:
    return _mean([run["step_cpu_s"] for run in runs])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _cells(measured: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation and single values of every measure over runs."""
    cells = {}
    for name in (*MEASURES, *_ALIKE):
        values = [run[name] for run in measured if run.get(name) is not None]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else None
            cells[name] = {"mean": statistics.fmean(values), "sd": deviation, "values": values}
    return cells


def _points(run: dict) -> list[dict]:
    return [*run["track"], {"step": run["steps"], **run["final"]}]


def _at(run: dict, step: float) -> dict[str, float]:
    """The measures of a run at a step, on the lines between its evaluations."""
    points = _points(run)
    # A cost that is the budget itself may miss the last step by rounding.
    step = min(step, run["steps"])
    for before, behind in itertools.pairwise(points):
        if before["step"] <= step <= behind["step"]:
            share = (step - before["step"]) / (behind["step"] - before["step"])
            both = [name for name in before if before[name] is not None and behind.get(name) is not None]
            return {name: before[name] + share * (behind[name] - before[name]) for name in both}
    return dict(points[-1]) if step == points[-1]["step"] else {}


def _track(runs: Sequence[dict]) -> dict[str, list]:
    """Steps, and of every measure its means over runs at these steps."""
    if not runs:
        return {"step": []}
    by_step = [{point["step"]: point for point in _points(run)} for run in runs]
    steps = sorted(set.intersection(*map(set, by_step)))
    track: dict[str, list] = {"step": steps}
    for name in (*MEASURES, "coverage_random"):
        means = [_mean([points[step].get(name) for points in by_step]) for step in steps]
        if any(mean is not None for mean in means):
            track[name] = means
    return track


def _compared(first: Mapping[str, Any], second: Mapping[str, Any], measure: str, seeds: int) -> dict[str, Any]:
    """Whether the first is better; a `difference` is positive where it is.

    `deviation` is that of two runs of any seeds, `by_seed` that of the differences of two runs of one seed.
    """
    found: dict[str, Any] = {"difference": None, "deviation": None, "by_seed": None, "verdict": ABSENT}
    if measure not in first or measure not in second:
        return found
    one, other = first[measure], second[measure]
    sign = 1 if MEASURES[measure][1] else -1
    found["difference"] = difference = sign * (one["mean"] - other["mean"])
    if one["sd"] is None or other["sd"] is None:
        return found | {"verdict": ONE_SEED}
    found["deviation"] = deviation = math.hypot(one["sd"], other["sd"])
    if len(one["values"]) == len(other["values"]) == seeds:
        found["by_seed"] = statistics.stdev(a - b for a, b in zip(one["values"], other["values"]))
    return found | {"verdict": HOLDS if difference > deviation else AGAINST if difference < -deviation else OPEN}


def markdown(table: Mapping[str, Any], picture: str | None = None) -> str:
    """A study for readers.

    Args:
        table: from `tabulate`.
        picture: where its figures lie, if there are any.
    """
    lines = [_conditions(table), "", *_main(table)]
    if table["claims"]:
        lines += ["", *_claims(table)]
    if picture:
        lines += ["", f"![{table['name']}: every seed, mean and standard deviation]({picture})"]
    return "\n".join(lines) + "\n"


def _conditions(table: Mapping[str, Any]) -> str:
    done, planned = (sum(row[name] for row in table["rows"]) for name in ("seeds", "planned"))
    seeds = len(table["seeds"])
    parts = [f"{done} of {planned} runs of `{table['name']}`, {seeds} {'seeds' if seeds > 1 else 'seed: no ordering'}"]
    if where := table["environment"]:
        told = [f"{key} {' and '.join(where[key])}" for key in ("python", "torch", "deepspeed", "commit")]
        parts.append(f"one core each of {' and '.join(where['machine'])}, {', '.join(told)}")
    if table["budget_cpu_s"] is not None:
        parts.append(
            f"equal compute is the {table['budget_cpu_s']:.0f} s of processor time that {table['cheapest']} takes"
        )
    return "; ".join(parts) + "."


def _main(table: Mapping[str, Any]) -> list[str]:
    def beside(name: str) -> float | None:
        return _mean([row["equal_steps"].get(name, {}).get("mean") for row in table["rows"]])

    random, best = beside("coverage_random"), beside("boxes_best")
    # What chance covers is what is masked, which rows may differ in.
    chances = [
        row["equal_steps"]["coverage_random"]["mean"]
        for row in table["rows"]
        if "coverage_random" in row["equal_steps"]
    ]
    alike = max(chances, default=0.0) - min(chances, default=0.0) < 0.01
    coverage = "coverage" if random is None else f"coverage (random {random:.3f})" if alike else "coverage (random)"
    # Few studies have rows that learn boxes.
    boxes = () if best is None else (f"Acc@0.5 of boxes (an image's best box {best:.3f})",)
    heading = ("row", "seeds", "mean recall", "at equal compute", "mTR", "mIR")
    heading += ("nats per token", "at equal compute", coverage, *boxes)
    heading += ("steps", "equal compute at step", "ms per step")
    lines = [_line(heading), _line(["---"] * len(heading))]
    for row in table["rows"]:
        final, even = row["equal_steps"], row["equal_compute"]
        cells = [row["name"], f"{row['seeds']} of {row['planned']}"]
        cells += [_cell(final, "recall"), _cell(even, "recall"), _cell(final, "mTR"), _cell(final, "mIR")]
        chance = "" if alike or "coverage_random" not in final else f" ({final['coverage_random']['mean']:.3f})"
        cells += [_cell(final, "nats"), _cell(even, "nats"), _cell(final, "coverage") + chance]
        cells += [_cell(final, "boxes")] if boxes else []
        cells += [_whole(row["steps"]), _whole(even["step"]), _whole(row["step_cpu_ms"])]
        lines.append(_line(cells))
    return lines


def _claims(table: Mapping[str, Any]) -> list[str]:
    heading = ("claim", "measure", "better by", "standard deviation", "by seed", "verdict")
    heading += ("better by, at equal compute", "standard deviation", "by seed", "verdict")
    lines = [_line(heading), _line(["---"] * len(heading))]
    for claim in table["claims"]:
        name, _, digits = MEASURES[claim["measure"]]
        cells = [f"{claim['better']} > {claim['worse']}", name]
        for at in ("equal_steps", "equal_compute"):
            found = claim[at]
            cells += [_number(found["difference"], digits, sign=True), _number(found["deviation"], digits)]
            cells.append(_number(found["by_seed"], digits))
            cells.append(found["verdict"])
        lines.append(_line(cells))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _cell(cells: Mapping[str, Any], name: str) -> str:
    if name not in cells:
        return "-"
    digits = MEASURES[name][2]
    mean, deviation = _number(cells[name]["mean"], digits), cells[name]["sd"]
    return mean if deviation is None else f"{mean} ± {_number(deviation, digits)}"


def _number(value: float | None, digits: int, *, sign: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
