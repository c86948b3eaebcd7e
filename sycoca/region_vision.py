"""Boxes of images as the ViT encodes them, every image once however many boxes it has.

local   the last blocks run on whole images, and on each box alone: [CLS] and the patches in it see one another only
pooled  whole images alone; a box is the mean of its patches, and its text sees those beside that mean

A box of all patches is the image itself, and on a CPU is not encoded again. Image tokens come out as rows of one table;
what an image or a box consists of is an index into it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import region_pool
from sycoca.config import VisionConfig
from sycoca.fusion import ImageTokens, Seen
from sycoca.layers import run_block
from sycoca.packing import Packing
from sycoca.regions import areas, places
from sycoca.vision import VisionTransformer


class EncodedRegions(NamedTuple):
    """N images and E boxes of them.

    Attributes:
        tokens: those of images and boxes.
        boxes: rows of each box; the first stands for it.
        images: rows of each image; the first stands for it.
    """

    tokens: ImageTokens
    boxes: Seen
    images: Seen


def encode_regions(
    tower: VisionTransformer, vision: VisionConfig, images: Tensor, rects: Tensor, image_index: Tensor
) -> EncodedRegions:
    """Tokens of images (N, 3, H, W) fp32 and of boxes of them.

    Args:
        tower: the image encoder.
        vision: its configuration.
        images: normalised.
        rects: (E, 4) int32 cells of the patch grid.
        image_index: (E,) int64, the image of each box.
    """
    rects, image_index = rects.to(images.device), image_index.to(images.device)
    form = _pooled if vision.region_form == "pooled" else _local
    return form(tower, vision, images, rects, image_index)


def whole_images(cls: Tensor, patches: Tensor) -> tuple[ImageTokens, Seen]:
    """Tokens of images that are cls (N, D) and patches (N, P, D), and the images as an index of them."""
    rows = torch.cat([cls[:, None], patches], dim=1)
    return ImageTokens(rows.flatten(0, 1), _cells(rows)), _consecutive(rows)


def _cells(x: Tensor) -> Tensor:
    """Cells (N S,) of sequences (N, S, D) of [CLS] and all patches."""
    N, S, _ = x.shape
    return (torch.arange(S, device=x.device) - 1).remainder(S).expand(N, S).flatten()


def _consecutive(x: Tensor) -> Seen:
    index = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2])
    return Seen(index, torch.ones_like(index, dtype=torch.bool))


def _most(rects: Tensor, vision: VisionConfig) -> int:
    # Elsewhere than on a CPU, the largest box would have to be waited for.
    on_host = rects.device.type == "cpu" and len(rects) > 0
    return int(areas(rects).max()) if on_host else vision.num_patches


def _alone(rects: Tensor, vision: VisionConfig) -> Tensor:
    """Boxes (M,) int64 that are no whole images; the first where all are, so that every rank runs the same blocks."""
    found = (areas(rects) < vision.num_patches).nonzero().squeeze(1)
    return found if len(found) else found.new_zeros(1)


def _with_first(first: Tensor, place: Tensor, valid: Tensor) -> Seen:
    index = torch.cat([first[:, None], place], dim=1)
    return Seen(index, torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1))


def _pooled(
    tower: VisionTransformer, vision: VisionConfig, images: Tensor, rects: Tensor, image_index: Tensor
) -> EncodedRegions:
    patches = tower(images).patches
    N, P, D = patches.shape
    means = patches.float().mean(1).to(patches.dtype)
    boxed = region_pool(patches.view(N, *vision.grid, D), rects, image_index).to(patches.dtype)
    place, valid = places(rects, vision.grid[1], _most(rects, vision))
    number = torch.arange(N + len(rects), device=images.device) + N * P
    boxes = _with_first(number[N:], place + image_index[:, None] * P, valid)
    inside = torch.arange(N * P, device=images.device).view(N, P)
    whole = _with_first(number[:N], inside, torch.ones_like(inside, dtype=torch.bool))
    rows = torch.cat([patches.flatten(0, 1), means, boxed])
    cells = torch.cat([inside.remainder(P).flatten(), number.new_full((len(number),), P)])
    return EncodedRegions(ImageTokens(rows, cells), boxes, whole)


def _local(
    tower: VisionTransformer, vision: VisionConfig, images: Tensor, rects: Tensor, image_index: Tensor
) -> EncodedRegions:
    x = tower.ln_pre(tower.sequence(tower.embed(images)))
    shared = len(tower.blocks) - vision.local_depth
    for block in tower.blocks[:shared]:
        x = run_block(block, x, recompute=tower.recompute)
    N, S, _ = x.shape
    place, valid = places(rects, vision.grid[1], _most(rects, vision))
    boxes = _with_first(image_index * S, place + 1 + image_index[:, None] * S, valid)
    whole = _consecutive(x)
    # Where the host knows, boxes of all patches are left to their image.
    alone = _alone(rects, vision) if rects.device.type == "cpu" else None
    part = boxes
    if alone is not None:
        part = boxes.of(alone)
        most = int(part.valid.sum(1).max())
        part = Seen(part.index[:, :most], part.valid[:, :most])
    packing = Packing.of(part.valid)
    chosen = part.index.flatten() if packing is None else part.index.flatten()[packing.rows]
    local = x.flatten(0, 1).index_select(0, chosen)
    local = local.view(*part.index.shape, -1) if packing is None else local[None]
    for block in tower.blocks[shared:]:
        x = run_block(block, x, recompute=tower.recompute)
        local = run_block(block, local, None, packing, part.valid, recompute=tower.recompute)
    cells = torch.cat([_cells(x), _cells(x)[chosen]])
    rows = torch.cat([x.flatten(0, 1), local.flatten(0, 1)])
    number = torch.arange(part.index.numel(), device=x.device) if packing is None else packing.places
    number = (number.view(part.index.shape) + N * S).masked_fill(~part.valid, 0)
    if alone is None:
        index = number
    else:
        index = boxes.index.clone()
        index[alone[:, None], torch.arange(number.shape[1])] = number
    return EncodedRegions(ImageTokens(tower.ln_post(rows), cells), Seen(index, boxes.valid), whole)
