"""Report the content of a record file: counts, tasks, lengths and faults; draw a sheet of records with gold boxes.

    boxgrpo inspect PATH [--model CHECKPOINT] [--no_images] [--json -]

With --model lengths are in tokens of the checkpoint's tokenizer, otherwise in characters.
"""

import argparse
import contextlib
import json
import logging
import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from boxgrpo.trainer.arguments import FlagParser, check_range
from boxgrpo.trainer.data.example import Example, Fault, Refused, box_text
from boxgrpo.trainer.data.images import Embedded, image_size
from boxgrpo.trainer.data.readers import FILE_FORMS, read_examples
from boxgrpo.trainer.data.schemas import SCHEMAS
from boxgrpo.trainer.evaluation.pictures import annotate_example, contact_sheet
from boxgrpo.trainer.evaluation.report import align
from boxgrpo.trainer.options import ANY_COUNT, BOX_UNITS, RANGES, check_pixels
from boxgrpo.trainer.presence import check_model, check_paths
from boxgrpo.trainer.runtime.ranks import run_as_script

LENGTH_SAMPLE = 2000  # most records whose length is measured, drawn at random
FIRST_BOXES = 5  # gold boxes that are shown
COLUMNS = 3  # columns of the sheet


def inspect(path: Path, args: argparse.Namespace) -> dict:
    """Count the records of the file, and draw the sheet if `args.sheet` names one.

    Returns:
        records, usable, faulty {reason: n}, tasks {task: usable records}, images_per_record {n: records},
        answer_formats, gold_boxes, chats, the schema, the gold boxes' unit, the first of them, and `lengths` of a
        sample in tokens or characters.
    """
    examples, faults = read_examples(
        path,
        schema=args.schema,
        image_root=args.image_root or None,
        min_usable=0,
        sized=not args.no_images,
        box_unit=args.box_unit,
    )
    if not (records := len(examples) + len(faults)):
        raise ValueError(f"{path} holds no record. Name {FILE_FORMS}.")
    exists = lru_cache(maxsize=None)(lambda image: args.no_images or Path(image).is_file())
    generator, usable = random.Random(args.seed), []
    tasks, formats, images, boxes, chats, first_boxes = Counter(), Counter(), Counter(), 0, 0, []
    for index in tqdm(range(len(examples)), desc="records", disable=len(examples) < 10_000):
        try:
            example = examples[index]
            if args.sheet and str(Path(args.sheet).absolute()) in example.images:
                raise ValueError(f"sheet is {args.sheet}, an image of {example.source}. Change --sheet.")
            for image in example.images:
                if not isinstance(image, Embedded) and not exists(image):
                    message = f"{example.source}: there is no image at {image}. Check --image_root."
                    raise Refused("missing_image", message, example.source)
        except Refused as refused:  # `examples[index]` raises it for an image removed since the scan
            faults.append(Fault(refused.source, refused.reason, str(refused)))
            continue
        usable.append(index)
        tasks[example.task] += 1
        formats[example.answer_format] += 1
        images[len(example.images)] += 1
        boxes += example.gold is not None
        chats += bool(example.turns)
        if example.gold is not None and len(first_boxes) < FIRST_BOXES:
            first_boxes.append(gold_row(example, opened=not args.no_images))
    measured = [examples[i] for i in sorted(generator.sample(usable, min(LENGTH_SAMPLE, len(usable))))]
    found = {
        "records": records,
        "usable": len(usable),
        "faulty": dict(Counter(f.reason for f in faults).most_common()),
        "tasks": dict(tasks.most_common()),
        "schema": examples.files[0].schema,
        "images_per_record": {str(n): c for n, c in sorted(images.items())},
        "answer_formats": dict(formats),
        "gold_boxes": boxes,
        "box_unit": examples.files[0].unit,
        "first_boxes": first_boxes,
        "chats": chats,
        "lengths": lengths(measured, args),
        "faults": [f.message for f in faults[: args.faults]],
    }
    if args.sheet:
        draw_sheet((examples[i] for i in generator.sample(usable, min(args.samples, len(usable)))), args.sheet)
    return found


def gold_row(example: Example, *, opened: bool) -> dict:
    """An example's gold box: source, image, `box` (0-1000), and where the image is `opened` its size and `pixels`."""
    image = example.images[example.target_image]
    row = {"source": example.source, "image": str(image), "box": [*example.gold]}
    with contextlib.suppress(Refused):
        if opened:
            size = image_size(image)
            row |= {"size": [*size], "pixels": [round(v * size[i % 2] / 1000) for i, v in enumerate(example.gold)]}
    return row


