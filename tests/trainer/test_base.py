"""The base model: its run, what Muon updates, and the model in the repository."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file

from boxgrpo.model.checkpoint import load_model
from boxgrpo.trainer import base
from boxgrpo.trainer.evaluation.evaluate import evaluate
from boxgrpo.trainer.options import EvalOptions, SftOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.world import recipe
from boxgrpo.trainer.world.digits import WORLDS
from boxgrpo.trainer.world.plain import PlainScenes, to_record
from runs import lines


def test_muon_updates_the_hidden_matrices_and_adamw_all_else(initial):
    model = load_model(initial)
    options = SftOptions(learning_rate=0.01, lr_scheduler_type="constant", freeze_vision=False)
    engine = base.MuonEngine(model, options, Ranks(), 10)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for step in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
            if p.ndim == 2:
                p.grad[0] = 2
        engine.step()
        assert all(p.grad is None for p in model.parameters()), step
    for name, p in model.named_parameters():
        change = (p - before[name]).detach()
        if p.ndim == 2 and "embed_tokens" not in name:  # a gradient of rank 1: its update is of rank 1 too
            rms, most = change.square().mean().sqrt(), torch.linalg.svdvals(change)
            assert most[1] < 0.05 * most[0] and rms < 0.2 * 2 * 0.01
        else:
            torch.testing.assert_close(change, torch.full_like(change, -0.02), atol=1e-5, rtol=1e-4)


@pytest.fixture
def few(tmp_path, monkeypatch):
    """The base's own recipe, but two steps and a small model."""
    whole = yaml.safe_load((recipe.RECIPES / "base.yaml").read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(whole | {"train_batch_size": 4, "logging_steps": 1}))
    monkeypatch.setattr(base, "RECIPES", tmp_path)
    monkeypatch.setattr(base, "SIZE", {"hidden_size": 64, "layers": 1, "vision_width": 64, "vision_depth": 1})
    return ["--max_steps=2", "--held_out=4", "--size=56", f"--output_dir={tmp_path / 'out'}"]


@pytest.mark.parametrize("world", WORLDS)
def test_a_short_run_writes_the_model_in_bf16_beside_its_curve(few, tmp_path, world):
    base.main([*few, f"--world={world}"])
    root = tmp_path / "out"
    trained, written = load_model(root / "run/best"), load_model(root / "model", dtype=torch.bfloat16)
    for (name, p), q in zip(trained.named_parameters(), written.parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q), name
    assert [line["step"] for line in lines(root / "run")] == [1, 2, 2]
    assert lines(root / "run")[-1]["eval/count"] == 4
    questions = [record["question"] for record in json.loads((root / "held_out.json").read_text())]
    assert [bool(re.match(r"Where is the \d in", q)) for q in questions] == [world == "digits"] * 4
    accuracy = 100 * lines(root / "run")[2]["eval/accuracy_at_0.5"]
    assert f"\n| 2 | {accuracy:.1f} |\n" in (root / "model/README.md").read_text()


def test_the_run_ends_with_the_first_score_that_is_enough(few, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "EVAL_EVERY", 1)
    monkeypatch.setattr(base, "ENOUGH", 0.0)
    base.main(few)
    assert [line["step"] for line in lines(tmp_path / "out/run")] == [1, 1]
    assert (tmp_path / "out/model/model.safetensors").exists()


def test_a_run_starts_from_the_weights_and_the_tokenizer_of_another_base(few, tmp_path):
    base.main([*few, "--world=digits", f"--start={recipe.BASE}"])
    model, start = tmp_path / "out/model", recipe.BASE
    assert (model / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    pairs = zip(load_model(start).parameters(), load_model(model).parameters(), strict=True)
    assert 0 < max((p - q).abs().max().item() for p, q in pairs) < 0.05
    assert f"trained them from {start}, by" in (model / "README.md").read_text()


def test_the_repositorys_base_is_small_and_answers_questions_about_new_scenes(tmp_path):
    weights = load_file(recipe.BASE / "model.safetensors")
    assert sum(path.stat().st_size for path in recipe.BASE.iterdir()) <= 5e6
    assert {w.dtype for w in weights.values()} == {torch.bfloat16} and sum(w.numel() for w in weights.values()) <= 2.5e6
    card = (recipe.BASE / "README.md").read_text()
    assert "Its weights are boxgrpo's own" in card and float(re.findall(r"\| ([\d.]+) \|$", card, re.M)[-1]) >= 97

    records = [to_record(example) for example in PlainScenes(120, 2, held_out=True)]  # training has seed 0, its score 1
    (tmp_path / "new.json").write_text(json.dumps(records))
    paths = {"model": str(recipe.BASE), "data": str(tmp_path / "new.json"), "output_dir": str(tmp_path / "eval")}
    options = EvalOptions(**paths, dtype="float32", max_completion_length=16, eval_batch_size=60)
    assert evaluate(options, Ranks())["accuracy_at_0.5"] >= 0.94
