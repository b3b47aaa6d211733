"""Greedy answers to a benchmark's records, from all ranks together."""

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor
from tqdm import tqdm

from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.model.packing import Prompt
from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import Example, plain_text
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.rollout.local import LocalRollout, Vocabulary, embed_prompts
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.runtime.spans import span

# How other models are asked for a box: the question, then this. (Qwen2-VL's as the published evaluation words it.)
_ONLY = "Don't generate additional words."
REQUESTS = {
    "marked": f" Format:<|box_start|>(x1,y1),(x2,y2)<|box_end|>. {_ONLY}",
    "list": f" Format:[x1, y1, x2, y2], in thousandths of the image's width and height. {_ONLY}",
    "fractions": f" Format:[x1, y1, x2, y2], as fractions of the image's width and height. {_ONLY}",
    "pixels": f" Format:[x1, y1, x2, y2], in pixels of the image. {_ONLY}",
    "tagged": f" Format:<box>x1 y1 x2 y2</box>, in thousandths of the image's width and height. {_ONLY}",
}


class Chosen(Sequence[Example]):
    """Some of the examples, by their numbers; none is read before it is asked for."""

    def __init__(self, examples: Sequence[Example], numbers: Sequence[int]):
        self.examples, self.numbers = examples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Example:
        return self.examples[self.numbers[i]]


def asked(example: Example, answer_format: str) -> Example:
    """The example as a model that writes boxes in `answer_format` is asked; "auto": as the record itself says."""
    if answer_format == "auto":
        return example
    if answer_format in REQUESTS:
        question = plain_text(example.question) + REQUESTS[answer_format]
        return dataclasses.replace(example, turns=(("user", question),))
    return dataclasses.replace(example, answer_format=answer_format)


class Prepare:
    """The prompt of an example, or why there is none: a slot of the loader's stream then stays its record's."""

    def __init__(self, processor: Processor, answer_format: str):
        self.processor, self.answer_format = processor, answer_format

    def __call__(self, example: Example) -> Prompt | str:
        try:
            return self.processor.prompt(asked(example, self.answer_format))
        except (ValueError, OSError) as error:
            return str(error)


def answer(
    model: Qwen2VL,
    processor: Processor,
    examples: Sequence[Example],
    numbers: Sequence[int],
    r: Ranks,
    *,
    answer_format: str = "auto",
    batch_size: int,
    max_completion_length: int,
    workers: int,
    keep: Callable[[dict[int, str]], None] | None = None,
) -> tuple[dict[int, str], dict[int, str]]:
    """Let the model answer `numbers` of the examples, greedily; every rank calls it, with the whole model each.

    Args:
        numbers: of the examples to answer, the same on every rank; shared out among them.
        batch_size: prompts that a rank decodes together; fewer where memory runs out.
        keep: called on each rank with what it has just answered.

    Returns:
        Texts by number, special tokens left out (but for the box marks in "marked"), and by number why there is none.
    """
    vocabulary = Vocabulary.of(processor, model.config, r.device)
    greedy = GrpoOptions(num_generations=1, temperature=0.0, max_completion_length=max_completion_length)
    rollout = LocalRollout(greedy, vocabulary, r)
    per_rank = max(1, min(batch_size, -(-len(numbers) // r.world_size)))
    stream = Loader(
        Chosen(examples, numbers),
        Prepare(processor, answer_format),
        batch_size=per_rank,
        seed=0,
        workers=workers,
        rank=r.rank,
        world_size=r.world_size,
        shuffle=False,
    )
    texts, reasons = {}, {}
    batches = iter(stream)
    own = len(range(r.rank, len(numbers), r.world_size))
    with tqdm(total=own, desc="evaluate", leave=False, disable=not r.is_main, dynamic_ncols=True) as bar:
        for _ in range(-(-len(numbers) // (per_rank * r.world_size))):
            samples = [s for s in next(batches) if s.serial < len(numbers)]  # the stream begins again behind them
            bar.update(len(samples))
            reasons |= {numbers[s.serial]: s.item for s in samples if isinstance(s.item, str)}
            samples = [s for s in samples if not isinstance(s.item, str)]
            answered, unfit = _decoded(model, processor, rollout, samples, answer_format)
            reasons |= {numbers[serial]: reason for serial, reason in unfit.items()}
            batch = {numbers[serial]: text for serial, text in answered.items()}
            texts |= batch
            if keep and batch:
                keep(batch)
    batches.close()  # which ends its workers
    parts = r.gather((texts, reasons))
    texts, reasons = ({n: v for part in parts for n, v in part[k].items()} for k in (0, 1))
    return dict(sorted(texts.items())), dict(sorted(reasons.items()))


def _decoded(model, processor, rollout, samples, answer_format: str) -> tuple[dict[int, str], dict[int, str]]:
    """Texts by serial, and by serial why there is none."""
    if not samples:
        return {}, {}
    with span("vision"):
        embeds = embed_prompts(model, [s.item for s in samples])
    fit = [i for i, embed in enumerate(embeds) if embed is None or len(embed)]
    unfit = {samples[i].serial: "its images alone run out of memory" for i in range(len(samples)) if i not in fit}
    samples = [samples[i] for i in fit]
    if not samples:
        return {}, unfit
    sampled = rollout(model, samples, [embeds[i] for i in fit])
    kept = sampled.of(samples)
    left_out = {s.serial for s in samples} - {s.serial for s in kept}
    unfit |= dict.fromkeys(left_out, "decoding it alone runs out of memory")
    texts = {}
    for sample, (ids,) in zip(kept, sampled.completions, strict=True):
        asks = sample.example.answer_format if answer_format == "auto" else answer_format
        texts[sample.serial] = spoken(processor, ids, asks)
    return texts, unfit


def spoken(processor: Processor, ids: Tensor, answer_format: str) -> str:
    """The text that the rewards' parser reads from these ids."""
    if answer_format == "marked":
        return processor.decode(ids)
    return processor.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
