"""What the fusion encoder is shown of an image with a text of one of its boxes: the box, or the whole image.

A phrase of a box is true of its image as well. Shown the whole image, the model has to find what the phrase speaks of
before it can judge it, as it has to with a caption of several things. What is not a negative then: a text that is also
said of a box of the image which is shown.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sycoca.fusion import Seen
from sycoca.masking import hash_tensor
from sycoca.regions import RegionBatch, areas

# Another use of a text's seed than that of masked words.
_USE = 0x5EE
_ONE = 1 << 53


class Shown(NamedTuple):
    """What E texts with boxes are shown.

    Attributes:
        whole: (E,) bool, shown the whole image.
        image_index: (E,) int64, the image of each.
        ids: (E,) int64, equal where the same text matches.
    """

    whole: Tensor
    image_index: Tensor
    ids: Tensor

    def without_true(self, texts: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Negatives, -1 where it is none or turns out to be true.

        Args:
            texts: (E,) int64, negative text of each view, or -1.
            views: (E,) int64, negative view of each text, or -1.
        """
        own = torch.arange(len(self.ids), device=self.ids.device)
        return texts.masked_fill(self._true(texts, own), -1), views.masked_fill(self._true(own, views), -1)

    def _true(self, texts: Tensor, views: Tensor) -> Tensor:
        texts, views = texts.clamp(min=0), views.clamp(min=0)
        said = (self.ids == self.ids[texts, None]) & (self.image_index == self.image_index[views, None])
        return self.whole[views] & said.any(1)


def shown(regions: RegionBatch, share: float, num_patches: int) -> Shown:
    """A draw by each text's seed: `share` of them are shown the whole image; captions of it are anyway."""
    draws = hash_tensor(hash_tensor(regions.seeds) + _USE) & (_ONE - 1)
    whole = (draws < int(share * _ONE)) | (areas(regions.rects) == num_patches)
    return Shown(whole.to(regions.ids.device), regions.image_index, regions.ids)


def choose_views(whole: Tensor, boxes: Seen, images: Seen) -> Seen:
    """Those of `images` where `whole` (E,) holds, else those of `boxes`; both of E rows, as wide as the wider."""
    width = max(boxes.index.shape[1], images.index.shape[1])
    boxes, images = (Seen(*(F.pad(x, (0, width - x.shape[1])) for x in seen)) for seen in (boxes, images))
    return Seen(*(torch.where(whole[:, None], a, b) for a, b in zip(images, boxes)))
