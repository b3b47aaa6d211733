"""The demo's world on disk: drawn scenes as PNG files and records in the formats that users have."""

import dataclasses
import functools
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor

from .scenes import CELL, PLACES, TASKS, Scene, box_text, draw_scene, place, where, with_margin
from .shapes import COLOURS, SHAPES

logger = logging.getLogger(__name__)

DEMO_TASKS = ("common_object", "refer_grounding", "group_grounding", "diff")
VERSION = 4  # of the drawing; a folder drawn by another version is not reused
SPLITS = ("cold_start", "train", "held_out")
FILES = {  # name: split, form of the records
    "cold_start": ("cold_start", "chain"),
    "coordinates": ("cold_start", "coordinates"),
    "plain": ("cold_start", "plain"),
    "train": ("train", "asked"),
    "train_chains": ("train", "chain"),
    "held_out": ("held_out", "asked"),
    "held_out_coordinates": ("held_out", "asked_coordinates"),
}
SEEDS_PER_SPLIT = 1_000_000
SEEDS_PER_WORLD = 10**12


def _prompts() -> tuple[str, str]:
    # Here, not above: transformers takes seconds to load, and drawing needs none of it.
    from boxgrpo.trainer.data.processor import BOX_PREFIX, THINK_SUFFIX

    return BOX_PREFIX, THINK_SUFFIX


def scene_of(split: str, task: str, seed: int, *, level: int, size: int) -> Scene:
    """The split's scene of this seed. One arrangement in eight is for held-out scenes, whatever their tints and words.

    So a model is never scored on an arrangement that it has seen, however few there are.
    """
    while True:
        scene = draw_scene(task, seed, level=level, size=size)
        arrangement = repr((task, [(layout.things, layout.framed) for layout in scene.layouts], scene.gold))
        if (zlib.crc32(arrangement.encode()) % 8 == 0) == (split == "held_out"):
            return scene
        seed += SEEDS_PER_WORLD


def _write_scene(
    folder: pathlib.Path,
    prompts: tuple[str, str],
    manifest: dict,
    split: str,
    name: str,
    task: str,
    level: int,
    seed: int,
) -> dict[str, dict]:
    """Writes one scene's PNG files under `folder`; returns its records by their form."""
    scene = scene_of(split, task, seed, level=level, size=manifest["size"])
    images = [f"images/{split}/{name}_{k}.png" for k in range(1, len(scene.images) + 1)]
    for path, image in zip(images, scene.images):
        image.save(folder / path, compress_level=1)
    record = {"id": f"{split}-{name}", "task": task, "level": level, "images": images}
    record["target_image"] = scene.target_image
    (prefix, suffix), box = prompts, box_text(scene.gold)
    answer = scene.completion if manifest["chains"] else dataclasses.replace(scene, chain="").completion
    asides = scene.asides if manifest["asides"] else []
    generous = random.Random(f"annotator {task} {level} {seed}").random() < manifest["margins"]

    def taught(turns: Sequence[tuple[str, str]]) -> dict:
        messages = []
        for question, text in turns:
            messages += [("user", question), ("assistant", _with_margins(text) if generous else text)]
        return {"messages": [{"role": role, "content": text} for role, text in messages]}

    asked, alone = {"question": scene.question, "answer": list(scene.gold)}, {"answer_format": "box"}
    return {
        "chain": record | taught([(scene.question + suffix, answer), *asides]),
        "coordinates": record | alone | taught([(prefix + scene.question, box), *asides]),
        "plain": record | taught(_plain_turns(scene, suffix, random.Random(f"plain {task} {level} {seed}"))),
        "asked": record | asked,
        "asked_coordinates": record | alone | asked,
    }


def _plain_turns(scene: Scene, suffix: str, rng: random.Random) -> list[tuple[str, str]]:
    """Where each object stands, which is no task yet: one, drawn at random, with a chain, the others without."""
    first = rng.randrange(len(scene.objects))
    turns = [(where(number, thing), box_text(thing.box)) for number, thing in scene.objects]
    number, thing = scene.objects[first]
    chain = f"The {thing.kind} is in image {number} at the {place(thing.box)}."
    question, box = turns.pop(first)
    return [(question + suffix, f"<think>{chain}</think><answer>{box}</answer>"), *turns]


