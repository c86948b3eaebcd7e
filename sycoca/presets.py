"""The presets of the models, and how many parameters they have."""

from dataclasses import replace

from sycoca.config import (
    CLIP_IDS,
    BertConfig,
    CaptionDecoderConfig,
    FusionConfig,
    ImageDecoderConfig,
    LossConfig,
    MaskingConfig,
    ModelConfig,
    SwinConfig,
    TextConfig,
    VisionConfig,
)

_OURS = MaskingConfig(score_space="local", ic_mask_prob=0.5, attentive_start=0.3, masked_input="drop")
_XVLM = ("itc", "itm", "mlm", "bbox")

_XVLM_BASE = ModelConfig(
    embed_dim=256,
    vision=VisionConfig(image_size=224, patch_size=16, width=768, depth=12, heads=12),
    text=TextConfig(context_length=40, vocab_size=30522, width=768, depth=6, heads=12, kind="bidirectional", mask_id=3),
    caption_decoder=CaptionDecoderConfig(depth=6, heads=12),
    image_decoder=ImageDecoderConfig(depth=4, width=768, heads=12),
    fusion=FusionConfig(depth=6, heads=12),
    objectives=_XVLM,
)

MODEL_PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        embed_dim=128,
        vision=VisionConfig(image_size=48, patch_size=8, width=96, depth=4, heads=4),
        text=TextConfig(context_length=28, vocab_size=512, width=96, depth=2, heads=4),
        caption_decoder=CaptionDecoderConfig(depth=1, heads=4),
        image_decoder=ImageDecoderConfig(depth=1, width=128, heads=4),
        masking=_OURS,
    ),
    "small": ModelConfig(
        embed_dim=256,
        vision=VisionConfig(image_size=128, patch_size=16, width=256, depth=6, heads=4),
        text=TextConfig(context_length=32, vocab_size=4096, width=256, depth=4, heads=4),
        caption_decoder=CaptionDecoderConfig(depth=3, heads=4),
        image_decoder=ImageDecoderConfig(depth=2, width=256, heads=4),
        masking=_OURS,
    ),
    "base_16": ModelConfig(
        embed_dim=512,
        vision=VisionConfig(image_size=224, patch_size=16, width=768, depth=12, heads=12),
        text=TextConfig(context_length=76, vocab_size=49408, width=512, depth=12, heads=8, **CLIP_IDS),
        caption_decoder=CaptionDecoderConfig(depth=12, heads=8),
        image_decoder=ImageDecoderConfig(depth=4, width=512, heads=8),
        masking=_OURS,
    ),
    "coca_base": ModelConfig(
        embed_dim=512,
        vision=VisionConfig(image_size=288, patch_size=18, width=768, depth=12, heads=12),
        text=TextConfig(context_length=76, vocab_size=64000, width=768, depth=12, heads=12, **CLIP_IDS),
        caption_decoder=CaptionDecoderConfig(depth=12, heads=12),
        image_decoder=ImageDecoderConfig(depth=4, width=768, heads=12),
    ),
    "large_14": ModelConfig(
        embed_dim=768,
        vision=VisionConfig(image_size=224, patch_size=14, width=1024, depth=24, heads=16),
        text=TextConfig(context_length=76, vocab_size=49408, width=768, depth=12, heads=12, **CLIP_IDS),
        caption_decoder=CaptionDecoderConfig(depth=12, heads=12),
        image_decoder=ImageDecoderConfig(depth=4, width=768, heads=12),
        masking=_OURS,
    ),
    "xvlm_tiny": ModelConfig(
        embed_dim=128,
        vision=VisionConfig(image_size=64, patch_size=8, width=96, depth=4, heads=4, local_depth=2, stem="conv"),
        text=TextConfig(context_length=28, vocab_size=512, width=96, depth=2, heads=4, kind="bidirectional", mask_id=3),
        caption_decoder=CaptionDecoderConfig(depth=1, heads=4),
        image_decoder=ImageDecoderConfig(depth=1, width=128, heads=4),
        fusion=FusionConfig(depth=2, heads=4),
        loss=LossConfig(itm_weight=4.0, mlm_weight=0.5, region_weight=8.0, itm_floor=0.005, whole_views=0.5),
        objectives=_XVLM,
    ),
    "xvlm_base": _XVLM_BASE,
    # The published form; with transformers.
    "xvlm_swin_base": replace(
        _XVLM_BASE,
        vision=VisionConfig(
            image_size=224,
            patch_size=32,
            width=1024,
            depth=24,
            heads=32,
            region_form="pooled",
            swin=SwinConfig(embed_width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=7),
        ),
        text=replace(_XVLM_BASE.text, bert=BertConfig()),
    ),
}

# Parameters of each preset, and of it without image decoder and score heads.
PRESET_PARAMETERS: dict[str, tuple[int, int]] = {
    "tiny": (1354562, 1043329),
    "small": (17511170, 15089665),
    "base_16": (271532034, 253739265),
    "coca_base": (479686093, 440336641),
    "large_14": (679782222, 640414465),
    "xvlm_tiny": (1257431, 1257431),
    "xvlm_base": (212064577, 212064577),
    "xvlm_swin_base": (215686905, 215686905),
}
