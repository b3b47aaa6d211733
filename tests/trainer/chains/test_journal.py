"""The answers kept in SQLite: one writer, nothing lost to a kill, an earlier version's file read once."""

import contextlib
import dataclasses
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from boxgrpo.trainer.chains.journal import Journal
from boxgrpo.trainer.chains.make import make_cold_start
from chain_runs import written

EARLIER_KEY = "d56dd6019e4f4a30061bb510a64e6385"  # of the first chain of record(0)
WRITER = """
import itertools, sys
from boxgrpo.trainer.chains.journal import Journal
with Journal(sys.argv[1]) as journal:
    for k in itertools.count():
        entry = journal.add({"key": str(k), "kind": "chain", "text": "x" * 5000, "tokens": [2, 1]})
        print(entry["key"], flush=True)
"""


def test_a_killed_process_loses_no_entry_that_add_returned(tmp_path):
    """It prints each key after `add`. While it runs, no other process may open the file."""
    run = subprocess.Popen([sys.executable, "-P", "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    keys = [run.stdout.readline().strip() for _ in range(50)]
    with pytest.raises(ValueError, match=r"another process has .*answers\.sqlite3 open"):
        Journal(tmp_path)
    run.kill()
    keys += run.communicate()[0].split()
    with Journal(tmp_path) as journal:
        assert all(journal.get(key) for key in keys)
        answers = journal.summary(("chain",))["answers"]["chain"]
    assert len(keys) <= answers <= len(keys) + 1  # one may be added and not yet printed


def test_a_journal_keeps_any_text_and_refuses_other_files(tmp_path):
    with Journal(tmp_path) as journal:
        journal.add({"key": "a", "kind": "chain", "text": "ö\ud83e", "finish": "stop", "tokens": None})
        assert journal.get("a")["text"] == "ö\ud83e" and journal.get("b") is None
    (tmp_path / "answers.sqlite3").write_bytes(b"no database" * 500)
    with pytest.raises(ValueError, match=r"answers\.sqlite3 cannot be read .*not a database.*Remove it"):
        Journal(tmp_path)


def test_answers_of_an_earlier_version_are_read_once(server, options, tmp_path):
    """From `answers.jsonl`, whose last line a kill cut off; keys have not changed since."""
    o = options(2)
    make_cold_start(o)
    with contextlib.closing(sqlite3.connect(Path(o.output_dir, "answers.sqlite3"))) as database:
        rows = database.execute("SELECT key, entry FROM entries").fetchall()
    assert EARLIER_KEY in dict(rows)
    lines = [*(entry for _, entry in rows[:5]), json.dumps({"failure": "timeout", "kind": "chain"}), '{"key": "12']
    later = dataclasses.replace(o, output_dir=str(tmp_path / "later"))
    earlier = tmp_path / "later/answers.jsonl"
    earlier.parent.mkdir()
    earlier.write_text("[1, 2]\n")
    with pytest.raises(ValueError, match="answers.jsonl has a line that is no answer.*Remove"):
        make_cold_start(later)
    earlier.write_text("\n".join(lines))
    server.seen.clear()
    assert make_cold_start(later)["failed_requests"] == {"timeout": 1} and len(server.seen) == 3
    assert make_cold_start(later)["answers"] == {"chain": 6, "judge": 2} and len(server.seen) == 3
    assert written(later) == written(o)
