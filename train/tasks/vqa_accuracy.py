"""Accuracy of answers as the VQA challenge counts it.

    accuracy = 1/m sum_i min(1, |{j != i: answer_j = given}| / 3)          m human answers, usually ten

The given answer is normalised: white space, punctuation, periods, case, number words, articles, contractions. Human
answers are normalised in their punctuation only, and only where they are not all alike, as the official tool does;
their files come normalised otherwise. Its quirks are kept: a mark of punctuation beside white space, or any mark where
the answer has a comma between digits, vanishes, elsewhere it becomes a space; a period stays before a digit.
"""

import re
from collections import Counter
from collections.abc import Sequence

_MARKS = (*';/[]"{}()=+', "\\", *"_-><@`,?!")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(n) for n, word in enumerate(_NUMBER_WORDS.split())}
_NUMBERS["none"] = "0"
_ARTICLES = frozenset(["a", "an", "the"])
_SHORT_FORMS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""
# Each is recognised when one of its apostrophes is missing.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in _SHORT_FORMS.split() for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def without_punctuation(answer: str) -> str:
    """An answer as the official tool leaves human answers."""
    cleaned, has_number = answer, _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _MARKS:
        beside_space = mark + " " in answer or " " + mark in answer
        cleaned = cleaned.replace(mark, "" if beside_space or has_number else " ")
    return _PERIOD.sub("", cleaned, count=_MOST_PERIODS)


def normalised(answer: str) -> str:
    """An answer as the official tool compares it."""
    flat = without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = [_NUMBERS.get(word, word) for word in flat.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def compared(answers: Sequence[str]) -> list[str]:
    """The human answers to a question as they are compared with a normalised one."""
    return [without_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else list(answers)


def vqa_accuracy(given: str, answers: Sequence[str]) -> float:
    """Accuracy of one answer.

    Args:
        given: what the model answers, as it comes.
        answers: at least one human answer, those that agree repeated. A single one is matched by equality.

    Returns:
        In 0..1.
    """
    return accuracy_of_count(Counter(compared(answers))[normalised(given)], len(answers))


def accuracy_of_count(agreeing: int, answers: int) -> float:
    """Accuracy of an answer that so many of the human answers agree with."""
    if answers == 1:
        return float(agreeing)
    # Leaving out one that agrees, then one that does not.
    left_out = agreeing * min(1.0, (agreeing - 1) / 3) + (answers - agreeing) * min(1.0, agreeing / 3)
    return left_out / answers
