"""Every answer that make_cot was given, a JSON line each, kept so that nothing is asked twice."""

import fcntl
import json
import os
from collections import Counter, defaultdict
from pathlib import Path


class Journal:
    """An append-only file of answers by key, and of failed requests.

    A line is handed to the system before `add` returns, so a killed process loses none. What it was just writing is a
    line without an end, which the next `Journal` cuts off. Only places in the file are kept in memory.

    Args:
        path: the file; begun where there is none.

    Raises:
        ValueError: another process has it open, or a line that was written to its end is not one of ours.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.answers: Counter[str] = Counter()  # by kind
        self.tokens: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # kind: in, out
        self.without_usage = 0  # answers whose server did not say what they cost
        self.failures: Counter[str] = Counter()  # requests without an answer, by reason
        self._places: dict[str, tuple[int, int]] = {}  # key: offset, length
        self._file = open(self.path, "a+b")  # noqa: SIM115, closed by __exit__
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(
                f"another process writes to {self.path}. Wait for it, or choose another --output_dir."
            ) from error
        self._read()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def get(self, key: str) -> dict | None:
        """The answer under this key, or None."""
        if key not in self._places:
            return None
        offset, length = self._places[key]
        return json.loads(os.pread(self._file.fileno(), length, offset))

    def add(self, entry: dict) -> dict:
        """Append an answer (`key`, `kind`, `tokens`, ...) or a failed request (`failure`, ...), and return it."""
        line = json.dumps(entry).encode() + b"\n"
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(line)
        self._file.flush()
        self._count(entry, offset, len(line))
        return entry

    def _read(self) -> None:
        offset = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self._file.truncate(offset)
                break
            try:
                self._count(json.loads(line), offset, len(line))
            except (ValueError, KeyError, TypeError) as error:
                self._file.close()
                raise ValueError(
                    f"{self.path}, line {number} is not a line of this file ({error!r}). Remove that line."
                ) from error
            offset += len(line)

    def _count(self, entry: dict, offset: int, length: int) -> None:
        if "failure" in entry:
            self.failures[entry["failure"]] += 1
            return
        self._places[entry["key"]] = offset, length
        self.answers[entry["kind"]] += 1
        if entry["tokens"] is None:
            self.without_usage += 1
        else:
            for k, count in enumerate(entry["tokens"]):
                self.tokens[entry["kind"]][k] += count
