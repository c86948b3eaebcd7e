"""Muon: what orthogonalised steps are, and that pieces of them are those of the whole."""

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from sycoca.config import ConfigError
from sycoca.xvlm import build_model
from train.config import PRESETS
from train.ema import keep_average
from train.launch import effective, parse
from train.muon import Matrix, Muon, _of_row, _of_shards, _orthogonal, orthogonalise
from train.param_groups import pretraining_groups

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "pretrain.py"

ADAMW = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def polar(x):
    U, _, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    return U @ Vh


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 48, 16), (2, 16, 48), (1, 1, 8)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_values_are_moved_close_to_one(shape, scale):
    x = draw(*shape)
    found = orthogonalise(x * scale)
    values = torch.linalg.svdvals(found)
    given = torch.linalg.svdvals(x)
    # What is far smaller than the largest is only on its way.
    assert values[given > 0.05 * given.amax(1, keepdim=True)].min() > 0.5 and values.max() < 1.25
    assert found.shape == x.shape and found.is_contiguous()
    aim = polar(x)
    cosine = (
        (found.double() * aim).flatten(1).sum(1) / found.double().flatten(1).norm(dim=1) / aim.flatten(1).norm(dim=1)
    )
    assert cosine.min() > 0.95


def test_nothing_stays_nothing():
    assert torch.equal(orthogonalise(torch.zeros(2, 8, 4)), torch.zeros(2, 8, 4))


def test_stacked_matrices_are_taken_one_by_one():
    x = draw(48, 16)
    (found,) = _orthogonal([x], [Matrix(3, 48, 16)])
    for part, whole in zip(found.split(16), x.split(16)):
        torch.testing.assert_close(part, orthogonalise(whole[None])[0])
    (tall,) = _orthogonal([x], [Matrix(1, 48, 16)])
    torch.testing.assert_close(tall, orthogonalise(x[None])[0] * 3**0.5)


MATRICES = [Matrix(1, 8, 8), Matrix(3, 24, 8), Matrix(1, 16, 4), Matrix(1, 4, 15), Matrix(2, 6, 5)]


