"""The demo's world on disk: drawn scenes as PNG files, and records in the formats of the published data sets."""

import functools
import itertools
import json
import logging
import multiprocessing
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from boxgrpo.trainer.data.example import BOX_PREFIX, THINK_SUFFIX
from boxgrpo.trainer.runtime.files import replace_folder

from .digits import WORLDS
from .scenes import CELL, PLACES, Scene, box_text, draw_scene
from .shapes import COLOURS, SHAPES

logger = logging.getLogger(__name__)

DEMO_TASKS = ("common_object", "refer_grounding", "group_grounding", "diff")
VERSION = 5  # of the drawing; a folder drawn by another version is not reused
SPLITS = ("cold_start", "train", "held_out")
FILES = {  # name: split, form of the records (ARCHITECTURE.md, section "Data")
    "cold_start": ("cold_start", "chain"),  # UniVG-R1's stage 1: messages with a reasoning chain and the box
    "coordinates": ("cold_start", "coordinates"),  # messages with the box alone, `answer_format` "box"
    "train": ("train", "question"),  # stage 2: a question, and a box on the 0-1000 scale
    "train_chains": ("train", "chain"),
    "held_out": ("held_out", "question"),
    "held_out_coordinates": ("held_out", "question_box"),  # with `answer_format` "box"
}
SEEDS_PER_SPLIT = 1_000_000
SEEDS_PER_WORLD = 10**12
ONE_PROCESS_SCENES = 500  # for more scenes, the calling script needs a `__main__` guard


def draw_split_scene(split: str, task: str, seed: int, *, level: int, size: int, world: str = "drawn") -> Scene:
    """Draw the scene of a split and seed. An eighth of all arrangements of objects is reserved for held-out scenes.

    So a model is never scored on an arrangement that it was trained on, whatever the tints and the wording.
    """
    sketch = WORLDS[world][split == "held_out"]
    while True:
        scene = draw_scene(task, seed, level=level, size=size, sketch=sketch)
        arrangement = repr((task, [(layout.things, layout.framed) for layout in scene.layouts], scene.gold))
        if (zlib.crc32(arrangement.encode()) % 8 == 0) == (split == "held_out"):
            return scene
        seed += SEEDS_PER_WORLD


def _write_scene(folder: Path, manifest: dict, split: str, name: str, task: str, level: int, seed: int) -> dict:
    """Writes one scene's PNG files under `folder`; returns its records by their form."""
    options = {name: manifest[name] for name in ("size", "world") if name in manifest}
    scene = draw_split_scene(split, task, seed, level=level, **options)
    images = [f"images/{split}/{name}_{k}.png" for k in range(1, len(scene.images) + 1)]
    for path, image in zip(images, scene.images):
        image.save(folder / path, compress_level=1)
    record = {"id": f"{split}-{name}", "task": task, "level": level, "images": images}
    record["target_image"] = scene.target_image
    others = scene.other_questions if manifest["asides"] else []

    def conversation(*turns: tuple[str, str]) -> dict:
        texts = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]
        return {"messages": texts}

    question, box = {"question": scene.question, "answer": list(scene.gold)}, {"answer_format": "box"}
    return {
        "chain": record | conversation((scene.question + THINK_SUFFIX, scene.completion), *others),
        "coordinates": record | box | conversation((BOX_PREFIX + scene.question, box_text(scene.gold)), *others),
        "question": record | question,
        "question_box": record | box | question,
    }


