"""Reads files of records as `Example`s, one record at a time (ARCHITECTURE.md, section "Data").

A file is scanned once, to find its usable records and their positions. The scan of a large file is cached in
`BOXGRPO_CACHE` (else ~/.cache/boxgrpo), so that later runs open it at once. A faulty record is skipped with
a warning that names the reason; it never stops a run.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import operator
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boxgrpo.trainer.runtime.files import replace_file

from .boxes import UNIT_BOXES, Written, known_size, likeliest_unit
from .chats import CHAT
from .example import Fault, Refused, Source, parse, require_some, target_image
from .loader import GOLD, TABLE, TURNS, Examples
from .scan import Row, scan
from .schemas import SCHEMAS, recognise
from .tables import cache_folder, files_of, is_table, scan_table

log = logging.getLogger(__name__)

TRANSIENT_FAULTS = {"missing_image", "image_unreadable", "bad_frames"}  # of image files, which may exist later
SNIFF_RECORDS = 1000  # number of records from which a file's schema and the unit of its boxes are derived
CACHE_MIN_BYTES = 16 << 20  # size from which a file's scan is cached
CACHE_VERSION = 5  # changes with the cache's format and with the rules for records
COUNTED = {
    "swapped": "have width and height swapped; the image files' own are used",
    "several": "have several boxes; the first is the gold box",
}
FAULTS_LOGGED = 100  # per run; most records of MGrounding have two boxes, which GRPO cannot use


def read_usable(options, *, needs: str) -> tuple[Examples, list[Fault]]:
    """Read the records of `options.data` that have what the run needs, `gold` or `turns`; the others become faults.

    From `path#count`, `count` records are drawn by the seed. The log names the first faults and counts the others.

    Raises:
        ValueError: no data is named, a file is missing, or a file has no usable record.
    """
    if not options.data:
        raise ValueError("no data. Name a JSON or JSONL file with --data.")
    kind, bit = {"gold": ("gold box", GOLD), "turns": ("assistant's answer", TURNS)}[needs]
    parts, faults = [], []
    for number, (path, count, label) in enumerate(_sources(options.data)):
        root = options.image_root or None
        found, refused = read_examples(
            path, schema=options.schema, image_root=root, label=label, box_unit=options.box_unit
        )
        usable = (found.table["has"] & bit) > 0
        good, without = found[usable], found[~usable]
        refused += [Fault(source, f"no_{needs}", f"{source}: the record has no {kind}.") for source in without.sources]
        require_some(path, good, refused, remedy=f"They need the {kind}. Pass other records with --data.")
        if count and count > len(good):
            log.warning("%s: %d records are requested and %d can be used; all are taken", label, count, len(good))
        elif count:
            draw = np.random.default_rng(options.seed + number)
            good = good[np.sort(draw.choice(len(good), count, replace=False))]
        parts.append(good)
        faults += refused
    for fault in faults[:FAULTS_LOGGED]:
        log.warning("skipped %s", fault.message)
    if more := faults[FAULTS_LOGGED:]:
        reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(f.reason for f in more).most_common())
        log.warning("skipped %d more (%s); boxgrpo inspect --faults N names them", len(more), reasons)
    return functools.reduce(operator.add, parts), faults


def _sources(data: Sequence[str]) -> list[tuple[Path, int | None, str]]:
    """Path, count and label of each `path` or `path#count`. Labels are file names, or paths where two names are alike.

    Raises:
        ValueError: there is no such file, or the count is 0.
    """
    found = []
    for source in data:
        path, _, count = source.rpartition("#")
        path, count = (path, int(count)) if count.isdigit() and path and not Path(source).exists() else (source, None)
        if not Path(path).exists():
            hub = re.fullmatch(r"\w[\w.-]*/[\w-]+", path)  # no suffix
            remedy = f"hf download {path} --repo-type dataset --local-dir {path} fetches one of the hub." * bool(hub)
            raise ValueError(f"data is {source}; there is no such file or folder. Correct --data. {remedy}".rstrip())
        if count == 0:
            raise ValueError(f"data is {source}; at least 1 record is to be taken. Correct --data.")
        found.append((Path(path), count))
    names = Counter(path.name for path, _ in found)
    return [(path, count, path.name if names[path.name] == 1 else str(path)) for path, count in found]


def read_examples(
    path: str | os.PathLike,
    *,
    schema: str = "auto",
    image_root: str | os.PathLike | None = None,
    label: str | None = None,
    min_usable: int = 1,
    sized: bool = True,
    box_unit: str = "auto",
) -> tuple[Examples, list[Fault]]:
    """Read records of a JSON array, a JSONL or Parquet file, or a folder of datasets' `save_to_disk`.

    Images are opened only for their size, where boxes are or may be in pixels.

    Args:
        path: the file or folder.
        schema: one of `SCHEMAS`, or "auto": the one that most of the first 1000 records fit, which is logged.
        image_root: folder that the records' image paths are relative to and must not leave. None: the file's own
            folder, and any path is allowed.
        label: the file's name in `Example.source`; None: the name on disk.
        min_usable: minimum number of usable records.
        sized: False: open no image; boxes in pixels of an image of unknown size are then wrong.
        box_unit: unit of the gold boxes, one of `BOX_UNITS`, or "auto": the likeliest by the first 200; logged.

    Returns:
        The usable examples in file order, read lazily, and one `Fault` for each rejected record.

    Raises:
        ValueError: no record that fits a schema, boxes whose unit is not clear, a broken JSON array, or fewer good
            records than `min_usable`.
        OSError: the file cannot be read.
    """
    file = Source.of(Path(path), image_root, label, sized=sized, schema=schema, unit=box_unit)
    found, label = _cached_scan(file), file.label
    for note in found.notes:
        log.info("%s: %s", label, note)
    faults = [Fault(f"{label}#{n}", reason, f"{label}#{n}: {message}") for n, reason, message in found.faults]
    remedy = "Correct the file, or name its format with --schema."
    require_some(file.path, found.table, faults, min_usable=min_usable, remedy=remedy)
    return Examples([dataclasses.replace(file, schema=found.schema, unit=found.unit)], found.table), faults


@dataclass
class _Scan:
    """The result of scanning a file."""

    schema: str
    unit: str  # of its gold boxes
    notes: list[str]  # for the log
    faults: list[tuple[int, str, str]]  # (number, reason, message)
    lasting: bool = True  # whether no image was missing that the unit might depend on
    table: np.ndarray | None = None  # (n) TABLE, the usable records


def _scan_file(file: Source) -> _Scan:
    rows = enumerate(scan_table(file.path) if is_table(file.path) else scan(file.path))
    head = list(itertools.islice(rows, SNIFF_RECORDS))
    records = [row.value for _, row in head if isinstance(row.value, dict)]
    schema, notes = file.schema, []
    if schema == "auto" and records:
        schema, why = _recognise_most(file.path, records)
        notes.append(why)
    found = _Scan(schema, file.unit, notes, faults=[])
    if records:
        _find_unit(found, records, dataclasses.replace(file, schema=schema))
    file = dataclasses.replace(file, schema=schema, unit=found.unit, counts=Counter())
    found.table = np.fromiter(_good_rows(itertools.chain(head, rows), file, found.faults), dtype=TABLE)
    notes += [f"{count} records {COUNTED[name]}" for name, count in file.counts.items() if count]
    return found


def _find_unit(found: _Scan, records: Sequence[dict], file: Source) -> None:
    """Set the unit of the gold boxes, and note it. Boxes in a chat's text are taken as thousandths, whatever they are.

    Raises:
        ValueError: the unit is neither named nor clear.
    """
    schema = SCHEMAS[file.schema]
    in_text = any(key in CHAT for keys in schema.keys for key in keys.split())
    boxes = _first_boxes(records, dataclasses.replace(file, unit="auto", counts=Counter()))
    found.lasting = not boxes or in_text or any(box.size for box in boxes)
    if file.unit == "auto" or in_text:
        try:
            found.unit = likeliest_unit(boxes, schema.unit)
        except ValueError as error:
            if not in_text:
                raise ValueError(f"{file.path}: {error}") from error
    if in_text:
        if found.unit not in (schema.unit, "auto"):
            what = f"the answers' boxes look like {found.unit} of their images; they are taken as thousandths"
            found.notes.append(f"{what}. Write them in thousandths")
        found.unit = schema.unit
    elif boxes:
        why = f", by {len(boxes)} of them; --box_unit overrules it" if file.unit == "auto" else ""
        found.notes.append(f"gold boxes are in {found.unit} of their images{why}")


def _first_boxes(records: Iterable[dict], file: Source) -> list[Written]:
    """The gold boxes of the first records that have one, as they are written."""

    def found() -> Iterator[Written]:
        for record in records:
            with contextlib.suppress(Exception):  # a record may hold anything; it is refused when it is read
                fields = SCHEMAS[file.schema].read(record, file)
                if isinstance(box := fields["gold"], Written):
                    yield box
                elif box:
                    images = fields["images"]
                    target = fields.get("target_image", target_image(record, fields["question"], len(images)))
                    yield Written(box, known_size(images[target], record, file))

    return list(itertools.islice(found(), UNIT_BOXES))


def _good_rows(rows: Iterable[tuple[int, Row]], file: Source, faults: list) -> Iterator[tuple]:
    """A row of the table for each good record; the others are appended to `faults`."""
    for number, row in rows:
        try:
            if row.fault:
                raise Refused("not_json", f"the line is not JSON ({row.fault}). Write it again.")
            if not isinstance(row.value, dict):
                raise Refused("not_a_record", f"{row.value!r:.80} is no JSON object. Drop it.")
            example = parse(row.value, SCHEMAS[file.schema].read, file, number, scanned=True)
        except Refused as refused:
            faults.append((number, refused.reason, str(refused)))
        except Exception as error:  # a record may hold anything: an unforeseen error must not stop a run
            message = f"reading it fails with {type(error).__name__}: {error!s:.200}. Drop it."
            faults.append((number, "unreadable", message))
        else:
            has = GOLD * (example.gold is not None) + TURNS * example.can_be_learned
            yield 0, number, row.start, row.stop, len(example.images), has


def _recognise_most(path: Path, records: list[dict]) -> tuple[str, str]:
    """The schema that most of the records fit, and why it was chosen."""
    fits = Counter(name for record in records if (name := recognise(record)))
    if not fits:
        known = "; ".join(f"{name} has {schema}" for name, schema in SCHEMAS.items())
        raise ValueError(
            f"{path}: records with the keys {sorted(records[0])} fit no known schema ({known}). "
            "Rename the keys, or name the format with --schema."
        )
    ((name, count), *_) = fits.most_common(1)
    among = f"of the first {len(records)} records" if len(records) == SNIFF_RECORDS else f"of {len(records)} records"
    return name, f"schema {name}, because {count} {among} have {SCHEMAS[name]}"


def _cached_scan(file: Source) -> _Scan:
    """The file's scan, which for a large file is cached until the file changes.

    A scan with faults of images is not cached: the images may exist later. A cache that cannot be written is no error.
    """
    stats = [path.stat() for path in files_of(file.path)]
    state = [sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)]
    if state[0] < CACHE_MIN_BYTES:
        return _scan_file(file)
    identity = json.dumps(
        [CACHE_VERSION, str(file.path.resolve()), file.schema, file.root, file.bounded, file.sized, file.unit]
    )
    cache = cache_folder() / "scans" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about.pop("state") == state:
                return _Scan(**about, table=arrays["table"])
    except FileNotFoundError:
        pass  # the first scan of this file
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        log.warning("%s cannot be used (%s); the data is scanned again", cache, error)
    found = _scan_file(file)
    if not found.lasting or any(reason in TRANSIENT_FAULTS for _, reason, _ in found.faults):
        return found
    about = vars(found) | {"state": state}
    table = about.pop("table")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(content := io.BytesIO(), about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8), table=table)
        replace_file(cache, content.getvalue())
    except OSError as error:
        log.warning("the scan of %s cannot be kept (%s); the next run scans it again", file.path, error)
    return found
