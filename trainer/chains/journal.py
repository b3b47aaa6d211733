"""An SQLite file of a server's answers, so that an answered request is never sent again."""

import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from boxgrpo.trainer.runtime.files import read_lines

_TOTALS = """
SELECT json_extract(entry, '$.kind'), COUNT(*), COUNT(json_extract(entry, '$.tokens')),
       COALESCE(SUM(json_extract(entry, '$.tokens[0]')), 0), COALESCE(SUM(json_extract(entry, '$.tokens[1]')), 0)
FROM entries WHERE key IS NOT NULL GROUP BY 1
"""
_FAILURES = (
    "SELECT json_extract(entry, '$.failure'), COUNT(*) FROM entries WHERE key IS NULL GROUP BY 1 ORDER BY 2 DESC"
)


class Journal:
    """`answers.sqlite3`: one table with a JSON object for each answer, under its key, and for each failed request.

    Each entry is a transaction in SQLite's write-ahead log, so a killed process loses no entry that `add` returned.
    The lock on the file is held until the journal is closed, or its process ends.

    Args:
        folder: where the file is, or is created. A new file starts with the entries of `answers.jsonl`, which an
            earlier version wrote into the same folder.

    Raises:
        ValueError: another process has the file open, it is not a journal, or a line of `answers.jsonl` is damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / "answers.sqlite3"
        self._database = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        try:
            self._open()
        except sqlite3.Error as error:
            self._database.close()
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                fault = f"another process has {self.path} open. Wait for it"
            else:
                fault = f"{self.path} cannot be read ({error}). Remove it"
            raise ValueError(f"{fault}, or choose another --output_dir.") from error

    def _open(self) -> None:
        execute, earlier = self._database.execute, self.path.with_suffix(".jsonl")
        execute("PRAGMA locking_mode = EXCLUSIVE")
        execute("PRAGMA journal_mode = WAL")
        execute("BEGIN EXCLUSIVE")
        if not execute("SELECT name FROM sqlite_master").fetchone():
            execute("CREATE TABLE entries (key TEXT UNIQUE, entry TEXT NOT NULL)")
            try:
                for entry in read_lines([earlier] if earlier.is_file() else []):
                    self.add(entry)
            except (ValueError, KeyError, TypeError) as error:
                self._database.close()
                raise ValueError(f"{earlier} has a line that is no answer ({error!r}). Remove that line.") from error
        execute("COMMIT")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self._database.close()

    def get(self, key: str) -> dict | None:
        """The answer under this key, or None."""
        row = self._database.execute("SELECT entry FROM entries WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def add(self, entry: dict) -> dict:
        """Store an answer (`key`, `kind`, `tokens`, ...) or a failed request (`failure`), and return it."""
        key = None if "failure" in entry else entry["key"]
        self._database.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (key, json.dumps(entry)))
        return entry

    def summary(self, kinds: Sequence[str]) -> dict:
        """Counts of `answers` and `tokens` by kind, of `answers_without_usage`, and of `failed_requests` by reason."""
        totals = {kind: counts for kind, *counts in self._database.execute(_TOTALS)}
        totals = {kind: totals.get(kind, (0, 0, 0, 0)) for kind in kinds}
        return {
            "answers": {kind: answers for kind, (answers, *_) in totals.items()},
            "answers_without_usage": sum(answers - counted for answers, counted, *_ in totals.values()),
            "failed_requests": dict(self._database.execute(_FAILURES)),
            "tokens": {kind: {"in": sent, "out": got} for kind, (*_, sent, got) in totals.items()},
        }
