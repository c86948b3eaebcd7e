"""Losses of 20 steps of the micro model: any change of the mathematics shows here.

Weights and inputs come from a hash, so that only rounding differs between machines and versions; RTOL is
some 100 times what one thread or two, or other vector widths, were seen to change.
"""

import pytest
import torch

from sycoca.masking import step_plan
from tests.sycoca.micro import batch, build, micro

RTOL = 2e-4
CONFIG = micro(masking={"attentive_start": 0.3, "ic_mask_prob": 0.5, "drop_ratio": 0.25})
# Every fifth step: total, itc, caption, tgmim, local.
GOLDEN = {
    0: (14.95252, 4.417029, 4.214618, 1.191236, 0.9150156),
    5: (10.56181, 1.983822, 3.540154, 1.069161, 0.4285209),
    10: (9.406491, 1.971555, 3.117696, 1.00137, 0.1981742),
    15: (8.010267, 1.687173, 2.659147, 0.9563372, 0.0484635),
    19: (7.761288, 1.462706, 2.653082, 0.9298022, 0.06261494),
}


def test_twenty_steps():
    model = build(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05)
    seen = {}
    for step in range(20):
        data = batch([3, 8, 0, 5, -1, 7, 2, 4], salt=10 + step % 3)
        losses = model(data, step_plan(CONFIG, step, 20, seed=5))
        if step % 5 == 0 or step == 19:
            seen[step] = tuple(x.item() for x in losses[:5])
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert seen.keys() == GOLDEN.keys(), seen
    for step, values in GOLDEN.items():
        assert seen[step] == pytest.approx(values, rel=RTOL), f"step {step}"
