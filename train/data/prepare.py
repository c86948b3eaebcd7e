"""Shards with an index out of any data source.

python -m train.data.prepare SPEC OUT              writes shards and OUT/index.json; started again it goes on
python -m train.data.prepare --index SPEC OUT      writes OUT alone: the index of shards that are there already
"""

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from train.data import DataError, check_source, open_dataset
from train.data.fetch import FetchError, fetch, sha256_of
from train.data.paths import told
from train.data.progress import progress
from train.data.sample import Skipped, Source
from train.data.shard_index import REMOTE, read_index, write_index, write_json
from train.data.spec import INDEX

SPLITS = ("train", "val", "test")
SHARD_SAMPLES = 1000
_PARTS = ".parts"
_PR_SET_PDEATHSIG = 1


class Job(NamedTuple):
    """One shard to write."""

    split: str
    number: int
    indices: range

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.split}-{self.number:06d}.tar"


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.prepare",
        description="Writes WebDataset shards with an index out of any data source.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m train.data.prepare /data/coco shards/coco\n"
        "  python -m train.data.prepare captions.tsv shards/mine --image-size 256 --workers 16\n"
        "  python -m train.data.prepare --index 'cc3m/{00000..00331}.tar' cc3m/index.json\n",
    )
    parser.add_argument("spec", help="data source")
    parser.add_argument("out", type=Path, help="folder of the shards; with --index the index file")
    parser.add_argument("--index", action="store_true", help="index shards that exist, local or not; writes no shard")
    parser.add_argument("--splits", default=None, help="comma-separated; without it those that the source has")
    parser.add_argument("--shard-samples", type=int, default=SHARD_SAMPLES, help="samples a shard (%(default)s)")
    parser.add_argument("--image-size", type=int, default=None, help="bring larger images down to this shorter side")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (%(default)s)")
    return parser.parse_args(argv)


def open_splits(spec: str, wanted: str | None) -> dict[str, Source]:
    """The splits of a source by name; those asked for must be there, else those are taken that are.

    Raises:
        DataError: a split that was asked for is not there, or none is.
    """
    names = SPLITS if wanted is None else tuple(name.strip() for name in wanted.split(","))
    found, errors = {}, []
    for name in names:
        try:
            found[name] = open_dataset(spec, name)
        except DataError as error:
            errors.append(error)
    if errors and (wanted is not None or not found):
        raise errors[0]
    return found