def write_world(
    folder: str | os.PathLike,
    *,
    tasks: Sequence[str] = DEMO_TASKS,
    cold_start: int,
    train: int,
    held_out: int,
    seed: int = 0,
    levels: Sequence[int] = (1,),
    size: int = 112,
    other_questions: bool = True,
    world: str = "drawn",
) -> Path:
    """Writes a world of `cold_start + train + held_out` scenes to `folder` and returns it as a path.

    Image paths in its `FILES` are relative to `folder`. Tasks alternate from scene to scene, levels after each round of
    tasks. Held-out scenes share no arrangement with others, and stay the same when another split grows.

    Args:
        other_questions: conversations also have questions about the scene's other objects.
        world: one of `WORLDS` (digits.py).

    Raises:
        ValueError: no task or level, a count out of range, or a folder that holds anything but this world.
    """
    folder = Path(folder)
    counts = dict(zip(SPLITS, (cold_start, train, held_out)))
    if not tasks or not levels:
        raise ValueError(f"tasks are {list(tasks)} and levels {list(levels)}; name at least one of each.")
    for split, count in counts.items():
        if not 0 <= count <= SEEDS_PER_SPLIT:
            raise ValueError(f"{split} is {count}; a split holds 0 to {SEEDS_PER_SPLIT} scenes. Choose within that.")
    manifest = {"version": VERSION, "tasks": list(tasks), **counts, "seed": seed, "levels": list(levels), "size": size}
    manifest |= {"asides": other_questions} | ({"world": world} if world != "drawn" else {})
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = folder / "world.json"
        held = json.loads(found.read_text()) if found.is_file() else "no world.json"
        if held == manifest:
            logger.info("%s already holds this world", folder)
            return folder
        raise ValueError(f"{folder} holds {held}, not this world: {manifest}. Remove it or name another folder.")
    with replace_folder(folder) as partial:
        _write_files(partial, manifest)
    return folder


def _write_files(folder: Path, manifest: dict) -> None:
    tasks, levels, jobs = manifest["tasks"], manifest["levels"], []
    for number, split in enumerate(SPLITS):
        (folder / "images" / split).mkdir(parents=True)
        first_seed = (len(SPLITS) * manifest["seed"] + number) * SEEDS_PER_SPLIT
        for k in range(manifest[split]):
            task, level = tasks[k % len(tasks)], levels[k // len(tasks) % len(levels)]
            jobs.append((split, f"{k:06d}", task, level, first_seed + k))
    write = functools.partial(_write_scene, folder, manifest)
    if len(jobs) > ONE_PROCESS_SCENES:  # spawned: a fork of a process that has run torch's threads may hang
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            records = list(pool.map(write, *zip(*jobs), chunksize=100))
    else:
        records = list(itertools.starmap(write, jobs))
    for name, (split, form) in FILES.items():
        rows = [json.dumps(record[form]) for job, record in zip(jobs, records) if job[0] == split]
        (folder / f"{name}.json").write_text("[\n" + ",\n".join(rows) + "\n]\n")
    (folder / "world.json").write_text(json.dumps(manifest, indent=1) + "\n")


def all_texts(
    tasks: Sequence[str] = DEMO_TASKS, *, levels: Sequence[int] = (1,), scenes: int = 100, world: str = "drawn"
) -> list[str]:
    """The texts to make a tokenizer from: every coordinate, and those of `scenes` a task and level, of no split."""
    texts = [str(v) for v in range(0, 1001, CELL)]
    for level, task, k in itertools.product(levels, tasks, range(scenes)):
        scene = draw_scene(task, -1 - k, level=level, sketch=WORLDS[world][False])
        texts += [scene.question + THINK_SUFFIX, scene.completion, *itertools.chain(*scene.other_questions)]
    return texts


def list_phrases(texts: Iterable[str]) -> list[str]:
    """The phrases of which a scene's texts consist: objects, places, and the text between them and the numbers.

    With one token for each phrase texts have a third fewer tokens, and every generated token carries a decision.
    """
    kinds = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
    varying = re.compile("|".join([rf"\b(?:{'|'.join(kinds)})\b", rf"\b(?:{'|'.join(PLACES)})\b", r"\d+"]))
    between = {phrase for text in texts for phrase in varying.split(text)} - {""}
    return [*kinds, *PLACES, *sorted(between)]
