"""Writing files so that a kill cannot damage them: atomically, line by line, or with checksums."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

MANIFEST = "manifest.json"


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically. A lone surrogate, which JSON can contain, becomes a "?"."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # several ranks may write the same file
    try:
        part.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it replaces `path` when the block ends, and is removed when the block fails.

    After a kill between the two renames there is no `path`; `restore_folder` renames the earlier folder back.
    """
    restore_folder(path)
    part, earlier = (path.with_name(f".{path.name}.{suffix}") for suffix in ("part", "old"))
    for leftover in (part, earlier):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if path.exists():
            path.rename(earlier)
        part.rename(path)
        flush_to_disk(path.parent)
        shutil.rmtree(earlier, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        restore_folder(path)
        raise


def restore_folder(path: Path) -> None:
    """Rename the earlier folder back to `path` where a kill interrupted `replace_folder` between its two renames."""
    earlier = path.with_name(f".{path.name}.old")
    if earlier.exists() and not path.exists():
        earlier.rename(path)


def open_lines(path: Path) -> TextIO:
    """Open a file to which JSON values are appended, one a line.

    Each line is flushed when its end is written, so a killed process loses none. A last line without an end is
    removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return path.open("a", buffering=1)


def read_lines(paths: Iterable[Path]) -> Iterator:
    """The JSON values in files that `open_lines` opened, except a last line without an end."""
    for path in paths:
        for line in path.read_bytes().split(b"\n")[:-1]:
            yield json.loads(line)


def write_manifest(folder: Path) -> None:
    """Flush every file in `folder` to the disk, then write their sizes and checksums into its manifest."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        flush_to_disk(path)
        flush_to_disk(path.parent)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    flush_to_disk(folder / MANIFEST)
    flush_to_disk(folder)


def find_fault(folder: Path, *needed: str) -> str | None:
    """What is missing or differs from the manifest; None for a complete folder that holds the `needed` files."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        listed = [(folder / name, expected["bytes"], expected["sha256"]) for name, expected in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no manifest: {error}"
    for path, size, checksum in listed:
        name = path.relative_to(folder)
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{name} lies outside the folder"
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or has another size"
        try:
            if _sha256(path) != checksum:
                return f"{name} has another checksum"
        except OSError as error:  # a block that cannot be read
            return f"{name}: {error}"
    return next((f"no {name}" for name in needed if name not in files), None)


def flush_to_disk(path: Path) -> None:
    """Wait until the written data would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