def lengths(examples: Sequence[Example], args: argparse.Namespace) -> dict:
    """Median, 95th percentile and largest of the prompts' and the answers' lengths in `unit`."""
    processor, measured = None, []
    if args.model:
        from boxgrpo.trainer.data.processor import Processor  # whose imports take seconds

        processor = Processor.from_pretrained(args.model, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    for example in examples:
        answer = "".join(text for role, text in example.turns if role == "assistant")
        if not processor:
            measured.append((len(example.question), len(answer)))
            continue
        with contextlib.suppress(Refused):  # a file that is not an image: training reports it
            sizes = [] if args.no_images else [image_size(path) for path in example.images]
            tokens = processor.prompt_tokens(example, sizes)
            measured.append((tokens, len(processor.tokenizer(answer).input_ids) if answer else 0))
    prompts, answers = map(_quantiles, zip(*measured)) if measured else ({}, {})
    unit = "tokens" if processor else "characters"
    return {"unit": unit, "measured": len(measured), "prompts": prompts, "answers": answers}


def _quantiles(values: Sequence[int]) -> dict:
    ordered = sorted(values)
    p95 = ordered[int(0.95 * len(ordered))]
    return {"median": int(statistics.median(ordered)), "p95": p95, "max": ordered[-1]}


def draw_sheet(examples: Iterable[Example], path: str) -> None:
    """Write a sheet of the examples' images with their gold boxes; examples with unreadable images are left out."""
    pictures = []
    for example in examples:
        with contextlib.suppress(ValueError):
            title = f"{example.task}  {example.source}"
            pictures.append(annotate_example(example, question=example.question, title=title))
    if pictures:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(pictures, COLUMNS).save(path)


def table(found: dict) -> str:
    """The report of `inspect` as text."""
    images = ", ".join(f"{count} of {n}" for n, count in found["images_per_record"].items())
    lines = [
        f"{found['records']} records of schema {found['schema']}, {found['usable']} usable",
        f"{found['gold_boxes']} with a gold box, {found['chats']} with answers; images a record: {images}",
    ]
    if found["first_boxes"]:
        lines += ["", f"gold boxes, written in {found['box_unit']}; the first of them on 0-1000 and in pixels"]
    for row in found["first_boxes"]:
        shown = f", pixels {row['pixels']} of {row['size'][0]} x {row['size'][1]}" if "pixels" in row else ""
        lines.append(f"  {row['source']}: {box_text(row['box'])}{shown} in {row['image']}")
    for name in ("faulty", "tasks"):
        counts = [["  " + key, str(n)] for key, n in found[name].items()]
        lines += ["", name, align(counts) if counts else "  none"]
    measured = found["lengths"]
    lines += ["", f"length in {measured['unit']}, of {measured['measured']} records"]
    for name in ("prompts", "answers"):
        lines.append(f"  {name}: " + "  ".join(f"{k} {v}" for k, v in measured[name].items()))
    return "\n".join(lines + [""] * bool(found["faults"]) + found["faults"])


def main(args: list[str] | None = None) -> None:
    parser = FlagParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("path", type=Path, help="JSON, JSONL or Parquet file of records, or a folder of save_to_disk")
    parser.add_argument("--schema", default="auto", choices=["auto", *SCHEMAS])
    parser.add_argument("--box_unit", default="auto", choices=["auto", *BOX_UNITS], help="unit of the gold boxes")
    parser.add_argument("--image_root", default="", help="folder of relative image paths; empty: the file's own")
    parser.add_argument("--no_images", action="store_true", help="do not check that the image files exist")
    parser.add_argument("--model", default="", help="checkpoint whose tokenizer measures lengths")
    parser.add_argument("--min_pixels", type=int, default=0, help="0: 4 image tokens")
    parser.add_argument("--max_pixels", type=int, default=0, help="0: 512 image tokens")
    parser.add_argument("--sheet", default="", help="file for a picture of sampled records, such as sheet.png")
    parser.add_argument("--samples", type=int, default=12, help="records on the sheet")
    parser.add_argument("--faults", type=int, default=20, help="most faulty records to list")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="", help="- prints only JSON; a path writes it there")
    options = parser.parse_args(args)
    for name in ("samples", "faults", "seed", "min_pixels", "max_pixels"):
        check_range(name, getattr(options, name), RANGES.get(name, ANY_COUNT))
    check_pixels(options)
    check_paths(options)
    if options.model:
        check_model(options.model)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)  # the recognised schema and the reason
    if not options.path.exists():
        raise ValueError(f"{options.path}: there is no such file. Name {FILE_FORMS}.")
    found = inspect(options.path, options)
    if options.json == "-":
        print(json.dumps(found, indent=1))
        return
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    run_as_script(main, "inspect_data.py")
