"""METEOR and SPICE of captions, through pycocoevalcap and Java; and whether the words without Java are the same.

python -m train.tasks.coco_java CAPTIONS
"""

import importlib.util
import shutil
import sys
from collections.abc import Sequence

from sycoca.config import ConfigError
from train.data import DataError, open_dataset
from train.tasks.bleu import Words
from train.tasks.ptb import ptb_words


def require_java(*, spice: bool) -> None:
    """Raises ConfigError where METEOR, or SPICE too, cannot run; fetches CoreNLP's models at SPICE's first use."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ConfigError('meteor, spice: they need pycocoevalcap: pip install "sycoca[coco]"')
    if shutil.which("java") is None:
        raise ConfigError("meteor, spice: they need Java, and there is no command java")
    if not spice:
        return
    from pycocoevalcap.spice.get_stanford_models import get_stanford_models

    try:
        get_stanford_models()
    except OSError as error:
        raise ConfigError(f"spice=true: CoreNLP's models cannot be fetched from nlp.stanford.edu: {error}") from None


def meteor(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """METEOR 1.5 of the corpus, in 0..1."""
    from pycocoevalcap.meteor.meteor import Meteor

    return float(Meteor().compute_score(*_sentences(candidates, references))[0])


def spice(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """SPICE of the corpus, in 0..1; behind `require_java`."""
    from pycocoevalcap.spice.spice import Spice

    return float(Spice().compute_score(*_sentences(candidates, references))[0])


def _sentences(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[dict, dict]:
    truth = {i: [" ".join(words) for words in refs] for i, refs in enumerate(references)}
    return truth, {i: [" ".join(words)] for i, words in enumerate(candidates)}


def differing(captions: Sequence[str]) -> list[tuple[str, str, str]]:
    """The captions of which Java's tokenizer makes other words: caption, its words, the words without Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    java = PTBTokenizer().tokenize({0: [{"caption": caption} for caption in captions]})[0]
    # Java keeps "2 1/2" together by a space that does not break; scores take it for two words.
    theirs = (" ".join(words.split()) for words in java)
    both = ((caption, words, " ".join(ptb_words(caption))) for caption, words in zip(captions, theirs, strict=True))
    return [(caption, words, ours) for caption, words, ours in both if words != ours]


def main(argv: list[str]) -> int:
    try:
        if len(argv) != 1:
            raise ConfigError("usage: python -m train.tasks.coco_java CAPTIONS, a source of captions")
        require_java(spice=False)
        captions = [text for split in ("train", "val") for text in open_dataset(argv[0], split).texts()]
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = differing(captions)
    for caption, theirs, ours in found[:20]:
        print(f"{caption}\n  java: {theirs}\n  ours: {ours}")
    equal = len(captions) - len(found)
    print(f"{len(captions)} captions, {equal} with equal words ({equal / len(captions):.4%})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
