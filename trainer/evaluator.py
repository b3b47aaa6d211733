"""A benchmark's scores: greedy answers through our own rollout, read by the rewards' own box reader.

torchrun trainer/evaluator.py --bench mig --model CHECKPOINT --data MIG_data.json --image_root FOLDER
python -P -m boxgrpo.trainer.evaluator --bench mig --data MIG_data.json --predictions ANSWERS.json --json -

A killed evaluation goes on where it was: start it again. It leaves in its folder

    results.json    every score and every answer
    table.md        the benchmark's columns beside the published rows
    report.html     the same, with worst, best and random cases
    pictures/       some cases as pictures
    answers/        the answers as they came
"""

import dataclasses
import hashlib
import importlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from boxgrpo.model.checkpoint import load_model
from boxgrpo.trainer.data.images import load_image
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import Example, Fault
from boxgrpo.trainer.evaluation.answer import answer
from boxgrpo.trainer.evaluation.answer_files import AnswerFiles, questions_identity, write_whole
from boxgrpo.trainer.evaluation.benches import BENCHES, Bench
from boxgrpo.trainer.evaluation.grade import grade_texts, summarize
from boxgrpo.trainer.evaluation.page import page
from boxgrpo.trainer.evaluation.pictures import annotate
from boxgrpo.trainer.evaluation.tables import markdown, one_number, percentages, table
from boxgrpo.trainer.options import EvalOptions, parse, validate_evaluator
from boxgrpo.trainer.run import chosen_dtype, read_usable
from boxgrpo.trainer.runtime.checkpoints import fingerprint
from boxgrpo.trainer.runtime.ranks import Ranks, ranks, run_as_script

log = logging.getLogger("boxgrpo.trainer.evaluator")  # as a script this module is called __main__


def evaluate(options: EvalOptions, r: Ranks) -> dict:
    """Score `options.model`, or `options.predictions`, on `options.data`; every rank calls it.

    Returns:
        `summarize`'s scores, or those of the bench's own module, and `skipped`: how many records have no answer.

    Raises:
        ValueError: options, records, answers or the folder do not fit.
    """
    validate_evaluator(options)
    bench = BENCHES[options.bench]
    examples, faults = read_records(options, bench)
    numbers = range(min(options.limit or len(examples), len(examples)))
    if options.predictions:
        texts, reasons = predicted(options, examples, faults, r), {}
        texts = {n: texts[n] for n in numbers}
    else:
        texts, reasons = answered(options, examples, numbers, r)
    skipped = [fault.message for fault in faults] + list(reasons.values())
    scored = [bench.labelled(examples[n]) for n in texts]
    answers, summary = judged(options, bench, scored, list(texts.values()))
    summary |= {"skipped": len(skipped)}
    folder = output_folder(options)
    if r.is_main and folder:
        folder.mkdir(parents=True, exist_ok=True)
        write(options, bench, summary, answers, scored, skipped, folder)
    return summary


def read_records(options: EvalOptions, bench: Bench) -> tuple[Sequence[Example], list[Fault]]:
    """The records that can be scored, in the bench's form unless --schema names another, and why others cannot."""
    if bench.module:
        if len(options.data) != 1 or not Path(options.data[0]).exists():
            raise ValueError(f"data is {' '.join(options.data)}; {bench.title} is one file or folder. Correct --data.")
        return module_of(bench).read(options.data[0], options.image_root or None)
    if options.schema == "auto":
        options = dataclasses.replace(options, schema=bench.schema)
    return read_usable(options, needs="gold")


def module_of(bench: Bench):
    return importlib.import_module(f"boxgrpo.trainer.evaluation.{bench.module}")


def output_folder(options: EvalOptions) -> Path | None:
    if options.predictions and not options.output_dir:
        return None
    return Path(options.output_dir or "out/eval")


def answered(
    options: EvalOptions, examples: Sequence[Example], numbers: Sequence[int], r: Ranks
) -> tuple[dict[int, str], dict[int, str]]:
    """The model's answers by record number, those of an earlier run among them, and why other records have none."""
    how = {name: getattr(options, name) for name in ("answer_format", "min_pixels", "max_pixels", "dtype")}
    how |= {"max_completion_length": options.max_completion_length, "questions": questions_identity(examples)}
    identity = {"model": fingerprint(options.model), **how}
    files = AnswerFiles(output_folder(options), identity, r, anew=options.overwrite_output_dir)
    texts = {n: files.found[n] for n in numbers if n in files.found}
    reasons = {}
    if missing := [n for n in numbers if n not in texts]:
        limits = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
        processor = Processor.from_pretrained(options.model, **limits)
        model = load_model(options.model, dtype=chosen_dtype(options.dtype, r.device), device=r.device).eval()
        found, reasons = answer(
            model,
            processor,
            examples,
            missing,
            r,
            answer_format=options.answer_format,
            batch_size=options.eval_batch_size,
            max_completion_length=options.max_completion_length,
            workers=options.dataloader_num_workers,
            keep=files.keep,
        )
        texts = dict(sorted((texts | found).items()))
    reasons = {n: f"{examples[n].source}: {reason}" for n, reason in reasons.items()}
    for reason in reasons.values() if r.is_main else ():
        log.warning("skipped %s", reason)
    if not texts:
        first = next(iter(reasons.values()))
        raise ValueError(f"none of the {len(numbers)} records can be prepared. The first: {first}")
    return texts, reasons


