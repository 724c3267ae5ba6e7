"""What happens to a text before a model reads it: the first step of the saved pipeline, and nowhere else.

HTML entities become the signs they stand for, as an operator's gateway may leave them in. Characters that
are coded in several ways become one (Unicode's NFKC: full-width and mathematical letters, ligatures).
Invisible characters, with which words are cut up to be hidden from filters, go. So does the mark <#>: it tells a
telephone where a one-time password begins, and it stands where numbers were blanked in the UCI collection, so a
model would learn that it means ham, and anyone can write it.
"""

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

# Soft hyphen, zero-width and directional characters, joiners, variation selectors, byte order mark.
INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
JOINER = "\u034f"
# Such a run may consist of marks that combine; word characters do not, but for two of Japanese.
RUN = re.compile("(?:[^\\w\\s]|[\uff9e\uff9f]){30}")
LONG = 1000  # characters
# Cut, where it can be, before what combines with nothing before it.
PIECE = re.compile(f".{{1,{LONG}}}(?![\u1160-\u11ff\uff9e-\uffdc])(?=[\\w\\s{JOINER}]|\\Z)|.{{1,{LONG}}}", re.DOTALL)
MARK = "<#>"
DIGIT = re.compile(r"\d")
# What is normalised on its own: the mark, an entity, or a character with the marks that combine with it.
CLUSTER = re.compile(
    r"(?:<|&lt;)#(?:>|&gt;)|&[#\w]+;?|.[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]*", re.DOTALL
)


def normalise(text: str) -> str:
    """Return a text in the form that models read."""
    if text.isascii() and "&" not in text and MARK not in text:  # most are, and are so already
        return text
    text = html.unescape(text)
    if len(text) <= LONG:
        text = unicodedata.normalize("NFKC", text)
    else:
        # Marks are sorted in a time that grows with the square of their number, unless cut in runs.
        text = RUN.sub(rf"\g<0>{JOINER}", text)
        # Piece by piece, as the whole of a text of ligatures would keep the interpreter for 10 ms.
        text = "".join(unicodedata.normalize("NFKC", piece) for piece in PIECE.findall(text))
    return INVISIBLE.sub("", text).replace(MARK, " ")


def plain(text: str) -> str:
    """Return a text in lower case with every digit a zero, so that 1,000 and 2,500 are the same word."""
    return DIGIT.sub("0", text.lower())


def normalise_texts(texts: Iterable[str]) -> list[str]:
    """Return each text in the form that models read: the function of the pipeline's first step."""
    return [normalise(text) for text in texts]


def origins(text: str, normalised: str) -> Sequence[int]:
    """Return for each character of a normalised text which character of the text it comes from."""
    if len(text) == len(normalised):
        return range(len(text))
    places = []
    for cluster in CLUSTER.finditer(text):
        places += [cluster.start()] * len(normalise(cluster[0]))
    if len(places) == len(normalised):
        return places
    return [i * len(text) // len(normalised) for i in range(len(normalised))]  # letters that melt into others
