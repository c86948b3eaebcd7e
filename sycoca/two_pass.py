"""The first pass over a batch in parts: what each part has to know of the whole before it is differentiated."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sycoca.contrast import PartContrast, Spread, Whole, contrastive_loss, part_contrasts, send_captions
from sycoca.losses import global_counts
from sycoca.model import Batch, SyCoCa


class RandomState(NamedTuple):
    """Where torch's generators stand: the host's, and the device's where the model is on one."""

    host: Tensor
    device: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> "RandomState":
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


class Part(NamedTuple):
    """A part after the first pass: what it knows, and the random state that its second pass has to begin with."""

    whole: Whole
    random: RandomState

    def losses(self, model: Callable, batch: Batch, plan):
        """Losses of the part, to be differentiated; the mean over parts and ranks is the loss of the whole batch.

        Args:
            model: the model, or what calls it.
            batch: the part, as `first_pass` saw it.
            plan: of the step.
        """
        self.random.restore(batch.images.device)
        return model(batch, plan, whole=self.whole)


@torch.no_grad()
def first_pass(
    model: SyCoCa, parts: Sequence[Batch], spread: Spread, load: Callable[[Batch], Batch] = lambda batch: batch
) -> list[Part]:
    """Encodes all parts without a graph and forms the gradient of the contrastive loss. All ranks call it alike.

    Args:
        model: whole, or partitioned with hooks that gather its parameters.
        parts: this rank's share of the batch, in order; every rank has as many.
        spread: over the ranks; its shares are those of the whole batch.
        load: brings a part to the model's device; called anew in every pass, so that images need not stay there.

    Returns:
        One for each of `parts`.
    """
    states, images, captions, counts, sent, ids = [], [], [], 0, None, None
    for number, part in enumerate(parts):
        batch = load(part)
        device = batch.images.device
        counts = counts + model.counts(batch.tokens)
        states.append(RandomState.of(device))
        if not model.config.learns("itc"):
            continue
        captions.append(model.encode_text(batch.tokens).features)
        if number + 1 == len(parts):
            if batch.ids is not None:
                ids = torch.cat([part.ids.to(device) for part in parts])
            all_captions = torch.cat(captions).requires_grad_()
            # The texts travel while the last images are encoded.
            sent = send_captions(all_captions, ids, spread)
        images.append(model.encode_image(batch.images).features)
    counts, ranks = global_counts(counts, spread.group)
    contrasts: list[PartContrast | None] = [None] * len(parts)
    if sent is not None:
        all_images, scale = torch.cat(images).requires_grad_(), model.logit_scale().requires_grad_()
        with torch.enable_grad():
            smoothing = model.config.loss.label_smoothing
            loss = contrastive_loss(all_images, sent, scale, ids, spread, smoothing)
        contrasts = part_contrasts(loss, all_images, all_captions, scale, [len(part) for part in images])
    wholes = (Whole(counts, ranks * len(parts), contrast) for contrast in contrasts)
    return [Part(whole, state) for whole, state in zip(wholes, states, strict=True)]
