"""Text in an SVG: how wide it is, at most, and how it is wrapped, shortened and escaped."""

from __future__ import annotations

import re
import unicodedata
from html import escape

ELLIPSIS = "…"
TIMES = "\N{MULTIPLICATION SIGN}"

# Widths in ems, of the widest fonts that a viewer may take for `sans-serif`: DejaVu Sans and Verdana.
_NARROW, _NARROW_WIDTH = set("ijlI.,:;'|!()[]ft-/ r"), 0.46
_BROAD, _BROAD_WIDTH = set("mwMWGOQ@%&+=<>^~#_—…→" + TIMES), 1.08
_UPPERCASE_WIDTH, _OTHER_WIDTH = 0.78, 0.65
_MONOSPACE_WIDTH = 0.61
_LATIN = 0x17F  # the last letter that these fonts have in an ordinary width
_BOLD = 1.12
# What XML 1.0 allows in no form, and what would move a line's other characters.
_NOT_FOR_XML = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufffe\uffff]"
)


def clean(text: str) -> str:
    """Returns a text on one line, with a replacement character for each that has no place in XML."""
    return _NOT_FOR_XML.sub("\ufffd", text.replace("\n", " ").replace("\t", " "))


def quoted(text: str) -> str:
    """Returns a text as XML, lines kept, for an element's content or an attribute."""
    return "\n".join(escape(clean(line)) for line in text.split("\n"))


def width(text: str, size: float, *, monospace: bool = False, bold: bool = False) -> float:
    """Returns how wide a text is at most, in pixels.

    Args:
        text: one line.
        size: the font's size in pixels.
        monospace: in a font whose characters are equally wide.
        bold: in bold.
    """
    return size * sum(_character(c, monospace) for c in text) * (_BOLD if bold and not monospace else 1)


def is_of_known_width(text: str) -> bool:
    """Returns whether `width` bounds a text in any font. Where not, the viewer has to squeeze the text to it."""
    return all(ord(c) <= _LATIN or c in _BROAD or c == ELLIPSIS for c in text)


def _character(c: str, monospace: bool) -> float:
    if not is_of_known_width(c):
        return 1.3 if unicodedata.east_asian_width(c) in "WF" else 1.0
    if monospace:
        return _MONOSPACE_WIDTH if ord(c) <= _LATIN or c == ELLIPSIS else 1.0
    if c in _NARROW:
        return _NARROW_WIDTH
    if c in _BROAD or ord(c) > 0x7F:
        return _BROAD_WIDTH
    return _UPPERCASE_WIDTH if c.isupper() else _OTHER_WIDTH


def fit(
    text: str, most: float, size: float, *, monospace: bool = False, bold: bool = False, keep_end: bool = False
) -> str:
    """Returns a text that is at most `most` pixels wide, shortened with an ellipsis if it has to be.

    Args:
        text: one line.
        most: pixels.
        size: the font's size in pixels.
        monospace: see `width`.
        bold: see `width`.
        keep_end: the end is what tells it from others, as in a path; the ellipsis then comes first.
    """
    text, short = clean(text), clean(text)
    while short and width(short + ELLIPSIS * (short != text), size, monospace=monospace, bold=bold) > most:
        short = short[1:] if keep_end else short[:-1]
    if short == text:
        return text
    return ELLIPSIS + short if keep_end else short.rstrip() + ELLIPSIS


def wrap(text: str, most: float, size: float, lines: int) -> list[str]:
    """Returns a text in lines that are at most `most` pixels wide; the last of `lines` lines holds the rest, shortened."""
    words = clean(text).split(" ")
    out: list[str] = []
    while words and len(out) < lines - 1:
        count = 1
        while count < len(words) and width(" ".join(words[: count + 1]), size) <= most:
            count += 1
        out.append(fit(" ".join(words[:count]), most, size))
        words = words[count:]
    return [*out, fit(" ".join(words), most, size)] if words else out
