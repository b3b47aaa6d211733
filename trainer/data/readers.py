"""Users' record files become `Example`s, one at a time as they are asked for (DESIGN section 7).

A file is scanned once: which of its records are good, and where they stand. Of a large one the outcome is kept in
`BOXGRPO_CACHE` (else ~/.cache/boxgrpo), so that it opens at once from then on. A faulty record is refused by name and
never fatal.
"""

import hashlib
import itertools
import json
import logging
import os
import tempfile
import zipfile
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from .example import Example, Fault, Place, Refused, plain_text, require_some
from .scan import Records, Row, scan
from .schemas import SCHEMAS, box_scale, parse, recognise

__all__ = ["Example", "Examples", "Fault", "most_images", "plain_text", "read_examples"]

logger = logging.getLogger(__name__)

# Faults that images bring about, and that may be gone when the next run looks.
PASSING = {"missing_image", "image_unreadable", "bad_frames"}
LOOKED_AT = 1000  # records that tell a file's schema and the scale of its boxes
KEPT_FROM = 16 << 20  # bytes of a file whose scan is kept
VERSION = 2  # of what is kept, and of the rules that it was found by
GOLD, TURNS = 1, 2  # bits of `has`


@dataclass(frozen=True)
class Format:
    """All that is needed to read a file's records again."""

    schema: str
    place: Place
    label: str  # of the file, in `Example.source`
    stem: str

    def read(self, record: dict, number: int, *, scanned: bool = False) -> Example:
        told = {"name": f"{self.stem}-{number}", "source": f"{self.label}#{number}"}
        return parse(record, self.schema, self.place, **told, scanned=scanned)


class Examples(Sequence):
    """Good records of one or several files, read and parsed when they are asked for. Pickles as places in files."""

    def __init__(self, files: list[tuple[Format, Records]], table: np.ndarray):
        self.files = files
        self.table = table  # (n) of file, row, number, images, has: `TABLE`

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Examples(self.files, self.table[index])
        entry = self.table[index]
        form, records = self.files[entry["file"]]
        try:
            return form.read(records[entry["row"]], int(entry["number"]))
        except Refused as refused:  # its image was there when the file was scanned
            source = f"{form.label}#{entry['number']}"
            raise Refused(refused.reason, f"{source}: {refused}") from refused

    def having(self, bit: int) -> tuple["Examples", "Examples"]:
        """Those with a gold box (GOLD) or with answers (TURNS), and those without."""
        there = (self.table["has"] & bit) > 0
        return Examples(self.files, self.table[there]), Examples(self.files, self.table[~there])

    def drawn(self, count: int, seed: int) -> "Examples":
        """`count` of them by chance, in their order; all where there are no more."""
        if count >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
        return Examples(self.files, self.table[chosen])

    def __add__(self, other: "Examples") -> "Examples":
        later = other.table.copy()
        later["file"] += len(self.files)
        return Examples(self.files + other.files, np.concatenate([self.table, later]))

    @property
    def sources(self) -> list[str]:
        """`Example.source` of each, without reading any."""
        return [f"{self.files[e['file']][0].label}#{e['number']}" for e in self.table]

    @property
    def most_images(self) -> int:
        return int(self.table["images"].max(initial=0))


TABLE = np.dtype([("file", "i2"), ("row", "i4"), ("number", "i4"), ("images", "i2"), ("has", "u1")])


def most_images(examples: Sequence[Example]) -> int:
    """Images of the example that has the most."""
    return examples.most_images if isinstance(examples, Examples) else max(len(e.images) for e in examples)


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
    kept = _Kept(path, schema, place)
    found = kept.load() or kept.save(_looked_through(path, schema, place))
    for line in found.told:
        logger.info("%s: %s", label, line)
    faults = [Fault(f"{label}#{n}", reason, f"{label}#{n}: {message}") for n, reason, message in found.faults]
    remedy = "Correct the file, or name its format with --schema."
    require_some(path, found.table, faults, least=least, remedy=remedy)
    form = Format(found.schema, replace(place, scale=found.scale), label, path.stem)
    return Examples([(form, found.records(path))], found.table), faults


@dataclass
class _Scanned:
    """What a file was found to hold."""

    schema: str
    scale: float
    told: list[str]
    faults: list[tuple[int, str, str]]  # (number, reason, message)
    table: np.ndarray  # of the good records
    spans: np.ndarray  # (n, 2) int64, their bytes

    def records(self, path: Path) -> Records:
        return Records(path, self.spans[:, 0], self.spans[:, 1])


