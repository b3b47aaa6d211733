"""The folder of one evaluation, whose answers are stored as they come, so that a killed evaluation can be resumed.

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

from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.options import EvalOptions
from boxgrpo.trainer.runtime.files import read_lines, replace_file
from boxgrpo.trainer.runtime.ranks import Ranks

log = logging.getLogger(__name__)

IDENTITY = "evaluation.json"
ANSWERS = "answers/rank{}.jsonl"
WRITTEN = (ANSWERS.format("*"), "results.json", "table.md", "report.html", IDENTITY)


def output_folder(options: EvalOptions) -> Path | None:
    """The folder that the evaluation writes into; None: it only prints its scores."""
    if options.predictions and not options.output_dir:
        return None
    return Path(options.output_dir or "out/eval")


def claim_folder(
    options: EvalOptions, examples: Sequence[Example], r: Ranks, *names: str, **answered_by: str
) -> dict[int, str]:
    """Make the `output_folder` this evaluation's; every rank calls it.

    With `overwrite_output_dir` what an earlier evaluation wrote into the folder is removed.

    Args:
        names: of the options that distinguish this evaluation from another, beside the questions.
        answered_by: a hash of what gives the answers.

    Returns:
        Text by record number, of earlier runs of this evaluation on any number of ranks; the same on each rank.

    Raises:
        ValueError: the folder holds the answers to another evaluation. On every rank.
    """
    questions = hashlib.sha256()  # of everything that a model's prompt and score depend on
    for example in examples:
        questions.update(json.dumps(dataclasses.astuple(example)).encode())
    identity = answered_by | {"questions": questions.hexdigest()} | {name: getattr(options, name) for name in names}
    folder = output_folder(options)
    changed, found = [], {}
    if r.is_main:
        if options.overwrite_output_dir and (earlier := [path for pattern in WRITTEN for path in folder.glob(pattern)]):
            log.warning("%s: an earlier evaluation is removed", folder)
            for path in earlier:
                path.unlink()
        changed = _changed(folder / IDENTITY, identity)
        if not changed:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / IDENTITY, json.dumps(identity, indent=1))
            found = {row["record"]: row["answer"] for row in read_lines(sorted(folder.glob(ANSWERS.format("*"))))}
    changed, found = r.gather((changed, found))[0]
    if changed:
        raise ValueError(
            f"output_dir {folder} holds the answers of another evaluation (other: {', '.join(changed)}). Name another "
            "with --output_dir, or begin anew with --overwrite_output_dir true."
        )
    if found and r.is_main:
        log.info("%s: %d answers are there already; the others follow", folder, len(found))
    return found


def _changed(path: Path, identity: dict) -> list[str]:
    """The names of the values that differ from those in the file; none where there is no file."""
    if not path.exists():
        return []
    try:
        written = json.loads(path.read_text())
        return sorted(k for k in written.keys() | identity.keys() if written.get(k) != identity.get(k))
    except (ValueError, AttributeError) as error:
        return [f"{path.name} cannot be read: {error}"]
