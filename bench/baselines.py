"""The plain compositions and peers that the operators are compared with."""

from bench.contrastive_baselines import contrastive_peers, eager, four_products, logits_once, siglip_peers
from bench.xvlm_baselines import boxes_pairwise, negatives_by_loop, negatives_by_matrix, regions_by_copy

__all__ = [
    "boxes_pairwise",
    "contrastive_peers",
    "eager",
    "four_products",
    "logits_once",
    "negatives_by_loop",
    "negatives_by_matrix",
    "regions_by_copy",
    "siglip_peers",
]
