"""A step's case of a tiny size, with its checkpoint and records."""

import pytest

from boxgrpo.bench.step_bench.cases import TEXTS, StepCase, prepare
from boxgrpo.trainer.data.vocabulary import demo_tokenizer


@pytest.fixture(scope="session")
def tiny_case():
    return StepCase("tiny", prompts=2, images=2, side=(56, 84), generations=4, tokens=6)


@pytest.fixture(scope="session")
def tokenizer():
    return demo_tokenizer(TEXTS)


@pytest.fixture(scope="session")
def tiny(tiny_case, tokenizer, tmp_path_factory):
    """The folder with the case's model and records.json."""
    folder = tmp_path_factory.mktemp("step")
    prepare(tiny_case, folder, tokenizer)
    return folder
