"""People accept or reject a tenth of the reasoning chains: a sheet to look at, and the rate from its saved answers.

python -P -m boxgrpo.trainer.accept_cot --data out/cot/cold_start.json
python -P -m boxgrpo.trainer.accept_cot --data out/cot/cold_start.json --answers acceptance.json

As in the paper's section 3.2, where 99.87 % of a tenth of 76k were accepted. The sheet is a page and a folder of
pictures: it opens from the file system, asks nothing of a network, and saves its answers as a file.
"""

import hashlib
import html
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

from boxgrpo.trainer.data.example import is_numbers
from boxgrpo.trainer.data.images import load_image
from boxgrpo.trainer.data.processor import THINK_SUFFIX
from boxgrpo.trainer.data.readers import Example, plain_text, read_examples
from boxgrpo.trainer.data.scan import scan
from boxgrpo.trainer.evaluation.pictures import annotate
from boxgrpo.trainer.options import option, parse


@dataclass
class AcceptOptions:
    """Draw records for people to accept or reject; with --answers, the rate at which they did."""

    data: str = option("out/cot/cold_start.json", "File of stage-1 records, as make_cot writes it.")
    image_root: str = option("", "Folder that image paths start from; empty: the data file's own.")
    output_dir: str = option("out/cot/acceptance", "Folder for index.html and its pictures.")
    share: float = option(0.1, "Share of the records to draw.")
    seed: int = option(42, "Seed of the draw.")
    answers: str = option("", "File that the sheet saved; empty: draw a sheet.")
    json: str = option("", "- writes the rate as JSON to standard output; empty: as text.")


STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 1100px; margin: 0 auto 6em; padding: 0 1em; color: #1e1e1e }
article { border-top: 1px solid #ccc; padding: 1em 0 } h2 { font-size: 1em; color: #6e6e6e }
img { max-width: 100% } p { white-space: pre-wrap; overflow-wrap: anywhere } .question { font-weight: bold }
fieldset { border: 0; padding: 0 } label { margin-right: 2em }
footer { position: fixed; inset: auto 0 0; background: #f2f2f2; border-top: 1px solid #ccc; padding: .7em 1em }
"""

SCRIPT = """
const form = document.forms[0], fields = [...document.querySelectorAll("fieldset")];
const sheet = JSON.parse(form.dataset.sheet), chosen = field => field.querySelector("input:checked");
let unsaved = false;
function count() {
  document.getElementById("count").textContent = `${fields.filter(chosen).length} of ${fields.length} decided`;
}
form.addEventListener("change", event => { if (event.target.type == "radio") { unsaved = true; count(); } });
addEventListener("beforeunload", event => { if (unsaved) event.preventDefault(); });
document.getElementById("save").addEventListener("click", () => {
  const answers = Object.fromEntries(fields.map(field => [field.dataset.record, chosen(field)?.value ?? null]));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({sheet, answers}, null, 1)], {type: "application/json"}));
  link.download = "acceptance.json";
  link.click();
  unsaved = false;
});
document.getElementById("load").addEventListener("change", async event => {
  const saved = await event.target.files[0].text().then(JSON.parse).catch(() => null);
  if (JSON.stringify(saved?.sheet) != JSON.stringify(sheet)) return alert("No answers of this sheet.");
  for (const radio of form.querySelectorAll("input[type=radio]"))
    radio.checked = radio.value == saved.answers[radio.closest("fieldset").dataset.record];
  count();
});
count();
"""


def draw(records: int, share: float, seed: int) -> list[int]:
    """The numbers of the records drawn, in order: the share of them, rounded up."""
    count = math.ceil(Fraction(str(share)) * records)  # in floats 0.07 of 100 is above 7
    return sorted(random.Random(seed).sample(range(records), count))


def wilson(accepted: int, decided: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share: what it is of all, as far as these tell (Wilson 1927)."""
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
        drawn = draw(len(examples), sheet["share"], sheet["seed"]) if sheet["digest"] == digest else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{o.answers} holds no answers of a sheet ({error!r}). Name the file it saved with --answers."
        ) from error
    if drawn is None:
        raise ValueError(f"{o.answers} belongs to other records than {o.data} holds now. Draw a new sheet.")
    known = ("accept", "reject", None)
    if answers.keys() != {str(k) for k in drawn} or not all(answer in known for answer in answers.values()):
        raise ValueError(f"{o.answers} does not answer for the {len(drawn)} records that were drawn. Save it again.")
    decisions = list(answers.values())
    accepted, rejected = decisions.count("accept"), decisions.count("reject")
    if not accepted + rejected:
        raise ValueError(f"{o.answers} decides none of {len(drawn)} records. Open the sheet and save it again.")
    low, high = wilson(accepted, accepted + rejected)
    return {
        "drawn": len(drawn),
        "accepted": accepted,
        "rejected": rejected,
        "undecided": decisions.count(None),
        "rate": accepted / (accepted + rejected),
        "interval": [low, high],
        "rejected_records": [examples[k].source for k in drawn if answers[str(k)] == "reject"],
    }


