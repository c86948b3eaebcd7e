"""Ahead-of-time compilation of the contrastive kernels.

`python -m tests.kernels.aot_itc hopper|few|all` prints one JSON line per kernel, tile and architecture.
"""

import json
import sys

import torch

from kernels import contrast_gluon, contrast_triton, itc_gluon, itc_gluon_bwd, itc_triton, itc_triton_fwd, siglip_triton
from kernels.itc_parts import Place, Statistics, Targets
from tests.kernels.aot import compile_launch, recorded

# The widths that the tiles are chosen for; one past a multiple of 16 bytes takes the kernels that read by pointers.
WIDTHS = (256, 512, 640, 768, 1024, 1152)
UNALIGNED = 513
HALF, FULL = torch.bfloat16, torch.float32
ONE_HOT = Targets(None, None, None, 0.5)


def cases(extent):
    """(architecture, D, dtype, ids)."""
    yield 90, 768, HALF, False
    if extent != "hopper":
        yield 80, 768, HALF, False
    if extent == "all":
        yield from ((90, D, HALF, ids) for D in WIDTHS for ids in (False, True))
        yield from ((80, D, HALF, ids) for D in (*WIDTHS, UNALIGNED) for ids in (False, True))
        yield from ((90, D, dtype, True) for D in (768, UNALIGNED) for dtype in (FULL, torch.float16))
        yield 90, UNALIGNED, HALF, False
        yield 80, 768, FULL, False


def launches(extent):
    every = extent == "all"
    seen = set()
    for architecture, D, dtype, with_ids in cases(extent):
        modules = contrast_triton, itc_gluon, itc_gluon_bwd, itc_triton, itc_triton_fwd, siglip_triton
        with recorded(architecture, *modules) as recorders:
            _launch(D, dtype, with_ids, every)
            if architecture == 90:
                _launch_specialised(D, dtype)
        for recorder in recorders:
            for args, options in recorder.launches:
                kinds = [
                    x if isinstance(x, bool) else x.dtype if isinstance(x, torch.Tensor) else type(x) for x in args
                ]
                key = architecture, D % 16, recorder.kernel.fn.__name__, dtype, str(kinds), str(options)
                if key not in seen:
                    seen.add(key)
                    facts = {"itemsize": dtype.itemsize, "aligned": D % 8 == 0}
                    yield facts, (recorder.kernel, args, options, architecture)


def _launch(D, dtype, with_ids, every):
    image, text, scale = torch.ones(304, D, dtype=dtype), torch.ones(304, D, dtype=dtype), torch.ones(())
    ids = torch.zeros(304, dtype=torch.int64)
    targets = Targets(ids, ids, torch.ones(304), 0.5) if with_ids else ONE_HOT
    place, stats = Place(0, dtype, 0), _statistics()
    itc_triton.sums(image, text, scale, torch.zeros(()), targets, place)
    if every:
        contrast_triton.prologue(image, text, scale, dtype)
        itc_triton.online(image, text, scale, stats.safe, place)
    blocks = itc_triton._blocks(image, text, scale, stats, targets, place, 1.5)
    assert list(blocks)
    if every:
        contrast_triton.finish(torch.ones(304, D), image, text, torch.ones(304), scale, scale, 1.5, 0, 0)
    if not with_ids:
        assert list(siglip_triton.blocks(image, text, scale, scale, 0, 1.5, True))


def _launch_specialised(D, dtype):
    features, scalar = torch.ones(304, D, dtype=dtype), torch.ones(())
    if contrast_gluon.supports(features, features, None):
        place = Place(0, dtype, 0)
        itc_gluon.sums(features, features, scalar, scalar, ONE_HOT, place)
        assert list(itc_gluon_bwd.blocks(features, features, scalar, _statistics(), ONE_HOT, place, 1.5))


def _statistics():
    return Statistics(torch.ones(2, 304), torch.ones(2, 304), torch.ones(304), torch.tensor(True))


if __name__ == "__main__":
    for facts, launch in launches(sys.argv[1]):
        print(json.dumps(compile_launch(*launch) | facts), flush=True)
