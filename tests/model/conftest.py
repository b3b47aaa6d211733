"""The tiny model and the prompts that it samples from."""

import functools

import pytest

from boxgrpo.model.batch import Group


@pytest.fixture
def kind():
    """Of `twins`; a test's parameter replaces it."""
    return "tiny"


@pytest.fixture
def model(twins, kind):
    return twins(kind)[0]


@pytest.fixture
def make_prompt(make_prompt, model):
    """The general one, with the model's patches."""
    return functools.partial(make_prompt, side=model.config.vision_config.patch_size)


@pytest.fixture
def groups(make_prompt):
    """No image, one, and three of different sizes, with questions of different lengths."""
    grids = [[], [(1, 4, 6)], [(1, 2, 4), (1, 6, 4), (1, 4, 2)]]
    prompts = [make_prompt(g, words=5 + 3 * i, seed=10 + i) for i, g in enumerate(grids)]
    return [Group(prompt, serial=serial) for prompt, serial in zip(prompts, (7, 3, 5))]
