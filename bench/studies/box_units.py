"""How often the unit of a file's gold boxes is found, refused or mistaken, over simulated files.

python bench/studies/box_units.py [--files 200]     writes bench/results/<device>/box_units.json, prints the table
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np

from boxgrpo.bench.machine import folder, machine, shared_data
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import write
from boxgrpo.trainer.arguments import option, parse
from boxgrpo.trainer.data.boxes import LIMITS, Written, likeliest_unit
from boxgrpo.trainer.options import BOX_UNITS, COUNT
from boxgrpo.trainer.runtime.ranks import run_as_script

COUNTS = (1, 2, 3, 5, 10, 50, 200)  # records of a file
FAMILIES = ("uniform", "centred", "corner", "elements", "left", "faulty", "real")
IMAGES = ("of one size", "of one size, turned", "of any size")
DIGITS = {"fractions": 4, "percent": 2, "thousandths": 0, "pixels": 0}


@dataclass
class BoxUnitsOptions:
    """Files of boxes in each unit."""

    choices: ClassVar = {}
    ranges: ClassVar = {"files": COUNT}
    files: int = option(200, "Files of each kind.")
    real: str = option("", "MIG-Bench records, for real boxes; default: those in data/ under BOXGRPO_SHARED.")


def draw_boxes(family: str, n: int, random: np.random.Generator, real: np.ndarray) -> np.ndarray:
    """(n, 4) in fractions: anywhere, centred, small at one corner, of a screen, on the left, 1 % outside, or real."""
    if family == "real":
        return real[random.integers(len(real), size=n)]
    if family in ("uniform", "left", "faulty"):
        corners = np.sort(random.uniform(0, 1, (n, 2, 2)), axis=1).reshape(n, 4)
        outside = (random.random(n) < 0.01) & (family == "faulty")
        return corners * ([0.5, 1] * 2 if family == "left" else 1) * np.where(outside, 3, 1)[:, None]
    least, most = {"centred": (0.15, 0.5), "corner": (0.02, 0.1), "elements": ((0.02, 0.01), (0.3, 0.06))}[family]
    sides = random.uniform(least, most, (n, 2))
    start = random.uniform(0, (0.3 if family == "corner" else 1) - sides)
    if family == "centred":
        start = np.clip(random.normal(0.5, 0.1, (n, 2)) - sides / 2, 0, 1 - sides)
    return np.concatenate([start, start + sides], axis=1)


def draw_file(family: str, images: str, n: int, unit: str, random: np.random.Generator, real: np.ndarray) -> list:
    """The boxes of a file in the unit, of images with sides of 56 to 4000 pixels."""
    long = np.exp(random.uniform(np.log(112), np.log(4000), (n, 1)))
    sizes = np.concatenate([long, long * random.uniform(0.5, 1, (n, 1))], axis=1).round()
    sizes = sizes if images == "of any size" else np.repeat(sizes[:1], n, axis=0)
    turned = random.random((1 if images == "of one size" else n, 1)) < 0.5
    sizes = np.where(turned, sizes[:, ::-1], sizes)
    corners = draw_boxes(family, n, random, real) * (np.tile(sizes, 2) if unit == "pixels" else LIMITS[unit])
    return [Written(box, tuple(size)) for box, size in zip(corners.round(DIGITS[unit]).tolist(), sizes.tolist())]


def judge(boxes: list[Written], usual: str, unit: str) -> str:
    """right, refused, wrong, or assumed: also wrong, but the log says that the boxes do not tell."""
    try:
        found, told = likeliest_unit(boxes, usual)
    except ValueError:
        return "refused"
    return "right" if found == unit else "wrong" if told else "assumed"


def measure(o: BoxUnitsOptions) -> dict:
    """Rows of files in their format's usual unit or in another one, by their number of records or by family."""
    file = Path(o.real or shared_data() / "mig_bench/MIG_data.sample.json")
    if not file.is_file():
        raise ValueError(f"real is {file}; there is no such file. Name MIG-Bench's records with --real.")
    real = np.array([record["answer"] for record in json.loads(file.read_text())])
    random, found = np.random.default_rng(0), {}
    for usual, unit, family, n in product(("thousandths", "pixels"), BOX_UNITS, FAMILIES, COUNTS):
        files = (draw_file(family, IMAGES[i % len(IMAGES)], n, unit, random, real) for i in range(o.files))
        outcomes = Counter(judge(boxes, usual, unit) for boxes in files)
        for by, value in (("records", n), ("family", family)):
            found.setdefault(("usual" if unit == usual else "another", by, value), Counter()).update(outcomes)
    rows = [{"unit": unit, "by": by, "value": value, "found": dict(c)} for (unit, by, value), c in found.items()]
    return {"machine": machine(), "options": asdict(o), "rows": sorted(rows, key=lambda row: (row["by"], row["unit"]))}


def main(args: list[str] | None = None) -> None:
    o = parse(BoxUnitsOptions, args, prog="box_units.py")
    result = measure(o)
    write(result, folder() / "box_units.json")
    print(table("box_units", result))


if __name__ == "__main__":
    run_as_script(main, "box_units.py")
