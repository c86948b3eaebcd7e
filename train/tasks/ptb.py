"""Words of a caption as COCO's evaluation counts them, without Java.

Penn Treebank tokens, lower-cased, sentence punctuation left out: what Stanford's PTBTokenizer (CoreNLP 3.4.1, options
-preserveLines -lowerCase) and the list of punctuation in pycocoevalcap leave of a caption. Periods that this
tokenizer adds behind an abbreviation at the end of a sentence are punctuation too, so sentences need not be found.
Not modelled: smileys, and numbers of telephones.
"""

import re
from functools import lru_cache

# Left out; a run of several marks ("?!") is a word of its own and stays, as do the brackets, which are lower-cased.
_PUNCTUATION = frozenset(["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", ";", "-"])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_LOOKS = {
    **dict.fromkeys("‘‛", "`"),
    **dict.fromkeys("’", "'"),
    **dict.fromkeys("“”„«»", '"'),
    **dict.fromkeys("–—―", " -- "),
    "…": " ... ",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
    "£": "#",
    "€": "$",
    "¢": "cents",
}
_LOOKS = str.maketrans(_LOOKS)

# Words that keep their period wherever they stand.
_ABBREVIATIONS = """
    jan feb mar apr jun jul aug sept sep oct nov dec mon tue tues wed thu thurs fri mr mrs ms dr drs prof gov
    sen rep reps pres gen col maj capt cpl cmdr lt sgt sr jr rev hon msgr messrs adm st mt ft ct est ave blvd
    rd sq bldg dept univ inc corp co cos bros ltd mfg assn intl natl vs etc cf al calif fla penn ariz ala ark
    colo conn ga ill ind kan ky md mich minn miss mo mont neb nev okla pa tenn va vt wash wis wyo
"""
# Those of them that are words as well keep it only when they are written with a capital.
_CAPITAL_ONLY = "ga ill ind kan ky md mich miss mo mont neb nev pa va wash ala ark"
_PARTS = r"(?:'(?:s|m|d|re|ve|ll)\b)"
_WORD = r"[^\W_]+"

_TOKEN = re.compile(
    rf"""
    (?P<url>https?://[^\s"<>|()]+[^\s"<>|.!?(){{}},-]|www\.[^\s"<>|()]+[^\s"<>|.!?(){{}},-])
  | (?P<mail>[\w.+-]+@[\w-]+(?:\.[\w-]+)*|@\w+|\#[^\W\d]\w*)
  | (?P<tag></?[A-Za-z!][^>\s]*>)
  | (?P<split>\b(?:cannot|gonna|gotta|wanna|lemme|gimme)\b|'t(?:is|was)\b|more'n\b)
  | (?P<time>\d+(?::\d+)+(?=[ap]m\b))
  | (?P<acronym>\b(?:[^\W\d_]\.)+[^\W\d_]\b\.?|\bph\.d\.|\b(?:us|hk|nz|[ac])\$)
  | (?P<upper>\b[A-Z]+(?:&[A-Z]+)+\b)
  | (?P<number>(?<![\w.])[-+]?(?:\d+(?:[,.:/]\d+)*|\.\d+(?:[,.]\d+)*)(?![\w/-]))
  | (?P<abbreviation>\b(?:{"|".join(_ABBREVIATIONS.split())})\.(?=\s|$|,))
  | (?P<numero>\bno\.(?=\s*\d))
  | (?P<initial>\b[^\W\d_]\.(?=\s|$|\.))
  | (?P<short>'n'|(?<!\d)'(?:em|n|cause|till?|\d\ds?)(?!\w))
  | (?P<negated>[^\W_]*?n't\b)
  | (?P<part>{_PARTS})
  | (?P<joined>(?:d'ye|o'clock|ma'am|c'mon)\b)
  | (?P<word>
        [^\W\d_y]'(?=[^\W_]{{2,}}){_WORD}
      | (?:{_WORD}(?:-{_WORD}|/{_WORD}|_{_WORD})*)(?:[.!?](?=[^\W\d_]){_WORD}(?:-{_WORD})*)*(?:\+\+|\#(?!\w))?
    )
  | (?P<ends>[?!]+)
  | (?P<mark>\*+|_+|.)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NEGATION = re.compile(r"n't\b", re.IGNORECASE)
_SPLIT = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "wanna": ("wan", "na"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
    "more'n": ("more", "'n"),
}


@lru_cache(maxsize=1 << 16)
def ptb_words(caption: str) -> tuple[str, ...]:
    """Words of a caption, lower-cased, without sentence punctuation.

    Args:
        caption: any text; line breaks are white space.

    Returns:
        The words in order; empty where there is none.
    """
    return tuple(word for word in _tokens(caption.translate(_LOOKS)) if word not in _PUNCTUATION)


def _tokens(text: str):
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        match = _TOKEN.match(text, position)
        kind, token = match.lastgroup, match.group()
        position = match.end()
        if kind == "word":
            # A negation ends the word in front of it: "does" "n't"; "y'" and what follows it are two.
            token, position = _cut(text, token, match.start(), position)
        lowered = token.lower()
        if kind == "split":
            yield from _SPLIT[lowered]
        elif kind == "negated" and len(lowered) > len("n't"):
            yield lowered[:-3]
            yield "n't"
        elif kind == "abbreviation" and token[:-1].lower() in _CAPITAL_ONLY.split() and token[0].islower():
            yield lowered[:-1]
        elif kind == "upper" and not token.isupper():
            # Only capitals are joined by an ampersand.
            first = re.match(_WORD, token).group()
            position = match.start() + len(first)
            yield first.lower()
        else:
            yield _BRACKETS.get(lowered, lowered)


def _cut(text: str, token: str, start: int, end: int) -> tuple[str, int]:
    if text.startswith("'", end) and token.lower() == "y":
        return token + "'", end + 1
    if token[-1:].lower() == "n" and _NEGATION.match(text, end - 1) and len(token) > 1:
        return token[:-1], end - 1
    return token, end
