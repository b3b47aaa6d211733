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
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boxgrpo.trainer.presence import check_data
from boxgrpo.trainer.runtime.files import replace_file

from .boxes import UNIT_BOXES, Written, known_size, likeliest_unit
from .chats import CHAT
from .example import Example, Fault, Refused, Source, parse, require_some
from .loader import GOLD, TABLE, TURNS, UNREAD, Examples
from .scan import Row, scan
from .schemas import SCHEMAS, nearest, recognise
from .tables import cache_folder, files_of, scan_table

log = logging.getLogger(__name__)

TRANSIENT_FAULTS = {"missing_image", "image_unreadable", "bad_frames"}  # of image files, which may exist later
SNIFF_RECORDS = 1000  # number of records from which a file's schema and the unit of its boxes are derived
CACHE_MIN_BYTES = 16 << 20  # size from which a file's scan is cached
CACHE_VERSION = 8  # changes with the cache's format and with the rules for records
FILE_FORMS = "a JSON, JSONL, Parquet or Arrow file of records, or a folder of datasets' save_to_disk"
READ_FORM = "Write it as <answer>(x1, y1), (x2, y2)</answer>, in thousandths of the image"
COUNTED = {
    "swapped": "have width and height swapped; the image files' own are used",
    "turned": "have an image that its EXIF turns; their boxes are taken on the upright image",
    "several": "have several boxes; the first is the gold box",
    "unread": "have an answer with a box that is not read: SFT learns it as text, nothing scores it. " + READ_FORM,
}
FAULTS_LOGGED = 100  # per run; most records of MGrounding have two boxes, which GRPO cannot use


def read_usable(options, *, needs: str) -> tuple[Examples, list[Fault]]:
    """Read the records of `options.data` that have what the run needs, `gold` or `turns`; the others become faults.

    From `path#count`, `count` records are drawn by the seed. The log names the first faults and counts the others.

    Raises:
        ValueError: no data is named, a file is missing, or a file has no usable record.
    """
    if not options.data:
        raise ValueError(f"no data. Name {FILE_FORMS} with --data.")
    bit, kind = {"gold": (GOLD, "single gold box"), "turns": (TURNS, "answer to learn")}[needs]
    parts, faults = [], []
    for number, (path, count, label) in enumerate(_sources(options.data)):
        root = options.image_root or None
        found, refused = read_examples(
            path, schema=options.schema, image_root=root, label=label, box_unit=options.box_unit
        )
        usable = (found.table["has"] & bit) > 0
        good, without = found[usable], found[~usable]
        for source, has in zip(without.sources, without.table["has"]):
            reason, what = f"no_{needs}", f"there is no {kind}. Add it, or pass other records."
            if needs == "gold" and has & UNREAD:
                reason, what = "unread_box", f"the box in the answer is not read. {READ_FORM}."
            refused.append(Fault(source, reason, f"{source}: {what}"))
        require_some(path, good, refused)
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
        check_data(source)
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

    Images are opened only for their size, where boxes are or may be in pixels, or a record tells a width and height.

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
    units = {"unit": box_unit, "objects_unit": box_unit}
    file = Source.of(Path(path), image_root, label, sized=sized, schema=schema, **units)
    found, label = _cached_scan(file), file.label
    for note in found.notes:
        log.info("%s: %s", label, note)
    for doubt in found.doubts:
        log.warning("%s: %s", label, doubt)
    faults = [Fault(f"{label}#{n}", reason, f"{label}#{n}: {message}") for n, reason, message in found.faults]
    remedy = f"Name {FILE_FORMS}." * (not faults) or f"They are read as --schema {schema}." * (schema != "auto")
    require_some(file.path, found.table, faults, min_usable=min_usable, remedy=remedy)
    units = {"unit": found.unit, "objects_unit": found.objects_unit}
    return Examples([dataclasses.replace(file, schema=found.schema, **units)], found.table), faults


@dataclass
class _Scan:
    """The result of scanning a file."""

    schema: str
    unit: str  # of its gold boxes
    objects_unit: str  # as `Source` has it
    notes: list[str]  # for the log
    doubts: list[str]  # for the log, as warnings
    faults: list[tuple[int, str, str]]  # (number, reason, message)
    lasting: bool = True  # whether no image was missing that the unit might depend on
    table: np.ndarray | None = None  # (n) TABLE, the usable records