def _looked_through(path: Path, schema: str, place: Place) -> _Scanned:
    rows = enumerate(scan(path))
    head = list(itertools.islice(rows, LOOKED_AT))
    records = [row.value for _, row in head if isinstance(row.value, dict)]
    told = []
    if schema == "auto" and records:
        schema, why = _recognised(path, records)
        told.append(why)
    scale = box_scale(records)
    if scale != 1:
        told.append(f"boxes are fractions of the image (half of them end at 2 or less); times {scale:g}")
    form = Format(schema, replace(place, scale=scale), path.name, path.stem)
    faults, good, spans = [], array("q"), array("q")
    for number, row in itertools.chain(head, rows):
        try:
            example = form.read(_record(row), number, scanned=True)
        except Refused as refused:
            faults.append((number, refused.reason, str(refused)))
            continue
        except Exception as error:  # a record is anybody's, and no rule foresees everything: it must not end a run
            faults.append(
                (number, "unreadable", f"reading it fails with {type(error).__name__}: {error!s:.200}. Drop it.")
            )
            continue
        has = GOLD * (example.gold is not None) + TURNS * example.can_be_learned
        good.extend((number, min(len(example.images), 2**15 - 1), has))
        spans.extend((row.start, row.stop))
    columns = np.array(good, dtype=np.int64).reshape(-1, 3)
    table = np.zeros(len(columns), dtype=TABLE)
    table["row"] = np.arange(len(columns))
    for i, name in enumerate(("number", "images", "has")):
        table[name] = columns[:, i]
    return _Scanned(schema, scale, told, faults, table, np.array(spans, dtype=np.int64).reshape(-1, 2))


def _record(row: Row) -> dict:
    if row.fault:
        raise Refused("not_json", f"the line is not JSON ({row.fault}). Write it again.")
    if not isinstance(row.value, dict):
        raise Refused("not_a_record", f"{row.value!r:.80} is no JSON object. Drop it.")
    return row.value


def _recognised(path: Path, records: list[dict]) -> tuple[str, str]:
    fits = Counter(name for record in records if (name := recognise(record)))
    if not fits:
        known = "; ".join(f"{name} has {schema.sign}" for name, schema in SCHEMAS.items())
        raise ValueError(
            f"{path}: records with the keys {sorted(records[0])} fit no known schema ({known}). "
            "Rename the keys, or name the format with --schema."
        )
    ((name, count), *_) = fits.most_common(1)
    among = f"of the first {len(records)} records" if len(records) == LOOKED_AT else f"of {len(records)} records"
    return name, f"schema {name}, because {count} {among} have {SCHEMAS[name].sign}"


class _Kept:
    """The scan of a large file, kept until the file changes."""

    def __init__(self, path: Path, schema: str, place: Place):
        stat = path.stat()
        self.large = stat.st_size >= KEPT_FROM
        self.key = [
            VERSION,
            str(path.resolve()),
            stat.st_size,
            stat.st_mtime_ns,
            schema,
            place.root,
            place.bounded,
            place.sized,
        ]
        name = hashlib.sha256(json.dumps(self.key[:2] + self.key[4:]).encode()).hexdigest()[:32]
        folder = os.environ.get("BOXGRPO_CACHE") or os.path.expanduser("~/.cache/boxgrpo")
        self.path = Path(folder) / "scans" / f"{name}.npz"

    def load(self) -> _Scanned | None:
        """What was kept of this very file; None: nothing, or of an earlier one."""
        if not self.large or not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                about = json.loads(arrays["about"].tobytes())
                if about.pop("key") != self.key:
                    return None
                return _Scanned(**about, table=arrays["table"], spans=arrays["spans"])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            logger.warning("%s cannot be used (%s); the data is scanned again", self.path, error)
            return None

    def save(self, found: _Scanned) -> _Scanned:
        """Written aside and renamed: another process may be reading. Where it cannot be, the next run scans again.

        So it does after faults that lie with the images.
        """
        if not self.large or any(reason in PASSING for _, reason, _ in found.faults):
            return found
        about = {k: v for k, v in asdict(found).items() if k not in ("table", "spans")} | {"key": self.key}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=self.path.parent, suffix=".npz")
            with os.fdopen(handle, "wb") as file:
                raw = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
                np.savez(file, about=raw, table=found.table, spans=found.spans)
            os.replace(aside, self.path)
        except OSError as error:
            logger.warning("the scan of %s cannot be kept (%s); it takes its time again", self.key[1], error)
        return found
