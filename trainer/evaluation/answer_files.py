"""The answers of an evaluation as they come, so that a killed one goes on where it was.

    evaluation.json          what is evaluated: the model's files, the questions, how they are asked
    answers/rank0.jsonl      {"record": 12, "answer": "..."} a line, of each rank that ever answered

All ranks write into one folder, which they must share.
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from boxgrpo.trainer.data.readers import Example
from boxgrpo.trainer.runtime.ranks import Ranks

log = logging.getLogger(__name__)

IDENTITY = "evaluation.json"
MADE = ("answers/rank*.jsonl", "results.json", "table.md", "report.html", IDENTITY)


def questions_identity(examples: Sequence[Example]) -> str:
    """SHA-256 of all that a model is asked and judged by."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(dataclasses.astuple(example)).encode())
    return digest.hexdigest()


class AnswerFiles:
    """The answers in `folder`, this rank's open for more.

    Args:
        identity: JSON values that tell this evaluation from another.
        anew: throw away what an earlier evaluation made in the folder.

    Attributes:
        found: text by record number, of earlier runs of this evaluation on any number of ranks; the same on each rank.

    Raises:
        ValueError: the folder holds the answers to another evaluation. On every rank.
    """

    def __init__(self, folder: Path, identity: dict, r: Ranks, *, anew: bool):
        self.path = folder / "answers" / f"rank{r.rank}.jsonl"
        error, found = None, {}
        if r.is_main:
            if anew:
                _remove(folder)
            error = _difference(folder, identity)
            if not error:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(folder / IDENTITY, json.dumps(identity, indent=1))
                found = _read(folder)
        error, self.found = r.gather((error, found))[0]
        if error:
            raise ValueError(error)
        if self.found and r.is_main:
            log.info("%s: %d answers are there already; going on behind them", folder, len(self.found))
        _end_with_a_whole_line(self.path)

    def keep(self, answers: dict[int, str]) -> None:
        """Add answers by record number; a kill afterwards does not lose them."""
        lines = [json.dumps({"record": record, "answer": text}) + "\n" for record, text in answers.items()]
        with self.path.open("a") as file:
            file.write("".join(lines))


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all. Half a character, which JSON can spell, becomes a "?"."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8", errors="replace")
    aside.replace(path)


def _remove(folder: Path) -> None:
    earlier = [path for pattern in MADE for path in folder.glob(pattern)]
    if earlier:
        log.warning("%s: an earlier evaluation is removed", folder)
    for path in earlier:
        path.unlink()


def _difference(folder: Path, identity: dict) -> str | None:
    """Why the folder is another evaluation's."""
    if not (folder / IDENTITY).exists():
        return None
    try:
        written = json.loads((folder / IDENTITY).read_text())
        changed = sorted(k for k in written.keys() | identity.keys() if written.get(k) != identity.get(k))
    except (ValueError, AttributeError) as error:
        changed = [f"{IDENTITY} cannot be read: {error}"]
    if not changed:
        return None
    return (
        f"output_dir {folder} holds the answers of another evaluation (other: {', '.join(changed)}). Name another with "
        "--output_dir, or begin anew with --overwrite_output_dir true."
    )


def _read(folder: Path) -> dict[int, str]:
    answers = {}
    for path in sorted((folder / "answers").glob("rank*.jsonl")):
        for line in path.read_text().split("\n")[:-1]:  # behind the last newline: what a kill cut off
            row = json.loads(line)
            answers[row["record"]] = row["answer"]
    return answers


def _end_with_a_whole_line(path: Path) -> None:
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1
        os.truncate(path, whole)
