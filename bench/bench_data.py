"""Time and memory to scan a file of MGrounding-630k's size once, and to open it from then on.

    python bench/bench_data.py [--records 630000] [--json PATH]

The records are written in MGrounding's form (several turns, marked boxes, two to six images, about 1.1 KB each) as one
JSON array. Each reading is a process of its own, whose anonymous memory is sampled. Wanted: a scan within 30 s, opening
within 1 s, 500 MB. Results go to bench/results/<device>/data.json; the exit status is 1 when a demand is not met.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import psutil

from boxgrpo.bench.machine import folder, machine
from boxgrpo.bench.processes import resident_bytes
from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import write
from boxgrpo.trainer.arguments import option, parse
from boxgrpo.trainer.options import COUNT
from boxgrpo.trainer.presence import check_paths
from boxgrpo.trainer.runtime.ranks import RunFailed, run_as_script

WANTED = {"scan_s": 30.0, "open_s": 1.0, "memory_mb": 500.0}
WORDS = "the a object in image that is near left right of which shows same different and person holding with".split()
READ = """
import json, sys, time
started = time.perf_counter()
from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.data.readers import read_examples
imported = time.perf_counter()
examples, faults = read_examples(sys.argv[1], schema="auto")
opened = time.perf_counter()
loader = Loader(examples, lambda example: example.id, batch_size=100, seed=1, workers=0, start=len(examples) // 2)
ids = [group.prompt for group in next(iter(loader))]
print(json.dumps({"import_s": imported - started, "open_s": opened - imported, "records": len(examples),
                  "faulty": len(faults), "hundred_s": time.perf_counter() - opened, "ids": ids}))
"""


@dataclass
class DataBenchOptions:
    """Scan and open a generated file of records."""

    choices: ClassVar = {}
    ranges: ClassVar = dict.fromkeys(("records", "repeats"), COUNT)
    records: int = option(630_000, "Records to write.")
    repeats: int = option(3, "Readings of each kind.")
    json: str = option("", "Where to write the results; empty: bench/results/<device>/data.json.")


def write_records(path: Path, count: int) -> None:
    """The file, a JSON array on one line; one record in ten thousand has an inverted box."""
    draw = random.Random(0)

    def words(n: int) -> str:
        return " ".join(draw.choices(WORDS, k=n))

    def box(inverted: bool) -> str:
        x1, x2 = sorted(draw.sample(range(1001), 2), reverse=inverted)
        y1, y2 = sorted(draw.sample(range(1001), 2))
        return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"

    with path.open("w") as file:
        for i in range(count):
            turns = []
            for turn in range(draw.randint(1, 3)):
                turns.append({"from": "human", "value": words(draw.randint(35, 65))})
                answer = f"{words(draw.randint(8, 25))} {box(turn == 0 and i % 10_000 == 7)}"
                turns.append({"from": "gpt", "value": answer})
            images = [f"mgrounding/part_{i % 97:03d}/{i:07d}_{k}.jpg" for k in range(draw.randint(2, 6))]
            record = {"id": f"mg_{i:07d}", "images": images, "conversations": turns, "type": words(1)}
            file.write("[" if i == 0 else ", ")
            file.write(json.dumps(record))
        file.write("]\n")


def read(path: Path, cache: str) -> dict:
    """One reading in a process of its own; with the most anonymous memory it had, MB."""
    environment = os.environ | {"BOXGRPO_CACHE": cache, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out:
        run = subprocess.Popen([sys.executable, "-P", "-c", READ, str(path)], env=environment, stdout=out)
        process, peak = psutil.Process(run.pid), 0
        while run.poll() is None:
            peak = max(peak, resident_bytes(process, anonymous=True))
            time.sleep(0.01)
        if run.returncode:
            raise RunFailed(f"reading {path} failed with status {run.returncode}; see above.")
        out.seek(0)
        return json.load(out) | {"memory_mb": peak / 1e6}


def measure(o: DataBenchOptions) -> dict:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "records.json"
        write_records(path, o.records)
        size = path.stat().st_size
        caches = [f"{place}/cache{k}" for k in range(o.repeats)]
        pairs = [(read(path, cache), read(path, cache)) for cache in caches]  # the first finds an empty cache
    readings = dict(zip(("scan", "open"), map(list, zip(*pairs))))
    ids = {json.dumps(r.pop("ids")) for pair in pairs for r in pair}
    found = {f"{kind}_s": statistics.median(r["open_s"] for r in readings[kind]) for kind in readings}
    found["memory_mb"] = max(r["memory_mb"] for pair in pairs for r in pair)
    met = {name: found[name] <= most for name, most in WANTED.items()}
    described = {"machine": machine(), "options": asdict(o), "megabytes": round(size / 1e6)}
    return described | found | {"same_order": len(ids) == 1, "met": met, "readings": readings}


def main(args: list[str] | None = None) -> None:
    o = parse(DataBenchOptions, args, prog="bench_data.py")
    check_paths(o)
    result = measure(o)
    write(result, Path(o.json) if o.json else folder() / "data.json")
    print(table("data", result, WANTED))
    if unmet := [name for name, met in result["met"].items() if not met] + ["same_order"] * (not result["same_order"]):
        sys.exit(f"not met: {', '.join(unmet)}")


if __name__ == "__main__":
    run_as_script(main, "bench_data.py")
