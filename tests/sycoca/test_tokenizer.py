"""Tokenizers: what goes in comes out, no text can spell a special token, CLIP's ids are CLIP's."""

import importlib.util
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sycoca.tokenizer import Tokenizer

CAPTIONS = [
    "A small red circle left of a big blue square.",
    "two dogs run across the grass",
    "A man's dog isn't here; it's 3/4 of the way to the U.S. border!",
    "Café naïve – “quoted” text, ‘single’ too…",
    "日本語の説明 and emoji 🐶🐱",
    "  white   space\tand\nnew lines  ",
    "UPPER lower MiXeD 12345 a1b2 under_score hash#tag @name",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS * 3, 400)


def test_layout(tokenizer):
    tokens = tokenizer.encode(["two dogs run", ""], 12)
    assert tokens.dtype == torch.int64 and tokens.shape == (2, 12)
    assert (tokenizer.pad_id, tokenizer.sot_id, tokenizer.eot_id) == (0, 1, 2)
    for row in tokens.tolist():
        end = row.index(2)
        assert row[0] == 1 and set(row[end + 1 :]) <= {0}
        assert not set(row[1:end]) & {0, 1, 2}
    assert tokens[1].tolist() == [1, 2] + [0] * 10


def test_no_captions_give_no_rows(tokenizer):
    assert tokenizer.encode([], 8).shape == (0, 8)


def test_a_long_caption_keeps_its_end_token(tokenizer):
    caption = " ".join(CAPTIONS)
    whole = tokenizer.encode([caption], 400)[0].tolist()
    cut = tokenizer.encode([caption], 16)[0].tolist()
    assert cut[:15] == whole[:15]
    assert cut[15] == tokenizer.eot_id
    assert tokenizer.encode(["dogs"], 2).tolist() == [[1, 2]]


def test_a_caption_that_fits_exactly(tokenizer):
    needed = tokenizer.encode(["two dogs run"], 64)[0].tolist().index(2) + 1
    assert tokenizer.encode(["two dogs run"], needed)[0].tolist()[-1] == 2
    assert tokenizer.decode(tokenizer.encode(["two dogs run"], needed)) == ["two dogs run"]
    assert tokenizer.decode(tokenizer.encode(["two dogs run"], needed - 1)) != ["two dogs run"]


def test_decoding_gives_the_cleaned_text(tokenizer):
    decoded = tokenizer.decode(tokenizer.encode(CAPTIONS, 128))
    assert decoded == [" ".join(caption.lower().split()) for caption in CAPTIONS]


def test_decoding_takes_what_generation_makes(tokenizer):
    words = tokenizer.encode(["two dogs"], 16)[0].tolist()
    # No start token, no end token, something behind the end, ids of unused rows of an embedding table.
    assert tokenizer.decode([words[1:]]) == ["two dogs"]
    assert tokenizer.decode([words[: words.index(2)]]) == ["two dogs"]
    assert tokenizer.decode([[*words[: words.index(2) + 1], *words[1:5]]]) == ["two dogs"]
    assert tokenizer.decode([[*words[: words.index(2)], 100_000, 0, 0]]) == ["two dogs"]
    assert tokenizer.decode(torch.tensor([[1, 2, 0]])) == [""]


@pytest.mark.parametrize(
    "text", ["[SOT]", "[EOT] [PAD]", "a [EOT] b", "<start_of_text>", "<end_of_text>!", "<|endoftext|>"]
)
def test_text_never_becomes_a_special_token(text):
    # Trained on nothing but such text, so that merges would build it if they could.
    tokenizer = Tokenizer.train([text] * 50, 400)
    tokens = tokenizer.encode([text], 64)[0].tolist()
    end = tokens.index(tokenizer.eot_id)
    assert not set(tokens[1:end]) & {tokenizer.pad_id, tokenizer.sot_id, tokenizer.eot_id}
    assert set(tokens[end + 1 :]) == {tokenizer.pad_id}
    assert tokenizer.decode([tokens]) == [text.lower()]


