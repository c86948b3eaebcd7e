"""Time and peak memory of callables, interleaved so that all meet the same machine."""

import ctypes
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

MIB = 2**20
# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


class Timing(NamedTuple):
    """Quantiles over the rounds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


def interleaved(cases: dict[str, Callable[[], object]], rounds: int, warm: bool = False) -> dict[str, Timing]:
    """Quantiles of each callable's time: one call of each per round, and unless `warm` one round first.

    With a GPU the device's time between two events; without one, and on one thread, the processor's time, which other
    processes of the machine do not lengthen; else the wall clock's.
    """
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for measured in [False] * (not warm) + [True] * rounds:
        for name, call in cases.items():
            elapsed = _device_ms(call) if torch.cuda.is_available() else _host_ms(call)
            if measured:
                samples[name].append(elapsed)
    return {name: _quantiles(values) for name, values in samples.items()}


def keep_freed_memory(keep: bool) -> None:
    """Whether glibc hands the memory of large tensors out again, or maps fresh pages for each one above 8 MiB.

    By itself it draws that line between 128 KiB and 32 MiB, by the history of the process. Fresh pages cost more than
    what most operators do with them. Ask for fresh ones first: memory that was kept is handed out.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_MMAP_THRESHOLD, 2**30 if keep else 2**23)


def peak_mib(call: Callable[[], object], forked: bool = True) -> float:
    """Largest memory held during the call above what is held before; on a CPU in a process of its own, if `forked`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return (peak - before) / MIB
    return _forked_peak_mib(call) if forked else _resident_peak_mib(call)


def _forked_peak_mib(call: Callable[[], object]) -> float:
    """In a forked process with one thread."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        status = 1
        try:
            os.write(send, str(_resident_peak_mib(call)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(send)
    with os.fdopen(receive) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        raise MemoryError("the measured call did not finish")
    return float(answer)


def _resident_peak_mib(call: Callable[[], object]) -> float:
    # Memory that was freed but is still held would hide what the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status")


def _device_ms(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _host_ms(call: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return (clock() - start) * 1e3


def _quantiles(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(*values * 3)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(tenths[1], statistics.median(values), tenths[7])
