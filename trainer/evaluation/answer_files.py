"""The answers of an evaluation as they come, so that a killed evaluation can be resumed.

    evaluation.json          what is evaluated: the model's files, the questions, the options
    answers/rank0.jsonl      {"record": 12, "answer": "..."} a line, of each rank that ever answered

All ranks write into one folder, which they must share.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from boxgrpo.trainer.data.readers import Example
from boxgrpo.trainer.runtime.files import open_lines, read_lines, replace_file
from boxgrpo.trainer.runtime.ranks import Ranks

log = logging.getLogger(__name__)

IDENTITY = "evaluation.json"
ANSWERS = "answers/rank*.jsonl"
WRITTEN = (ANSWERS, "results.json", "table.md", "report.html", IDENTITY)


def hash_questions(examples: Sequence[Example]) -> str:
    """SHA-256 of everything that a model's prompt and score depend on."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(dataclasses.astuple(example)).encode())
    return digest.hexdigest()


def claim_folder(folder: Path, identity: dict, r: Ranks, *, anew: bool) -> dict[int, str]:
    """Make `folder` this evaluation's; every rank calls it.

    Args:
        identity: JSON values that distinguish this evaluation from another.
        anew: remove what an earlier evaluation wrote into the folder.

    Returns:
        Text by record number, of earlier runs of this evaluation on any number of ranks; the same on each rank.

    Raises:
        ValueError: the folder holds the answers to another evaluation. On every rank.
    """
    error, found = None, {}
    if r.is_main:
        if anew and (earlier := [path for pattern in WRITTEN for path in folder.glob(pattern)]):
            log.warning("%s: an earlier evaluation is removed", folder)
            for path in earlier:
                path.unlink()
        error = _difference(folder, identity)
        if not error:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / IDENTITY, json.dumps(identity, indent=1))
            found = {row["record"]: row["answer"] for row in read_lines(sorted(folder.glob(ANSWERS)))}
    error, found = r.gather((error, found))[0]
    if error:
        raise ValueError(error)
    if found and r.is_main:
        log.info("%s: %d answers are there already; the others follow", folder, len(found))
    return found


class AnswerFile:
    """This rank's answers, open for more."""

    def __init__(self, folder: Path, r: Ranks):
        self._file = open_lines(folder / ANSWERS.replace("*", str(r.rank)))
        self.close = self._file.close

    def keep(self, answers: dict[int, str]) -> None:
        """Add answers by record number."""
        for record, text in answers.items():
            self._file.write(json.dumps({"record": record, "answer": text}) + "\n")


def _difference(folder: Path, identity: dict) -> str | None:
    """Which values of the folder's identity are not this evaluation's, as a message; None: it has none, or the same."""
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