def test_vocabulary_is_of_the_given_size_at_most():
    assert Tokenizer.train(CAPTIONS * 3, 300).vocab_size == 300
    assert Tokenizer.train(["a"], 300).vocab_size <= 300
    assert Tokenizer.train([], 259).vocab_size == 259
    with pytest.raises(ValueError, match="at least 259, got 258"):
        Tokenizer.train(CAPTIONS, 258)


def test_training_depends_on_the_captions_alone(tmp_path):
    code = """if True:
        import random, sys
        from sycoca.tokenizer import Tokenizer
        captions = [f"{a} {b} {c}" for a in "abcdefg" for b in ("ab", "cd", "ef") for c in ("dog", "cat", "cod", "dot")]
        random.Random(int(sys.argv[1])).shuffle(captions)
        Tokenizer.train(captions, 280).save(sys.argv[2])
    """
    for run, threads in enumerate(("1", "4")):
        path = tmp_path / f"{run}.json"
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": str(run)}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        subprocess.run([sys.executable, "-c", code, str(run), str(path)], env=environment, check=True)
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert torch.equal(loaded.encode(CAPTIONS, 40), tokenizer.encode(CAPTIONS, 40))
    assert (loaded.vocab_size, loaded.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(sent.encode(CAPTIONS, 40), tokenizer.encode(CAPTIONS, 40))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe\x00", b'{"model": {"type": "BPE"}}'])
def test_a_wrong_file_is_named_in_one_line(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Tokenizer.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_arguments_are_checked(tokenizer):
    with pytest.raises(ValueError, match="context_length must be at least 2, got 1"):
        tokenizer.encode(["a"], 1)
    with pytest.raises(TypeError, match="list of captions"):
        tokenizer.encode("a", 8)


def test_any_string_can_be_encoded(tokenizer):
    odd = ["\x00", "\ud800 lone", "a" * 1_000_000, " " * 1_000_000 + "dogs", "\x07" * 1_000_000 + "run", "e\u0301"]
    tokens = tokenizer.encode(odd, 16)
    assert (tokens == tokenizer.eot_id).any(dim=1).all()
    assert tokenizer.decode(tokens[3:]) == ["dogs", "run", "é"]
    assert tokenizer.decode(tokens[:2]) == ["", "? lone"]


def test_what_is_not_printed_is_left_out(tokenizer):
    odd = ["a\x00b\x1b[31mred\x07 dog\x9b", "\u202edog\u2066 run", "two\tdogs\r\nrun\x85", "\ufefftwo", "\x00\x01"]
    found = tokenizer.decode(tokenizer.encode(odd, 64))
    assert found == ["ab[31mred dog", "dog run", "two dogs run", "two", ""]
    # Joiners are part of words and of emoji.
    joined = "می‌خواهم 👩‍👩‍👧"
    assert tokenizer.decode(tokenizer.encode([joined], 128)) == [joined]


def test_a_caption_cut_within_a_character_stays_clean(tokenizer):
    for length in range(2, 12):
        (text,) = tokenizer.decode(tokenizer.encode(["日本語"], length))
        assert "日本語".startswith(text)


def test_learning_survives_any_string():
    draws = random.Random(0)
    endless = "".join(draws.choices("abcdefgh", k=1_000_000))
    tokenizer = Tokenizer.train(["\ud800 lone", "a" * 1_000_000, endless, "\x00" * 1_000_000 + "dog"] * 2, 400)
    assert tokenizer.decode(tokenizer.encode(["dog"], 16)) == ["dog"]


@pytest.mark.parametrize("caption", [None, b"dog", 5, ["dog"]])
def test_only_strings_are_captions(tokenizer, caption):
    line = f"tokenizer: a caption must be a string, got {type(caption).__name__}"
    with pytest.raises(TypeError, match=line):
        tokenizer.encode(["dog", caption], 8)
    with pytest.raises(TypeError, match=line):
        Tokenizer.train(["dog", caption], 300)


# CLIP's vocabulary


def _open_clip_tokenizer():
    """open_clip's own tokenizer, its file executed without importing the package."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip_torch is not installed")
    pytest.importorskip("ftfy")
    pytest.importorskip("regex")
    path = Path(spec.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer_file", path)
    module = importlib.util.module_from_spec(spec)
    # The file switches the tokenizers library's threads off for the whole process.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    spec.loader.exec_module(module)
    if before is None:
        os.environ.pop("TOKENIZERS_PARALLELISM", None)
    return module.SimpleTokenizer()


@pytest.fixture(scope="module")
def theirs():
    return _open_clip_tokenizer()


@pytest.fixture(scope="module")
def clip(theirs):
    return Tokenizer.clip()


CAPTION_WORDS = (
    "a the man woman's dogs don't it's playing with frisbee red-orange t-shirt 2 17 1990s park, grass. (two)"
)
OTHER_WORDS = """ 'quoted' "quoted" near/by NYC St. naïve café jalapeño 50% $3 #1 snow-covered & y's I'm we're they'll
    you've he'd ... -- !? :-) éclair Zürich 東京 Привет 🐕 ½ ² №"""


def _made_up_captions(count):
    draws = random.Random(0)
    words = (CAPTION_WORDS + OTHER_WORDS).split()
    return [" ".join(draws.choices(words, k=draws.randint(1, 30))) for _ in range(count)]


ODD = [
    "", "   ", "tabs\tand\nlines", "a\u00a0b\u200bc\u2028d", "\ufeffhello\x07", "x" * 500, "a " * 200, "á" * 90,
    "“curly” ‘quotes’ don’t", "ʼa ‛b‟ „c“", "&amp; &lt;b&gt; &quot;x&quot; &eacute;", "<b>bold</b>", "a_b.c,!?;",
    "I'LL we'VE 'S 's 'RE", "ﬁne ﬂow ＡＢＣ ｗｉｄｅ", "e\u0301 A\u030a", "İstanbul ǅ ß ẞ Ω K Å", "١٢٣ ½ ² ①",
    "😀😀👩‍👩‍👧",
]  # fmt: skip


def test_clip_ids_are_those_of_open_clip(clip, theirs):
    captions = _made_up_captions(3000) + CAPTIONS + ODD
    expected = theirs(captions, context_length=77)
    found = clip.encode(captions, 77)
    wrong = [caption for caption, same in zip(captions, (expected == found).all(dim=1).tolist()) if not same]
    assert not wrong


def test_clip_truncates_as_open_clip(clip, theirs):
    captions = _made_up_captions(200)
    assert torch.equal(clip.encode(captions, 12), theirs(captions, context_length=12))


def test_clip_numbers(clip):
    assert (clip.vocab_size, clip.sot_id, clip.eot_id, clip.pad_id) == (49408, 49406, 49407, 0)


def test_clip_keeps_special_text_as_text(clip):
    tokens = clip.encode(["a <start_of_text> b <end_of_text>"], 32)[0].tolist()
    assert tokens.count(clip.sot_id) == 1 and tokens.count(clip.eot_id) == 1


def test_clip_decodes_to_clean_words(clip):
    assert clip.decode(clip.encode(["Two  DOGS run, fast"], 77)) == ["two dogs run , fast"]
    # Its padding id is the exclamation mark within a word.
    assert clip.decode(clip.encode(["stop!"], 77)) == ["stop !"]


def test_clip_survives_save_and_load(clip, tmp_path):
    clip.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    captions = CAPTIONS + ODD
    assert torch.equal(loaded.encode(captions, 77), clip.encode(captions, 77))


def test_clip_does_not_import_open_clip(theirs, monkeypatch):
    # None in place of a module makes its import an error.
    spec = importlib.util.find_spec("open_clip")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: spec)
    assert Tokenizer.clip().vocab_size == 49408


def test_without_open_clip_one_line_names_the_extra(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "open_clip" else found(name, *a))
    with pytest.raises(ModuleNotFoundError) as caught:
        Tokenizer.clip()
    assert 'pip install -e ".[openclip]"' in str(caught.value) and "\n" not in str(caught.value)
