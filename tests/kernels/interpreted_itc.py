"""The contrastive Triton kernels in Triton's interpreter, against fp64.

`TRITON_INTERPRET=1 python -m tests.kernels.interpreted_itc few|all` prints one JSON line per case: the errors of value
and gradients, those of the reference in the inputs' dtype, those of rounding the truth, and the largest logit. bf16
is left out: the interpreter's product of it is wrong.
"""

import json
import sys

import torch

import kernels
from kernels import contrast_tiles, reference
from tests.kernels.contrastive import ADVERSARIAL, correlated, errors, with_gradients

SCALARS = {"itc": (torch.tensor([14.3]),), "siglip": (torch.tensor([10.0]), torch.tensor([-10.0]))}
HOT = {"itc": (torch.tensor([100.0]),), "siglip": (torch.tensor([100.0]), torch.tensor([1.0]))}
TILE = contrast_tiles.INTERPRETED_TILE


def case(name, operator, features, scalars, *, tile=TILE, dtype=torch.float32, **options):
    contrast_tiles.INTERPRETED_TILE = tile
    fused, plain = {
        "itc": (kernels.fused_itc_loss, reference.itc_loss),
        "siglip": (kernels.fused_siglip_loss, reference.siglip_loss),
    }[operator]
    inputs = *(x.to(dtype) for x in features), *scalars
    shared = {key: value for key, value in options.items() if key != "scratch_bytes"}
    exact = with_gradients(lambda *x: plain(*x, **shared), *(x.double() for x in inputs))
    got = with_gradients(lambda *x: fused(*x, impl="triton", **options), *inputs)
    budget = with_gradients(lambda *x: plain(*x, **shared), *inputs)
    rounding = [x.to(got_x.dtype) for x, got_x in zip(exact, got)]
    rows = {"errors": errors(got, exact), "budget": errors(budget, exact), "rounding": errors(rounding, exact)}
    largest = (scalars[0] * inputs[0].float() @ inputs[1].float().T).abs().max().item()
    print(json.dumps({"case": name, "dtype": str(dtype), "largest_logit": largest} | rows), flush=True)


def main(every):
    ids = torch.tensor([index % 7 for index in range(35)])
    odd, even = correlated(35, 18, 0.3, 0.1), correlated(35, 16, 0.3, 0.1)
    case("itc ids, smoothing", "itc", odd, SCALARS["itc"], ids=ids, label_smoothing=0.1)
    case("itc negative cone", "itc", correlated(20, 64, -0.85, -0.85), HOT["itc"])
    for operator, scalars in SCALARS.items():
        # Descriptors: rows of 16 bytes, past the end in both directions.
        case(f"{operator} descriptors", operator, even, scalars, tile=TILE._replace(tma=True))
        if every:
            case(f"{operator} alone", operator, correlated(1, 3, 0.3, 0.1), scalars)
            case(f"{operator} odd", operator, odd, scalars)
            case(f"{operator} fp16", operator, odd, scalars, dtype=torch.float16)
            case(f"{operator} huge norm", operator, ADVERSARIAL["one huge norm"](20, 8), HOT[operator])
    if every:
        case("itc blocks", "itc", odd, SCALARS["itc"], scratch_bytes=1200)
        case("itc ids", "itc", odd, SCALARS["itc"], ids=ids)
        case("itc smoothing", "itc", odd, SCALARS["itc"], label_smoothing=0.1)
        case(
            "itc huge norm, 300",
            "itc",
            ADVERSARIAL["one huge norm"](300, 24),
            HOT["itc"],
            tile=TILE._replace(block_m=64, block_n=128),
        )
        case("itc zero rows", "itc", ADVERSARIAL["zero rows"](20, 8), HOT["itc"])
        _frozen()
        _deterministic(odd)


def _frozen():
    image, text = correlated(20, 8, 0.3, 0.1)
    exact = with_gradients(reference.itc_loss, image.double(), text.double(), SCALARS["itc"][0].double())[1:]
    for learns in ((True, False, False), (False, True, True), (False, False, True)):
        leaves = [x.clone().requires_grad_(wanted) for x, wanted in zip((image, text, *SCALARS["itc"]), learns)]
        kernels.fused_itc_loss(*leaves, impl="triton").backward()
        assert [leaf.grad is not None for leaf in leaves] == list(learns)
        got = [(leaf.grad, truth) for leaf, truth in zip(leaves, exact) if leaf.grad is not None]
        found = errors(*zip(*got))
        row = {"case": f"frozen {learns}", "errors": found, "budget": [0.0] * 3, "rounding": [0.0] * 3}
        print(json.dumps(row | {"largest_logit": 0.0}))


def _deterministic(features):
    runs = [
        with_gradients(lambda *x: kernels.fused_itc_loss(*x, impl="triton"), *features, *SCALARS["itc"]) for _ in "ab"
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


if __name__ == "__main__":
    main(sys.argv[1] == "all")
