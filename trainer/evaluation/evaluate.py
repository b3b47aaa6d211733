"""A whole evaluation: read a benchmark's records, get answers from a model or a file, score them, write the results.

A killed evaluation is resumed by the same call. In its folder it writes

    results.json    every score and every answer
    table.md        the benchmark's columns beside the published rows
    report.html     the same, with worst, best and random cases (not for mmiu and odinw)
    pictures/       some cases as pictures (not for mmiu and odinw)
    answers/        the answers in order of arrival, {"record": 12, "answer": "..."} a line: rank0.jsonl of rank 0, ...
    evaluation.json hashes of the model's files and the questions, and the options

All ranks write into one folder, which they must share.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from boxgrpo.model.checkpoint import load_model
from boxgrpo.trainer.data.example import Example, Fault
from boxgrpo.trainer.data.processor import Processor, token_side
from boxgrpo.trainer.data.readers import read_usable
from boxgrpo.trainer.options import EvalOptions, resolve_dtype, validate_evaluator
from boxgrpo.trainer.runtime.checkpoints import fingerprint
from boxgrpo.trainer.runtime.files import open_lines, read_lines, replace_file
from boxgrpo.trainer.runtime.ranks import Ranks

from .answer import answer_examples
from .benches import BENCHES, Bench
from .decode import GreedyDecoder
from .grade import grade_texts, summarize
from .pictures import draw_cases
from .report import Case, in_percent, markdown, render_page

log = logging.getLogger(__name__)

IDENTITY = "evaluation.json"
ANSWERS = "answers/rank{}.jsonl"
OUTPUTS = (ANSWERS.format("*"), "results.json", "table.md", "report.html", IDENTITY)
# Options that a model's answers depend on.
ANSWER_OPTIONS = ("answer_format", "min_pixels", "max_pixels", "dtype", "max_completion_length")


def evaluate(options: EvalOptions, r: Ranks) -> dict:
    """Score `options.model`, or `options.predictions`, on `options.data`; every rank calls it.

    Returns:
        `summarize`'s scores, or those of the bench's own module, and `skipped`: how many records have no answer.

    Raises:
        ValueError: options, records or answers are invalid, or the folder holds another evaluation.
    """
    validate_evaluator(options)
    bench = BENCHES[options.bench]
    examples, faults = read_records(options, bench)
    numbers = range(min(options.limit or len(examples), len(examples)))
    if options.predictions:
        texts, reasons = read_predictions(options, examples, faults, r), {}
        texts = {n: texts[n] for n in numbers}
    else:
        texts, reasons = answer_records(options, examples, numbers, r)
    skipped = [fault.message for fault in faults] + list(reasons.values())
    scored = [bench.labelled(examples[n]) for n in texts]
    answers, summary = grade(options, bench, scored, list(texts.values()))
    summary |= {"skipped": len(skipped)}
    folder = output_folder(options)
    if r.is_main and folder:
        write_results(options, bench, summary, list(zip(answers, scored, strict=True)), skipped, folder)
    return summary


def report(options: EvalOptions, summary: dict) -> dict:
    """The scores as JSON: `mean` and `tasks` in %, Acc@0.5 where the answers are boxes, and all of the summary."""
    bench = BENCHES[options.bench]
    return {"bench": options.bench, **in_percent(bench, summary), **(summary if bench.module else {"summary": summary})}


def output_folder(options: EvalOptions) -> Path | None:
    """The folder that the evaluation writes into; None: it only prints its scores."""
    if options.predictions and not options.output_dir:
        return None
    return Path(options.output_dir or "out/eval")


def claim_folder(
    options: EvalOptions, examples: Sequence[Example], r: Ranks, *names: str, **answered_by: str
) -> dict[int, str]:
    """Reserve the `output_folder` for this evaluation and read the answers in it; every rank calls it.

    With `overwrite_output_dir` the files of an earlier evaluation are removed from the folder.

    Args:
        names: names of the options that, with the questions, identify this evaluation.
        answered_by: `model` or `predictions`, with a hash of that source of the answers.

    Returns:
        The answers of earlier runs of this evaluation, on any number of ranks, by record number; the same on each rank.

    Raises:
        ValueError: on every rank, if the folder holds the answers of another evaluation.
    """
    questions = hashlib.sha256()  # of everything that a model's prompt and score depend on
    for example in examples:
        questions.update(json.dumps(dataclasses.astuple(example), default=bytes.hex).encode())
    identity = answered_by | {"questions": questions.hexdigest()} | {name: getattr(options, name) for name in names}
    folder = output_folder(options)
    changed, found = [], {}
    if r.is_main:
        if options.overwrite_output_dir and (earlier := [path for pattern in OUTPUTS for path in folder.glob(pattern)]):
            log.warning("%s: an earlier evaluation is removed", folder)
            for path in earlier:
                path.unlink()
        changed = _changed(folder / IDENTITY, identity)
        if not changed:
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / IDENTITY, json.dumps(identity, indent=1))
            found = {row["record"]: row["answer"] for row in read_lines(sorted(folder.glob(ANSWERS.format("*"))))}
    changed, found = r.gather((changed, found))[0]
    if changed:
        raise ValueError(
            f"output_dir {folder} holds the answers of another evaluation (other: {', '.join(changed)}). Name another "
            "with --output_dir, or begin anew with --overwrite_output_dir true."
        )
    if found and r.is_main:
        log.info("%s: %d answers exist already; the others are computed", folder, len(found))
    return found


def _changed(path: Path, identity: dict) -> list[str]:
    """The names of the values that differ from those in the file; none where there is no file."""
    if not path.exists():
        return []
    try:
        written = json.loads(path.read_text())
        return sorted(k for k in written.keys() | identity.keys() if written.get(k) != identity.get(k))
    except (ValueError, AttributeError) as error:
        return [f"{path.name} cannot be read: {error}"]


def read_records(options: EvalOptions, bench: Bench) -> tuple[Sequence[Example], list[Fault]]:
    """The usable records, by the benchmark's schema unless --schema names another, and the faults of the others."""
    if bench.module:
        if len(options.data) != 1 or not Path(options.data[0]).exists():
            raise ValueError(f"data is {' '.join(options.data)}; {bench.title} is one file or folder. Correct --data.")
        return bench.module.read(options.data[0], options.image_root or None)
    schema = bench.schema if options.schema == "auto" else options.schema
    return read_usable(dataclasses.replace(options, schema=schema), needs="gold")