def predicted(options: EvalOptions, examples: Sequence[Example], faults: Sequence[Fault], r: Ranks) -> list[str]:
    """The answers in a JSON list, one for each example.

    The list has one for each record of the one file, or one for each record that can be used.
    """
    path = Path(options.predictions)
    if not path.is_file():
        raise ValueError(f"predictions is {path}; there is no such file. Correct --predictions.")
    try:
        texts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}). Write a list of answer strings.") from error
    if not isinstance(texts, list):
        raise ValueError(f"{path} holds a JSON {type(texts).__name__}; it must be a list of answer strings.")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{path}: answer {i} is {text!r:.80}; it must be a string. Write '' where there is none.")
    records = len(examples) + len(faults)
    whole = len(options.data) == 1 and Path(options.data[0]).is_file()  # not a part of it, as file.json#7000
    if len(texts) != len(examples) and not (whole and len(texts) == records):
        raise ValueError(
            f"{path} holds {len(texts)} answers; {', '.join(options.data)} has {records} records, of which "
            f"{len(examples)} can be used. Give one answer for each record, or one for each that can be used, in order."
        )
    if folder := output_folder(options):
        identity = {"predictions": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
        identity |= {"questions": questions_identity(examples), "answer_format": options.answer_format}
        AnswerFiles(folder, identity, r, anew=options.overwrite_output_dir)
    if len(texts) == len(examples):
        if faults:
            log.warning("%s: taken for the answers to the %d usable records alone, in order", path, len(examples))
        return texts
    return [texts[int(e.source.rsplit("#", 1)[1])] for e in examples]


def judged(
    options: EvalOptions, bench: Bench, examples: Sequence[Example], texts: Sequence[str]
) -> tuple[list[dict], dict]:
    """Every answer with its score, and the scores of all."""
    if bench.module:
        return module_of(bench).grade(examples, texts), module_of(bench).score(examples, texts)
    answers = grade_texts(examples, texts, answer_format=options.answer_format)
    if without := sum(a["box"] is None for a in answers):
        log.warning(
            "%d of %d answers hold no box that --answer_format %s reads", without, len(answers), options.answer_format
        )
    return answers, summarize(answers, resamples=options.resamples, seed=options.seed)


def report(options: EvalOptions, summary: dict) -> dict:
    """The scores as JSON: `mean` and `tasks` in %, Acc@0.5 where the answers are boxes, and all of the summary."""
    if BENCHES[options.bench].module:
        return {"bench": options.bench, **summary}
    order = BENCHES[options.bench].ordered(summary["tasks"])
    in_percent = {task: 100 * summary["tasks"][task]["accuracy_at_0.5"] for task in order}
    mean = 100 * summary["accuracy_at_0.5"]
    return {"bench": options.bench, "mean": mean, "tasks": in_percent, "summary": summary}


def write(
    options: EvalOptions,
    bench: Bench,
    summary: dict,
    answers: Sequence[dict],
    examples: Sequence[Example],
    skipped: Sequence[str],
    folder: Path,
) -> None:
    """Leave results, table, page and pictures in the folder."""
    if (folder / "results.json").exists():  # an earlier evaluation's cases must not stand among these
        for earlier in folder.glob("pictures/[0-9][0-9].png"):
            earlier.unlink()
    results = report(options, summary) | {"skipped_records": skipped, "answers": answers}
    write_whole(folder / "results.json", json.dumps(results, indent=1))
    name = Path(options.model).name or Path(options.predictions).stem
    if bench.module:
        write_whole(folder / "table.md", one_number(bench.title, name, summary, module_of(bench).PUBLISHED))
        return
    write_whole(folder / "table.md", markdown(bench, summary, name))
    shown = page(bench, summary, answers, examples, name=name, skipped=skipped, count=options.cases, seed=options.seed)
    write_whole(folder / "report.html", shown)
    draw(answers, examples, folder / "pictures", options.pictures)


def draw(answers: Sequence[dict], examples: Sequence[Example], folder: Path, count: int) -> None:
    """Pictures of cases spread evenly over the tasks: images, gold and predicted box, the reasoning under them.

    A case whose images are not there, as may be where the answers were made elsewhere, has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = min(count, len(answers))
    by_task = sorted(zip(answers, examples, strict=True), key=lambda case: case[0]["task"])
    chosen = [by_task[i * len(answers) // count] for i in range(count)]
    for number, (a, example) in enumerate(chosen):
        try:
            images = [load_image(path) for path in example.images]
        except ValueError as error:
            log.info("no picture of %s: %s", a["source"], error)
            continue
        picture = annotate(
            images,
            gold=example.gold,
            predicted=a["box"],
            target_image=example.target_image,
            question=example.question,
            reasoning=a["answer"],
            title=example.task,
        )
        picture.save(folder / f"{number:02d}.png")


def main(args: list[str] | None = None) -> None:
    options = parse(EvalOptions, args, prog="evaluator.py")
    with ranks() as r:
        summary = evaluate(options, r)
        if not r.is_main:
            return
        scores = json.dumps(report(options, summary), indent=1)
        if options.json == "-":
            print(scores)
            return
        if options.json:
            write_whole(Path(options.json), scores)
        print(percentages(summary) if BENCHES[options.bench].module else table(summary))
        print(f"skipped {summary['skipped']}")
        if folder := output_folder(options):
            print(f"see {folder}/report.html, table.md and results.json")


if __name__ == "__main__":
    run_as_script(main, "evaluator.py")
