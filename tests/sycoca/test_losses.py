"""Losses of the model's own: next tokens, token-wise contrast."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from sycoca import losses
from sycoca.losses import local_loss, token_loss
from tests.sycoca.micro import uniform


def relative(x, truth):
    return ((x.double() - truth).norm() / truth.norm()).item()


def token_case(dtype, N=70, D=12, V=41):
    x, w = uniform(N, D, salt=1).to(dtype), (uniform(V, D, salt=2) * D**-0.5).to(dtype)
    labels = (uniform(N, salt=3) * 1000).long().remainder(V)
    labels[::3] = -1
    return x.requires_grad_(), w.requires_grad_(), labels


# 1 << 24 holds all logits at once; 41 * 64 gives chunks with a rest; 1 falls back to the smallest chunk.
@pytest.mark.parametrize("chunk_logits", [1 << 24, 41 * 64, 1])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_token_loss_and_gradients_against_fp64(monkeypatch, chunk_logits, label_smoothing):
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", chunk_logits)
    results = []
    for dtype, ours in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        x, w, labels = token_case(dtype)
        if ours:
            loss = token_loss(x, w, labels, label_smoothing)
        else:
            loss = F.cross_entropy(x @ w.T, labels, ignore_index=-1, label_smoothing=label_smoothing, reduction="sum")
        (2 * loss).backward()
        results.append((loss.detach(), x.grad, w.grad))
    for truth, plain, mine in zip(*results):
        # Twice the error of the plain loss, plus 4 ulp.
        assert relative(mine, truth) <= 2 * relative(plain, truth) + 4 * 2**-23


def test_token_loss_edges():
    x, w, labels = token_case(torch.float32)
    ignored = token_loss(x, w, torch.full_like(labels, -1))
    ignored.backward()
    assert ignored == 0 and not x.grad.any() and not w.grad.any()
    assert token_loss(x[:0], w, labels[:0]) == 0
    assert token_loss(x[:1], w, torch.tensor([3])).isfinite()


def test_token_loss_backward_twice_and_frozen_parts():
    x, w, labels = token_case(torch.float32)
    loss = token_loss(x, w, labels)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    frozen = torch.autograd.grad(token_loss(x, w.detach(), labels), x)[0]
    assert torch.equal(frozen, first[0])


def test_token_loss_is_fp32_under_autocast():
    x, w, labels = token_case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_loss(x, w, labels)
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert loss.dtype == dx.dtype == dw.dtype == torch.float32
    exact = F.cross_entropy(x.bfloat16().float() @ w.bfloat16().float().T, labels, ignore_index=-1, reduction="sum")
    # Logits are rounded to bf16 by the product, the sum over tokens is not.
    assert abs(loss.item() / exact.item() - 1) < 2**-9


_MEMORY = """
import torch
import torch.nn.functional as F
from sycoca import losses
from sycoca.decoders import VocabularyHead

torch.set_num_threads(1)
losses._CHUNK_LOGITS = 1 << 20
N, D, V = 2048, 16, 16384
head = VocabularyHead(D, V, 0.0)
x, labels = torch.randn(1, N, D, requires_grad=True), torch.randint(V, (1, N))
head(x[:, :8], labels[:, :8]).backward()
# Not ru_maxrss: a child inherits that of the process that started it.
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
start = peak()
head(x, labels).backward()
chunked = peak() - start
F.cross_entropy(head(x).flatten(0, 1), labels.flatten(), reduction="sum").backward()
print(chunked / (4 * N * V), (peak() - start) / (4 * N * V))
"""


def test_token_loss_never_holds_all_logits():
    """Peak memory of forward and backward, in units of all logits."""
    run = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    chunked, plain = map(float, run.stdout.split())
    assert chunked < 0.25
    # The meter sees the logits and their gradient where they exist.
    assert plain > 1.5


def brute_force_local(v, w, valid, scale, group_size):
    total = 0.0
    for start in range(0, len(v), group_size):
        rows = [i for i in range(start, min(start + group_size, len(v))) if valid[i].any()]
        if not rows:
            continue
        s = torch.stack([torch.stack([(v[a] @ w[b, valid[b]].T).amax(1).mean() for b in rows]) for a in rows])
        r = torch.stack([torch.stack([(v[a] @ w[b, valid[b]].T).amax(0).mean() for b in rows]) for a in rows])
        target = torch.arange(len(rows))
        pairs = (
            F.cross_entropy(scale * s, target, reduction="sum"),
            F.cross_entropy(scale * r.T, target, reduction="sum"),
        )
        total = total + sum(pairs) / 2
    return total


# A full group, groups with a rest, groups of one pair.
@pytest.mark.parametrize("group_size", [7, 3, 1])
def test_local_loss_and_gradients_against_fp64(group_size):
    results = []
    for dtype, function in (
        (torch.float64, brute_force_local),
        (torch.float32, brute_force_local),
        (torch.float32, local_loss),
    ):
        v = F.normalize(uniform(7, 5, 8, salt=1).to(dtype), dim=2).requires_grad_()
        w = F.normalize(uniform(7, 6, 8, salt=2).to(dtype), dim=2).requires_grad_()
        scale = torch.full((1,), 9.0, dtype=dtype, requires_grad=True)
        valid = torch.arange(6) < torch.tensor([3, 6, 1, 0, 4, 2, 5])[:, None]
        loss = function(v, w, valid, scale, group_size)
        loss.backward()
        results.append((loss.detach(), v.grad, w.grad, scale.grad))
    for truth, plain, mine in zip(*results):
        if truth.norm() == 0:
            assert not mine.any()
        else:
            assert relative(mine, truth) <= 2 * relative(plain, truth) + 4 * 2**-23


def test_local_loss_of_empty_captions_is_nothing():
    v = F.normalize(uniform(4, 5, 8, salt=1), dim=2).requires_grad_()
    valid = torch.zeros(4, 6, dtype=torch.bool)
    loss = local_loss(v, F.normalize(uniform(4, 6, 8, salt=2), dim=2), valid, torch.ones(1), 2)
    loss.backward()
    assert loss == 0 and not v.grad.any()
