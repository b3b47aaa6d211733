"""A checkpoint that answers one question about some images, with words that a page or a terminal must not act upon."""

import json

import pytest
import torch
from PIL import Image

from boxgrpo.trainer import sft
from boxgrpo.trainer.apps.ground import GroundOptions
from boxgrpo.trainer.apps.grounding import Grounder
from boxgrpo.trainer.data.example import THINK_SUFFIX
from boxgrpo.trainer.options import SftOptions
from boxgrpo.trainer.runtime.ranks import Ranks

QUESTION = "<script>document.title = 'run'</script>Where is it?"
THOUGHT = "<img src=x onerror=\"document.title='run'\"> it is &amp; there"  # what a page must show unchanged
BOX = "(125, 250), (500, 750)"
ANSWER = f"<think>{THOUGHT}</think><answer>{BOX}</answer>"


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Pictures by name: one, one that a camera stored lying on its side (upright 80 x 160), one of 20 x 10."""
    folder = tmp_path_factory.mktemp("images")
    Image.effect_noise((112, 84), 60).save(folder / "one.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((160, 80), 60).convert("RGB").save(folder / "turned.jpg", exif=exif)
    Image.effect_noise((20, 10), 60).save(folder / "small.png")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def pair(images):
    return [images["one"], images["turned"]]


@pytest.fixture(scope="session")
def certain(initial, images, pair, tmp_path_factory):
    """A checkpoint that has learned by heart to give ANSWER to QUESTION, about the pair or the small image."""
    folder = tmp_path_factory.mktemp("certain")
    turns = [{"role": "user", "content": QUESTION + THINK_SUFFIX}, {"role": "assistant", "content": ANSWER}]
    records = [{"images": list(map(str, shown)), "messages": turns} for shown in (pair, [images["small"]])]
    (folder / "records.json").write_text(json.dumps(records))
    values = {"model": str(initial), "data": str(folder / "records.json"), "output_dir": str(folder / "run")}
    learning = {"max_steps": 60, "train_batch_size": len(records), "learning_rate": 5e-3}
    sft.train(SftOptions(**values, **learning, dataloader_num_workers=0), Ranks())
    return folder / "run"


def loaded(folder, **changes) -> Grounder:
    limits = {"min_pixels": 784, "max_pixels": 50_000, "max_completion_length": 120}
    return Grounder.load(GroundOptions(model=str(folder), dtype="float32", **limits | changes), torch.device("cpu"))


@pytest.fixture(scope="session")
def grounder(certain):
    return loaded(certain)
