"""Records of tables: Parquet and Arrow files, and folders that `datasets.Dataset.save_to_disk` writes.

Rows are read from memory-mapped Arrow files. A Parquet file, which can only be read in large pieces, is first written
as an Arrow file into the folder of caches.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

from boxgrpo.trainer.arguments import optional_import

from .scan import Row

STATE = "state.json"  # in a folder of `save_to_disk`: names its Arrow files
SPLITS = "dataset_dict.json"  # in a folder of `DatasetDict.save_to_disk`: names the folders of its splits
ROWS_AT_ONCE = 64  # of a Parquet file; a row may hold images


def is_table(path: Path) -> bool:
    return path.suffix in (".parquet", ".arrow") or path.is_dir()


def files_of(path: Path) -> list[Path]:
    """The files that a table's rows are in.

    Raises:
        ValueError: a folder that `save_to_disk` did not write, or that holds several splits.
    """
    if not path.is_dir():
        return [path]
    if (path / SPLITS).is_file():
        splits = ", ".join(json.loads((path / SPLITS).read_text())["splits"])
        raise ValueError(f"{path} holds the splits {splits}. Name the folder of one: {path}/{splits.split(',')[0]}.")
    if not (path / STATE).is_file():
        raise ValueError(
            f"{path} is a folder without {STATE}, so none of datasets' save_to_disk. Name a file of records in it."
        )
    return [path / file["filename"] for file in json.loads((path / STATE).read_text())["_data_files"]]


def scan_table(path: Path) -> Iterator[Row]:
    """Every row, in order; `start` and `stop` are row numbers."""
    starts, batches = _open(path)
    for number in range(starts[-1] + len(batches[-1]) if batches else 0):
        yield Row(number, number + 1, read_row(path, number))


def read_row(path: Path, number: int) -> dict:
    """The row as a record. Columns and fields without a value are left out: a table has them for every row."""
    starts, batches = _open(path)
    batch = bisect.bisect_right(starts, number) - 1
    (row,) = batches[batch].slice(number - starts[batch], 1).to_pylist()
    return _without_nulls(row)


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@functools.lru_cache(maxsize=64)
def _open(path: Path) -> tuple[list[int], list]:
    """The table's `pyarrow.RecordBatch`es that have rows, memory-mapped, and the number of the first row of each.

    Raises:
        ValueError: pyarrow is not installed, or the files are broken.
        OSError: they cannot be read, or the cache cannot be written.
    """
    with optional_import(f"data is {path}", "Run `pip install pyarrow`."):
        import pyarrow
    try:
        files = [_as_arrow(path)] if path.suffix == ".parquet" else files_of(path)
        tables = [pyarrow.ipc.open_stream(pyarrow.memory_map(os.fspath(file))).read_all() for file in files]
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} cannot be read as a table ({error}). Write it again.") from error
    batches = [batch for table in tables for batch in table.to_batches() if len(batch)]
    return list(itertools.accumulate(map(len, batches[:-1]), initial=0)), batches


def _as_arrow(path: Path) -> Path:
    """The Arrow file of a Parquet file's rows in the folder of caches; it is written where the Parquet file is new."""
    import pyarrow
    from pyarrow import parquet

    stat, name = path.stat(), hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    made = cache_folder() / "tables" / f"{name}.{stat.st_size}.{stat.st_mtime_ns}.arrow"
    if made.is_file():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    part = made.with_name(f".{made.name}.{os.getpid()}.part")  # several ranks may write the same file
    try:
        with parquet.ParquetFile(path) as file, pyarrow.ipc.new_stream(os.fspath(part), file.schema_arrow) as stream:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                stream.write_batch(batch)
        part.replace(made)
    finally:
        part.unlink(missing_ok=True)
    for other in made.parent.glob(f"{name}.*.arrow"):
        if other != made:  # of an earlier version of the Parquet file
            other.unlink(missing_ok=True)
    return made


def cache_folder() -> Path:
    """`BOXGRPO_CACHE`, else ~/.cache/boxgrpo."""
    return Path(os.environ.get("BOXGRPO_CACHE") or os.path.expanduser("~/.cache/boxgrpo"))
