"""People accept or reject a tenth of the reasoning chains: a page of them, and the rate from its saved answers.

python -P -m boxgrpo.trainer.accept_cot --data out/cot/cold_start.json
python -P -m boxgrpo.trainer.accept_cot --data out/cot/cold_start.json --answers acceptance.json

As in the paper's section 3.2, where 99.87 % of a tenth of 76k were accepted. The sheet is a page and a folder of
pictures: it opens from the file system, loads nothing from a network, and saves its answers as a file.
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

from jinja2 import Template
from tqdm import tqdm

from boxgrpo.trainer.arguments import option, parse
from boxgrpo.trainer.data.example import THINK_SUFFIX, Example, is_numbers, plain_text
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.data.scan import scan
from boxgrpo.trainer.evaluation.pictures import annotate_example
from boxgrpo.trainer.runtime.files import replace_file
from boxgrpo.trainer.runtime.ranks import run_as_script

PAGE = Path(__file__).with_name("templates") / "acceptance.html"


@dataclass
class AcceptOptions:
    """Draw records for people to accept or reject; with --answers, the rate at which they did."""

    data: str = option("out/cot/cold_start.json", "File of stage-1 records, as make_cot writes it.")
    image_root: str = option("", "Folder that image paths start from; empty: the data file's own.")
    output_dir: str = option("out/cot/acceptance", "Folder for index.html and its pictures.")
    share: float = option(0.1, "Share of the records to draw.")
    seed: int = option(42, "Seed of the draw.")
    answers: str = option("", "File that the sheet saved; empty: draw a sheet.")
    json: str = option("", "- prints the rate as JSON; empty: as text.")


def draw(records: int, share: float, seed: int) -> list[int]:
    """The numbers of the records drawn, in order: the share of them, rounded up."""
    count = math.ceil(Fraction(str(share)) * records)  # in floats 0.07 of 100 is above 7
    return sorted(random.Random(seed).sample(range(records), count))


def wilson(accepted: int, decided: int, confidence: float = 0.95) -> tuple[float, float]:
    """The confidence interval of the share accepted of all records, by the score method of Wilson (1927)."""
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share, scale = accepted / decided, 1 + z * z / decided
    centre = (share + z * z / (2 * decided)) / scale
    reach = z / scale * math.sqrt(share * (1 - share) / decided + z * z / (4 * decided * decided))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def rate(o: AcceptOptions) -> dict:
    """How many of the drawn records were accepted: counts, the rate of those decided and its 95 % interval.

    Raises:
        ValueError: the answers are no such file, belong to other records or another draw, or decide nothing.
    """
    examples, digest = _read(o)
    try:
        saved = json.loads(Path(o.answers).read_text())
        sheet, answers = saved["sheet"], dict(saved["answers"])
        same = sheet["digest"] == digest
        drawn = draw(len(examples), sheet["share"], sheet["seed"]) if same else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{o.answers} holds no answers of a sheet ({error!r}). Name the file it saved with --answers."
        ) from error
    if not same:
        raise ValueError(f"{o.answers} belongs to other records than {o.data} holds now. Draw a new sheet.")
    decisions = list(answers.values())
    accepted, rejected, undecided = map(decisions.count, ("accept", "reject", None))
    if answers.keys() != {str(k) for k in drawn} or accepted + rejected + undecided != len(drawn):
        raise ValueError(f"{o.answers} does not answer for the {len(drawn)} records that were drawn. Save it again.")
    if not accepted + rejected:
        raise ValueError(f"{o.answers} decides none of {len(drawn)} records. Open the sheet and save it again.")
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
    """Write `index.html` and the pictures of the records drawn, in the place of an earlier sheet; returns how many."""
    examples, digest = _read(o)
    gold = _gold_boxes(Path(o.data))
    folder = Path(o.output_dir)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("pictures/[0-9]*.jpg"):
        earlier.unlink()
    chosen = []
    for k in tqdm(draw(len(examples), o.share, o.seed), desc="pictures"):
        example, name = examples[k], f"pictures/{k:06d}.jpg"
        boxes = {"gold": gold.get(example.source, example.gold), "predicted": example.gold}  # that of the answer
        annotate_example(example, **boxes, reasoning="").save(folder / name, quality=88)
        (_, question), (_, answer), *_ = example.turns
        question = plain_text(question).removesuffix(THINK_SUFFIX)
        chosen.append({"number": k, "task": example.task, "picture": name, "question": question, "answer": answer})
    sheet = {"digest": digest, "share": o.share, "seed": o.seed}
    page = Template(PAGE.read_text(encoding="utf-8"), autoescape=True, trim_blocks=True)
    text = page.render(sheet=sheet, chosen=chosen, records=len(examples), file=Path(o.data).name)
    replace_file(folder / "index.html", text)
    return len(chosen)


def _read(o: AcceptOptions) -> tuple[Sequence[Example], str]:
    """The records, and the checksum of their file."""
    if not 0 < o.share <= 1:
        raise ValueError(f"share is {o.share:g}; it must be above 0 and at most 1. Change --share.")
    if not Path(o.data).is_file():
        raise ValueError(f"data is {o.data!r}; there is no such file. Name make_cot's cold_start.json with --data.")
    examples, _ = read_examples(o.data, schema="univg_stage1", image_root=o.image_root or None)
    return examples, hashlib.sha256(Path(o.data).read_bytes()).hexdigest()


def _gold_boxes(path: Path) -> dict[str, list[float]]:
    """The gold boxes that make_cot noted, by the record's source; the answers' own boxes may differ a little."""
    noted = ((k, row.value.get("cot")) for k, row in enumerate(scan(path)) if isinstance(row.value, dict))
    return {
        f"{path.name}#{k}": cot["gold"] for k, cot in noted if isinstance(cot, dict) and is_numbers(cot.get("gold"))
    }


def main(args: list[str] | None = None) -> None:
    o = parse(AcceptOptions, args, prog="accept_cot.py")
    if not o.answers:
        print(f"{write_sheet(o)} records to accept or reject in {o.output_dir}/index.html; it saves acceptance.json")
        return
    found = rate(o)
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
