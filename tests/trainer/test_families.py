"""A small model of a further family goes through SFT, GRPO, a resumption, an evaluation and a question."""

import json

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from boxgrpo.model.checkpoint import load_model, save_model
from boxgrpo.model.families import make_model
from boxgrpo.model.families.qwen3_vl import Qwen3VL
from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.apps.ground import GroundOptions
from boxgrpo.trainer.apps.grounding import Grounder
from boxgrpo.trainer.data.example import BOX_PREFIX, THINK_SUFFIX
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS, chat_template, demo_tokenizer
from boxgrpo.trainer.evaluation.evaluate import evaluate
from boxgrpo.trainer.options import GrpoOptions, SftOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from families import family_config
from runs import eval_options, lines

LIMITS = {"min_pixels": 1024, "max_pixels": 20_000}


@pytest.fixture
def initial(tmp_path):
    """A checkpoint folder of random weights, with the image processor of Qwen3-VL."""
    folder = tmp_path / "initial"
    tokenizer = demo_tokenizer([f"{BOX_PREFIX}Where is it?{THINK_SUFFIX}", "(10, 20), (300, 400)"])
    tokenizer.chat_template = chat_template(None)
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = family_config("qwen3_vl", len(tokenizer) + 8, special)
    save_model(make_model(config).init_weights(torch.Generator().manual_seed(0)), folder)
    images = Qwen2VLImageProcessorPil(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    Processor(tokenizer, images, family="qwen3_vl", **LIMITS).save_pretrained(folder)
    return folder


def test_qwen3_vl_learns_is_resumed_and_answers(initial, record_file, tmp_path):
    records = json.loads(record_file.read_text())
    simple = tmp_path / "simple.json"
    simple.write_text(json.dumps([record | {"answer_format": "box"} for record in records]))
    both = {"data": str(simple), "dataloader_num_workers": 0, "freeze_vision": False, "learning_rate": 3e-3} | LIMITS
    cold, tuned = tmp_path / "sft", tmp_path / "grpo"
    sft.train(SftOptions(model=str(initial), output_dir=str(cold), max_steps=12, train_batch_size=6, **both), Ranks())
    loss = [line["loss"] for line in lines(cold)]
    assert loss[-1] < loss[0] / 2
    run = {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 24, "beta": 0.0, "save_steps": 1}
    run |= {"model": str(cold), "output_dir": str(tuned)} | both
    for steps in (1, 2):
        grpo.train(GrpoOptions(max_steps=steps, resume="auto", **run), Ranks())
    assert [line["step"] for line in lines(tuned)] == [1, 2]
    tower = [load_model(folder).visual.deepstack_merger_list[1].linear_fc2.weight for folder in (initial, cold)]
    assert isinstance(load_model(tuned), Qwen3VL) and not torch.equal(*tower)

    summary = evaluate(eval_options(tuned, simple, max_completion_length=24, **LIMITS), Ranks())
    assert summary["count"] == 6 and summary["format"] > 0
    grounder = Grounder.load(GroundOptions(model=str(tuned), max_completion_length=24, **LIMITS), torch.device("cpu"))
    question = grounder.prepare("Where is it?", [tmp_path / "0.png"], answer_format="box")
    *_, ids = grounder.stream(question)
    assert grounder.parse(question, ids).box_1000
