"""Parsers of a completion's text: the part that is the answer, the option that it chooses, the boxes in it."""

import json
import re
from collections.abc import Iterator, Mapping

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

_NUMBER = r"\s{0,4}([0-9]{1,4}(?:\.[0-9]{1,9})?)\s{0,4}"
_PAIRS = rf"\({_NUMBER},{_NUMBER}\)\s{{0,4}},?\s{{0,4}}\({_NUMBER},{_NUMBER}\)"
_FOUR = rf"{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}"
_BOX = re.compile(rf"{_PAIRS}|\[{_FOUR}\]")
ANY_BOX = re.compile(rf"{_PAIRS}|[\[(]{_FOUR}[\])]")
TAGGED_BOX = re.compile(rf"<box>{_NUMBER} {_NUMBER} {_NUMBER} {_NUMBER}</box>")  # MiniCPM-V's
_OBJECT = re.compile(r"\{[^{}]{1,1000}\}")


def boxes_of(text: str, pattern: re.Pattern) -> Iterator[Box]:
    """The boxes that match the pattern, in the units of the text."""
    for match in pattern.finditer(text):
        yield tuple(float(n) for n in match.groups() if n is not None)


def listed_boxes(text: str) -> list[tuple[Box, float | None]]:
    """The boxes in the `answer_part`, with the coordinates as written (0-1000), each with its score or None.

    They are JSON objects with `bbox_2d` or `bbox` and perhaps a `score` or `confidence` (Qwen2.5-VL's form); without
    these, `(x1, y1), (x2, y2)` with or without Qwen2-VL's box marks, and `[x1, y1, x2, y2]`. Of an answer that was cut
    off, the complete boxes count.
    """
    part = answer_part(text)
    objects = [found for match in _OBJECT.finditer(part) if (found := _box_object(match[0]))]
    if objects:
        return objects
    return [(box, None) for box in boxes_of(part, _BOX)]


def _box_object(text: str) -> tuple[Box, float | None] | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    numbers = record.get("bbox_2d", record.get("bbox"))
    if not is_numbers(numbers) or len(numbers) != 4 or not all(0 <= n <= 10_000 for n in numbers):
        return None
    score = record.get("score", record.get("confidence"))
    return tuple(map(float, numbers)), float(score) if is_numbers([score]) and 0 <= score <= 1 else None
