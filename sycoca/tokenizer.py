"""Captions to token ids and back: byte-level BPE, trained on captions or CLIP's own, and WordPiece.

    [SOT] w1 ... wn [EOT] [PAD] ...        BPE
    [CLS] w1 ... wn [PAD] ...              WordPiece; [SEP] behind the words where the vocabulary's file says so

Text is lower-cased before it is split, so that no text can spell a special token. A caption that does not fit loses
its end, never its [EOT]. What lies behind the first [EOT] is padding; in CLIP, the padding id is a word as well.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

_OWN = ("[PAD]", "[SOT]", "[EOT]")
_WORDPIECE = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
# What marks a piece that goes on with a word, and, while pieces are learned, one that begins it.
_CONTINUES, _BEGINS = "##", "\u2581"
_CLIP = ("!", "<start_of_text>", "<end_of_text>")
_CLIP_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_MERGES = 49152 - 256 - 2
_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
# A caption longer than this many characters per token of the context is cut before it is split.
_CHARACTERS_PER_TOKEN = 64
# Of a caption that a vocabulary learns from; merges within one endless word would take hours.
_TRAINED_CHARACTERS = 4096
# What ftfy's repairs come to on well-encoded captions: straight quotes, no control characters, and ligatures and
# full-width forms taken apart.
_REPAIRS = {
    **dict.fromkeys([0x02BC, *range(0x2018, 0x201C)], "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    **dict.fromkeys([*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F, *range(0x206A, 0x2070), 0xFEFF], None),
    **dict.fromkeys(range(0xFFF9, 0xFFFD), None),
}
# Terminal commands and reversed writing; line ends and tabs are white space, joiners belong to words and emoji.
_UNPRINTED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u206f\ufeff]")
_APART = [*range(0xFB00, 0xFB07), *range(0xFF01, 0xFFF0), 0x3000, 0x0132, 0x0133, *range(0x01C4, 0x01CD)]
_REPAIRS |= {c: unicodedata.normalize("NFKC", chr(c)) for c in _APART} | {0x0149: "'n"}


def _clip_clean(text: str) -> str:
    if "<" not in text:
        text = html.unescape(text)
    text = unicodedata.normalize("NFC", text.translate(_REPAIRS))
    return html.unescape(html.unescape(text))


def _bounded(text: str, most: int) -> str:
    """A caption of at most so many characters that can be written as bytes."""
    if not isinstance(text, str):
        raise TypeError(f"tokenizer: a caption must be a string, got {type(text).__name__}")
    if len(text) > most:
        # White space and what is not printed must not hide the words behind it.
        text = " ".join(_UNPRINTED.sub("", text).split())[:most]
    # Lone surrogates are no characters.
    return text.encode("utf-8", "replace").decode("utf-8")


def _normalizer(printed_only: bool) -> normalizers.Normalizer:
    unprinted = [normalizers.Replace(Regex(_UNPRINTED.pattern), "")] if printed_only else []
    steps = [
        *unprinted,
        normalizers.NFC(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
        normalizers.Lowercase(),
    ]
    return normalizers.Sequence(steps)


def _bytes_to_characters() -> list[str]:
    """The 256 byte characters in CLIP's order: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in set(printable)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


