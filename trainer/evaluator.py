"""Acc@0.5 on a benchmark file: greedy answers through our own rollout, scored by the rewards' own box reader.

torchrun trainer/evaluator.py --model CHECKPOINT --data MIG_data.json --image_root FOLDER
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from boxgrpo.kernels import ANSWER_FORMATS, GroundingRewards, grounding_rewards, pack_texts
from boxgrpo.model.checkpoint import load_model
from boxgrpo.model.generate import generate
from boxgrpo.trainer.common import chosen_dtype, read_usable
from boxgrpo.trainer.images import load_image
from boxgrpo.trainer.loader import Loader
from boxgrpo.trainer.options import EvalOptions, parse
from boxgrpo.trainer.pictures import annotate
from boxgrpo.trainer.processing import Processor
from boxgrpo.trainer.ranks import Ranks, ranks
from boxgrpo.trainer.readers import Example
from boxgrpo.trainer.rollout import Vocabulary, score


@torch.no_grad()
def answer(model, processor: Processor, examples: Sequence[Example], options: EvalOptions, r: Ranks) -> list[dict]:
    """`graded` answers to the examples that could be prepared, in the file's order, from all ranks together."""
    vocabulary = Vocabulary.of(processor, model.config, r.device)
    per_rank = max(1, min(options.eval_batch_size, -(-len(examples) // r.world_size)))
    loader = Loader(
        examples,
        processor.prompt,
        batch_size=per_rank,
        seed=0,
        workers=options.dataloader_num_workers,
        rank=r.rank,
        world_size=r.world_size,
        shuffle=False,
    )
    answers: dict[str, dict] = {}
    batches = iter(loader)
    for _ in tqdm(range(-(-len(examples) // (per_rank * r.world_size))), desc="evaluate", disable=not r.is_main):
        # A record that cannot be prepared gives its slot to the next one, which then comes twice: keyed by source.
        samples = [s for s in next(batches) if s.serial < len(examples) and s.example.source not in answers]
        if not samples:
            continue
        rollout = generate(
            model,
            [s.item for s in samples],
            prompt_ids=[s.serial for s in samples],
            eos_token_ids=vocabulary.eos_token_ids,
            forbidden=vocabulary.forbidden,
            max_completion_length=options.max_completion_length,
            temperature=0.0,
        )
        completions = rollout.completions()
        rewards = score([[c] for c in completions], samples, vocabulary, r.device)
        texts = [processor.decode(ids) for ids in completions]
        found = graded([s.example for s in samples], texts, rewards)
        answers |= {a["source"]: a for a in found}
    merged = {source: a for part in r.gather(answers) for source, a in part.items()}
    return [merged[e.source] for e in examples if e.source in merged]


def graded(examples: Sequence[Example], texts: Sequence[str], rewards: GroundingRewards) -> list[dict]:
    """A dictionary each: source, id, task, question, answer, box (0-1000) or None, gold, iou (0-1), format (0 or 1)."""
    columns = (c.tolist() for c in (rewards.accuracy, rewards.format, rewards.boxes, rewards.found))
    return [
        {
            "source": e.source,
            "id": e.id,
            "task": e.task,
            "question": e.question,
            "answer": text,
            "box": box if found else None,
            "gold": list(e.gold),
            "iou": iou,
            "format": form,
        }
        for e, text, iou, form, box, found in zip(examples, texts, *columns, strict=True)
    ]


def grade_texts(examples: Sequence[Example], texts: Sequence[str], *, answer_format: str | None = None) -> list[dict]:
    """`graded` answers that were made elsewhere, one text an example. No command calls this.

    Another model's boxes are read as `answer_format`, one of ANSWER_FORMATS; None: as each example asks.
    """
    if len(texts) != len(examples):
        raise ValueError(f"{len(texts)} answers for {len(examples)} usable records; there must be one each, in order.")
    text, offsets = pack_texts([text.encode() for text in texts])
    gold = torch.tensor([e.gold for e in examples], dtype=torch.float32)
    codes = torch.tensor([ANSWER_FORMATS[e.answer_format] for e in examples], dtype=torch.uint8)
    return graded(examples, texts, grounding_rewards(text, offsets, gold, answer_format=answer_format or codes))


def summarize(answers: Sequence[dict]) -> dict:
    """Scores of the answers: per task, and the mean over tasks as the paper reports it.

    `accuracy_at_0.5` counts IoU above 0.5, the paper's words; `accuracy_at_least_0.5` counts equality too, as its
    scorer does. All accuracies are in 0-1; `well_formed_iou` is the mean IoU of the answers in the right format.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("there are 0 answers; a summary needs at least 1. Check --data and --limit.")
    by_task = defaultdict(list)
    for a in answers:
        by_task[a["task"]].append(a)

    def share(rows, test):
        return sum(map(test, rows)) / max(1, len(rows))

    tasks = {
        task: {
            "count": len(rows),
            "accuracy_at_0.3": share(rows, lambda a: a["iou"] > 0.3),
            "accuracy_at_0.5": share(rows, lambda a: a["iou"] > 0.5),
            "accuracy_at_least_0.5": share(rows, lambda a: a["iou"] >= 0.5),
            "accuracy_at_0.7": share(rows, lambda a: a["iou"] > 0.7),
            "mean_iou": share(rows, lambda a: a["iou"]),
        }
        for task, rows in sorted(by_task.items())
    }
    mean = {
        name: sum(t[name] for t in tasks.values()) / len(tasks)
        for name in next(iter(tasks.values()))
        if name != "count"
    }
    well_formed = [a for a in answers if a["format"]]
    return {
        "count": len(answers),
        **mean,
        "format": share(answers, lambda a: a["format"]),
        "well_formed_iou": share(well_formed, lambda a: a["iou"]),
        "tasks": tasks,
    }


def draw(answers: Sequence[dict], examples: Sequence[Example], folder: Path, count: int) -> None:
    """Pictures of cases spread evenly over the tasks: images, gold and predicted box, the reasoning under them."""
    by_source = {e.source: e for e in examples}
    folder.mkdir(parents=True, exist_ok=True)
    count = min(count, len(answers))
    by_task = sorted(answers, key=lambda a: a["task"])
    chosen = [by_task[i * len(answers) // count] for i in range(count)]
    for number, a in enumerate(chosen):
        example = by_source[a["source"]]
        picture = annotate(
            [load_image(path) for path in example.images],
            gold=example.gold,
            predicted=a["box"],
            target_image=example.target_image,
            question=example.question,
            reasoning=a["answer"],
            title=example.task,
        )
        picture.save(folder / f"{number:02d}.png")


def evaluate(options: EvalOptions, r: Ranks) -> dict:
    """Score `options.model` on `options.data`; writes results.json and the pictures, returns the summary."""
    processor = Processor.from_pretrained(options.model, min_pixels=options.min_pixels, max_pixels=options.max_pixels)
    examples, faults = read_usable(options, needs="gold")
    if options.limit:
        examples = examples[: options.limit]
    model = load_model(options.model, dtype=chosen_dtype(options.dtype, r.device), device=r.device).eval()
    answers = answer(model, processor, examples, options, r)
    summary = summarize(answers) | {"skipped": len(faults) + len(examples) - len(answers)}
    if r.is_main:
        folder = Path(options.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "results.json").exists():  # an earlier evaluation's cases must not stand among these
            for earlier in folder.glob("pictures/[0-9][0-9].png"):
                earlier.unlink()
        (folder / "results.json").write_text(json.dumps({"summary": summary, "answers": answers}, indent=1))
        draw(answers, examples, folder / "pictures", options.pictures)
    return summary


def table(summary: dict) -> str:
    """Task, records, Acc@0.5 and mean IoU as text."""
    rows = [f"{'task':<18}{'records':>8}{'Acc@0.5':>9}{'mean IoU':>10}"]
    for task, t in summary["tasks"].items():
        rows.append(f"{task:<18}{t['count']:>8}{100 * t['accuracy_at_0.5']:>9.2f}{t['mean_iou']:>10.3f}")
    rows.append(
        f"{'mean':<18}{summary['count']:>8}{100 * summary['accuracy_at_0.5']:>9.2f}{summary['mean_iou']:>10.3f}"
    )
    return "\n".join(rows)


def main(args: list[str] | None = None) -> None:
    options = parse(EvalOptions, args, prog="evaluator.py")
    if not options.model:
        raise ValueError("no model. Name a checkpoint folder with --model.")
    with ranks() as r:
        summary = evaluate(options, r)
        if r.is_main:
            print(table(summary))
            print(
                f"format {summary['format']:.3f}, skipped {summary['skipped']}; see {options.output_dir}/results.json"
            )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"evaluator.py: {error}")
