"""Fixtures shared by the test files."""

import functools
import json
import os
import pathlib
import shutil

import pytest
import torch
from PIL import Image

from browser import browser  # noqa: F401 - a fixture
from families import KINDS, family_config
from special_ids import SPECIAL_IDS

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared():
    """The folder of real records, photos and the Qwen2 merges; not part of the repository."""
    folder = pathlib.Path(os.environ.get("BOXGRPO_SHARED", ROOT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data at {folder}; set BOXGRPO_SHARED")
    return folder


@pytest.fixture(scope="session")
def twins(tmp_path_factory):
    """twins(kind) -> (our model, transformers' model) with the same random fp32 weights.

    Kinds of Qwen2-VL: "tiny" (tied head) and "published" (the published ratios: head_dim 128, sections 16, 24, 24,
    rope_theta 1e6, untied head). Both have two query heads to a key head, two layers and two vision blocks. Those of
    the other families: `KINDS` of families.py.
    """
    import transformers

    from boxgrpo.model.checkpoint import load_model
    from boxgrpo.model.families import FAMILIES
    from boxgrpo.trainer.world.tiny import tiny_config

    @functools.cache
    def make(kind):
        published = {"hidden_size": 512, "theta": 1e6, "initializer_range": 0.02}
        if kind in KINDS:
            config = family_config(kind)
        else:
            sizes = {"tiny": {"hidden_size": 64}, "published": published}[kind]
            config = tiny_config(160, SPECIAL_IDS, layers=2, vision_width=64, **sizes)
            config.tie_word_embeddings = kind == "tiny"
        theirs = getattr(transformers, FAMILIES[config.model_type].architecture)(config).eval()
        g = torch.Generator().manual_seed(0)
        for _, parameter in sorted(theirs.named_parameters()):
            noise = torch.randn(parameter.shape, generator=g)
            if parameter.ndim == 1:
                parameter.data += 0.1 * noise  # biases 0 and norms 1 would hide a forgotten one
            else:
                parameter.data = noise * config.text_config.initializer_range
        folder = tmp_path_factory.mktemp(kind)
        theirs.save_pretrained(folder)
        return load_model(folder), theirs

    return make


@pytest.fixture(scope="session")
def make_prompt():
    """make_prompt(grids, words=6, seed=0, side=14): images between <|vision_start|> and <|vision_end|>, random words.

    `side`: of a patch, in pixels.
    """
    from boxgrpo.model.batch import Pixels, Prompt
    from boxgrpo.model.decoder import mrope_position_ids

    table = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))

    def make(grids, words=6, seed=0, side=14):
        g = torch.Generator().manual_seed(seed)
        image = SPECIAL_IDS["<|image_pad|>"]
        ids = []
        for t, h, w in grids:
            word = int(torch.randint(100, (1,), generator=g))
            pads = [image] * (t * h * w // 4)
            ids += [word, SPECIAL_IDS["<|vision_start|>"], *pads, SPECIAL_IDS["<|vision_end|>"]]
        ids = torch.tensor(ids + torch.randint(100, (words,), generator=g).tolist())
        grids = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
        colours = torch.randint(256, (int(grids.prod(1).sum()), 3 * side**2), generator=g, dtype=torch.uint8)
        pixels = Pixels(colours, table) if len(grids) else None
        return Prompt(ids, mrope_position_ids(ids, grids, image_token_id=image), pixels, grids)

    return make


@pytest.fixture(scope="session")
def pack_prompt():
    """pack_prompt(prompt): a batch of one prompt, all tokens but the first scored."""
    from boxgrpo.model.batch import Conversation, Group, pack_groups

    def pack(prompt):
        whole = Conversation(**vars(prompt), loss_mask=torch.ones(len(prompt.input_ids), dtype=torch.bool))
        return pack_groups([Group(whole)], image_token_id=SPECIAL_IDS["<|image_pad|>"])

    return pack


@pytest.fixture(scope="session")
def hf_logits():
    """hf_logits(theirs, prompt, completion=None): (P + C, V) logits of one whole sequence by transformers."""

    def logits(theirs, prompt, completion=None):
        ids = prompt.input_ids if completion is None else torch.cat((prompt.input_ids, completion))
        images = {}
        if len(prompt.image_grid_thw):
            images = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        types = (ids == SPECIAL_IDS["<|image_pad|>"]).int()
        return theirs(input_ids=ids[None], mm_token_type_ids=types[None], **images).logits[0]

    return logits


@pytest.fixture(scope="session")
def initial(tmp_path_factory):
    """A checkpoint folder: tiny, random weights, a vocabulary of answers, and 8 rows of the head beyond it."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from boxgrpo.model.checkpoint import save_model
    from boxgrpo.model.families.qwen2_vl import Qwen2VL
    from boxgrpo.trainer.data.processor import THINK_SUFFIX, Processor
    from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS, demo_tokenizer
    from boxgrpo.trainer.world.tiny import tiny_config

    folder = tmp_path_factory.mktemp("initial")
    tokenizer = demo_tokenizer(
        [f"Where is it?{THINK_SUFFIX}", "<think>Here.</think><answer>(0, 0), (500, 500)</answer>"]
    )
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = tiny_config(len(tokenizer) + 8, special, hidden_size=64, layers=2, vision_width=64)
    save_model(Qwen2VL(config).init_weights(torch.Generator().manual_seed(0)), folder)
    Processor(tokenizer, Qwen2VLImageProcessorPil(), min_pixels=784, max_pixels=50_000).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def drawn_world(tmp_path_factory):
    import runs

    return runs.make_world(tmp_path_factory.mktemp("drawn_world"))


@pytest.fixture(scope="module")
def world(drawn_world, tmp_path_factory):
    """A module's own copy of a folder with a small drawn world, an initial model for it, and `sft/`, a cold start."""
    return shutil.copytree(drawn_world, tmp_path_factory.mktemp("world"), dirs_exist_ok=True)


@pytest.fixture
def write(tmp_path):
    """write(value, name="data.json") -> the path of a JSON file in the test's folder."""

    def write_json(value, name="data.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        return path

    return write_json


@pytest.fixture
def record_file(write, tmp_path):
    """Seven records of two tasks, of which the third has lost its image: a file and its examples."""
    records = []
    for i in range(7):
        if i != 2:
            Image.effect_noise((56 + 14 * i, 56), 60).save(tmp_path / f"{i}.png")
        task = ("diff", "region")[i % 2]
        records.append({"task": task, "images": [f"{i}.png"], "question": "Where is it?", "answer": [10, 20, 300, 400]})
    return write(records, "benchmark.json")
