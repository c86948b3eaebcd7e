"""What the contrastive operators are compared with: plain compositions, and peers where they can be imported."""

import contextlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """open_clip's `ClipLoss` on one process, written out: a product and a cross entropy for each direction."""
    labels = torch.arange(image.shape[0], device=image.device)
    per_image, per_text = logit_scale * image @ text.T, logit_scale * text @ image.T
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


class _LogitsOnce(torch.autograd.Function):
    """The best composition that holds the logits: formed once, overwritten by their gradient; three products."""

    @staticmethod
    def forward(ctx, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        logits = (image @ text.T).mul_(logit_scale.to(image.dtype))
        row, column = logits.float().logsumexp(1), logits.float().logsumexp(0)
        loss = (row.mean() + column.mean()) / 2 - logits.diagonal().float().mean()
        ctx.save_for_backward(image, text, logit_scale, logits, row, column)
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor):
        image, text, logit_scale, logits, row, column = ctx.saved_tensors
        B = image.shape[0]
        G = logits
        for rows in range(0, B, 4096):
            block = logits[rows : rows + 4096].float()
            probability = (block - row[rows : rows + 4096, None]).exp_() + (block - column).exp_()
            G[rows : rows + 4096] = probability.to(G.dtype)
        G.diagonal().sub_(2)
        factor = (dloss * logit_scale / (2 * B)).to(image.dtype)
        dimage = (G @ text).mul_(factor)
        dtext = (G.T @ image).mul_(factor)
        return dimage, dtext, ((dimage.float() * image.float()).sum() / logit_scale).reshape(logit_scale.shape)


def logits_once(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Contrastive loss that holds its logits once; its backward can run once only."""
    return _LogitsOnce.apply(image, text, logit_scale)


def contrastive_peers(device: torch.device) -> dict[str, Loss]:
    """Losses to compare with on a device, by name."""
    peers: dict[str, Loss] = {"eager": eager, "logits once": logits_once}
    with contextlib.suppress(ImportError):
        peers["open_clip"] = _open_clip()
    if device.type == "cuda":
        peers["compiled"] = torch.compile(eager)
        with contextlib.suppress(ImportError):
            from inf_cl import cal_flash_loss

            # Its kernels for one process: `cal_inf_loss` reduces the scale's gradient over a process group.
            def inf_cl(i: Tensor, t: Tensor, s: Tensor) -> Tensor:
                head = math.gcd(i.shape[1], 256)
                return sum(cal_flash_loss(*pair, scale=s, head_dim=head).mean() for pair in ((i, t), (t, i))) / 2

            peers["Inf-CL"] = inf_cl
        with contextlib.suppress(ImportError):
            from memeff import MemoryEfficientCLIPLoss

            # The temperature is a Python number there, and has no gradient; `stable` would multiply the others.
            peers["memeff"] = lambda i, t, s: MemoryEfficientCLIPLoss(
                temperature=1.0 / s.item(), normalized_inputs=True, stable=False
            )(i, t)
    return peers


def siglip_peers(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """Sigmoid losses (image, text, scale, bias) to compare with on a device, by name."""
    peers: dict[str, Callable[..., Tensor]] = {"eager": eager_siglip}
    if device.type == "cuda":
        peers["compiled"] = torch.compile(eager_siglip)
        with contextlib.suppress(ImportError):
            from siglip_kernel import fused_siglip_loss

            peers["siglip-kernel"] = lambda i, t, s, b: fused_siglip_loss(i, t, s.reshape(()).log(), b.reshape(()))
    return peers


def eager_siglip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """open_clip's `SigLipLoss` on one process, written out."""
    logits = logit_scale * image @ text.T + logit_bias
    labels = 2 * torch.eye(image.shape[0], device=image.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / image.shape[0]


def four_products(image: Tensor, text: Tensor) -> Callable[[], None]:
    """The contrastive loss's matrix products alone, in blocks: what its time is compared with."""
    B, D = image.shape
    block = min(B, 2048)
    logits = torch.empty(block, block, device=image.device)
    dimage, dtext = (torch.zeros(B, D, device=image.device) for _ in "it")

    def run() -> None:
        for rows in range(0, B, block):
            a = image[rows : rows + block].float()
            for columns in range(0, B, block):
                b = text[columns : columns + block].float()
                out = logits[: a.shape[0], : b.shape[0]]
                torch.mm(a, b.T, out=out)
                torch.mm(a, b.T, out=out)
                dimage[rows : rows + block].addmm_(out, b)
                dtext[columns : columns + block].addmm_(out.T, a)

    return run


def _open_clip() -> Loss:
    """Its loss module alone: the package imports torchvision, which has no build for every torch."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        raise ImportError("open_clip is not installed")
    path = Path(package.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ClipLoss()
