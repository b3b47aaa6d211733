"""Records of a JSON array or a JSONL file, found again by their place in it: a file of any size, read one at a time."""

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

CHUNK = 8 << 20  # bytes read at once
LONGEST = 64 << 20  # characters: a record that has not ended by then never will


class Row(NamedTuple):
    """One record, or what stands in its place."""

    start: int  # byte of the file
    stop: int
    value: object  # as JSON gives it; None with a fault
    fault: str | None = None  # why it is no JSON


class Records:
    """The records at given places of a file. Each is read when it is asked for; pickled, it is places alone."""

    def __init__(self, path: Path, starts: np.ndarray, stops: np.ndarray):
        self.path, self.starts, self.stops = path, starts, stops  # (n) int64 bytes
        self._file: tuple[int, int] | None = None  # process, descriptor

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int):
        if self._file is None or self._file[0] != os.getpid():  # a forked worker opens its own
            self._file = os.getpid(), os.open(self.path, os.O_RDONLY)
        start, stop = int(self.starts[index]), int(self.stops[index])
        return json.loads(os.pread(self._file[1], stop - start, start))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}

    def __del__(self):
        if self._file is not None and self._file[0] == os.getpid():
            os.close(self._file[1])


def scan(path: Path) -> Iterator[Row]:
    """Every record of the file, in order. A line of a JSONL file that is not JSON is a row with a fault.

    Raises:
        ValueError: the file is not UTF-8, or a JSON array that is broken.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        try:
            if head.partition(b"\n")[0].strip() == b"{":
                raise ValueError(f"{path} is one JSON object over several lines. Put [ before it and ] behind it.")
            yield from _array(file) if head.startswith(b"[") else _lines(file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}). Write the file again.") from error
        except (json.JSONDecodeError, RecursionError) as error:
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


def _array(file) -> Iterator[Row]:
    """Elements of the file's array, decoded chunk by chunk."""
    text = _Text(file)
    text.skip("[")
    decode = json.JSONDecoder(parse_int=_integer).raw_decode
    if text.peek() == "]":
        text.skip("]")
    else:
        while True:
            text.peek()  # past white space
            while True:
                try:
                    value, end = decode(text.text, text.at)
                except json.JSONDecodeError as error:
                    # Cut off, or broken? What is cut off breaks at the end, or in a string that does not.
                    cut = error.pos > len(text.text) - 16 or "Unterminated" in error.msg
                    if not cut or text.ended or len(text.text) - text.at > LONGEST:
                        raise text.located(error) from None
                else:
                    if end + 3 < len(text.text) or text.ended:  # else it may be a number that goes on: 1e+
                        break
                text.more()
            start = text.byte
            text.advance(end)
            yield Row(start, text.byte, value)
            if text.peek() == "]":
                text.skip("]")
                break
            text.skip(",")
    if text.peek():
        raise text.located(json.JSONDecodeError("Extra data", text.text, text.at))


def _integer(digits: str) -> float:
    """An int, or what no check lets pass: Python converts no more than some thousand digits."""
    return int(digits) if len(digits) < 1000 else float("inf")


class _Text:
    """A window of a UTF-8 file: its characters from `at` on, and the byte that they begin at."""

    def __init__(self, file):
        file.seek(0)
        self.file, self.text, self.at, self.byte, self.ended = file, "", 0, 0, False
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        while not self.text and not self.ended:  # a piece may end within the first character
            self.more()
        if self.text.startswith("\ufeff"):
            self.advance(1)

    def more(self) -> None:
        """Take another piece, if there is one."""
        raw = self.file.read(CHUNK)
        self.ended = not raw
        self.text = self.text[self.at :] + self.decoder.decode(raw, final=self.ended)
        self.at = 0

    def advance(self, end: int) -> None:
        passed = end - self.at
        self.byte += passed if self.text.isascii() else len(self.text[self.at : end].encode())
        self.at = end

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in " \t\r\n":
                end += 1
            self.advance(end)
            if end < len(self.text):
                return self.text[end]
            if self.ended:
                return ""
            self.more()

    def skip(self, mark: str) -> None:
        if self.peek() != mark:
            raise self.located(json.JSONDecodeError(f"Expecting {mark!r}", self.text, self.at))
        self.advance(self.at + 1)

    def located(self, error: json.JSONDecodeError) -> json.JSONDecodeError:
        """The error told by its byte in the file, not by its place in this window."""
        byte = self.byte + len(self.text[self.at : error.pos].encode())
        error.args = (f"{error.msg} at byte {byte}",)
        return error
