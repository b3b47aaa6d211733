"""What a step's images cost the process that trains: its CPU time, its waiting, and the bytes that it receives.

    python bench/loader_bench/run.py [--quick] [--json FILE|-]

`make bench` keeps the results. A step is 16 prompts of four images of 448 x 896 from two loader processes, which can
work ahead: between steps this process sleeps, for less than a step of the 7B takes. On a GPU the pixels arrive in
page-locked memory and are copied to it, which has two times: of this process, and of the GPU. On a CPU a second row,
"fp32 patches", sends the same prompts with the values that the vision tower takes, as the image processor returns them.
"""

import pickle
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from boxgrpo.bench.publish.tables import table
from boxgrpo.bench.records import begin, flags, output
from boxgrpo.model.batch import Group, Pixels, Prompt
from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.vocabulary import demo_tokenizer
from boxgrpo.trainer.runtime.ranks import run_as_script

WORKERS, PHOTOS, STEPS = 2, 8, 2
SIZES = {"prompts": 16, "images": 4, "height": 448, "width": 896, "seconds_between": 3.0}
QUICK = {"prompts": 2, "images": 1, "height": 56, "width": 112, "seconds_between": 0.1}


class WithValues:
    """`prepare` with the tower's values in place of the 8-bit colours."""

    def __init__(self, prepare: Callable[[Example], Prompt]):
        self.prepare = prepare

    def __call__(self, example: Example) -> Prompt:
        prompt = self.prepare(example)
        return replace(prompt, pixels=prompt.pixel_values)


def make_examples(folder: Path, sizes: dict) -> list[Example]:
    """Records of one step, of JPEG photos with soft shapes."""
    width, height = sizes["width"], sizes["height"]
    for i in range(PHOTOS):
        colours = random.Random(i).randbytes(3 * (width // 14) * (height // 14))
        small = Image.frombytes("RGB", (width // 14, height // 14), colours)
        small.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    paths = [str(folder / f"{i}.jpg") for i in range(PHOTOS)]
    chosen = [tuple(paths[(i + k) % PHOTOS] for k in range(sizes["images"])) for i in range(sizes["prompts"])]
    return [Example(str(i), "diff", images, "Where?", None, source=f"#{i}") for i, images in enumerate(chosen)]


def copy(groups: list[Group], gpu: torch.device) -> Callable[[], dict[str, float]]:
    """Queue the copy of the pixels; a function that returns the milliseconds of this process, and those of the GPU."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    clock = time.perf_counter()
    begun.record()
    Pixels.concat([group.prompt.pixels for group in groups], gpu)
    ended.record()
    queued = 1e3 * (time.perf_counter() - clock)
    return lambda: ended.synchronize() or {"queue_ms": queued, "copy_ms": begun.elapsed_time(ended)}


def measure(name: str, prepare: Callable, examples: list[Example], sizes: dict, gpu: torch.device | None) -> dict:
    """A row: means of the steps after the first, which starts the loader's processes."""
    loader = Loader(examples, prepare, batch_size=len(examples), seed=0, workers=WORKERS, pin_for=gpu)
    steps, samples = iter(loader), []
    for _ in range(STEPS + 1):
        processor, clock = time.process_time(), time.perf_counter()
        groups = next(steps)
        waited = time.perf_counter() - clock
        copied = copy(groups, gpu) if gpu else dict
        time.sleep(sizes["seconds_between"])
        spent = time.process_time() - processor  # by the thread that takes the next step, too
        samples.append({"cpu_s": spent, "wait_s": waited} | copied())
    steps.close()
    received = sum(len(pickle.dumps((group, []), protocol=pickle.HIGHEST_PROTOCOL)) for group in groups)
    found = {key: statistics.mean(sample[key] for sample in samples[1:]) for key in samples[0]}
    found["megabytes"] = received / 1e6
    return {"run": name, "workers": WORKERS} | sizes | {key: round(value, 4) for key, value in found.items()}


def run(sizes: dict) -> dict:
    limits = {"min_pixels": 784}
    prepare = Processor(demo_tokenizer(["Where?"]), Qwen2VLImageProcessorPil(), **limits).prompt
    with tempfile.TemporaryDirectory() as folder:
        examples = make_examples(Path(folder), sizes)
        gpu = torch.device("cuda", 0) if torch.cuda.is_available() else None
        runs = {"8-bit pixels": prepare} | ({} if gpu else {"fp32 patches": WithValues(prepare)})
        return {"rows": [measure(name, given, examples, sizes, gpu) for name, given in runs.items()]}


def main(args: list[str] | None = None) -> None:
    parser = flags(__doc__)
    parser.add_argument("--quick", action="store_true", help="two small images a step")
    o = parser.parse_args(args)
    record = begin() | {"loader": run(QUICK if o.quick else SIZES)}
    output(record, o.json, table("loader", record["loader"]))


if __name__ == "__main__":
    run_as_script(main, "loader_bench/run.py")
