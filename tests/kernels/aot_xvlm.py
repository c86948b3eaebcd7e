"""The region kernels that `aot_masking` compiles, beside its own."""

import itertools

import torch

from kernels import box_loss_triton, hard_negatives_triton, region_pool_triton
from tests.kernels.aot import recorded

HALF, FULL = torch.bfloat16, torch.float32


def cases(extent):
    """(architecture, dtype, width of the pooled features, width of the sampled ones, pairs, ids)."""
    if extent == "few":
        # a Hopper takes most, and an A100 once what has a product
        return [(90, HALF, 1024, 256, 1024, True), (80, HALF, 1024, 256, 1024, False)]
    widths = (768, 256), (1024, 256), (100, 33), (16, 16)
    return [
        (architecture, dtype, *pair, pairs, ids)
        for architecture, dtype, pair in itertools.product((80, 90), (HALF, torch.float16, FULL), widths)
        for pairs, ids in ((128, False), (4096, True))
    ]


def launch(architecture, dtype, width, sampled_width, pairs, ids):
    x, rects = torch.ones(2, 7, 7, width, dtype=dtype), torch.ones(3, 4, dtype=torch.int32)
    order, starts = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    region_pool_triton.pool(x, rects, order, starts)
    region_pool_triton.pool_backward(torch.ones(3, width, dtype=dtype), rects, order, starts, 7, 7)
    features = torch.ones(1, sampled_width, dtype=dtype).expand(pairs, -1).contiguous()
    groups = torch.zeros(pairs, dtype=torch.int64) if ids else None
    floor = 1e-5 if ids else 0.0
    hard_negatives_triton.sample(features, features, torch.ones(()), groups, floor, torch.zeros(1, dtype=torch.int64))
    pred, valid = torch.ones(128, 4, dtype=dtype), torch.ones(128, dtype=torch.bool)
    box_loss_triton.loss(pred, torch.ones(128, 4), valid, True, 1e-12)
    one = torch.ones(())
    box_loss_triton.loss_backward(one, one, one, pred, torch.ones(128, 4), valid, 1e-12)


def launches(extent):
    """Facts for the assertions, and (kernel, arguments, options, architecture) of what compiles differently."""
    seen = set()
    for case in cases(extent):
        architecture, dtype = case[:2]
        with recorded(architecture, box_loss_triton, hard_negatives_triton, region_pool_triton) as recorders:
            launch(*case)
        for recorder in recorders:
            for args, options in recorder.launches:
                name = recorder.kernel.fn.__name__
                # of the kernels without a product one architecture is enough, and one direction of a draw
                spared = not name.startswith(("_pool_kernel", "_sums")) and architecture == 80
                if extent == "few" and (spared or options.get("DIRECTION") == 0):
                    continue
                kinds = [a.dtype if isinstance(a, torch.Tensor) else type(a) for a in args]
                key = architecture, name, str(kinds), str(options)
                if key not in seen:
                    seen.add(key)
                    facts = {"half": dtype != FULL, "aligned": case[2] % 16 == 0}
                    yield facts, (recorder.kernel, args, options, architecture)
