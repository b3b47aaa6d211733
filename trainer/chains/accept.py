"""Make a page on which people accept or reject a tenth of the reasoning chains, and compute the acceptance rate.

boxgrpo accept --data out/cot/cold_start.json
boxgrpo accept --data out/cot/cold_start.json --answers acceptance.json

The paper does the same (section 3.2): 99.87 % of a tenth of its 76k chains were accepted. The page, here called sheet,
has a folder of pictures. It opens from the file system without a network, and saves the answers as a file.
"""

import hashlib
import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

from jinja2 import Template
from tqdm import tqdm

from boxgrpo.trainer.arguments import check_options, option, parse
from boxgrpo.trainer.data.example import THINK_SUFFIX, Example, is_numbers, number_images
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.data.scan import scan
from boxgrpo.trainer.evaluation.pictures import annotate_example
from boxgrpo.trainer.options import ANY_COUNT
from boxgrpo.trainer.presence import check_paths
from boxgrpo.trainer.runtime.files import replace_file
from boxgrpo.trainer.runtime.ranks import run_as_script

PAGE = Path(__file__).with_name("templates") / "acceptance.html"


@dataclass
class AcceptOptions:
    """Draw records for people to accept or reject; with --answers, compute the acceptance rate."""

    choices: ClassVar = {"json": ("", "-")}
    ranges: ClassVar = {"share": "(0, 1]", "seed": ANY_COUNT}
    data: str = option("out/cot/cold_start.json", "File of stage-1 records, as `boxgrpo chains` writes it.")
    image_root: str = option("", "Folder to which image paths are relative; empty: the data file's folder.")
    output_dir: str = option("out/cot/acceptance", "Folder for index.html and its pictures.")
    share: float = option(0.1, "Share of the records to draw.")
    seed: int = option(42, "Seed of the draw.")
    answers: str = option("", "File of answers that the sheet saved; empty: make a sheet.")
    json: str = option("", "- prints the rate as JSON; empty: as text.")


def draw_records(records: int, share: float, seed: int) -> list[int]:
    """Draw a share of the records, rounded up; returns their numbers in ascending order."""
    count = math.ceil(Fraction(str(share)) * records)  # with floats 0.07 * 100 is above 7
    return sorted(random.Random(seed).sample(range(records), count))


def wilson(accepted: int, decided: int, confidence: float = 0.95) -> tuple[float, float]:
    """The confidence interval of the acceptance rate over all records, by the score method of Wilson (1927)."""
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share, scale = accepted / decided, 1 + z * z / decided
    centre = (share + z * z / (2 * decided)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / decided + z * z / (4 * decided * decided))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def acceptance_rate(o: AcceptOptions) -> dict:
    """Counts of accepted, rejected and undecided records; the rate among the decided ones and its 95 % interval.

    Raises:
        ValueError: the file holds no answers of a sheet, answers for other records or another draw, or no decision.
    """
    examples, digest = _read(o)
    try:
        saved = json.loads(Path(o.answers).read_text())
        sheet, answers = saved["sheet"], dict(saved["answers"])
        same = sheet["digest"] == digest
        drawn = draw_records(len(examples), sheet["share"], sheet["seed"]) if same else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{o.answers} holds no answers of a sheet ({error!r}). Name the file it saved with --answers."
        ) from error
    if not same:
        raise ValueError(f"{o.answers} belongs to other records than {o.data} holds now. Draw a new sheet.")
    decisions = list(answers.values())
    accepted, rejected, undecided = map(decisions.count, ("accept", "reject", None))
    if answers.keys() != {str(k) for k in drawn} or accepted + rejected + undecided != len(drawn):
        raise ValueError(f"{o.answers} does not hold answers for the {len(drawn)} drawn records. Save it again.")
    if not accepted + rejected:
        raise ValueError(f"{o.answers} has no decision on any of {len(drawn)} records. Decide, and save it again.")
    return {
        "drawn": len(drawn),
        "accepted": accepted,
        "rejected": rejected,
        "undecided": undecided,
        "rate": accepted / (accepted + rejected),
        "interval": list(wilson(accepted, accepted + rejected)),
        "rejected_records": [examples[k].source for k in drawn if answers[str(k)] == "reject"],
    }


def write_sheet(o: AcceptOptions) -> int:
    """Write `index.html` and pictures of the drawn records, replacing an earlier sheet; returns their number."""
    examples, digest = _read(o)
    gold = _gold_boxes(Path(o.data))
    folder = Path(o.output_dir)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("pictures/[0-9]*.jpg"):
        earlier.unlink()
    chosen = []
    for k in tqdm(draw_records(len(examples), o.share, o.seed), desc="pictures"):
        example, name = examples[k], f"pictures/{k:06d}.jpg"
        boxes = {"gold": gold.get(example.source, example.gold), "predicted": example.gold}  # the box of the answer
        annotate_example(example, **boxes, reasoning="").save(folder / name, quality=88)
        (_, question), (_, answer), *_ = example.turns
        question = number_images(question).removesuffix(THINK_SUFFIX)
        chosen.append({"number": k, "task": example.task, "picture": name, "question": question, "answer": answer})
    sheet = {"digest": digest, "share": o.share, "seed": o.seed}
    page = Template(PAGE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True)
    text = page.render(sheet=sheet, chosen=chosen, records=len(examples), file=Path(o.data).name)
    replace_file(folder / "index.html", text)
    return len(chosen)


def _read(o: AcceptOptions) -> tuple[Sequence[Example], str]:
    """The records, and the checksum of their file."""
    check_options(o)
    check_paths(o)
    if not Path(o.data).is_file():
        raise ValueError(f"data is {o.data!r}; there is no such file. Name a cold_start.json with --data.")
    examples, _ = read_examples(o.data, schema="univg_stage1", image_root=o.image_root or None)
    return examples, hashlib.sha256(Path(o.data).read_bytes()).hexdigest()


def _gold_boxes(path: Path) -> dict[str, list[float]]:
    """The stored gold boxes, by the record's source; the boxes in the answers may differ slightly."""
    stored = ((k, row.value.get("cot")) for k, row in enumerate(scan(path)) if isinstance(row.value, dict))
    return {
        f"{path.name}#{k}": cot["gold"] for k, cot in stored if isinstance(cot, dict) and is_numbers(cot.get("gold"))
    }


def main(args: list[str] | None = None) -> None:
    o = parse(AcceptOptions, args, prog="accept_cot.py")
    if not o.answers:
        print(f"{write_sheet(o)} records to accept or reject in {o.output_dir}/index.html; the page saves its answers")
        return
    found = acceptance_rate(o)
    if o.json == "-":
        print(json.dumps(found, indent=1))
        return
    low, high = (100 * end for end in found["interval"])
    print(
        f"accepted {found['accepted']} of {found['accepted'] + found['rejected']} decided: {100 * found['rate']:.2f} % "
        f"(95 %: {low:.2f} to {high:.2f}); undecided {found['undecided']} of {found['drawn']}"
    )
    for source in found["rejected_records"]:
        print(f"rejected: {source}")


if __name__ == "__main__":
    run_as_script(main, "accept_cot.py")
