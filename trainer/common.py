"""What the two loops and the evaluator do alike."""

import logging
from pathlib import Path

import torch

from boxgrpo.model.checkpoint import save_model
from boxgrpo.model.qwen2vl import Qwen2VL

from .checkpoints import Progress
from .loader import Loader
from .lora import merged_weights, save_adapter
from .options import DataOptions
from .processing import Processor
from .ranks import Ranks
from .readers import Example, Fault, read_examples

log = logging.getLogger(__name__)


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


def read_usable(options, *, needs: str) -> tuple[list[Example], list[Fault]]:
    """The records of `options.data` that have what is needed, `gold` or `turns`; the others are faults.

    Every fault is named in the log.

    Raises:
        ValueError: no data named, no such file, or no record left.
    """
    if not options.data:
        raise ValueError("no data. Name a JSON or JSONL file with --data.")
    if not Path(options.data).is_file():
        raise ValueError(f"data is {options.data}; there is no such file. Correct --data.")
    kind = {"gold": "gold box", "turns": "assistant's answer"}[needs]
    examples, faults = read_examples(options.data, schema=options.schema, image_root=options.image_root or None)
    usable = [e for e in examples if getattr(e, needs)]
    faults += [
        Fault(e.source, f"no_{needs}", f"{e.source}: the record has no {kind}.")
        for e in examples
        if not getattr(e, needs)
    ]
    for fault in faults[:20]:
        log.warning("skipped %s", fault.message)
    if more := [fault.source for fault in faults[20:]]:
        log.warning("skipped %d more: %s", len(more), ", ".join(more))
    if not usable:
        raise ValueError(
            f"{options.data}: 0 of {len(faults)} records can be used; they need the {kind}. The first: "
            f"{faults[0].message} Pass other records with --data."
        )
    return usable, faults


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


def save_result(model: Qwen2VL, processor: Processor, folder: Path, r: Ranks) -> None:
    """`save_pretrained` on rank 0, with the others waiting."""
    if r.is_main:
        save_pretrained(model, processor, folder)
    r.barrier()
