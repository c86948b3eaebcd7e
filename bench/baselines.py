"""The plain compositions and peers that the operators are compared with."""

from bench.contrastive_baselines import contrastive_peers, eager, four_products, logits_once, siglip_peers

__all__ = ["contrastive_peers", "eager", "four_products", "logits_once", "siglip_peers"]
