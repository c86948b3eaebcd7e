"""A fine-tuning of four examples a step on a few scenes."""

from dataclasses import replace
from typing import Any

from train.tasks.launch import Tuning, TuningData, defaults
from train.tasks.sources import open_source


def tuning_of(task: str, options: dict[str, Any], image_size: int) -> Tuning:
    config = defaults(task, "none", has_cuda=False)
    config = replace(
        config,
        data=TuningData(train="scenes?count=60", workers=0),
        train=replace(config.train, micro_batch=4),
        options=replace(config.options, **options),
    )
    source = open_source(task, config.data.train, "train", image_size=image_size)
    return Tuning(config, {}, None, False, source, source)
