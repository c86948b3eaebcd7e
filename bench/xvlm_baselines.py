"""What the region operators replace: the operations of the published X-VLM code, and the best plain composition."""

import torch
from torch import Tensor


def negatives_by_loop(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Hard negatives as X-VLM draws them: both matrices of weights, then a draw and a synchronisation for each row."""
    for_images, for_texts = _weights(image, text, scale)
    image_negative = [torch.multinomial(for_texts[b], 1).item() for b in range(len(image))]
    text_negative = [torch.multinomial(for_images[b], 1).item() for b in range(len(image))]
    return torch.tensor(image_negative), torch.tensor(text_negative)


def negatives_by_matrix(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Hard negatives with one draw for all rows of a matrix."""
    for_images, for_texts = _weights(image, text, scale)
    return torch.multinomial(for_texts, 1)[:, 0], torch.multinomial(for_images, 1)[:, 0]


def _weights(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = image @ text.T * scale
    weights = logits.softmax(1) + 1e-5, logits.T.softmax(1) + 1e-5
    return weights[0].fill_diagonal_(0), weights[1].fill_diagonal_(0)


def regions_by_copy(x: Tensor, inside: Tensor, image_index: Tensor) -> Tensor:
    """Means under masks inside (E, P) of patches x (N, P, D): a copy of the image for each region, as in X-VLM."""
    weights = inside.to(x.dtype)[:, :, None]
    return (x[image_index] * weights).sum(1) / weights.sum(1)


def boxes_pairwise(pred: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """L1 and GIoU as in X-VLM: all E x E pairs, of which the diagonal is taken, and two synchronising checks."""
    share = valid / valid.sum()
    l1 = ((pred - target).abs().sum(1) * share).sum()
    p, t = (torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], 1) for b in (pred, target))
    if (p[:, 2:] < p[:, :2]).any() or (t[:, 2:] < t[:, :2]).any():
        return l1, l1.new_zeros(())
    areas = [(b[:, 2:] - b[:, :2]).prod(1) for b in (p, t)]
    overlap = (torch.minimum(p[:, None, 2:], t[:, 2:]) - torch.maximum(p[:, None, :2], t[:, :2])).clamp(min=0)
    hull = (torch.maximum(p[:, None, 2:], t[:, 2:]) - torch.minimum(p[:, None, :2], t[:, :2])).clamp(min=0)
    overlap, hull = (side[..., 0] * side[..., 1] for side in (overlap, hull))
    union = areas[0][:, None] + areas[1] - overlap
    giou = overlap / union - (hull - union) / hull
    return l1, ((1 - giou.diagonal()) * share).sum()
