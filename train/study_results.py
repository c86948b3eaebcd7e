"""What is kept of a study's runs: one JSON file each, named by the digest of its configuration.

recall        mean of R@1, R@5, R@10 in both directions, over all captions where an image has several
mTR, mIR      the same from image to text and from text to image
nats          per token of the true caption of the full image
coverage      share of the described boxes inside what the score selects; `coverage_random` at random
boxes         share of the phrases whose box is found with an IoU of at least 1/2; `boxes_best` of each image's best box
"""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sycoca.config import ConfigError, to_dict
from train.durable import write_atomically
from train.study_plan import PlannedRun

ROOT = Path(__file__).resolve().parent.parent
_NEEDED = ("key", "final", "track", "steps")


def result_path(out: Path, run: PlannedRun) -> Path:
    """Where a run's result lies."""
    return out / "results" / f"{run.key}.json"


def read_result(out: Path, run: PlannedRun) -> dict[str, Any] | None:
    """A run's result, None where there is none yet.

    Raises:
        ConfigError: the file is not one of a result.
    """
    path = result_path(out, run)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if all(name in result for name in _NEEDED) and result["key"] == run.key:
            return result
        reason = "not the result of this run"
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror
    except (ValueError, TypeError):
        reason = "not a JSON file of a result"
    raise ConfigError(f"{path}: {reason}; remove it to have the run judged again")


def keep_result(out: Path, run: PlannedRun, run_dir: Path, wall_s: float | None) -> dict[str, Any]:
    """Writes down what a finished run left in its folder.

    Args:
        out: of the study.
        run: the planned one.
        run_dir: its folder, with eval.json.
        wall_s: seconds from start to end, None where it took several starts.

    Raises:
        OSError, ValueError: the folder does not hold a finished run.
    """
    figures = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in _lines(run_dir / "evaluations.jsonl")]
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    costs = [row["step_cpu_s"] for row in rows if row.get("step_cpu_s")]
    result = {
        "key": run.key,
        "config": to_dict(run.config),
        "steps": config["run"]["train"]["steps"] or _last_step(run_dir),
        "step_cpu_s": costs[-1] if costs else None,
        "wall_s": wall_s,
        "final": measures(figures),
        "track": [{"step": row["step"], **measures(row)} for row in rows],
        "environment": environment(),
    }
    path = result_path(out, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    return result


def measures(figures: dict[str, Any]) -> dict[str, float | None]:
    """The study's measures of what `train.evaluation_run.evaluate` found; None for what a model does not learn."""
    found: dict[str, float | None] = {}
    if retrieval := figures["retrieval"]:
        block = retrieval["captions"] or retrieval["pairs"]
        for name, way in (("mTR", "image_to_text"), ("mIR", "text_to_image")):
            found[name] = sum(block[way].values()) / len(block[way])
            found[f"{name}_chance"] = sum(block["chance"][way].values()) / len(block["chance"][way])
        found["recall"] = (found["mTR"] + found["mIR"]) / 2
        found["recall_chance"] = (found["mTR_chance"] + found["mIR_chance"]) / 2
    if captioning := figures["captioning"]:
        found["nats"] = captioning["nats_per_token"]
    if selection := figures["selection"]:
        found["coverage"] = selection["described_share"]
        found["coverage_random"] = selection["described_share_random"]
        found["coverage_shuffled"] = selection["described_share_shuffled"]
        found["auc"] = selection["auc"]
    if grounding := figures.get("grounding"):
        found["boxes"], found["boxes_best"] = grounding["acc@0.5"], grounding["best_box"]
    return found


def environment() -> dict[str, Any]:
    """Where and with what runs are made."""
    return {
        "machine": _processor(),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "deepspeed")},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _last_step(run_dir: Path) -> int:
    return json.loads(_lines(run_dir / "metrics.jsonl")[-1])["step"]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in _lines(info):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