class Tokenizer:
    """A vocabulary with its start, end and padding ids, and that of [MASK] where it has one, else None.

    Args:
        backend: a tokenizer of the `tokenizers` library whose vocabulary holds the special tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._is_clip = backend.token_to_id(_CLIP[1]) is not None
        self._is_wordpiece = isinstance(backend.model, models.WordPiece)
        names = _WORDPIECE[:3] if self._is_wordpiece else _CLIP if self._is_clip else _OWN
        ids = [backend.token_to_id(name) for name in names]
        if None in ids:
            raise ValueError("tokenizer: the vocabulary lacks its padding, start or end token")
        self.pad_id, self.sot_id, self.eot_id = ids
        self.mask_id = backend.token_to_id(_WORDPIECE[3]) if self._is_wordpiece else None
        # A backend tells it by what it would put around a text.
        self._ends = not self._is_wordpiece or backend.encode("").ids[-1:] == [self.eot_id]

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs."""
        return self._backend.get_vocab_size()

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learns a byte-level BPE.

        Args:
            captions: the texts; equal multisets of texts give equal vocabularies.
            vocab_size: rows at most, special tokens and the 256 bytes included.

        Returns:
            The tokenizer.

        Raises:
            ValueError: no room for the bytes and special tokens.
        """
        least = 256 + len(_OWN)
        if vocab_size < least:
            raise ValueError(f"tokenizer: vocab_size must be at least {least}, got {vocab_size}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.normalizer = _normalizer(printed_only=True)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(_OWN),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((_bounded(text, _TRAINED_CHARACTERS) for text in captions), trainer)
        learned = json.loads(backend.to_str())["model"]
        return cls(cls._assemble(models.BPE(learned["vocab"], [tuple(m) for m in learned["merges"]]), _OWN))

    @classmethod
    def train_wordpiece(cls, captions: Iterable[str], vocab_size: int, *, sep: bool = False) -> Tokenizer:
        """Learns a WordPiece vocabulary.

        Args:
            captions: the texts; equal multisets of texts give equal vocabularies.
            vocab_size: rows at most, special tokens included.
            sep: whether [SEP] ends the words.

        Returns:
            The tokenizer.

        Raises:
            ValueError: no room for special tokens and a letter.
        """
        letters = (vocab_size - len(_WORDPIECE)) // 2
        if letters < 1:
            raise ValueError(f"tokenizer: vocab_size must be at least {len(_WORDPIECE) + 2}, got {vocab_size}")
        # The library's own WordPiece trainer numbers pieces in another order each time. Merges of letters that know
        # where a word begins are the same pieces, learned in one order.
        learner = tokenizers.Tokenizer(models.BPE())
        learner.normalizer = _normalizer(printed_only=True)
        learner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace(_BEGINS, prepend_scheme="always", split=False)]
        )
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, limit_alphabet=letters + 1, show_progress=False)
        learner.train_from_iterator((_bounded(text, _TRAINED_CHARACTERS) for text in captions), trainer)
        found = json.loads(learner.to_str())["model"]["vocab"]
        pieces = sorted(found, key=found.get)
        single = [piece for piece in pieces if len(piece) == 1 and piece != _BEGINS]
        words = [*_WORDPIECE, *single, *(_CONTINUES + letter for letter in single)]
        for piece in pieces:
            if len(piece) > 1:
                words.append(piece[1:] if piece.startswith(_BEGINS) else _CONTINUES + piece)
        vocabulary = {word: i for i, word in enumerate(list(dict.fromkeys(words))[:vocab_size])}
        backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=_WORDPIECE[4]))
        backend.normalizer = _normalizer(printed_only=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(prefix=_CONTINUES)
        return cls(backend).ending(sep)

    def ending(self, sep: bool) -> Tokenizer:
        """The same WordPiece vocabulary with or without [SEP] behind the words."""
        if not self._is_wordpiece:
            raise ValueError("tokenizer: only a WordPiece vocabulary can leave out its end token")
        data = json.loads(self._backend.to_str())
        # Published files have text that spells a special token become it, and some cut and pad.
        data |= {"added_tokens": [], "truncation": None, "padding": None}
        backend = tokenizers.Tokenizer.from_str(json.dumps(data))
        start, end = _WORDPIECE[1:3]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}" if sep else f"{start} $A",
            special_tokens=[(start, self.sot_id), (end, self.eot_id)],
        )
        return type(self)(backend)

    def ended(self) -> Tokenizer:
        """This vocabulary with its end token behind every text, as texts that are written need it."""
        return self if self._ends else self.ending(True)

    def continues(self) -> Tensor:
        """Which tokens (V,) bool go on with a word that an earlier one began; none where the kind cannot tell."""
        found = torch.zeros(self.vocab_size, dtype=torch.bool)
        if self._is_wordpiece:
            found[[i for word, i in self._backend.get_vocab().items() if word.startswith(_CONTINUES)]] = True
        return found

    @classmethod
    def clip(cls) -> Tokenizer:
        """CLIP's BPE, from the vocabulary file of an installed open_clip_torch; the package itself is not imported.

        Ids equal those of open_clip's SimpleTokenizer, except that text which spells a special token stays text, and
        that mojibake and terminal escapes are left as they are.

        Raises:
            ModuleNotFoundError: open_clip_torch is not installed.
        """
        spec = importlib.util.find_spec("open_clip")
        folders = list(spec.submodule_search_locations or ()) if spec else []
        path = next((Path(f) / _CLIP_FILE for f in folders if (Path(f) / _CLIP_FILE).is_file()), None)
        if path is None:
            raise ModuleNotFoundError(
                'tokenizer: the vocabulary of CLIP comes with open_clip_torch: pip install -e ".[openclip]"',
                name="open_clip",
            )
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : _CLIP_MERGES + 1]
        merges = [tuple(line.split()) for line in lines]
        characters = _bytes_to_characters()
        words = [*characters, *(c + "</w>" for c in characters), *("".join(m) for m in merges), *_CLIP[1:]]
        vocabulary = {word: i for i, word in enumerate(words)}
        model = models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>")
        return cls(cls._assemble(model, _CLIP))

    @staticmethod
    def _assemble(model: models.BPE, special: tuple[str, str, str]) -> tokenizers.Tokenizer:
        """A backend in which special tokens are rows of the vocabulary and nothing that text could match."""
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = _normalizer(printed_only=special != _CLIP)
        if special == _CLIP:
            words = pre_tokenizers.Split(Regex(_CLIP_WORD), behavior="removed", invert=True)
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
        else:
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        start, end = special[1:]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}",
            special_tokens=[(start, backend.token_to_id(start)), (end, backend.token_to_id(end))],
        )
        return backend

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Reads a file that `save` wrote.

        Raises:
            ValueError: not such a file.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"tokenizer '{path}': {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"tokenizer '{path}': not a text file") from None
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:
            raise ValueError(f"tokenizer '{path}': not a tokenizer file ({str(error).splitlines()[0]})") from None
        return cls(backend)

    def save(self, path: str | os.PathLike) -> None:
        """Writes one JSON file in the format of the `tokenizers` library."""
        Path(path).write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    def __getstate__(self) -> str:
        return self._backend.to_str()

    def __setstate__(self, state: str) -> None:
        self.__init__(tokenizers.Tokenizer.from_str(state))

    def encode(self, texts: Sequence[str], context_length: int) -> Tensor:
        """Token ids of a batch of texts.

        Args:
            texts: B captions.
            context_length: T, at least 2.

        Returns:
            (B, T) int64.
        """
        if isinstance(texts, str):
            raise TypeError("tokenizer: encode takes a list of captions, got one string")
        if context_length < 2:
            raise ValueError(f"tokenizer: context_length must be at least 2, got {context_length}")
        most = _CHARACTERS_PER_TOKEN * context_length
        cleaned = [self._clean(text, most) for text in texts]
        tokens = np.full((len(cleaned), context_length), self.pad_id, dtype=np.int64)
        for row, encoding in zip(tokens, self._backend.encode_batch_fast(cleaned, add_special_tokens=False)):
            ids = encoding.ids[: context_length - 1 - self._ends]
            row[0] = self.sot_id
            row[1 : len(ids) + 1] = ids
            if self._ends:
                row[len(ids) + 1] = self.eot_id
        return torch.from_numpy(tokens)

    def words(self, text: str, context_length: int) -> list[tuple[str, list[int]]]:
        """Words of a text and where in the row of `encode` their tokens stand; words that do not fit are missing.

        Args:
            text: a caption.
            context_length: T, at least 2.

        Returns:
            Each word as it is written, with its positions, ascending.
        """
        cleaned = self._clean(text, _CHARACTERS_PER_TOKEN * context_length)
        encoding = self._backend.encode(cleaned, add_special_tokens=False)
        found: dict[int, tuple[list[int], list[int]]] = {}
        for position, (word, span) in enumerate(zip(encoding.word_ids, encoding.offsets), 1):
            if position <= context_length - 1 - self._ends:
                positions, ends = found.setdefault(word, ([], []))
                positions.append(position)
                ends += span
        return [(cleaned[min(ends) : max(ends)].strip(), positions) for positions, ends in found.values()]

    def _clean(self, text: str, most: int) -> str:
        text = _bounded(text, most)
        return _clip_clean(text) if self._is_clip else text

    def decode(self, tokens: Tensor | Sequence[Sequence[int]] | np.ndarray) -> list[str]:
        """Texts of a batch of token ids.

        Args:
            tokens: (B, T) integers, with or without start token; what follows the first end token is ignored.

        Returns:
            B texts: words apart by single spaces, no special tokens.
        """
        rows = tokens.tolist() if isinstance(tokens, (Tensor, np.ndarray)) else [list(row) for row in tokens]
        return [self._decode_row(row) for row in rows]

    def _decode_row(self, row: list[int]) -> str:
        if self.eot_id in row:
            row = row[: row.index(self.eot_id)]
        drop = {self.sot_id} if self._is_clip else {self.sot_id, self.pad_id}
        # Rows of an embedding table behind the vocabulary have no text.
        text = self._backend.decode([i for i in row if i not in drop and 0 <= i < self.vocab_size])
        if self._is_clip:
            text = text.replace("</w>", " ")
        # A caption cut within a character ends in a mark that stands for none.
        return " ".join(text.replace("\ufffd", "").split())
