"""Cold-start data: reasoning chains for records with a gold box, written by one model and judged by it or another.

export OPENAI_API_KEY=...
boxgrpo chains --base_url https://HOST/v1 --model MODEL --data RECORDS.json

As in the paper's section 3.2, a model writes three chains for each record, given question, images and gold box. The
judge chooses the best of those in the right form and with the right box. It also judges a single chain, and may refuse
all: the paper evaluates and validates chains, not only ranks them. Records that are left out are counted by reason.

Every answer is stored in `answers.sqlite3` on arrival. The same command continues from there, also after a kill, and
sends no answered request again; `--ask false` writes the records of the answers so far. Next: `boxgrpo accept`.

Not supported: streaming, batch APIs, `n` for several answers at once, which many servers lack, and models without
`max_tokens`, `temperature` or `seed`.
"""

import asyncio
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tqdm import tqdm

from boxgrpo.trainer.arguments import check_options, option, parse
from boxgrpo.trainer.chains.ask import RecordImages, Requester
from boxgrpo.trainer.chains.journal import Journal
from boxgrpo.trainer.chains.judge import Outcome, make_record
from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.data.readers import FILE_FORMS, read_examples
from boxgrpo.trainer.options import ANY_COUNT, BOX_UNITS, CHOICES, COUNT, RANGES
from boxgrpo.trainer.presence import check_paths
from boxgrpo.trainer.runtime.files import replace_file
from boxgrpo.trainer.runtime.ranks import run_as_script


@dataclass
class CotOptions:
    """Request reasoning chains from an OpenAI-compatible server; the API key comes from OPENAI_API_KEY."""

    choices: ClassVar = CHOICES
    ranges: ClassVar = RANGES | dict.fromkeys(("chains", "max_tokens", "concurrency", "tries", "max_failures"), COUNT)
    ranges |= {"max_pixels": COUNT}
    ranges |= {"sample": ANY_COUNT, "min_iou": "[0, 1)"} | dict.fromkeys(
        ("temperature", "judge_temperature"), "[0, 100]"
    )
    ranges |= {"requests_per_minute": "[0, 1e6]", "backoff": "[0, 1e4]"}
    base_url: str = option("", "The server, such as http://localhost:8000/v1.")
    model: str = option("", "Name of the model that writes the chains.")
    judge_model: str = option("", "Name of the model that chooses the best chain; empty: --model.")
    judge_base_url: str = option("", "Server of the judge, with its key in JUDGE_API_KEY; empty: --base_url.")
    data: str = option("", "JSON, JSONL or Parquet file of records with gold boxes.")
    schema: str = option("auto", "Format of the records; auto: it is recognised, and the log names it.")
    box_unit: str = option("auto", f"Unit of the gold boxes: auto (by the file), {', '.join(BOX_UNITS)}.")
    image_root: str = option("", "Folder to which image paths are relative; empty: the data file's folder.")
    output_dir: str = option("out/cot", "Folder for answers.sqlite3, cold_start.json and summary.json.")
    sample: int = option(0, "Records to take, drawn by seed; 0: all.")
    seed: int = option(42, "Seed of the draw.")
    chains: int = option(3, "Chains for each record.")
    min_iou: float = option(0.9, "A chain passes if the IoU of its box with the gold box is above this.")
    temperature: float = option(1.0, "Temperature of the chains.")
    judge_temperature: float = option(0.0, "Temperature of the judge.")
    max_tokens: int = option(1024, "Most tokens of an answer.")
    max_pixels: int = option(401408, "Images are reduced to at most this many pixels.")
    concurrency: int = option(16, "Most requests in flight.")
    requests_per_minute: float = option(0.0, "Most requests per minute, evenly spaced; 0: no limit.")
    tries: int = option(6, "Most tries of a request that gets no answer, or a truncated one.")
    backoff: float = option(1.0, "Seconds before the second try, then doubled; Retry-After overrules it.")
    timeout: float = option(180.0, "Seconds until a request counts as failed.")
    max_failures: int = option(50, "Stop after this many consecutive requests that failed in every try.")
    ask: bool = option(True, "false: send nothing and write the records of the answers so far.")


