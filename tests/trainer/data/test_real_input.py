"""Input as it comes: real photos and the real vocabulary through all three loops, and records with every fault."""

import json
import math
import re

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from boxgrpo.bench.reward_bench.vocabularies import qwen2_tokenizer
from boxgrpo.model.checkpoint import save_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.data.processor import THINK_SUFFIX, Processor
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.data.vocabulary import SPECIAL_TOKENS
from boxgrpo.trainer.evaluation.evaluate import evaluate
from boxgrpo.trainer.evaluation.grade import grade_texts
from boxgrpo.trainer.options import EvalOptions, GrpoOptions, SftOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.world.tiny import tiny_config
from runs import lines

DEFAULTS = GrpoOptions()
LIMITS = {"min_pixels": DEFAULTS.min_pixels, "max_pixels": DEFAULTS.max_pixels}
ANSWER = "<think>The box marks the bird's tail; the tiger's is at the top.</think><answer>(502, 8), (839, 392)</answer>"
GOLD = [502, 8, 839, 392]


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """One real record: SFT on it as stage 1, GRPO on it as stage 2, evaluation on it as MIG-Bench has it.

    The model is a Qwen2-VL in all but its widths and depths. 30 steps are enough to learn one answer by heart.
    """
    root = tmp_path_factory.mktemp("real")
    tokenizer = qwen2_tokenizer(shared / "data/qwen2_tokenizer/merges.txt")
    special = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))))
    config = tiny_config(151_936, special, hidden_size=64, layers=2, vision_width=64)
    save_model(Qwen2VL(config).init_weights(torch.Generator().manual_seed(0)), root / "initial")
    Processor(tokenizer, Qwen2VLImageProcessorPil(), **LIMITS).save_pretrained(root / "initial")

    benchmark = shared / "data/mig_bench/with_images.json"
    (record,) = json.loads(benchmark.read_text())
    user = f"<image><image>{record['question'].strip()}{THINK_SUFFIX}"
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": ANSWER}]
    (root / "stage1.json").write_text(json.dumps([{"messages": messages, "images": record["images"]}]))
    stage2 = {"images": record["images"], "question": record["question"], "answer": GOLD}
    (root / "stage2.json").write_text(json.dumps([stage2]))

    def options(kind, model, data, run, **changes):
        values = {"model": str(root / model), "data": str(data), "output_dir": str(root / run)}
        return kind(**values, image_root=str(benchmark.parent), dataloader_num_workers=0, **changes)

    learning = {"train_batch_size": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    sft.train(options(SftOptions, "initial", root / "stage1.json", "sft", max_steps=30, **learning), Ranks())
    step = {"prompts_per_step": 1, "num_generations": 4, "max_completion_length": 48, "learning_rate": 1e-5}
    grpo.train(options(GrpoOptions, "sft", root / "stage2.json", "grpo", max_steps=2, **step), Ranks())
    evaluate(options(EvalOptions, "grpo", benchmark, "eval", max_completion_length=48), Ranks())
    return root


def test_sft_learns_the_real_record(real):
    losses = [m["loss"] for m in lines(real / "sft")]
    assert losses[0] == pytest.approx(math.log(151_936), abs=0.3)  # nothing known: every token alike
    assert losses[-1] < 0.1


def test_grpo_rewards_the_learned_answer(real):
    first, second = lines(real / "grpo")
    assert first["reward"] > 0 and second["reward"] > 0
    assert 1022 < first["num_tokens"] <= 1022 + 4 * 48  # the prompt once for its four completions
    assert first["data/skipped"] == 0


def test_evaluation_finds_the_box_and_draws_it(real, shared):
    ((example,), _) = read_examples(shared / "data/mig_bench/with_images.json")
    results = json.loads((real / "eval/results.json").read_text())
    (graded,) = results["answers"]
    assert example.gold == tuple(GOLD) == tuple(graded["box"])  # MIG-Bench's fractions, stage 2's thousandths
    assert (graded["answer"], graded["iou"], graded["format"]) == (ANSWER, 1.0, 1.0)
    assert results["summary"]["tasks"]["correspondence"]["accuracy_at_0.5"] == 1.0
    assert grade_texts([example], [graded["answer"]]) == [graded]  # from text as from token ids
    with Image.open(real / "eval/pictures/00.png") as picture:
        colours = {colour for _, colour in picture.getcolors(picture.width * picture.height)}
    assert {(0, 150, 60), (225, 30, 30)} <= colours  # both boxes


@pytest.mark.parametrize("loop", ["sft", "grpo"])
def test_bad_records_cost_only_themselves(initial, tmp_path, caplog, loop):
    """One epoch a step, two steps: every bad record is met twice, counted and named once, and every step is full."""
    Image.effect_noise((84, 56), 60).convert("RGB").save(tmp_path / "plain.png")

    def record(image="plain.png", question="Where is it?", box=(0, 0, 500, 500)):
        if loop == "grpo":
            return {"images": [image], "question": question, "answer": box}
        answer = box and "<think>Here.</think><answer>({}, {}), ({}, {})</answer>".format(*box)
        turns = [("user", question), ("assistant", answer)]
        return {"images": [image], "messages": [{"role": role, "content": text} for role, text in turns if text]}

    bad = {
        "no image at": record("missing.png"),
        "an answer ends a chat" if loop == "sft" else "a gold box": record(box=None),
        "is inverted": record(box=(500, 500, 0, 0)),
        "over the budget of 300": record(question="Where is it? " * 200),
        "delimits turns or images": record(question="Where is <|image_pad|>?"),
    }
    records = [record(), record(), *bad.values()]
    (tmp_path / "records.json").write_text(json.dumps(records))
    values = {"model": str(initial), "data": str(tmp_path / "records.json"), "output_dir": str(tmp_path / "run")}
    values |= {"max_steps": 2, "dataloader_num_workers": 0}
    if loop == "sft":
        sft.train(SftOptions(**values, train_batch_size=len(records), cutoff_len=300), Ranks())
    else:
        step = {"prompts_per_step": len(records), "num_generations": 2, "max_completion_length": 4}
        grpo.train(GrpoOptions(**values, **step, max_prompt_length=300), Ranks())
    logged = lines(tmp_path / "run")
    assert [m["data/skipped"] for m in logged] == [len(bad)] * 2
    assert all(m["grad_norm"] >= 0 and m["num_tokens"] > 0 for m in logged)
    for number, reason in enumerate(bad, 2):
        (named,) = [message for message in caplog.messages if re.search(rf"records\.json#{number}\b", message)]
        assert reason in named
