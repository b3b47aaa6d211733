"""Greedy answers to a benchmark's records, which are divided among all ranks."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TextIO

from torch import Tensor
from tqdm import tqdm

from boxgrpo.model.batch import Prompt
from boxgrpo.trainer.data.example import Example, asked
from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.options import InputOptions
from boxgrpo.trainer.runtime.ranks import Ranks, RunFailed

from .decode import GreedyDecoder

# Added to the question to request a box in another model's format. (Qwen2-VL's is that of its published evaluation.)
_ONLY = "Don't generate additional words."
REQUESTS = {
    "marked": f" Format:<|box_start|>(x1,y1),(x2,y2)<|box_end|>. {_ONLY}",
    "list": f" Format:[x1, y1, x2, y2], in thousandths of the image's width and height. {_ONLY}",
    "fractions": f" Format:[x1, y1, x2, y2], as fractions of the image's width and height. {_ONLY}",
    **dict.fromkeys(("pixels", "resized_pixels"), f" Format:[x1, y1, x2, y2], in pixels of the image. {_ONLY}"),
    "tagged": f" Format:<box>x1 y1 x2 y2</box>, in thousandths of the image's width and height. {_ONLY}",
}


def in_format(example: Example, answer_format: str) -> Example:
    """The example for a model that writes boxes in `answer_format`; "auto": in the record's own format."""
    if answer_format == "auto":
        return example
    if answer_format in REQUESTS:
        question = asked(example.question, suffix=REQUESTS[answer_format])
        return dataclasses.replace(example, turns=(("user", question), *example.turns[1:]))
    return dataclasses.replace(example, answer_format=answer_format)


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """Stands for an example that cannot be read."""

    source: str
    reason: str
    images: tuple = ()


class ReadOrReason(Sequence):
    """The examples of these numbers; one that cannot be read, as its file or an image was removed, is an `Unreadable`.

    (On an exception the loader would use the next record instead.)
    """

    def __init__(self, examples: Sequence[Example], numbers: Sequence[int] | None = None):
        self.examples, self.numbers = examples, range(len(examples)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example | Unreadable:
        number = self.numbers[index]
        try:
            return self.examples[number]
        except (ValueError, OSError) as error:
            return Unreadable(getattr(error, "source", "") or f"record {number}", str(error))


class PromptOrReason:
    """Gives an example's prompt, or why it has none."""

    def __init__(self, processor: Processor, answer_format: str):
        self.processor, self.answer_format = processor, answer_format

    def __call__(self, example: Example | Unreadable) -> Prompt | str:
        if isinstance(example, Unreadable):
            return example.reason
        try:
            return self.processor.prompt(in_format(example, self.answer_format))
        except (ValueError, OSError) as error:
            return str(error)
        except Exception as error:  # one record must not stop an evaluation
            return f"preparing it fails with {type(error).__name__}: {error}"


def answer_examples(
    decoder: GreedyDecoder,
    examples: Sequence[Example],
    numbers: Sequence[int],
    r: Ranks,
    options: InputOptions,
    *,
    answer_format: str = "auto",
    store: TextIO | None = None,
) -> tuple[dict[int, str], dict[int, str]]:
    """Answer some of the examples by greedy decoding; every rank calls it and holds the whole model.

    Args:
        numbers: indices of the examples to answer, the same on every rank; they are divided among the ranks.
        options: the run's; `eval_batch_size` prompts are decoded together on a rank, fewer where memory runs out.
        store: file of this rank's answers, a line `{"record": number, "answer": text}` each, written batch by batch.

    Returns:
        The texts by number, without special tokens (except the box marks in "marked"); and by number the record's
        source and the reason why it has no text.
    """
    per_rank = max(1, min(options.eval_batch_size, -(-len(numbers) // r.world_size)))
    stream = Loader(
        ReadOrReason(examples, numbers),
        PromptOrReason(decoder.processor, answer_format),
        batch_size=per_rank,
        seed=0,
        workers=options.dataloader_num_workers,
        rank=r.rank,
        world_size=r.world_size,
        shuffle=False,
    )
    texts, reasons, failed = {}, {}, None
    batches = iter(stream)
    own = len(range(r.rank, len(numbers), r.world_size))
    try:
        with tqdm(total=own, desc="evaluate", leave=False, disable=not r.is_main, dynamic_ncols=True) as bar:
            for _ in range(-(-len(numbers) // (per_rank * r.world_size))):
                groups = [g for g in next(batches) if g.serial < len(numbers)]  # then the stream starts over
                bar.update(len(groups))
                ready = [g for g in groups if not isinstance(g.prompt, str)]
                completions = decoder.complete([g.prompt for g in ready])
                ids_of = {g.serial: ids for g, ids in zip(ready, completions, strict=True)}
                for g in groups:
                    number, ids = numbers[g.serial], ids_of.get(g.serial)
                    if ids is None:
                        why = g.prompt if isinstance(g.prompt, str) else "decoding it alone runs out of memory"
                        reasons[number] = f"{g.source}: {why}"
                        continue
                    written = g.record.answer_format if answer_format == "auto" else answer_format
                    texts[number] = decode_answer(decoder.processor, ids, written)
                    if store:
                        store.write(json.dumps({"record": number, "answer": texts[number]}) + "\n")
        batches.close()  # ends the loader's workers
    except Exception as error:  # raised after the other ranks, which wait for this one, know of it
        failed = error
    texts, reasons = gather_answers(r, texts, reasons, failed)
    return dict(sorted(texts.items())), dict(sorted(reasons.items()))


def gather_answers(r: Ranks, texts: dict, reasons: dict, failed: Exception | None) -> tuple[dict, dict]:
    """The answers and reasons of all ranks. Where a rank has failed, it raises its error, and the others RunFailed."""
    parts = r.gather((texts, reasons, failed and f"{type(failed).__name__}: {failed}"))
    if failed:
        raise failed
    if lost := [f"rank {rank}: {error}" for rank, (_, _, error) in enumerate(parts) if error]:
        raise RunFailed(f"answering the records failed ({lost[0]}).")
    return tuple({n: v for part in parts for n, v in part[k].items()} for k in (0, 1))


def decode_answer(processor: Processor, ids: Tensor, answer_format: str) -> str:
    """The text that the rewards' parser reads from these ids."""
    if answer_format == "marked":
        return processor.decode(ids)
    return processor.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
