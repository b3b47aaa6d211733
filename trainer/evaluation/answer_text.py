"""Parsers of a completion's text: the part that is the answer, the option that it chooses, the boxes in it."""

import json
import re
from collections.abc import Iterator, Mapping

from boxgrpo.kernels.rewards import COORDINATE_LIMIT
from boxgrpo.trainer.data.example import Box, is_numbers

# ---- the part that is the answer


def answer_part(text: str) -> str:
    """The content of the first `<answer>` tag, else what follows the reasoning, else the whole text.

    An `<answer>` that was cut off runs to the end; reasoning that was cut off leaves no answer.
    """
    _, opened, rest = text.partition("<answer>")
    if opened:
        return rest.partition("</answer>")[0]
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


# ---- the letter of an option

_EDGES = " \t\r\n.,:;!?()[]{}*\"'“”‘’$"
_LETTER = re.compile(r"(?<!\w)(?<!\w['’/-])([A-Za-z])(?!\w)(?!['’/-]\w)")
_CLOSED = re.compile(r"[ \t]*(?:\Z|[\n.,:;!?)\]}*\"”'’]|[-–—] )")
# Words that follow the letter A or I as an option, but never the article or the pronoun.
_CONNECTED = re.compile(r"\s+(?:is|was|because|since|as|due|based|which|and|or|but|not)\b")
_LABELLED = re.compile(r"\b(?:image|option|choice|candidate|letter)\s+\Z", re.I)
_NEGATED = re.compile(r"\b(?:not|nor|neither|except|than|unlike|isn't):?\s+(?:option |image )?[(\[\"'*]*\Z", re.I)
_STATED = re.compile(  # an announced answer, followed by nothing but punctuation
    r"\b(?:answer|choice)[\"'*]*(?:\s+to\s+\w+\s+question)?"
    r"(?:\s*[:=]|\s+(?:is|was|would be|should be|must be)\b:?)\**\s*"
    r"(?:(?:the\s+)?(?:option|choice|letter)\s*:?)?\s*(?:\$?\\[a-z]+)?[$(\[{*\"'“]*\Z",
    re.I,
)
_NAMED = re.compile(r"\b(?:option|answer|choice|choose|select|pick|go with)\s+[(\[\"'*]*\Z", re.I)
_LEADING = re.compile(r"[*\"']*([A-Z])(?:[*\"']*[.:\n]|[*\"']*\Z|\)|\s+[-–—] )")


