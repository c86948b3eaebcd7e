"""SyCoCa and CoCa: models that align images and captions, globally and locally."""

from importlib import import_module

# Resolved on first use, so that configuration can be read without loading torch.
_HOME = {
    "ConfigError": "config",
    "ModelConfig": "config",
    "MODEL_PRESETS": "presets",
    "PRESET_PARAMETERS": "presets",
    "Batch": "model",
    "Losses": "model",
    "StepPlan": "masking",
    "SyCoCa": "model",
    "parameter_groups": "model",
    "step_plan": "masking",
    "Tokenizer": "tokenizer",
    "load_images": "images",
    "save_overlay": "visualize",
    "Pretrained": "hub",
    "WeightsError": "weights",
    "create_model": "hub",
    "list_models": "hub",
    "load_pretrained": "hub",
    "load_backbones": "backbones",
    "save_openclip": "openclip_files",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
