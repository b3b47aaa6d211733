"""Records of a JSON array or a JSONL file of any size, one at a time, with their byte ranges in the file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CHUNK = 8 << 20  # bytes read at once
MAX_RECORD = 64 << 20  # bytes; an array with a longer record is treated as broken
# The beginning of an object that holds the records: {"data": [{ or, after other values, {"version": 1, "data": [{
_WRAPPED = re.compile(
    r"""\{\s*(?:"\w+"\s*:\s*(?:"[^"\\]*"|[\w.+-]+)\s*,\s*)*"(?:data|records|examples|samples|items)"\s*:\s*\[(?=\s*\{)"""
)
_SPACE = re.compile(r"[ \t\r\n]*")


class Row(NamedTuple):
    """One record, or a line that is not JSON."""

    start: int  # first byte in the file
    stop: int  # one past the last byte
    value: object  # the parsed JSON; None with a fault
    fault: str | None = None  # why the line is not JSON


def scan(path: Path) -> Iterator[Row]:
    """Every record of the file, in order: a JSON array's, also where an object holds it as `data`, or a line each.

    A line that is not JSON is a row with a fault.

    Raises:
        ValueError: the file is not UTF-8, or a JSON array that is broken.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(4096)
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
        wrapped = _WRAPPED.match(text.decode("latin-1"))
        if not wrapped and text.partition(b"\n")[0].strip() == b"{":
            raise ValueError(
                f"{path} is one JSON object over several lines. If it is a record, put [ before it and ] behind it; if "
                "it holds a list of records, write the list alone."
            )
        if not wrapped and not text.startswith(b"["):
            yield from _lines(file)
            return
        try:
            begin = wrapped.end() if wrapped else 1
            yield from _array(file, len(head) - len(text) + begin, inside=bool(wrapped))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}). Write the file again.") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}). Write the file again.") from error


def _lines(file) -> Iterator[Row]:
    file.seek(0)
    start = 0
    for line in file:
        stop = start + len(line)
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            try:
                yield Row(start, stop, json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of 5000 digits
                yield Row(start, stop, None, str(error))
        start = stop


def _array(file, first: int, *, inside: bool) -> Iterator[Row]:
    """Elements of the array whose first one begins at byte `first` or after white space; `inside`: of an object.

    The text is decoded as Latin-1, one character a byte, because JSON's delimiters are ASCII: a chunk may end anywhere,
    and an index in the text is a byte in the file. An element with other characters is decoded again, as UTF-8.
    """
    file.seek(first)
    decode = json.JSONDecoder(parse_int=_integer).raw_decode
    text, offset, index = "", first, 0  # a window of the file, its offset in the file, the next element's index in it
    while True:
        start = _SPACE.match(text, index).end()
        try:
            if text.startswith("]", start) and offset + index == first:
                end = start
                break
            value, stop = decode(text, start)
            end = _SPACE.match(text, stop).end()
            if text[end : end + 1] not in (",", "]"):  # or a number is cut off here: 1e+
                raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        except json.JSONDecodeError as error:  # broken, or it goes on in the next chunk
            more = file.read(CHUNK) if len(text) - index < MAX_RECORD else b""
            if not more:
                raise ValueError(f"{error.msg} at byte {offset + error.pos}") from error
            text, offset, index = text[index:] + more.decode("latin-1"), offset + index, 0
            continue
        if not text[start:stop].isascii():
            value, _ = decode(text[start:stop].encode("latin-1").decode())
        yield Row(offset + start, offset + stop, value)
        if text[end] == "]":
            break
        index = end + 1
    rest = text[end + 1 :] + file.read(MAX_RECORD).decode("latin-1")
    if inside:  # the object's other values, if any, must end it
        json.loads('{"":0' + rest)
    elif (begins := _SPACE.match(rest).end()) < len(rest):
        raise ValueError(f"Extra data at byte {offset + end + 1 + begins}")


def _integer(digits: str) -> float:
    """The int, or infinity for 1000 digits or more, which Python may refuse to convert; checks reject infinity."""
    return int(digits) if len(digits) < 1000 else float("inf")
