"""What the two loops and the evaluator do alike."""

import functools
import logging
import operator
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from boxgrpo.model.checkpoint import load_model, save_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import GOLD, TURNS, Examples, Fault, read_examples
from boxgrpo.trainer.engine.lora import merged_weights, save_adapter
from boxgrpo.trainer.runtime.checkpoints import Progress
from boxgrpo.trainer.runtime.ranks import Ranks

from .options import DataOptions

log = logging.getLogger(__name__)
NAMED = 100  # faulty records that a run names: most of MGrounding has two boxes, which GRPO cannot use


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """`float32`, `bfloat16`, or by the device for `auto`."""
    choices = {
        "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }
    if name not in choices:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join(choices)}. Change --dtype.")
    return choices[name]


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


def loaded_model(options, r: Ranks) -> Qwen2VL:
    """`options.model`. For ZeRO-3 on the host: its engine moves it on, a model at a time, and shares it out."""
    sharded = options.engine == "deepspeed" and options.zero_stage == 3
    device = torch.device("cpu") if sharded else r.device
    return load_model(options.model, dtype=chosen_dtype(options.dtype, r.device), device=device)


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


def total_steps(options: DataOptions, examples: int, per_step: int) -> int:
    """Optimizer steps of the run: `max_steps`, or what the epochs ask for."""
    return options.max_steps if options.max_steps > 0 else max(1, round(options.num_train_epochs * examples / per_step))


def make_loader(
    examples, prepare, per_rank: int, options: DataOptions, r: Ranks, progress: Progress | None = None
) -> Loader:
    """The stream of prepared examples, from where `progress` stands."""
    loader = Loader(
        examples,
        prepare,
        batch_size=per_rank,
        seed=options.seed,
        workers=options.dataloader_num_workers,
        rank=r.rank,
        world_size=r.world_size,
        start=progress.position if progress else 0,
    )
    loader.faults |= progress.faults if progress else {}
    return loader


def save_pretrained(model: Qwen2VL, processor: Processor, folder: Path) -> None:
    """Weights, config, tokenizer and image processor, as `from_pretrained` and vLLM read them.

    Adapters are merged into the weights, and stand in `adapter/` as PEFT reads them.
    """
    save_model(model, folder, weights=merged_weights(model))
    save_adapter(model, folder / "adapter")
    processor.save_pretrained(folder)