def answer_records(
    options: EvalOptions, examples: Sequence[Example], numbers: Sequence[int], r: Ranks
) -> tuple[dict[int, str], dict[int, str]]:
    """The model's answers by record number, those of an earlier run among them, and why other records have none."""
    found = claim_folder(options, examples, r, *ANSWER_OPTIONS, model=fingerprint(options.model))
    texts, reasons = {n: found[n] for n in numbers if n in found}, {}
    if missing := [n for n in numbers if n not in texts]:
        limits = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
        processor = Processor.from_pretrained(options.model, **limits)
        model = load_model(options.model, dtype=resolve_dtype(options.dtype, r.device), device=r.device).eval()
        decoder = GreedyDecoder(model, processor, options.max_completion_length)
        form = options.answer_format
        with open_lines(output_folder(options) / ANSWERS.format(r.rank)) as store:
            answered, reasons = answer_examples(decoder, examples, missing, r, options, answer_format=form, store=store)
        texts = dict(sorted((texts | answered).items()))
    for reason in reasons.values() if r.is_main else ():
        log.warning("skipped %s", reason)
    if not texts:
        first = next(iter(reasons.values()))
        raise ValueError(f"none of the {len(numbers)} records can be prepared. The first: {first}")
    return texts, reasons


def read_predictions(options: EvalOptions, examples: Sequence[Example], faults: Sequence[Fault], r: Ranks) -> list[str]:
    """Read the answers in a JSON list; returns one for each example.

    The list holds an answer for each record of the data, if that is one whole file, or for each usable record.
    """
    path = Path(options.predictions)
    texts = _read_texts(path)
    records = len(examples) + len(faults)
    whole = len(options.data) == 1 and Path(options.data[0]).exists()  # not a part, such as file.json#7000
    if len(texts) != len(examples) and not (whole and len(texts) == records):
        raise ValueError(
            f"{path} holds {len(texts)} answers; {', '.join(options.data)} has {records} records, of which "
            f"{len(examples)} can be used. Give one answer for each record, or one for each that can be used, in order."
        )
    if output_folder(options):
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        claim_folder(options, examples, r, "answer_format", predictions=digest)
    if len(texts) == len(examples):
        if faults:
            log.warning("%s: read as the answers to the %d usable records only, in order", path, len(examples))
        return texts
    return [texts[int(e.source.rsplit("#", 1)[1])] for e in examples]


def _read_texts(path: Path) -> list[str]:
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
    return texts


def grade(
    options: EvalOptions, bench: Bench, examples: Sequence[Example], texts: Sequence[str]
) -> tuple[list[dict], dict]:
    """Every answer with its grade, and the summary of all."""
    if bench.module:
        answers = bench.module.grade(examples, texts)
        return answers, bench.module.score(examples, answers)
    limits = options.min_pixels, options.max_pixels, token_side(options.model) if options.model else 28
    answers = grade_texts(examples, texts, answer_format=options.answer_format, limits=limits)
    if without := sum(a["box"] is None for a in answers):
        form = options.answer_format
        log.warning("%d of %d answers hold no box that --answer_format %s reads", without, len(answers), form)
    return answers, summarize(answers, resamples=options.resamples, seed=options.seed)


def write_results(
    options: EvalOptions, bench: Bench, summary: dict, cases: Sequence[Case], skipped: Sequence[str], folder: Path
) -> None:
    """Write results, table, page and pictures into the folder."""
    if (folder / "results.json").exists():  # then the pictures are those of an earlier evaluation
        for earlier in folder.glob("pictures/[0-9][0-9].png"):
            earlier.unlink()
    results = report(options, summary) | {"skipped_records": skipped, "answers": [a for a, _ in cases]}
    replace_file(folder / "results.json", json.dumps(results, indent=1))
    name = Path(options.model).name or Path(options.predictions).stem
    replace_file(folder / "table.md", markdown(bench, summary, name))
    if bench.module:
        return
    shown = render_page(bench, summary, cases, name=name, skipped=skipped, count=options.cases, seed=options.seed)
    replace_file(folder / "report.html", shown)
    draw_cases(cases, folder / "pictures", options.pictures)
