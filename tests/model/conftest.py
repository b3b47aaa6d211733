"""The tiny model and the prompts that it samples from."""

import pytest

from boxgrpo.model.batch import Group


@pytest.fixture
def model(twins):
    return twins("tiny")[0]


@pytest.fixture
def groups(make_prompt):
    """No image, one, and three of different sizes, with questions of different lengths."""
    grids = [[], [(1, 4, 6)], [(1, 2, 4), (1, 6, 4), (1, 4, 2)]]
    prompts = [make_prompt(g, words=5 + 3 * i, seed=10 + i) for i, g in enumerate(grids)]
    return [Group(prompt, serial=serial) for prompt, serial in zip(prompts, (7, 3, 5))]
