"""METEOR and SPICE of captions, through pycocoevalcap and Java."""

import importlib.util
import shutil
from collections.abc import Sequence

from sycoca.config import ConfigError
from train.tasks.bleu import Words


def require_java() -> None:
    """Raises ConfigError where the two cannot run."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ConfigError('java=true: METEOR and SPICE need pycocoevalcap: pip install "sycoca[coco]"')
    if shutil.which("java") is None:
        raise ConfigError("java=true: METEOR and SPICE need Java, and there is no command java")


def meteor(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """METEOR 1.5 of the corpus, in 0..1."""
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(*_sentences(candidates, references))[0])


def spice(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """SPICE of the corpus, in 0..1; fetches CoreNLP's models at its first use."""
    from pycocoevalcap.spice.spice import Spice

    return float(Spice().compute_score(*_sentences(candidates, references))[0])


def _sentences(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[dict, dict]:
    truth = {i: [" ".join(words) for words in refs] for i, refs in enumerate(references)}
    return truth, {i: [" ".join(words)] for i, words in enumerate(candidates)}