def _scan_file(file: Source) -> _Scan:
    rows = enumerate(scan_table(file.path) if file.table else scan(file.path))
    head = list(itertools.islice(rows, SNIFF_RECORDS))
    records = [row.value for _, row in head if isinstance(row.value, dict)]
    schema, notes = file.schema, []
    if head and not records:
        row = head[0][1]
        what = row.fault or f"its first is {row.value!r:.80}"
        raise ValueError(f"{file.path} holds no JSON object: {what}. Name {FILE_FORMS}.")
    if schema == "auto" and records:
        alone = len(head) == 1 and head[0][1].start == 0 and not file.table  # in no list
        schema, why = _recognise_most(file.path, records, alone)
        notes.append(why)
    found = _Scan(schema, file.unit, file.objects_unit, notes, doubts=[], faults=[])
    if records:
        _find_unit(found, records, dataclasses.replace(file, schema=schema))
    units = {"unit": found.unit, "objects_unit": found.objects_unit}
    file = dataclasses.replace(file, schema=schema, counts=Counter(), **units)
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
    keyed, texts = _first_boxes(records, dataclasses.replace(file, unit="auto", objects_unit="auto", counts=Counter()))
    found.lasting = not keyed or any(box.size for box in keyed)
    usual = "pixels" if in_text else schema.unit  # ms-swift's, of `objects`
    told = False
    if file.unit == "auto":
        try:
            found.unit, told = likeliest_unit(keyed, usual)
            found.objects_unit = found.unit
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from error
    if keyed:
        first = f"the first {len(keyed)} boxes" if len(keyed) > 1 else "the first box"
        how = f"the form's usual unit{', which fits' if told else ', which is not certain from'} {first}"
        if found.unit != usual:
            how = f"for {first} likelier than {usual}, the form's usual unit"
        why = f", {how}; --box_unit overrules it" if file.unit == "auto" else ""
        boxes = "boxes in objects" if in_text else "gold boxes"
        notes = found.notes if told or file.unit != "auto" else found.doubts
        notes.append(f"{boxes} are taken in {found.unit} of their images{why}")
    elif in_text:
        found.unit = schema.unit
        if file.unit not in ("auto", schema.unit):
            found.notes.append(f"--box_unit {file.unit} does not apply to boxes in the text of chats: thousandths")
    with contextlib.suppress(ValueError):
        if texts and (likeliest := likeliest_unit(texts, schema.unit)[0]) != schema.unit:
            what = f"the answers' boxes look like {likeliest} of their images; they are taken as thousandths"
            found.doubts.append(f"{what}. Write them in thousandths")


def _first_boxes(records: Iterable[dict], file: Source) -> tuple[list[Written], list[Written]]:
    """The gold boxes of the first records that have one, as they are written: under keys, and in chats' texts."""
    keyed, texts = [], []
    for record in records:
        with contextlib.suppress(Refused):
            example = _example(record, file, 0)
            if isinstance(box := example.gold, Written):
                keyed.append(box)
            elif box and len(texts) < UNIT_BOXES:
                texts.append(Written(box, known_size(example.images[example.target_image], record, file)))
        if len(keyed) == UNIT_BOXES:
            break
    return keyed, texts


def _example(record: object, file: Source, number: int, **how) -> Example:
    """`parse` by the file's schema. A record may hold anything: an unforeseen error raises Refused too."""
    try:
        if not isinstance(record, dict):
            raise Refused("not_a_record", f"{record!r:.80} is no JSON object. Drop it.")
        return parse(record, SCHEMAS[file.schema].read, file, number, **how)
    except Refused:
        raise
    except Exception as error:
        message = f"reading it fails with {type(error).__name__}: {error!s:.200}. Drop it."
        raise Refused("unreadable", message) from error


def _good_rows(rows: Iterable[tuple[int, Row]], file: Source, faults: list) -> Iterator[tuple]:
    """A row of the table for each good record; the others are appended to `faults`."""
    for number, row in rows:
        try:
            if row.fault:
                raise Refused("not_json", f"the line is not JSON ({row.fault}). Write it again.")
            example = _example(row.value, file, number, scanned=True)
        except Refused as refused:
            faults.append((number, refused.reason, str(refused)))
        else:
            has = GOLD * (example.gold is not None) + TURNS * example.can_be_learned + UNREAD * example.unread
            file.counts["unread"] += example.unread
            yield 0, number, row.start, row.stop, len(example.images), has


def _recognise_most(path: Path, records: list[dict], alone: bool) -> tuple[str, str]:
    """The schema that most of the records fit, and why it was chosen. `alone`: the file is one object."""
    fits = Counter(name for record in records if (name := recognise(record)))
    if not fits:
        lists = {key: value for key, value in records[0].items() if isinstance(value, list)}
        lists = {
            key: len(value)
            for key, value in lists.items()
            if (value or key == "data") and all(isinstance(one, dict) for one in value)
        }
        if alone and lists:
            key = max(lists, key=lists.get)
            raise ValueError(
                f"{path} is one object, whose {key} is a list of {lists[key]}; a file of records is a list, or an "
                "object that begins with it as data (docs/data.md, Files). Write the list alone."
            )
        name = nearest(records[0])
        raise ValueError(
            f"{path}: records with the keys {', '.join(sorted(records[0])):.200} fit no known form. The nearest, "
            f"{name}, has {SCHEMAS[name]}. Rename the keys (docs/data.md, Forms)."
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
