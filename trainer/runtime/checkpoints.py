"""Checkpoints that a killed run goes on from: written aside, their manifest of checksums last, then renamed.

    checkpoint-20/  config.json, model.safetensors, tokenizer ...   what `from_pretrained` reads
                    trainer/progress.json                           step, place in the data, options, revision
                    trainer/rank0.safetensors                       trained weights in fp32 and optimizer state, of
                                                                    each rank that has some
                    trainer/rng-rank0.json                          random states of each rank
                    manifest.json                                   size and SHA-256 of all of these

All ranks write into one folder, which they must share. Nothing in it is a pickle.
"""

import dataclasses
import hashlib
import json
import logging
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .ranks import STOPPED, Ranks
from .reporter import METRICS

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
TRAINER = "trainer"
PROGRESS = "progress.json"
# What a place in the data, the frozen weights or the optimizer's state have no meaning without.
FIXED = (
    *("model", "data", "schema", "seed", "prompts_per_step", "train_batch_size"),
    *("engine", "zero_stage", "optimizer", "dtype", "freeze_vision", "lora_rank", "lora_alpha"),
)
# What changes nothing in what a run computes.
FREE = ("resume", "output_dir", "overwrite_output_dir", "profile_steps", "memory_snapshot", "peak_tflops")
CONTENT = (".safetensors", ".json", ".txt", ".jinja")  # of a model's folder


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    position: int = 0  # slots of the data stream that were taken, over all ranks
    num_tokens: int = 0
    skipped_steps: int = 0  # for NaN or infinity
    faults: dict[str, str] = field(default_factory=dict)  # reason by record
    metrics_bytes: int = 0
    rollout_bytes: dict[str, int] = field(default_factory=dict)  # by file name, of --rollout_file
    evaluated: int = 0  # step of the last evaluation on --eval_data
    best_accuracy: float = -1.0  # of these, mean Acc@0.5 in 0-1
    best_step: int = 0