def chosen_letter(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer chooses; None if it chooses none, or more than one.

    It is read from the `answer_part`, in this order: a bare letter; an option's own text; the last "answer: B"; a
    letter at the beginning ("B. ...", "B) ..."); a letter alone on the last line; the only one in brackets; the only
    "option B"; the only capital letter; the only option whose text is part of the answer. The article "A", the pronoun
    "I", and a letter after "not" do not count as letters.

    Args:
        text: a completion.
        options: letter (A, B, ...) to the option's text.
    """
    answer = answer_part(text).strip()
    if (bare := answer.strip(_EDGES).upper()) in options:
        return bare
    texts = {letter: _plain(option) for letter, option in options.items()}
    if own := _unique(letter for letter, option in texts.items() if option and option == _plain(answer)):
        return own
    found = [m for m in _LETTER.finditer(answer) if m[1].upper() in options and not _NEGATED.search(_before(m))]
    stated = [m[1].upper() for m in found if _names_option(m, lower=True) and _STATED.search(_before(m))]
    leading = _LEADING.match(answer)
    last = answer.rpartition("\n")[2].strip(_EDGES)
    for letter in (*stated[-1:], leading and leading[1], last):
        if letter in options:
            return letter
    bracketed = _unique(m[1].upper() for m in found if _before(m).endswith("(") and answer.startswith(")", m.end()))
    capitals = [m for m in found if _names_option(m)]
    named = _unique(m[1] for m in capitals if _NAMED.search(_before(m)))
    return bracketed or named or _unique(m[1] for m in capitals) or _mentioned(_plain(answer), texts)


def _before(match: re.Match) -> str:
    return match.string[max(0, match.start() - 60) : match.start()]


def _names_option(match: re.Match, lower: bool = False) -> bool:
    """Whether a letter names an option, not the article or pronoun; `lower`: also a lower-case one before a mark."""
    closed = _CLOSED.match(match.string, match.end())
    if match[1].islower():
        return lower and closed is not None
    connected = _CONNECTED.match(match.string, match.end())
    return match[1] not in "AI" or any((closed, connected, _LABELLED.search(_before(match))))


def _unique(letters: Iterator[str]) -> str | None:
    distinct = set(letters)
    return distinct.pop() if len(distinct) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(_EDGES)


def _mentioned(answer: str, texts: Mapping[str, str]) -> str | None:
    """The only option whose text the answer has outside of longer options; one under 3 letters only at its start."""
    found = {}
    for letter, option in texts.items():
        start = r"\A" if len(option) < 3 and option.isalpha() else r"(?<![\w.-])"
        if option and re.search(rf"{start}{re.escape(option)}(?!\w|\.\d)", answer):
            found[letter] = option
    parts = {text for text in found.values() for other in found.values() if text != other and text in other}
    return _unique(letter for letter, text in found.items() if text not in parts)


# ---- boxes that the kernels do not read

_JSON_NUMBER = r"-?[0-9]++(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+"  # leading zeros too
_NUMBER = rf"\s*+[\"']?({_JSON_NUMBER})[\"']?\s*+"
_PAIRS = rf"\({_NUMBER},{_NUMBER}\)\s*+,?\s*+\({_NUMBER},{_NUMBER}\)"
_FOUR = rf"{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}"
LIST_BOX = re.compile(rf"\[{_FOUR}\]")
PAIRS_OR_LIST = re.compile(rf"{_PAIRS}|\[{_FOUR}\]")
ANY_BOX = re.compile(rf"{_PAIRS}|[\[(]{_FOUR}[\])]")
_TWO_POINTS = re.compile(rf"\[\s*+\[{_NUMBER},{_NUMBER}\]\s*+,\s*+\[{_NUMBER},{_NUMBER}\]\s*+\]")
_SPACED = r"\s++".join([f"({_JSON_NUMBER})"] * 4)
TAGGED_BOX = re.compile(rf"<box>\s*+{_SPACED}\s*+</box>")  # MiniCPM-V's
_OBJECT = re.compile(r"\{[^{}]++\}")
_LISTS = "bbox2d", "bbox", "box"  # keys in lower case, without "_"
_CORNERS = ("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("left", "top", "right", "bottom")


def first_box(text: str, pattern: re.Pattern) -> Box | None:
    """The first box of the text, in the text's units: a JSON object that names one, or a match of the pattern. Without
    either, for `ANY_BOX` two points in square brackets are a box too.

    An object names its corners x1 y1 x2 y2, xmin ymin xmax ymax or left top right bottom, or holds four
    under bbox_2d, bbox or box, in a list or in one text. Numbers are JSON's, in quotes or not; a larger one is read as
    COORDINATE_LIMIT.
    """
    match = pattern.search(text)
    for found in _OBJECT.finditer(text):
        if match and match.start() < found.start():
            break
        if named := _box_object(found[0]):
            return named[0]
    if not match and pattern is ANY_BOX:
        match = _TWO_POINTS.search(text)
    return _as_box([n for n in match.groups() if n is not None]) if match else None


def listed_boxes(text: str) -> list[tuple[Box, float | None]]:
    """The boxes in the `answer_part`, with the coordinates as written (0-1000), each with its score or None.

    They are JSON objects as in `first_box`, perhaps with a `score` or `confidence` (Qwen2.5-VL's form); without these,
    `(x1, y1), (x2, y2)` with or without Qwen2-VL's box marks, and `[x1, y1, x2, y2]`. Coordinates under 0 or over
    10,000 are no box. Of an answer that was cut off, the complete boxes count.
    """
    part = answer_part(text)
    objects = [named for match in _OBJECT.finditer(part) if (named := _box_object(match[0]))]
    plain = (_as_box([n for n in match.groups() if n is not None]) for match in PAIRS_OR_LIST.finditer(part))
    objects = [(box, score) for box, score in objects if _is_near(box)]
    return objects or [(box, None) for box in plain if _is_near(box)]


def _is_near(box: Box) -> bool:
    return min(box) >= 0 and max(box) <= 10_000


def _box_object(text: str) -> tuple[Box, float | None] | None:
    """The box that a JSON object names, and its score or None."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    named = {name.lower().replace("_", ""): value for name, value in record.items()}
    written = [named.get(name) for name in _LISTS] + [[named.get(name) for name in names] for names in _CORNERS]
    box = next(filter(None, map(_as_box, written)), None)
    score = record.get("score", record.get("confidence"))
    return box and (box, float(score) if is_numbers([score]) and 0 <= score <= 1 else None)


def _as_box(values: object) -> Box | None:
    """The box of four JSON numbers or texts that are such, of two points, or of a text with four; None for others."""
    if isinstance(values, list) and len(values) == 2 and all(isinstance(point, list) for point in values):
        values = [*values[0], *values[1]]
    if isinstance(values, str):
        values = [value.strip() for value in values.split(",")]
    texts = [str(value) for value in values] if isinstance(values, list) and len(values) == 4 else [""]
    if not all(re.fullmatch(_JSON_NUMBER, text) for text in texts):
        return None
    return tuple(max(-COORDINATE_LIMIT, min(float(text), COORDINATE_LIMIT)) for text in texts)