def _with_margins(answer: str) -> str:
    return re.sub(
        r"\((\d+), (\d+)\), \((\d+), (\d+)\)",
        lambda found: box_text(with_margin(tuple(map(int, found.groups())))),
        answer,
    )


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
    chains: bool = True,
    asides: bool = True,
    margins: float = 0.5,
    processes: int = 2,
) -> pathlib.Path:
    """Writes a world of `cold_start + train + held_out` scenes to `folder` and returns it as a path.

    `cold_start.json` holds UniVG-R1 stage-1 records (messages with the reasoning chain and the box), `train.json` and
    `held_out.json` stage-2 ones (question, and answer on the 0-1000 scale), `train_chains.json` the training scenes as
    stage-1 records; DESIGN section 7. Image paths are relative to `folder`. Tasks take turns, and so do the levels
    after each turn of the tasks; held-out scenes share no arrangement with the others (`scene_of`), and stay the same
    when another split grows.

    `coordinates.json` is the cold start with the box alone for an answer, asked for as `answer_format` "box" asks, and
    `held_out_coordinates.json` asks so too. `plain.json` asks about the cold start's images where each object is, and
    none of the tasks.

    With `chains=False` the <think> of stage 1 is empty; with `asides=False` its records lack the plain questions about
    a scene's other objects. Its annotators have two habits, as those of real sets do: a share `margins` of the records
    comes from one who leaves a cell of background around every object. The boxes of stage 2 are exact.

    `world.json` lists all arguments: where a folder already holds this world nothing is written; a folder that holds
    anything else raises ValueError. The folder appears only when it is complete. With `processes` above 1 the calling
    script needs its `__main__` guard.
    """
    folder = pathlib.Path(folder)
    counts = dict(zip(SPLITS, (cold_start, train, held_out)))
    if not tasks or set(tasks) - TASKS.keys():
        raise ValueError(
            f"tasks are {list(tasks)}; they must be some of {', '.join(TASKS)}. Name at least one of these."
        )
    if not levels:
        raise ValueError("levels are []; scenes need one. Name at least one of 0, 1 and 2.")
    for split, count in counts.items():
        if not 0 <= count <= SEEDS_PER_SPLIT:
            raise ValueError(f"{split} is {count}; a split holds 0 to {SEEDS_PER_SPLIT} scenes. Choose within that.")
    manifest = {"version": VERSION, "tasks": list(tasks), **counts}
    manifest |= {"seed": seed, "levels": list(levels), "size": size}
    manifest |= {"chains": chains, "asides": asides, "margins": margins}
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        found = folder / "world.json"
        held = json.loads(found.read_text()) if found.is_file() else "no world.json"
        if held == manifest:
            logger.info("%s already holds this world", folder)
            return folder
        raise ValueError(
            f"{folder} holds {held}, not the world asked for, {manifest}. Remove it or name another folder."
        )

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    jobs = []
    for number, (split, count) in enumerate(counts.items()):
        (partial / "images" / split).mkdir(parents=True)
        first_seed = (len(SPLITS) * seed + number) * SEEDS_PER_SPLIT
        for k in range(count):
            task, level = tasks[k % len(tasks)], levels[k // len(tasks) % len(levels)]
            jobs.append((split, f"{k:06d}", task, level, first_seed + k))
    write = functools.partial(_write_scene, partial, _prompts(), manifest)
    if processes > 1:  # spawned: a fork of a process that has run torch's threads may hang
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            records = list(pool.map(write, *zip(*jobs), chunksize=100))
    else:
        records = list(itertools.starmap(write, jobs))
    for name, (split, form) in FILES.items():
        mine = [record[form] for job, record in zip(jobs, records) if job[0] == split]
        (partial / f"{name}.json").write_text("[\n" + ",\n".join(map(json.dumps, mine)) + "\n]\n")
    (partial / "world.json").write_text(json.dumps(manifest, indent=1) + "\n")
    partial.rename(folder)
    return folder


def all_texts(tasks: Sequence[str] = DEMO_TASKS, *, levels: Sequence[int] = (1,)) -> list[str]:
    """Every coordinate, and the texts of scenes outside every split: what the demo tokenizer is trained on."""
    texts, (_, suffix) = [str(v) for v in range(0, 1001, CELL)], _prompts()
    for level, task, k in itertools.product(levels, tasks, range(500)):
        scene = draw_scene(task, -1 - k, level=level)
        texts += [scene.question + suffix, scene.completion, *itertools.chain(*scene.asides)]
    return texts


def wordings(texts: Iterable[str]) -> list[str]:
    """Objects, places, and the stretches of text between them and the numbers: all that a scene's texts are made of.

    With a token for each of them a tiny model reads and writes a third fewer tokens, and every token it writes decides
    something.
    """
    kinds = [f"{colour} {shape}" for colour, shape in itertools.product(COLOURS, SHAPES)]
    varying = re.compile("|".join([rf"\b(?:{'|'.join(kinds)})\b", rf"\b(?:{'|'.join(PLACES)})\b", r"\d+"]))
    between = {stretch for text in texts for stretch in varying.split(text)} - {""}
    return [*kinds, *PLACES, *sorted(between)]