async def make_records(
    examples: Sequence[Example], chosen: Sequence[int], journal: Journal, o: CotOptions
) -> list[Outcome]:
    """The outcome of each chosen example, in order. At most `concurrency` of them are in memory with their images."""
    requester, slots = Requester(journal, o), asyncio.Semaphore(o.concurrency)
    root, seen = o.image_root or Path(o.data).parent, set()

    async def outcome(index: int) -> Outcome:
        async with slots:
            example = examples[index]
            if not all(isinstance(image, str) for image in example.images):
                return Outcome(None, "image_without_file")  # the records to be written name files
            names = tuple(os.path.relpath(path, root) for path in example.images)
            if (same := (names, example.question, example.gold)) in seen:
                return Outcome(None, "duplicate")
            seen.add(same)
            images = RecordImages(example.source, example.images, names, o.max_pixels)
            return await make_record(example, images, requester, o)

    try:
        with tqdm(total=len(chosen), desc="chains") as bar:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(outcome(index)) for index in chosen]
                for task in tasks:
                    task.add_done_callback(lambda done: done.cancelled() or bar.update())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        await requester.close()
    return [task.result() for task in tasks]


def summarize(outcomes: Sequence[Outcome], faulty: Counter, journal: Journal) -> dict:
    """Counts. Those of requests, answers and tokens cover the whole journal, including earlier runs."""
    return {
        "records": len(outcomes),
        "written": sum(outcome.record is not None for outcome in outcomes),
        "left_out": dict(Counter(outcome.reason for outcome in outcomes if outcome.record is None).most_common()),
        "faulty": dict(faulty.most_common()),
        "chains": dict(Counter(label for outcome in outcomes for label in outcome.labels).most_common()),
    } | journal.summary(("chain", "judge"))


def make_cold_start(o: CotOptions) -> dict:
    """Make the chains, write `cold_start.json` and `summary.json`, and return the summary.

    The records' image paths start from `image_root` where one is given, else from `output_dir`.

    Raises:
        ValueError: an option is invalid, the records cannot be read, or the server refuses all requests. The answers
            until then stay stored; an earlier run's files do not change.
    """
    check(o)
    examples, faults = read_examples(o.data, schema=o.schema, image_root=o.image_root or None, box_unit=o.box_unit)
    chosen = range(len(examples))
    if 0 < o.sample < len(examples):
        chosen = sorted(random.Random(o.seed).sample(chosen, o.sample))
    folder = Path(o.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder) as journal:
        outcomes = asyncio.run(make_records(examples, chosen, journal, o))
        records = [outcome.record for outcome in outcomes if outcome.record]
        summary = summarize(outcomes, Counter(fault.reason for fault in faults), journal)
        replace_file(folder / "cold_start.json", "[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
        replace_file(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def check(o: CotOptions) -> None:
    """Refuse invalid options before anything is read."""
    check_options(o)
    check_paths(o)
    if not o.data or not Path(o.data).exists():
        raise ValueError(f"data is {o.data!r}; there is no such file. Name {FILE_FORMS} with --data.")
    for name in ("model", "base_url") if o.ask else ("model",):
        if not getattr(o, name):
            raise ValueError(f"{name} is empty; no request can be sent without one. Give --{name}.")
    for name in ("base_url", "judge_base_url") if o.ask else ():
        if (url := getattr(o, name)) and not url.startswith(("http://", "https://")):
            raise ValueError(f"{name} is {url}; it must begin with http:// or https://. Correct --{name}.")


def main(args: list[str] | None = None) -> None:
    o = parse(CotOptions, args, prog="make_cot.py")
    try:
        summary = make_cold_start(o)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command continues from here") from None
    print(json.dumps(summary, indent=1))
    print(f"{summary['written']} of {summary['records']} records have a chain: see {o.output_dir}/cold_start.json")
    print("boxgrpo accept draws a tenth of them for people to accept or reject")


if __name__ == "__main__":
    run_as_script(main, "make_cot.py")
