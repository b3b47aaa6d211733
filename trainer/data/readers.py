"""Users' record files become `Example`s, read one at a time (ARCHITECTURE.md, section "Data").

A file is scanned once, for which of its records are good and where they begin. The scan of a large file is cached in
`BOXGRPO_CACHE` (else ~/.cache/boxgrpo), so that later runs open it at once. A faulty record is named with its reason
and left out; it never ends a run.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import logging
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boxgrpo.trainer.runtime.files import replace_file

from .example import Example, Fault, Place, Refused, plain_text, require_some
from .scan import Row, scan
from .schemas import SCHEMAS, box_scale, parse, recognise

__all__ = ["Example", "Examples", "Fault", "most_images", "plain_text", "read_examples"]

logger = logging.getLogger(__name__)

TRANSIENT_FAULTS = {"missing_image", "image_unreadable", "bad_frames"}  # of images, which may be there for the next run
SNIFF_RECORDS = 1000  # read to find a file's schema and the scale of its boxes
CACHE_MIN_BYTES = 16 << 20  # of a file whose scan is cached
CACHE_VERSION = 3  # of the cache's format, and of the rules by which records were checked
GOLD, TURNS = 1, 2  # bits of `has`
# One good record: its file, its number and bytes there, how many images, and whether it has a gold box or answers.
TABLE = np.dtype([("file", "i2"), ("number", "i4"), ("start", "i8"), ("stop", "i8"), ("images", "i4"), ("has", "u1")])


@dataclass(frozen=True)
class Source:
    """A file of records, and what is needed to read one of them again."""

    path: Path
    label: str  # of the file, in `Example.source`
    schema: str
    place: Place


class Examples(Sequence):
    """Good records of one or several files, read and parsed on access. Pickled, they are places in files."""

    def __init__(self, files: list[Source], table: np.ndarray):
        self.files = files
        self.table = table  # (n) TABLE

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index):
        """One example, or for a slice or an array those records, unread.

        Raises:
            Refused: with its `source`, where an image that was there during the scan has gone.
        """
        if isinstance(index, slice | np.ndarray):
            return Examples(self.files, self.table[index])
        number_of_file, number, start, stop, *_ = self.table[index].item()
        file = self.files[number_of_file]
        source = f"{file.label}#{number}"
        with file.path.open("rb") as content:
            content.seek(start)
            record = json.loads(content.read(stop - start))
        try:
            return parse(record, file.schema, file.place, name=f"{file.path.stem}-{number}", source=source)
        except Refused as refused:
            raise Refused(refused.reason, f"{source}: {refused}", source) from refused

    def having(self, bit: int) -> tuple["Examples", "Examples"]:
        """Those with a gold box (GOLD) or with answers (TURNS), and those without."""
        there = (self.table["has"] & bit) > 0
        return self[there], self[~there]

    def drawn(self, count: int, seed: int) -> "Examples":
        """`count` of them by chance, in their order; all where there are no more."""
        if count >= len(self):
            return self
        return self[np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))]

    def __add__(self, other: "Examples") -> "Examples":
        later = other.table.copy()
        later["file"] += len(self.files)
        return Examples(self.files + other.files, np.concatenate([self.table, later]))

    @property
    def sources(self) -> list[str]:
        """`Example.source` of each, without reading any."""
        return [f"{self.files[file].label}#{number}" for file, number, *_ in self.table.tolist()]


def most_images(examples: Sequence[Example]) -> int:
    """Images of the example that has the most."""
    return max(
        examples.table["images"].tolist() if isinstance(examples, Examples) else (len(e.images) for e in examples)
    )


def read_examples(
    path: str | os.PathLike,
    *,
    schema: str = "auto",
    image_root: str | os.PathLike | None = None,
    label: str | None = None,
    least: int = 1,
    sized: bool = True,
) -> tuple[Examples, list[Fault]]:
    """Read a JSON array or JSONL file of records. Images are opened only for their size, where boxes are in pixels.

    Args:
        path: the file.
        schema: one of `SCHEMAS`, or "auto": what most of the first 1000 records fit, and the log says why.
        image_root: folder that the records' image paths are relative to and must not leave. None: the file's own
            folder, and any path is allowed.
        label: what to call the file in `Example.source`; None: its name.
        least: good records without which the file is refused.
        sized: False opens no image: boxes in pixels of an image of unknown size are then not in 0-1000.

    Returns:
        The good examples in file order, read lazily, and one `Fault` for each record refused.

    Raises:
        ValueError: unknown schema, no record that fits one, a broken JSON array, or fewer good records than `least`.
        OSError: the file cannot be read.
    """
    path, label = Path(path), label or Path(path).name
    if schema not in SCHEMAS and schema != "auto":
        raise ValueError(
            f"schema is {schema!r}; known schemas are auto, {', '.join(SCHEMAS)}. Pass one of them as --schema."
        )
    place = Place.of(path, image_root, sized=sized)
    found = _cached_scan(path, schema, place)
    for note in found.notes:
        logger.info("%s: %s", label, note)
    faults = [Fault(f"{label}#{n}", reason, f"{label}#{n}: {message}") for n, reason, message in found.faults]
    remedy = "Correct the file, or name its format with --schema."
    require_some(path, found.table, faults, least=least, remedy=remedy)
    source = Source(path, label, found.schema, dataclasses.replace(place, scale=found.scale))
    return Examples([source], found.table), faults


@dataclass
class _Scan:
    """What a file was found to hold."""

    schema: str
    scale: float  # of its boxes
    notes: list[str]  # for the log
    faults: list[tuple[int, str, str]]  # (number, reason, message)
    table: np.ndarray | None = None  # of the good records


def _scan_file(path: Path, schema: str, place: Place) -> _Scan:
    rows = enumerate(scan(path))
    head = list(itertools.islice(rows, SNIFF_RECORDS))
    records = [row.value for _, row in head if isinstance(row.value, dict)]
    notes = []
    if schema == "auto" and records:
        schema, why = _recognise_most(path, records)
        notes.append(why)
    scale = box_scale(records)
    if scale != 1:
        notes.append(f"boxes are fractions of the image (half of them end at 2 or less); times {scale:g}")
    found = _Scan(schema, scale, notes, faults=[])
    good = _good_rows(itertools.chain(head, rows), schema, dataclasses.replace(place, scale=scale), found.faults)
    found.table = np.fromiter(good, dtype=TABLE)
    return found


def _good_rows(rows: Iterable[tuple[int, Row]], schema: str, place: Place, faults: list) -> Iterator[tuple]:
    """A row of the table for each good record; the others are appended to `faults`."""
    for number, row in rows:
        try:
            if row.fault:
                raise Refused("not_json", f"the line is not JSON ({row.fault}). Write it again.")
            if not isinstance(row.value, dict):
                raise Refused("not_a_record", f"{row.value!r:.80} is no JSON object. Drop it.")
            example = parse(row.value, schema, place, name="", source="", scanned=True)
        except Refused as refused:
            faults.append((number, refused.reason, str(refused)))
        except Exception as error:  # a record may hold anything, and what no rule foresees must not end a run
            message = f"reading it fails with {type(error).__name__}: {error!s:.200}. Drop it."
            faults.append((number, "unreadable", message))
        else:
            has = GOLD * (example.gold is not None) + TURNS * example.can_be_learned
            yield 0, number, row.start, row.stop, len(example.images), has


def _recognise_most(path: Path, records: list[dict]) -> tuple[str, str]:
    """The schema that most of the records fit, and why it was chosen."""
    fits = Counter(name for record in records if (name := recognise(record)))
    if not fits:
        known = "; ".join(f"{name} has {schema.sign}" for name, schema in SCHEMAS.items())
        raise ValueError(
            f"{path}: records with the keys {sorted(records[0])} fit no known schema ({known}). "
            "Rename the keys, or name the format with --schema."
        )
    ((name, count), *_) = fits.most_common(1)
    among = f"of the first {len(records)} records" if len(records) == SNIFF_RECORDS else f"of {len(records)} records"
    return name, f"schema {name}, because {count} {among} have {SCHEMAS[name].sign}"


def _cached_scan(path: Path, schema: str, place: Place) -> _Scan:
    """The file's scan, which for a large file is cached until the file changes.

    A scan with faults that lie with the images is not cached, and a cache that cannot be written costs only time.
    """
    stat = path.stat()
    if stat.st_size < CACHE_MIN_BYTES:
        return _scan_file(path, schema, place)
    identity = json.dumps([CACHE_VERSION, str(path.resolve()), schema, *dataclasses.astuple(place)])
    folder = os.environ.get("BOXGRPO_CACHE") or os.path.expanduser("~/.cache/boxgrpo")
    cache = Path(folder) / "scans" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    state = [stat.st_size, stat.st_mtime_ns]
    try:
        with np.load(cache, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            if about.pop("state") == state:
                return _Scan(**about, table=arrays["table"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        logger.warning("%s cannot be used (%s); the data is scanned again", cache, error)
    found = _scan_file(path, schema, place)
    if any(reason in TRANSIENT_FAULTS for _, reason, _ in found.faults):
        return found
    about = vars(found) | {"state": state}
    table = about.pop("table")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(content := io.BytesIO(), about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8), table=table)
        replace_file(cache, content.getvalue())
    except OSError as error:
        logger.warning("the scan of %s cannot be kept (%s); the next run scans it again", path, error)
    return found
