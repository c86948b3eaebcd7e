"""What a pair costs by the configuration alone: multiplications of the forward pass, and bytes that backward needs.

    linear      2 n i o FLOPs for n rows of i values into o
    attention   4 n m D for n queries and m keys
    backward    twice the forward pass
    kept        e (6 D + 2 r D) + 8 D bytes a row of a block: normed inputs, queries, keys, values, what was attended to
                and both sides of the MLP in the products' e bytes, the residual stream in fp32 at both norms

Captions count at their full length; what is packed or recomputed by a fused operator costs less.
"""

from typing import NamedTuple

from sycoca.config import ModelConfig, VisionConfig
from sycoca.stem import stem_convs


class Layer(NamedTuple):
    """Attention and MLP over `rows`, `times` over; to itself, or to a memory of other rows."""

    times: int
    rows: int
    width: int
    hidden: int
    memory_rows: int = 0
    memory_width: int = 0

    def flops(self) -> float:
        """Of the forward pass."""
        n, D = self.rows, self.width
        keys = self.memory_rows or n
        own = 2 * n * D * D * (2 if self.memory_rows else 4)
        looked_up = 4 * self.memory_rows * self.memory_width * D
        return self.times * (own + looked_up + 4 * n * keys * D + 4 * n * D * self.hidden)

    def kept_bytes(self, e: int, recompute: str) -> float:
        """Until backward, of one pair."""
        n, D = self.rows, self.width
        if recompute == "blocks":
            return self.times * n * D * 4
        own = n * (e * ((4 if self.memory_rows else 6) * D + 2 * self.hidden) + 8 * D)
        memory = self.memory_rows * (e * (self.memory_width + 2 * D) + 4 * self.memory_width)
        return self.times * (own + memory)


class Work(NamedTuple):
    """Of one pair.

    Attributes:
        encoder_flops: of the forward pass of both encoders, which the first of two passes repeats.
        forward_flops: of the whole forward pass, without the targets.
        kept_bytes: what backward needs of it.
        target_flops: of the averaged image encoder, where TG-MIM predicts its features.
    """

    encoder_flops: float
    forward_flops: float
    kept_bytes: float
    target_flops: float = 0.0


def stem_parameters(vision: VisionConfig) -> int:
    """Weights of what makes patches of an image."""
    if vision.stem == "patch":
        return vision.patch_values * vision.width
    convs = stem_convs(vision.patch_size, vision.width)
    return vision.width**2 + sum(9 * conv.before * conv.after for conv in convs)


def stem_flops(vision: VisionConfig) -> float:
    """Of the forward pass of one image through what makes patches of it."""
    if vision.stem == "patch":
        return 2 * vision.num_patches * vision.patch_values * vision.width
    size, total = vision.image_size, 2 * vision.num_patches * vision.width**2
    for conv in stem_convs(vision.patch_size, vision.width):
        size //= conv.stride
        total += 2 * 9 * conv.before * conv.after * size**2
    return total


def work(config: ModelConfig, value_bytes: int) -> Work:
    """The cost of a pair, averaged over a run's steps with and without masked captioning and TG-MIM.

    Args:
        config: of the model, [CLS] without a pooler.
        value_bytes: of the values that products take, 2 for bf16.
    """
    vision, text, masking = config.vision, config.text, config.masking
    P, T, D, E = vision.num_patches, text.context_length, text.width, config.embed_dim
    image = Layer(vision.depth, P + 1, vision.width, int(vision.width * vision.mlp_ratio))
    words = Layer(text.depth, T + 1, D, int(D * text.mlp_ratio))
    patches = image.flops() + stem_flops(vision)
    encoder = patches + words.flops() + 2 * E * (config.memory_width + D)
    layers, second, rest, target = [image, words], [], 0.0, 0.0
    if config.learns("ic"):
        decoder = config.caption_decoder
        hidden = int(D * decoder.mlp_ratio)
        masked = (1 - masking.attentive_start) * masking.ic_mask_prob
        seen = round(P - masked * config.num_dropped)
        layers += [Layer(decoder.depth, T - 1, D, hidden)]
        layers += [Layer(decoder.depth, T - 1, D, hidden, seen, config.memory_width)]
        rest += 2 * (T - 1) * D * text.vocab_size
    if config.num_masked:
        decoder, K = config.image_decoder, config.num_masked
        rows = P - K if masking.masked_input == "drop" else P
        second += [Layer(vision.depth, rows + 1, vision.width, image.hidden)]
        hidden = int(decoder.width * decoder.mlp_ratio)
        # Only the masked patches ask in the last layer.
        for times, asking in ((decoder.depth - 1, P), (1, K)):
            second += [Layer(times, asking, decoder.width, 0, P, decoder.width)]
            second += [Layer(times, asking, decoder.width, hidden, T, D)]
        share = 1 - masking.tgmim_start
        values = vision.width if config.predicts_features else vision.patch_values
        rest += share * 2 * decoder.width * (rows * vision.width + K * values)
        rest += share * sum(layer.flops() for layer in second)
        target = share * patches if config.predicts_features else 0.0
    if config.local_weight > 0:
        dim = masking.local_dim
        rest += 2 * dim * (P * vision.width + T * D) + 2 * masking.local_group * P * T * dim
    forward = encoder + rest + sum(layer.flops() for layer in layers[2:])
    kept = sum(layer.kept_bytes(value_bytes, config.recompute) for layer in layers + second)
    return Work(encoder, forward, kept, target)
