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
    0: (13.58451, 3.606717, 4.123882, 1.117099, 0.6129315),
    5: (9.959982, 1.922073, 3.313484, 1.002711, 0.4082284),
    10: (8.715775, 1.472053, 3.04709, 0.9297512, 0.2197904),
    15: (7.05109, 0.7717502, 2.64671, 0.9175202, 0.06839921),
    19: (6.496634, 0.3428738, 2.606303, 0.8899247, 0.05123052),
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
