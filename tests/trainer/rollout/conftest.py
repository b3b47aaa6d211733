"""Prompts of different images, a model and its vocabulary for all rollouts."""

import pytest
from PIL import Image

from boxgrpo.model.batch import Group
from boxgrpo.model.checkpoint import load_model
from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.rollout.base import Vocabulary

SIZES = {7: (), 3: ((56, 56),), 12: ((61, 90), (400, 300)), 5: ((56, 56), (28, 140), (84, 56))}


@pytest.fixture(scope="package")
def processor(initial):
    return Processor.from_pretrained(initial, min_pixels=784, max_pixels=50_000)


@pytest.fixture(scope="package")
def groups(processor, tmp_path_factory):
    """Four prompts with none to three images, one of them over the limit; serial numbers are not their places."""
    folder, made = tmp_path_factory.mktemp("images"), []
    for serial, sizes in SIZES.items():
        paths = tuple(str(folder / f"{serial}_{k}.png") for k in range(len(sizes)))
        for path, size in zip(paths, sizes):
            Image.effect_noise(size, 60).convert("RGB").save(path)
        example = Example(str(serial), "diff", paths, "Where is it?", (0.0, 0.0, 500.0, 500.0), source=f"data#{serial}")
        made.append(Group(processor.prompt(example), serial=serial, record=example))
    return made


@pytest.fixture(scope="package")
def model(initial):
    return load_model(initial)


@pytest.fixture(scope="package")
def vocabulary(processor, model):
    return Vocabulary.of(processor, model.config, "cpu")
