"""Caption metrics: against recorded outputs of COCO's tools, against brute force, and against the tools themselves."""

import json
import math
import random
import shutil
from itertools import combinations
from pathlib import Path

import pytest

from train.data import open_dataset
from train.tasks.bleu import bleu
from train.tasks.cider import CiderD, cider_d
from train.tasks.coco_java import differing, meteor, require_java
from train.tasks.ptb import ptb_words
from train.tasks.rouge import common_length, rouge_l

# Captions and what Stanford's PTBTokenizer, as pycocoevalcap 1.2 calls it, makes of them.
CASES = json.loads(Path(__file__).with_name("ptb_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("caption", "words"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_words_are_those_of_the_java_tokenizer(caption, words):
    assert " ".join(ptb_words(caption)) == words


@pytest.mark.parametrize(
    "caption", ["", " ", "...", '"?"', "\n\t", "\x00", "\ud800 x", "a" * 100_000, "'" * 3000, "a." * 5000]
)
def test_any_text_has_words(caption):
    assert all(word and not word.isspace() for word in ptb_words(caption))


CANDIDATES = [
    "a dog runs across the green grass",
    "two men are playing a game of soccer",
    "a a a a",
    "",
    "the red car",
    "a woman",
]
REFERENCES = [
    ["a brown dog is running across the grass", "the dog runs over green grass", "a dog runs"],
    ["several men play soccer on a field", "two men are playing a game of soccer"],
    ["a a cat", "the cat sat on a mat"],
    ["a boy jumps"],
    ["a red car is parked in the street", "the red car", "car"],
    ["a woman in a red dress", "a lady"],
]
# pycocoevalcap 1.2: Bleu(4), Cider() and Rouge() of the captions above.
BLEU = [0.8792570022767718, 0.8159789309362694, 0.7146193080140565, 0.6468069231366]
CIDER = [2.6739302992656917, 5.401912516589636, 0.29056405829335674, 0.0, 3.654805286094081, 1.081850448807005]
ROUGE = [0.8591549295774649, 1.0, 0.5865384615384615, 0.0, 1.0, 0.6288659793814433]


def split(captions):
    return [tuple(caption.split()) for caption in captions]


CORPUS = split(CANDIDATES), [split(references) for references in REFERENCES]


def test_scores_are_those_of_pycocoevalcap():
    assert bleu(*CORPUS).corpus == pytest.approx(BLEU, abs=1e-12)
    assert cider_d(*CORPUS) == pytest.approx(CIDER, abs=1e-12)
    assert rouge_l(*CORPUS) == pytest.approx(ROUGE, abs=1e-12)


def test_a_caption_that_repeats_its_only_reference_scores_highest():
    words = ("a", "small", "dog", "runs", "after", "a", "red", "ball")
    others = [tuple(f"word{i} and word{i + 1} of it".split()) for i in range(3)]
    corpus = [words, *others], [[words], *([other] for other in others)]
    assert bleu(*corpus).corpus == pytest.approx([1.0] * 4, abs=1e-8)
    assert cider_d(*corpus)[0] == pytest.approx(10.0)
    assert rouge_l(*corpus) == pytest.approx([1.0] * 4)


def test_nothing_written_scores_nothing():
    corpus = [(), ()], [[("a", "dog")], [("b", "cat")]]
    found = bleu(*corpus)
    assert max(found.corpus) < 1e-6 and cider_d(*corpus) == [0, 0] and rouge_l(*corpus) == [0, 0]
    assert all(math.isfinite(score) for scores in [found.corpus, *found.captions] for score in scores)


def test_common_length_is_that_of_the_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(60):
        a, b = ([rng.choice("xyz") for _ in range(rng.randint(0, 7))] for _ in range(2))
        subsequences = {
            tuple(b[i] for i in chosen) for n in range(len(b) + 1) for chosen in combinations(range(len(b)), n)
        }
        brute = max(
            n
            for n in range(len(a) + 1)
            for chosen in combinations(range(len(a)), n)
            if tuple(a[i] for i in chosen) in subsequences
        )
        assert common_length(a, b) == brute


def test_frequencies_counted_once_serve_other_captions():
    scorer = CiderD(CORPUS[1])
    assert [scorer.score(*pair) for pair in zip(*CORPUS)] == cider_d(*CORPUS)
    assert scorer.images == len(CANDIDATES)
    assert scorer.score(("unseen", "words"), [("unseen", "words")]) > scorer.score(("a", "dog"), [("unseen", "words")])


@pytest.fixture(scope="module")
def written():
    """Captions of scenes, some of them shuffled, cut or of another scene, and the references they are held against."""
    rng = random.Random(0)
    scenes = open_dataset("scenes", "val")
    texts = [scenes.captions(i) for i in range(300)]
    candidates, references = [], []
    for i, captions in enumerate(texts):
        words = list(ptb_words(captions[0] if i % 3 else rng.choice(texts)[1]))
        rng.shuffle(words) if i % 5 == 0 else None
        candidates.append(tuple(words[: rng.randint(0, 2)] if i % 50 == 0 else words))
        references.append([ptb_words(caption) for caption in captions[1:]])
    return candidates, references


@pytest.mark.full
def test_against_pycocoevalcap(written):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = written
    truth = {i: [" ".join(words) for words in refs] for i, refs in enumerate(references)}
    given = {i: [" ".join(words)] for i, words in enumerate(candidates)}
    ours = bleu(candidates, references)
    corpus, each = Bleu(4).compute_score(truth, given, verbose=0)
    assert ours.corpus == pytest.approx(corpus, abs=1e-6)
    assert [s[3] for s in ours.captions] == pytest.approx(each[3], abs=1e-6)
    assert cider_d(candidates, references) == pytest.approx(list(Cider().compute_score(truth, given)[1]), abs=1e-6)
    assert rouge_l(candidates, references) == pytest.approx(list(Rouge().compute_score(truth, given)[1]), abs=1e-6)


@pytest.mark.full
def test_words_and_meteor_by_java(written):
    if shutil.which("java") is None:
        pytest.skip("there is no command java")
    require_java(spice=False)
    candidates, references = written
    captions = [caption for i in range(300) for caption in open_dataset("scenes", "val").captions(i)]
    assert differing(captions + [caption for caption, _ in CASES]) == []
    first = [refs[0] for refs in references]
    assert 0.1 < meteor(candidates, references) < meteor(first, references) == pytest.approx(1.0, abs=0.01)
