"""Checkpoints from which a killed run is resumed: written to a temporary folder, given checksums, then renamed.

    checkpoint-20/  config.json, model.safetensors, tokenizer ...   what `from_pretrained` reads
                    trainer/progress.json                           step, position in the data, options, revision
                    trainer/rank0.safetensors                       trained weights in fp32 and optimizer state, of
                                                                    each rank that has some
                    trainer/rng-rank0.json                          random states of each rank
                    manifest.json                                   size and SHA-256 of all of these

All ranks write into one folder, which they must share. Nothing in it is a pickle.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from .files import MANIFEST, find_fault, flush_to_disk, replace_folder, write_manifest
from .ranks import Ranks, RunFailed
from .reporter import METRICS, checkpoint_folders

T = TypeVar("T")
log = logging.getLogger(__name__)

TRAINER = "trainer"
PROGRESS = "progress.json"
# Options that a resumed run must keep: its position in the data, frozen weights or optimizer state depend on them.
FIXED_OPTIONS = (
    *("model", "data", "schema", "box_unit", "seed", "prompts_per_step", "train_batch_size", "num_iterations"),
    *("engine", "zero_stage", "optimizer", "dtype", "freeze_vision", "lora_rank", "lora_alpha"),
)
EVAL_DATA = ("eval_data", "eval_image_root", "eval_schema", "eval_box_unit")  # what the best score belongs to
# Options that do not change what a run computes.
FREE_OPTIONS = {"resume", "output_dir", "overwrite_output_dir", "profile_steps", "memory_snapshot", "peak_tflops"}
MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".jinja")  # suffixes of the files that form a model


@dataclass
class Progress:
    """The progress of a run, as a checkpoint stores it."""

    step: int = 0
    position: int = 0  # slots of the data stream that were taken, over all ranks
    num_tokens: int = 0
    skipped_steps: int = 0  # updates skipped for NaN or infinity
    faults: dict[str, str] = field(default_factory=dict)  # reason by record
    metrics_bytes: int = 0
    rollout_bytes: dict[str, int] = field(default_factory=dict)  # by file name, of --rollout_file
    evaluated: int = 0  # step of the last evaluation on --eval_data
    best_accuracy: float = -1.0  # highest mean Acc@0.5 of the evaluations, 0-1
    best_step: int = 0


class Checkpoints:
    """The `checkpoint-<step>` folders of a run.

    Args:
        options: of the run; `output_dir`, `resume` and `save_total_limit` are used, all are stored.
    """

    def __init__(self, options, r: Ranks):
        self.options, self.r = options, r
        self.root = Path(options.output_dir)
        named = [name for name in ("model", "data", "eval_data") if getattr(options, name)]
        self.contents = {name: fingerprint(getattr(options, name)) for name in named} if r.is_main else {}

    def find(self) -> Path | None:
        """The folder that `--resume` names, or for "auto" the newest complete one; None: the run starts at step 0.

        Raises:
            ValueError: the named one is incomplete, or options that a resumed run must keep have changed.
        """
        resume, found, error = self.options.resume, None, None
        if self.r.is_main and resume == "auto":
            folders = checkpoint_folders(self.root)
            for folder in reversed(folders.values()):
                if not (reason := find_fault(folder, f"{TRAINER}/{PROGRESS}")):
                    found = folder
                    break
                log.warning("%s is incomplete (%s); trying an earlier one.", folder, reason)
            if folders and not found and not self.options.overwrite_output_dir:
                error = (
                    f"none of the checkpoints in {self.root} is complete: see the warnings. Name one with --resume, "
                    "give another --output_dir, or start anew with --overwrite_output_dir true."
                )
        elif self.r.is_main and resume:
            found = Path(resume)
            if reason := find_fault(found, f"{TRAINER}/{PROGRESS}"):
                error = f"resume is {resume}; it is not a complete checkpoint ({reason}). Name another, or auto."
        found, error = self.r.gather((found, error))[0]
        if error:
            raise ValueError(error)
        if found is not None:
            self._check_options(found)
        return found

    def _check_options(self, folder: Path) -> None:
        """Raise ValueError for changed options that a resumed run must keep; warn of other changes."""
        written = json.loads((folder / TRAINER / PROGRESS).read_text())
        was, now = written["options"], dataclasses.asdict(self.options)
        changed = {name for name in was.keys() & now.keys() if was[name] != now[name]}
        if now["engine"] == "ddp":
            changed.discard("zero_stage")
        contents = written.get("contents", {})
        for name, content in self.r.gather(self.contents)[0].items():
            if contents.get(name) == content:  # the same content, wherever the files are now
                changed.discard(name)
            elif name in contents and name not in changed and name != "eval_data":
                raise ValueError(
                    f"{folder} was made with --{name} {was[name]}, whose files have changed since; the run cannot "
                    "continue with others. Restore them, or start anew without --resume."
                )
        for name in FIXED_OPTIONS:
            if name in changed:
                typed = " ".join(was[name]) if isinstance(was[name], list) else was[name]
                raise ValueError(
                    f"{folder} was made with {name} {was[name]!r}, this run has {now[name]!r}; it cannot continue "
                    f"from there. Give --{name} {typed}, or start anew without --resume."
                )
        for name in sorted(changed - FREE_OPTIONS):
            log.warning("resumed with %s %r; the checkpoint was made with %r.", name, now[name], was[name])
        if (ranks := written["world_size"]) == self.r.world_size:
            return
        if was.get("engine", "ddp") != "ddp":
            raise ValueError(
                f"{folder} holds the optimizer in {ranks} parts, this run has {self.r.world_size} ranks. Start {ranks} "
                f"of them, or train on its weights with --model {folder}."
            )
        if was.get("rollout_file"):
            raise ValueError(
                f"{folder} was made by {ranks} ranks that each store completions in a file; this run has "
                f"{self.r.world_size}. Leave --rollout_file out, or start {ranks} ranks."
            )

    @staticmethod
    def step_of(folder: Path) -> int:
        """The step after which the checkpoint was written."""
        return json.loads((folder / TRAINER / PROGRESS).read_text())["progress"]["step"]

    def load(self, folder: Path, engine) -> Progress:
        """Restore trained weights, optimizer, schedule and random states."""
        written = json.loads((folder / TRAINER / PROGRESS).read_text())
        progress = Progress(**written["progress"])
        now = dataclasses.asdict(self.options) | {"eval_data": self.r.gather(self.contents)[0].get("eval_data")}
        was = written["options"] | {"eval_data": written.get("contents", {}).get("eval_data")}
        for options in (was, now):
            options["eval_image_root"] = os.path.abspath(options.get("eval_image_root") or "")
        if changed := [name for name in EVAL_DATA if was.get(name, "auto") != now[name]] if was["eval_data"] else []:
            log.warning("%s is not what %s was scored with; the best score starts anew.", changed[0], folder)
            progress.best_accuracy, progress.best_step = -1.0, 0
        engine.load(folder / TRAINER)
        states = folder / TRAINER / f"rng-rank{self.r.rank}.json"
        if states.exists():
            set_random_states(json.loads(states.read_text()))
        log.info("resumed %s at step %d", folder, progress.step)
        return progress

    def save(self, progress: Progress, engine, write_model: Callable[[Path], None]) -> Path:
        """Write `checkpoint-<step>`; every rank calls it. Afterwards the oldest beyond `save_total_limit` are removed.

        Args:
            write_model: called on rank 0 with the folder for weights, config and tokenizer.

        Raises:
            ValueError: on every rank, when one of them cannot write; the partial checkpoint is removed, and the
                earlier ones are unchanged.
        """
        ranks = self.r.gather({"faults": progress.faults, "rollout_bytes": progress.rollout_bytes})
        merged = {name: {k: v for rank in ranks for k, v in rank[name].items()} for name in ranks[0]}
        metrics, target = self.root / METRICS, self.root / f"checkpoint-{progress.step}"

        def write_shared() -> Path:
            part = replacing.enter_context(replace_folder(target))
            (part / TRAINER).mkdir()
            write_model(part)
            merged["metrics_bytes"] = metrics.stat().st_size if metrics.exists() else 0
            written = {
                "progress": dataclasses.asdict(progress) | merged,
                "options": dataclasses.asdict(self.options),
                "contents": self.contents,
                "world_size": self.r.world_size,
                "revision": revision(),
                "torch": torch.__version__,
            }
            (part / TRAINER / PROGRESS).write_text(json.dumps(written, indent=1))
            return part

        def write_own() -> None:
            for name in progress.rollout_bytes:
                flush_to_disk(Path(self.options.rollout_file).parent / name)
            engine.save(part / TRAINER)
            (part / TRAINER / f"rng-rank{self.r.rank}.json").write_text(json.dumps(random_states()))

        def finish() -> None:
            if metrics.exists():
                flush_to_disk(metrics)
            write_manifest(part)
            replacing.close()

        with contextlib.ExitStack() as replacing:
            with engine.gathered_weights():
                part = self._write(write_shared, target, on_main=True)
            self._write(write_own, target)
            self._write(finish, target, on_main=True)
        if self.r.is_main:
            self._prune(progress.step)
        return target

    def save_result(self, folder: Path, engine, write_model: Callable[[Path], None]) -> None:
        """Write the run's weights, config and tokenizer; every rank calls it.

        Raises:
            ValueError: on every rank, when they cannot be written.
        """
        with engine.gathered_weights():
            self._write(lambda: write_model(folder), folder, on_main=True)

    def _write(self, write: Callable[[], T], target: Path, *, on_main: bool = False) -> T:
        """Call `write` on every rank, or on rank 0 alone. All ranks return rank 0's result; if one fails, all raise."""
        result = error = None
        try:
            if self.r.is_main or not on_main:
                result = write()
        except Exception as failed:  # a full disk is an OSError, a SafetensorError, or the tokenizer's bare Exception
            log.debug("writing %s failed", target, exc_info=True)
            error = f"rank {self.r.rank}: {type(failed).__name__}: {failed}"
        results, errors = zip(*self.r.gather((result, error)), strict=True)
        if not any(errors):
            return results[0]
        complete = [folder for folder in checkpoint_folders(self.root).values() if (folder / MANIFEST).exists()]
        raise RunFailed(
            f"{target} cannot be written ({next(filter(None, errors))}). "
            + (f"{complete[-1]} is still complete: " if complete else "There is no earlier checkpoint. ")
            + "free disk space, or give another --output_dir"
            + (", and continue with --resume auto." if complete else ".")
        )

    def _prune(self, step: int) -> None:
        """Remove partial checkpoints of a killed run, and the oldest checkpoints beyond `save_total_limit`.

        Those after `step` are neither counted nor removed: they were incomplete when this run was resumed before them.
        """
        for leftover in self.root.glob(".checkpoint-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        limit = self.options.save_total_limit
        saved = [folder for number, folder in checkpoint_folders(self.root).items() if number <= step]
        for old in saved[: -limit if limit else 0]:
            # Without its manifest a folder counts as incomplete, also if a kill interrupts the removal.
            (old / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)


def fingerprint(paths: str | Sequence[str]) -> str:
    """A hash of data files, or of a model's folder: names, lengths, and the first and last MiB of each file.

    Hashing all of a large model would take minutes, and different weights differ in those parts, too.
    """
    digest = hashlib.sha256()
    for given in [paths] if isinstance(paths, str) else paths:
        path = Path(given)
        if not path.exists():
            name, _, count = given.rpartition("#")
            path = Path(name) if name and count.isdigit() else path
            digest.update(f"{count} of ".encode())
        files = sorted(f for f in path.glob("*") if f.suffix in MODEL_SUFFIXES) if path.is_dir() else [path]
        for file in filter(Path.is_file, files):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with file.open("rb") as content:
                digest.update(content.read(1 << 20))
                content.seek(max(0, size - (1 << 20)))
                digest.update(content.read())
    return digest.hexdigest()


def random_states() -> dict:
    """The states of Python, numpy, torch and this rank's GPU, as JSON values."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }


def set_random_states(states: dict) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(states["torch"]), dtype=torch.uint8))
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(states["cuda"]), dtype=torch.uint8))


def revision() -> str:
    """The git revision of this code; `unknown` where it was installed without its repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