def write_sheet(o: AcceptOptions) -> int:
    """Write `index.html` and the pictures of the records drawn, in the place of an earlier sheet; returns how many."""
    examples, digest = _read(o)
    sheet = {"digest": digest, "share": o.share, "seed": o.seed}
    drawn = draw(len(examples), o.share, o.seed)
    gold = _gold_boxes(o)
    folder = Path(o.output_dir)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("pictures/[0-9]*.jpg"):
        earlier.unlink()
    articles = []
    for k in tqdm(drawn, desc="pictures"):
        example, name = examples[k], f"pictures/{k:06d}.jpg"
        picture = annotate(
            [load_image(path) for path in example.images],
            gold=gold.get(example.source, example.gold),
            predicted=example.gold,  # of a chat that is the box in its answer
            target_image=example.target_image,
            question="",
            reasoning="",
        )
        picture.save(folder / name, quality=88)
        articles.append(_article(k, name, example))
    (folder / "index.html").write_text(_page(articles, sheet, len(examples), o), encoding="utf-8")
    return len(drawn)


def _read(o: AcceptOptions) -> tuple[Sequence[Example], str]:
    if not 0 < o.share <= 1:
        raise ValueError(f"share is {o.share:g}; it must be above 0 and at most 1. Change --share.")
    if not Path(o.data).is_file():
        raise ValueError(f"data is {o.data!r}; there is no such file. Name make_cot's cold_start.json with --data.")
    examples, _ = read_examples(o.data, schema="univg_stage1", image_root=o.image_root or None)
    return examples, hashlib.sha256(Path(o.data).read_bytes()).hexdigest()


def _gold_boxes(o: AcceptOptions) -> dict[str, list[float]]:
    """The gold boxes that make_cot noted, by the record's source; the answers' own boxes may differ a little."""
    path = Path(o.data)
    noted = ((k, row.value.get("cot")) for k, row in enumerate(scan(path)) if isinstance(row.value, dict))
    return {
        f"{path.name}#{k}": cot["gold"] for k, cot in noted if isinstance(cot, dict) and is_numbers(cot.get("gold"))
    }


def _article(k: int, picture: str, example: Example) -> str:
    (_, question), (_, answer), *_ = example.turns
    shown = html.escape(plain_text(question).removesuffix(THINK_SUFFIX))
    return (
        f'<article><h2>{k} · {html.escape(example.task)}</h2><img src="{picture}" alt="" loading="lazy">'
        f'<p class="question">{shown}</p><p>{html.escape(answer)}</p>'
        f'<fieldset data-record="{k}"><label><input type="radio" name="r{k}" value="accept"> accept</label>'
        f'<label><input type="radio" name="r{k}" value="reject"> reject</label></fieldset></article>\n'
    )


def _page(articles: Sequence[str], sheet: dict, records: int, o: AcceptOptions) -> str:
    title = f"{len(articles)} of {records} records of {html.escape(Path(o.data).name)}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>\n'
        f"<h1>{title}</h1><p>Accept a record if the box is on what is asked for and every step of the reasoning is "
        "true of the images and leads to it; else reject it. Green is the gold box, red the answer's.</p>\n"
        f'<form data-sheet="{html.escape(json.dumps(sheet))}">\n{"".join(articles)}'
        '<footer><span id="count"></span> · <button type="button" id="save">save the answers</button> · '
        '<label>go on from saved answers <input type="file" id="load"></label></footer></form>\n'
        f"<script>{SCRIPT}</script></html>\n"
    )


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
    try:
        main()
    except ValueError as error:
        sys.exit(f"accept_cot.py: {error}")