def whole_steps():
    given = [draw(m.rows, m.columns, seed=n) for n, m in enumerate(MATRICES)]
    return given, _orthogonal(given, MATRICES)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_pieces_of_a_row_are_those_of_the_whole(world):
    given, steps = whole_steps()
    flat = torch.cat([x.flatten() for x in given])
    n = -(-len(flat) // world)
    rows = torch.cat([flat, flat.new_zeros(world * n - len(flat))]).view(world, n)
    found = torch.cat([_of_row(rows, rank, MATRICES) for rank in range(world)])
    torch.testing.assert_close(found[: len(flat)], torch.cat([x.flatten() for x in steps]))
    assert not found[len(flat) :].any()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_pieces_of_shards_are_those_of_the_whole(world):
    def cut(tensors):
        """(world, n): rank r holds the r-th part of every tensor."""
        parts = []
        for x in tensors:
            size = -(-x.numel() // world)
            parts.append(torch.cat([x.flatten(), x.new_zeros(world * size - x.numel())]).view(world, size))
        return torch.cat(parts, dim=1)

    given, steps = whole_steps()
    rows = cut(given)
    found = torch.stack([_of_shards(rows, rank, MATRICES) for rank in range(world)])
    torch.testing.assert_close(found, cut(steps))


def two_groups(matrix, vector):
    return [
        {"params": [matrix], "matrices": [(1, *matrix.shape)], "weight_decay": 0.1, "lr": 0.02},
        {"params": [vector], "weight_decay": 0.0},
    ]


def test_steps_are_the_formulas_and_the_rest_is_adamw():
    matrix, vector = (torch.nn.Parameter(draw(*shape)) for shape in ((12, 6), (5,)))
    other = torch.nn.Parameter(vector.detach().clone())
    expected, m = matrix.detach().clone(), torch.zeros(12, 6)
    muon = Muon(two_groups(matrix, vector), ADAMW, lr=1e-3, momentum=0.9, weight_decay=0.1)
    adamw = ADAMW([{"params": [other], "weight_decay": 0.0}])
    for step in range(4):
        matrix.grad, vector.grad = draw(12, 6, seed=step), draw(5, seed=step)
        other.grad = vector.grad.clone()
        m = 0.9 * m + 0.1 * matrix.grad
        u = orthogonalise((0.1 * matrix.grad + 0.9 * m)[None])[0] * 2**0.5
        expected = (1 - 0.02 * 0.1) * expected - 0.02 * u
        muon.step()
        adamw.step()
        torch.testing.assert_close(matrix.detach(), expected)
        torch.testing.assert_close(vector.detach(), other.detach(), rtol=0, atol=0)


def test_a_flat_piece_of_one_rank_takes_the_same_steps():
    matrix, vector = (torch.nn.Parameter(draw(*shape)) for shape in ((12, 6), (5,)))
    flat = torch.nn.Parameter(torch.cat([matrix.detach().flatten(), torch.zeros(3)]))
    whole = Muon(two_groups(matrix, vector), ADAMW, lr=1e-3)
    pieces = Muon(two_groups(matrix, torch.nn.Parameter(vector.detach().clone())), ADAMW, lr=1e-3)
    pieces.param_groups[0]["params"] = [flat]
    for step in range(3):
        matrix.grad = draw(12, 6, seed=step)
        flat.grad = torch.cat([matrix.grad.flatten(), torch.zeros(3)])
        whole.step()
        pieces.step()
    torch.testing.assert_close(flat.detach()[:72].view(12, 6), matrix.detach())
    assert not flat.detach()[72:].any()


def test_a_loaded_state_goes_on_as_the_saved_one():
    def made():
        matrix, vector = (torch.nn.Parameter(draw(*shape)) for shape in ((12, 6), (5,)))
        return (matrix, vector), Muon(two_groups(matrix, vector), ADAMW, lr=1e-3)

    def step(params, optimizer, seed):
        for p in params:
            p.grad = draw(*p.shape, seed=seed)
        optimizer.step()

    params, optimizer = made()
    step(params, optimizer, 0)
    others, loaded = made()
    # A copy: what is loaded is not copied.
    loaded.load_state_dict(deepcopy(optimizer.state_dict()))
    for p, other in zip(params, others):
        other.data.copy_(p.data)
    for seed in (1, 2):
        step(params, optimizer, seed)
        step(others, loaded, seed)
    for p, other in zip(params, others):
        torch.testing.assert_close(p, other, rtol=0, atol=0)


@pytest.mark.parametrize("preset", ["tiny", "xvlm_tiny"])
def test_the_matrices_are_the_linear_maps_of_blocks_and_inside_of_heads(preset):
    config = PRESETS[preset]
    config = replace(config, optimizer=replace(config.optimizer, name="muon", lr=1e-3, matrix_lr=0.05))
    model = build_model(config.model)
    groups = pretraining_groups(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
    (inner,) = (group for group in groups if "matrices" in group)
    assert inner["lr_scale"] == pytest.approx(50) and inner["weight_decay"] == config.optimizer.weight_decay
    chosen = {names[id(p)] for p in inner["params"]}
    linear = {name for name in names.values() if name.endswith("weight") and ".ln_" not in name}
    heads = {f"{head}.weight" for head in ("itm_head.hidden", "box_head.hidden", "word_head.dense")}
    assert chosen == {name for name in linear if "blocks." in name or name in heads}
    for p, matrix in zip(inner["params"], map(Matrix._make, inner["matrices"]), strict=True):
        name = names[id(p)].rsplit(".", 2)[-2]
        assert (matrix.rows, matrix.columns) == p.shape and matrix.parts == {"qkv": 3, "kv": 2}.get(name, 1)


@pytest.mark.parametrize(("option", "config", "words"), [
    ("train.precision=fp16", "ds_zero2.json", "not tested with train.precision=fp16"),
    ("matrix_momentum=1", "ds_zero2.json", "matrix_momentum: 1.0, needs to be in 0..1"),
    ("matrix_lr=0", "ds_zero2.json", "matrix_lr: 0.0, needs to be above 0"),
    ("train.steps=3", "ds_zero2_offload.json", "not with an offloaded optimizer"),
    ("train.steps=3", {"stage": 2, "round_robin_gradients": True}, "not with zero_optimization.round_robin_gradients"),
    ("train.steps=3", {"stage": 1, "parameter_alignment": True}, "not with zero_optimization.parameter_alignment"),
    ("train.steps=3", {"stage": 3, "sub_group_size": 1000}, "not with zero_optimization.sub_group_size"),
])  # fmt: skip
def test_what_it_cannot_do_is_refused(tmp_path, monkeypatch, option, config, words):
    monkeypatch.chdir(tmp_path)
    if isinstance(config, dict):
        Path("user.json").write_text(json.dumps({"zero_optimization": config}))
        config = "user.json"
    with pytest.raises(ConfigError, match=words):
        parse(["--config", config, "optimizer.name=muon", option], script=SCRIPT, has_cuda=False)


def test_its_runs_are_not_reshaped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch = parse(["--config", "ds_zero2.json", "optimizer.name=muon"], script=SCRIPT, has_cuda=False)
    assert launch.deepspeed["zero_allow_untested_optimizer"]
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(effective(launch)))
    argv = ["--config", "ds_zero2.json", "--run-dir", str(run), "--resume", "--reshape"]
    with pytest.raises(ConfigError, match="--reshape: not for"):
        parse(argv, script=SCRIPT, has_cuda=False)


def test_weights_are_averaged_as_those_of_adamw():
    """The average is warmed up by the steps that the state counts."""
    matrix, vector = (torch.nn.Parameter(draw(*shape)) for shape in ((12, 6), (5,)))
    optimizer = Muon(two_groups(matrix, vector), ADAMW, lr=1e-3)
    keep_average(optimizer, 0.5)
    average = None
    for step in range(30):
        for p in (matrix, vector):
            p.grad = draw(*p.shape, seed=step)
        optimizer.step()
        share = max(9 / (10 + step + 1), 0.5)
        new = matrix.detach().clone()
        average = new if average is None else average.lerp(new, share)
    torch.testing.assert_close(optimizer.state[matrix]["ema"], average)


def test_a_matrix_without_a_gradient_stays():
    first, second = (torch.nn.Parameter(draw(*shape)) for shape in ((4, 8), (12, 6)))
    before, moved = first.detach().clone(), second.detach().clone()
    groups = [{"params": [first, second], "matrices": [(1, 4, 8), (1, 12, 6)], "lr": 0.02}]
    second.grad = draw(12, 6)
    Muon(groups, ADAMW, lr=1e-3).step()
    assert torch.equal(first.detach(), before) and not torch.equal(second.detach(), moved)
