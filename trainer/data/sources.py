"""The files that `--data` names, as one sequence of examples that a loop or an evaluation can use."""

import functools
import logging
import operator
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .readers import GOLD, TURNS, Examples, Fault, read_examples

log = logging.getLogger(__name__)
NAMED = 100  # faulty records that a run names: most of MGrounding has two boxes, which GRPO cannot use


def sources(data: Sequence[str]) -> list[tuple[Path, int | None, str]]:
    """Path, count and label of each `path` or `path#count`. The label is the file's name where that tells it apart.

    Raises:
        ValueError: there is no such file, or nothing to take from it.
    """
    found = []
    for source in data:
        path, _, count = source.rpartition("#")
        path, count = (path, int(count)) if count.isdigit() and path and not Path(source).is_file() else (source, None)
        if not Path(path).is_file():
            raise ValueError(f"data is {source}; there is no such file. Correct --data.")
        if count == 0:
            raise ValueError(f"data is {source}; at least 1 record is to be taken. Correct --data.")
        found.append((Path(path), count))
    names = Counter(path.name for path, _ in found)
    return [(path, count, path.name if names[path.name] == 1 else str(path)) for path, count in found]


def read_usable(options, *, needs: str) -> tuple[Examples, list[Fault]]:
    """The records of `options.data` that have what is needed, `gold` or `turns`; the others are faults.

    Of a source with a count so many are taken, drawn by the seed. The log names the first faults and counts them all.

    Raises:
        ValueError: no data named, no such file, or one without a record that can be used.
    """
    if not options.data:
        raise ValueError("no data. Name a JSON or JSONL file with --data.")
    kind, bit = {"gold": ("gold box", GOLD), "turns": ("assistant's answer", TURNS)}[needs]
    parts, faults = [], []
    for number, (path, count, label) in enumerate(sources(options.data)):
        good, refused = read_examples(path, schema=options.schema, image_root=options.image_root or None, label=label)
        good, without = good.having(bit)
        refused += [Fault(source, f"no_{needs}", f"{source}: the record has no {kind}.") for source in without.sources]
        if not good:
            raise ValueError(
                f"{path}: 0 of {len(refused)} records can be used; they need the {kind}. The first: "
                f"{refused[0].message} Pass other records with --data."
            )
        if count and count > len(good):
            log.warning("%s: %d records are asked for and %d can be used; all are taken", label, count, len(good))
        parts.append(good.drawn(count, getattr(options, "seed", 0) + number) if count else good)
        faults += refused
    for fault in faults[:NAMED]:
        log.warning("skipped %s", fault.message)
    if more := faults[NAMED:]:
        reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(f.reason for f in more).most_common())
        log.warning("skipped %d more (%s); boxgrpo.trainer.inspect_data --faults N names them", len(more), reasons)
    return functools.reduce(operator.add, parts), faults