def _fingerprint(arguments: argparse.Namespace, sources: dict[str, Source]) -> dict[str, Any]:
    """What two starts must share for one to continue the other."""
    heads = {}
    for split, source in sources.items():
        texts = sha256("\n".join(source.texts(2000)).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        heads[split] = f"{len(source)} samples, {texts}"
    return {
        "spec": arguments.spec,
        "shard_samples": arguments.shard_samples,
        "image_size": arguments.image_size,
        "source": heads,
    }


def _jobs(sources: dict[str, Source], shard_samples: int) -> list[Job]:
    jobs = []
    for split, source in sources.items():
        starts = range(0, len(source), shard_samples)
        jobs += [Job(split, i, range(s, min(s + shard_samples, len(source)))) for i, s in enumerate(starts)]
    return jobs


def _quiet_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker whose parent was killed must not go on writing beside the next start.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _pool(function: Callable, jobs: list, workers: int) -> Iterator:
    """Results as they come; the jobs' inputs are inherited, not sent."""
    if workers <= 1 or len(jobs) <= 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("fork")
    with context.Pool(min(workers, len(jobs)), initializer=_quiet_worker) as pool:
        yield from pool.imap_unordered(function, jobs)


class _Writer:
    """Writes a job's shard and the record that says so."""

    def __init__(self, sources: dict[str, Source], out: Path, image_size: int | None) -> None:
        self.sources, self.out, self.image_size = sources, out, image_size

    def __call__(self, job: Job) -> dict[str, Any]:
        from train.data.shard_writer import write_shard

        account, source = Skipped(), self.sources[job.split]
        before, told_parts = dict(source.skipped.rows), len(source.skipped.parts)
        entry, keys = write_shard(source, job.indices, self.out / job.name, self.image_size, account)
        record = {
            "entry": {"file": job.name, **entry},
            "keys": keys,
            "samples": account.samples,
            "rows": {c: n - before.get(c, 0) for c, n in source.skipped.rows.items() if n > before.get(c, 0)},
            "examples": source.skipped.examples() | account.examples(),
            "parts": source.skipped.parts_from(told_parts),
        }
        write_json(self.out / _PARTS / f"{job.name}.json", record)
        return record


def _finished(out: Path, job: Job) -> dict[str, Any] | None:
    """The record of a shard that an earlier start wrote, if the shard is still as it was left."""
    try:
        record = json.loads((out / _PARTS / f"{job.name}.json").read_bytes())
        return record if (out / job.name).stat().st_size == record["entry"]["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Makes the folder, or finds in it what an earlier start of the same work left."""
    path = out / _PARTS / "plan.json"
    if path.is_file():
        before = json.loads(path.read_bytes())
        if differing := [name for name in plan if plan[name] != before.get(name)]:
            name = differing[0]
            raise DataError(
                f"'{out}' holds shards begun with another {name} ({before.get(name)}, not {plan[name]}); "
                "name another folder or remove it"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise DataError(f"'{out}' is not empty and holds no shards that could be continued; name another folder")
    else:
        (out / _PARTS).mkdir(parents=True)
        write_json(path, plan)


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes shards and index.

    Returns:
        What the index says beside its shards: totals by split, and what was left out, by cause.
    """
    sources = open_splits(arguments.spec, arguments.splits)
    out: Path = arguments.out
    account = Skipped()
    for source in sources.values():
        source.ready()
        account.add(source.skipped)
    with told(out):
        _begin(out, _fingerprint(arguments, sources))
    jobs = _jobs(sources, arguments.shard_samples)
    records = {job: record for job in jobs if (record := _finished(out, job))}
    waiting = [job for job in jobs if job not in records]
    if waiting:
        # Imported once, before the workers are forked.
        import sycoca.images  # noqa: F401
    total = sum(len(job.indices) for job in jobs)
    with progress("samples", total, sum(len(job.indices) for job in records)) as bar:
        by_name = {job.name: job for job in waiting}
        for record in _pool(_Writer(sources, out, arguments.image_size), waiting, arguments.workers):
            job = by_name[record["entry"]["file"]]
            records[job] = record
            bar(len(job.indices))
    seen: set[str] = set()
    for job in jobs:
        record = records[job]
        account.add_rows(record["rows"], record["examples"])
        for name, cause in record["samples"].items():
            account.sample(name, cause)
        account.add_parts(record["parts"])
        for key in record["keys"]:
            if key in seen:
                account.row("duplicate key (kept)", key)
            seen.add(key)
    entries = [records[job]["entry"] for job in jobs]
    more = {"source": arguments.spec, "splits": totals(entries), "left_out": account.counts()}
    write_index(out / INDEX, entries, **more)
    return {**more, "line": account.line(), "shards": len(entries), "fresh": len(waiting)}


def totals(entries: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Samples, bytes and shards by split."""
    found: dict[str, dict[str, int]] = {}
    for entry in entries:
        of_split = found.setdefault(entry["split"] or "all", {"samples": 0, "bytes": 0, "shards": 0})
        of_split["samples"] += entry["samples"]
        of_split["bytes"] += entry["bytes"]
        of_split["shards"] += 1
    return found


def _indexed(place: str) -> tuple[str, dict[str, Any] | None, list]:
    """A shard's entry, without its file, and what is wrong with it."""
    from train.data.tars import scan

    with tempfile.TemporaryDirectory() as folder:
        path = Path(place)
        try:
            if place.startswith(REMOTE):
                path = Path(folder) / "shard.tar"
                fetch(place, path)
            listing = scan(path)
        except (FetchError, OSError) as error:
            return place, None, [(f"shard left out: {getattr(error, 'strerror', None) or error}", place)]
        entry = {"split": None, "samples": len(listing.keys), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        return place, entry, listing.faults


def index_shards(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the index of shards that exist."""
    parsed = check_source(arguments.spec)
    if parsed.kind != "shards":
        raise DataError(f"--index: {arguments.spec!r} is a source of kind {parsed.kind!r}; an index is made of shards")
    places = parsed.shards or tuple(shard.place for shard in read_index(str(parsed.path)))
    path = arguments.out / INDEX if arguments.out.is_dir() else arguments.out
    account, found = Skipped(), {}
    with progress("shards", len(places), 0) as bar:
        for place, entry, faults in _pool(_indexed, list(places), arguments.workers):
            found[place] = entry
            for cause, where in faults:
                account.row(cause, where)
            bar(1)
    split = arguments.splits
    if split is not None and split not in SPLITS:
        raise DataError(f"--splits {split}: shards of an index are of one split; there are {', '.join(SPLITS)}")
    kept = [place for place in places if found[place] is not None]
    if not kept:
        raise DataError(f"--index: none of {len(places)} shards could be read; {account.line()}")
    folder = path.absolute().parent
    with told(path):
        entries = [{"file": _from(folder, place), **found[place], "split": split} for place in kept]
        more = {"source": arguments.spec, "splits": totals(entries), "left_out": account.counts()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_index(path, entries, **more)
    return {**more, "line": account.line(), "shards": len(entries), "fresh": len(entries)}


def _from(folder: Path, place: str) -> str:
    if place.startswith(REMOTE):
        return place
    whole = Path(place).absolute()
    return str(whole.relative_to(folder)) if whole.is_relative_to(folder) else str(whole)


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    began = time.perf_counter()
    try:
        for name in ("shard_samples", "image_size", "workers"):
            if (value := getattr(arguments, name)) is not None and value < 1:
                raise DataError(f"--{name.replace('_', '-')} {value}: needs at least 1")
        told_of = index_shards(arguments) if arguments.index else prepare(arguments)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    for split, of_split in told_of["splits"].items():
        print(
            f"{split}: {of_split['samples']} samples, {of_split['shards']} shards, {of_split['bytes'] / 2**20:.1f} MiB"
        )
    print(told_of["line"] or "nothing left out")
    earlier = told_of["shards"] - told_of["fresh"]
    already = f", {earlier} shards were there already" if earlier else ""
    place = arguments.out if arguments.index else arguments.out / INDEX
    print(f"{place} written in {time.perf_counter() - began:.1f} s{already}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
