"""VQA accuracy: every rule of the official normalisation, by hand."""

import pytest

from train.tasks.vqa_accuracy import normalised, vqa_accuracy, without_punctuation

RULES = {
    "white space": ("  red\nand\tblue ", "red and blue"),
    "case": ("Red Bus", "red bus"),
    "articles": ("a cat on an old the mat", "cat on old mat"),
    "an article alone": ("the", ""),
    "number words": ("two dogs and ten cats", "2 dogs and 10 cats"),
    "none is zero": ("none", "0"),
    "eleven stays": ("eleven", "eleven"),
    "a mark between letters becomes a space": ("black/white", "black white"),
    "a hyphen as well": ("t-shirt", "t shirt"),
    "a mark beside a space vanishes": ("yes, sir", "yes sir"),
    "a mark anywhere beside a space vanishes everywhere": ("a-b - c", "ab c"),
    "a comma in a number takes every mark with it": ("1,000 left/right", "1000 leftright"),
    "a period at the end": ("no.", "no"),
    "a period before a digit stays": ("3.5", "3.5"),
    "a period behind a digit": ("3. item", "3 item"),
    "an apostrophe is no punctuation": ("dog's", "dog's"),
    "a colon is none either": ("10:30", "10:30"),
    "a contraction without its apostrophe": ("dont know", "don't know"),
    "one of two apostrophes missing": ("couldn'tve couldnt've", "couldn't've couldn't've"),
    "both missing is another word": ("couldntve", "couldntve"),
    "words that contractions would hide": ("hell well shell", "hell well shell"),
    "somebody'd, as the official table has it": ("somebody'd", "somebodyd"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    given, expected = RULES[rule]
    assert normalised(given) == expected


def test_human_answers_lose_punctuation_only_and_only_if_they_differ():
    assert without_punctuation("The Bus!") == "The Bus "
    alike = ["black/white"] * 10
    assert vqa_accuracy("black/white", alike) == 0
    assert vqa_accuracy("black/white", [*alike[:9], "grey"]) == pytest.approx(1.0)


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_of_ten_answers(agreeing, expected):
    answers = ["yes"] * agreeing + [f"no {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy("Yes.", answers) == pytest.approx(expected)


def test_an_empty_answer_is_wrong_and_a_single_human_answer_is_matched():
    assert vqa_accuracy("", ["yes"] * 10) == 0
    assert vqa_accuracy("two", ["2"]) == 1 and vqa_accuracy("two", ["3"]) == 0
