"""open_clip's own CoCa, without the parts of the package that need torchvision."""

import contextlib
import importlib
import importlib.util
import sys
import types

import pytest
import torch


def coca_class():
    """The class CoCa of an installed open_clip_torch, its package's `__init__` not executed."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip_torch is not installed")
    with contextlib.suppress(ImportError):
        # It looks for torchvision when it is first imported, and must not find what stands in for it here.
        import transformers  # noqa: F401
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
            sys.modules.setdefault(name, types.ModuleType(name))
        sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = torch.nn.Identity
    package = types.ModuleType("open_clip_files")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault("open_clip_files", package)
    try:
        return importlib.import_module("open_clip_files.coca_model").CoCa
    finally:
        for name in ("torchvision.ops.misc", "torchvision.ops", "torchvision"):
            if isinstance(sys.modules.get(name), types.ModuleType) and not getattr(sys.modules[name], "__file__", None):
                sys.modules.pop(name)


def randomised(model, seed: int = 0):
    """The model with weights that leave no term out: norms, biases and projections too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "logit_scale":
                p.fill_(2.5)
                continue
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if p.ndim == 1 and name.endswith("weight") else noise * (p.shape[-1] ** -0.5))
    return model.eval()
