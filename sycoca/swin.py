"""Image encoder: transformers' Swin, whose image is the mean of its last grid, as X-VLM pools boxes of it.

patches = LN(stages(E pixels));  cls = mean_i patches_i
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import SwinConfig, SwinModel
from transformers.models.swin.modeling_swin import SwinLayer, SwinRelativePositionBias

from sycoca.config import ModelConfig
from sycoca.layers import recomputation
from sycoca.vision import EncodedImage


class SwinTransformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision, swin = config.vision, config.vision.swin
        sizes = SwinConfig(
            image_size=vision.image_size,
            patch_size=swin.patch_size,
            embed_dim=swin.embed_width,
            depths=list(swin.depths),
            num_heads=list(swin.heads),
            window_size=swin.window,
            mlp_ratio=vision.mlp_ratio,
            drop_path_rate=swin.drop_path,
        )
        self.swin = SwinModel(sizes, add_pooling_layer=False)
        if config.recompute != "nothing":
            _recompute(self.swin, config.recompute)
        _fill_index(self.swin)

    def forward(self, images: Tensor) -> EncodedImage:
        patches = self.swin(images.to(self.swin.dtype)).last_hidden_state
        return EncodedImage(patches.float().mean(1).to(patches.dtype), patches, None, None)


def _recompute(swin: nn.Module, recompute: str) -> None:
    # The library's own switch has stages computed again as well as the blocks in them.
    for module in swin.modules():
        if isinstance(module, SwinLayer):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, **recomputation(recompute))


def _fill_index(swin: nn.Module) -> None:
    """Gives the tables' indices, which no weight file holds, their values where the model is made without memory."""
    tables = [module for module in swin.modules() if isinstance(module, SwinRelativePositionBias)]
    with torch.device("cpu"):
        index = SwinRelativePositionBias(1, tables[0].window_size).relative_position_index
    for table in tables:
        if table.relative_position_index.is_meta:
            table.relative_position_index = index