class Checkpoints:
    """The `checkpoint-<step>` folders of a run.

    Args:
        options: of the run; `output_dir`, `resume` and `save_total_limit` are looked at here, all are written down.
    """

    def __init__(self, options, r: Ranks):
        self.options, self.r = options, r
        self.root = Path(options.output_dir)
        self.contents = {name: fingerprint(getattr(options, name)) for name in ("model", "data")} if r.is_main else {}

    def find(self) -> Path | None:
        """The folder that `--resume` asks for: the newest whole one for "auto", else the one that is named.

        Raises:
            ValueError: the one that is named is not whole, or was made with options that cannot go on from it.
        """
        resume = self.options.resume
        found, error = None, None
        if self.r.is_main and resume == "auto":
            for folder in sorted(self._folders(), key=_step, reverse=True):
                if reason := fault(folder):
                    log.warning("%s is not whole (%s); an earlier one is looked for.", folder, reason)
                else:
                    found = folder
                    break
            if found is None and self._folders() and not self.options.overwrite_output_dir:
                error = (
                    f"none of the checkpoints in {self.root} is whole: see the warnings above. Name one with --resume, "
                    "give another --output_dir, or begin anew with --overwrite_output_dir true."
                )
        elif self.r.is_main and resume:
            if reason := fault(Path(resume)):
                error = f"resume is {resume}; it is not a whole checkpoint ({reason}). Use --resume auto, or another."
            found = Path(resume)
        found, error = self.r.gather((found, error))[0]
        if error:
            raise ValueError(error)
        if found is not None:
            self._compare(found)
        return found

    def _compare(self, folder: Path) -> None:
        """Refuse to go on with options that make another run of it; warn of others that changed."""
        written = json.loads((folder / TRAINER / PROGRESS).read_text())
        now = dataclasses.asdict(self.options)
        changed = {k: (v, now.get(k)) for k, v in written["options"].items() if k in now and v != now[k]}
        contents = written.get("contents", {})
        for name, content in self.r.gather(self.contents)[0].items():
            if contents.get(name, content) == content:
                if name in contents:  # the same files, wherever they are now
                    changed.pop(name, None)
            elif name not in changed:
                raise ValueError(
                    f"{folder} was made with --{name} {written['options'][name]}, whose files have changed since; the "
                    "run cannot go on with others. Put them back, or start anew without --resume."
                )
        if now["engine"] == "ddp":
            changed.pop("zero_stage", None)
        for name in [n for n in FIXED if n in changed]:
            was, given = changed[name]
            raise ValueError(
                f"{folder} was made with {name} {was!r}, this run has {given!r}; it cannot go on from there. "
                f"Give --{name} {was}, or start anew without --resume."
            )
        for name in sorted(changed.keys() - {*FREE}):
            log.warning(
                "resumed with %s %r; the checkpoint was made with %r.", name, changed[name][1], changed[name][0]
            )
        if written["world_size"] != self.r.world_size:
            if written["options"].get("engine", "ddp") != "ddp":
                raise ValueError(
                    f"{folder} holds the optimizer in {written['world_size']} parts, this run has {self.r.world_size} "
                    f"ranks. Start {written['world_size']} of them, or train on its weights with --model {folder}."
                )
            if written["options"].get("rollout_file"):
                raise ValueError(
                    f"{folder} was made by {written['world_size']} ranks that each store completions in a file; this "
                    f"run has {self.r.world_size}. Leave --rollout_file out, or start {written['world_size']} ranks."
                )

    def load(self, folder: Path, engine) -> Progress:
        """Put trained weights, optimizer, schedule and random states back."""
        progress = Progress(**json.loads((folder / TRAINER / PROGRESS).read_text())["progress"])
        engine.load(folder / TRAINER)
        states = folder / TRAINER / f"rng-rank{self.r.rank}.json"
        if states.exists():
            set_random_states(json.loads(states.read_text()))
        log.info("resumed %s at step %d", folder, progress.step)
        return progress

    def after_step(self, progress: Progress, steps: int, engine, write_model, *, stop: bool) -> None:
        """Save when it is due, or when the run is asked to stop, and then stop.

        Raises:
            SystemExit: with 143 (128 + SIGTERM), after a launcher's SIGTERM.
            ValueError: more than `max_skipped` steps had no update.
        """
        o = self.options
        if progress.skipped_steps > o.max_skipped:
            raise ValueError(
                f"{progress.skipped_steps} updates in {progress.step} steps had a loss or a gradient that is NaN or "
                f"infinite; max_skipped is {o.max_skipped}. Lower --learning_rate, or go on from an earlier checkpoint "
                "with --resume."
            )
        if stop or (o.save_steps and (progress.step % o.save_steps == 0 or progress.step == steps)):
            saved = self.save(progress, engine, write_model)
        if stop:
            log.warning("asked to stop: saved %s; --resume auto goes on from there", saved)
            raise SystemExit(STOPPED)

    def save(self, progress: Progress, engine, write_model: Callable[[Path], None]) -> Path:
        """Write `checkpoint-<step>`; every rank calls it. Afterwards the oldest beyond `save_total_limit` are removed.

        Args:
            write_model: called on rank 0 with the folder for weights, config and tokenizer.

        Raises:
            ValueError: on every rank, when one of them cannot write; what was written is removed, and the earlier
                checkpoints are as they were.
        """
        merged = dataclasses.replace(
            progress,
            faults=_union(self.r.gather(progress.faults)),
            rollout_bytes=_union(self.r.gather(progress.rollout_bytes)),
        )
        target = self.root / f"checkpoint-{progress.step}"
        aside = self.root / f".{target.name}.part"

        def begin() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / TRAINER).mkdir(parents=True)
            write_model(aside)
            written = {
                "progress": dataclasses.asdict(merged),
                "options": dataclasses.asdict(self.options),
                "contents": self.contents,
                "world_size": self.r.world_size,
                "revision": revision(),
                "torch": torch.__version__,
            }
            (aside / TRAINER / PROGRESS).write_text(json.dumps(written, indent=1))

        def own() -> None:
            for name in progress.rollout_bytes:
                to_disk(Path(self.options.rollout_file).parent / name)
            engine.save(aside / TRAINER)
            (aside / TRAINER / f"rng-rank{self.r.rank}.json").write_text(json.dumps(random_states()))

        def finish() -> None:
            if (self.root / METRICS).exists():
                to_disk(self.root / METRICS)
            seal(aside)
            shutil.rmtree(target, ignore_errors=True)  # one that was not whole
            os.rename(aside, target)
            to_disk(self.root)

        with engine.gathered_weights():
            self._together(begin if self.r.is_main else _nothing, target, aside)
        self._together(own, target, aside)
        self._together(finish if self.r.is_main else _nothing, target, aside)
        if self.r.is_main:
            self._prune(progress.step)
        return target

    def save_result(self, folder: Path, engine, write_model: Callable[[Path], None]) -> None:
        """The run's weights, config and tokenizer; every rank calls it.

        Raises:
            ValueError: on every rank, when they cannot be written.
        """
        with engine.gathered_weights():
            self._together((lambda: write_model(folder)) if self.r.is_main else _nothing, folder)

    def _together(self, write: Callable[[], None], target: Path, aside: Path | None = None) -> None:
        """Let every rank write; where one cannot, all of them stop."""
        error = None
        try:
            write()
        except Exception as failed:  # a full disk is an OSError, a SafetensorError, or the tokenizer's bare Exception
            log.debug("writing %s failed", target, exc_info=True)
            error = f"rank {self.r.rank}: {type(failed).__name__}: {failed}"
        errors = [e for e in self.r.gather(error) if e]
        if not errors:
            return
        if self.r.is_main and aside:
            shutil.rmtree(aside, ignore_errors=True)
        good = max((f for f in self._folders() if (f / MANIFEST).exists()), key=_step, default=None)
        raise ValueError(
            f"{target} cannot be written ({errors[0]}). "
            + (f"{good} stays good: " if good else "There is no earlier checkpoint. ")
            + "make room, or give another --output_dir"
            + (", and go on with --resume auto." if good else ".")
        )

    def _folders(self) -> list[Path]:
        return [f for f in self.root.glob("checkpoint-*") if f.is_dir() and re.fullmatch(r"checkpoint-\d+", f.name)]

    def _prune(self, step: int) -> None:
        """Remove the oldest beyond `save_total_limit`, and what a kill left half written; `step`'s is whole, and stays.

        Later ones are none of its business: they were not whole when this run went on from before them.
        """
        for part in self.root.glob(".checkpoint-*.part"):
            shutil.rmtree(part, ignore_errors=True)
        limit = self.options.save_total_limit
        kept = sorted((f for f in self._folders() if _step(f) <= step), key=_step)
        for old in kept[: -limit if limit else 0]:
            # A kill in the middle leaves a folder without its manifest: not whole, and seen to be.
            (old / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def fingerprint(paths: str | Sequence[str]) -> str:
    """Of data files, or of a model's folder: names, lengths, and the first and last MiB of each file's content.

    Weights that were trained again differ everywhere, and hashing all of a large model would take minutes.
    """
    digest = hashlib.sha256()
    for given in [paths] if isinstance(paths, str) else paths:
        path = Path(given)
        if not path.exists():
            name, _, count = given.rpartition("#")
            path = Path(name) if name and count.isdigit() else path
            digest.update(f"{count} of ".encode())
        files = sorted(f for f in path.glob("*") if f.suffix in CONTENT) if path.is_dir() else [path]
        for file in filter(Path.is_file, files):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as content:
                digest.update(content.read(1 << 20))
                content.seek(max(0, size - (1 << 20)))
                digest.update(content.read())
    return digest.hexdigest()


def _nothing() -> None:
    pass


def _union(mappings: list[dict]) -> dict:
    return {key: value for mapping in mappings for key, value in mapping.items()}


def _step(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


def seal(folder: Path) -> None:
    """Write the manifest of everything in `folder`, when all of it is on the disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        to_disk(path)
        to_disk(path.parent)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    to_disk(folder / MANIFEST)
    to_disk(folder)


def fault(folder: Path) -> str | None:
    """What is missing or other than the manifest says; None for a whole checkpoint."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        listed = [(folder / name, expected["bytes"], expected["sha256"]) for name, expected in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"no manifest: {error}"
    for path, size, checksum in listed:
        name = path.relative_to(folder)
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{name} lies outside it"
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or has another size"
        try:
            if _sha256(path) != checksum:
                return f"{name} has another checksum"
        except OSError as error:  # a block that cannot be read
            return f"{name}: {error}"
    return None if f"{TRAINER}/{PROGRESS}" in files else f"no {PROGRESS}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(path: Path) -> None:
    """Wait until what was written is there after a loss of power, too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def random_states() -> dict:
    """Of Python, numpy, torch and this rank's GPU, as JSON can hold them."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda": bytes(torch.cuda.get_rng_state().tolist()).hex() if torch.cuda.is_available() else None,
    }


def set_random_states(states: dict) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(states["torch"]))
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(states["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def revision() -> str:
    """This code's git revision, `unknown` where it was installed without its repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
