"""LoRA: only adapters are trained, the reference is the model without them, other programs read what is saved."""

import copy
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

import fake_vllm
import runs
from boxgrpo.kernels import token_logps
from boxgrpo.model.checkpoint import load_model, save_model
from boxgrpo.trainer import grpo, run, sft
from boxgrpo.trainer.engine.lora import add_adapters, merged_weights, save_pretrained, without_adapters
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import ROOT, finish, lines, sft_options, start_forked, untimed_lines

PARTS = (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))


def linears(layers=2):
    """Names of the decoder's linear layers."""
    return [f"model.layers.{i}.{part}" for i in range(layers) for part in PARTS]


def adapters():
    """Names of the adapters' weights."""
    return {f"{name}.lora_{ab}.default.weight" for name in linears() for ab in "AB"}


def lora_options(world, name, **changes):
    """GRPO from the cold start, three steps with adapters of rank 4."""
    return runs.grpo_options(world, name, **{"lora_rank": 4, "learning_rate": 1e-2, "max_steps": 3} | changes)


@pytest.fixture
def pack(make_prompt, pack_prompt):
    """One prompt of two images, every token after the first scored."""
    return pack_prompt(make_prompt([(1, 4, 6), (1, 2, 4)]))


@pytest.fixture(params=["tiny", "published"], ids=["tied", "untied"])
def base(request, twins, tmp_path):
    """A checkpoint folder with random weights."""
    save_model(twins(request.param)[0], tmp_path / "base")
    return tmp_path / "base"


def adapted(folder, dtype=torch.float32, moved=True, **changes):
    """The folder's model with adapters, `moved` away from the zero that they start at."""
    model = load_model(folder, dtype=dtype)
    add_adapters(model, GrpoOptions(**{"model": str(folder), "lora_rank": 4} | changes))
    if moved:
        g = torch.Generator().manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05, generator=g)
    return model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def logits(model, pack):
    return model(pack) @ model.head_weight.T  # (N, V)


def test_adapters_start_at_nothing_and_from_the_seed(base, pack):
    before = torch.random.get_rng_state()
    model = adapted(base, moved=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters()
    assert torch.equal(logits(model, pack), logits(load_model(base), pack))
    assert same(model.state_dict(), adapted(base, moved=False).state_dict())
    assert not same(model.state_dict(), adapted(base, moved=False, seed=7).state_dict())


@pytest.mark.parametrize("rank, alpha, scale", [(4, 0, 2), (8, 0, 2), (4, 2, 0.5)])
def test_adapters_are_scaled_by_alpha_over_rank(base, rank, alpha, scale):
    model = adapted(base, lora_rank=rank, lora_alpha=alpha)
    weights, merged, before = dict(model.named_parameters()), dict(merged_weights(model)), load_model(base).state_dict()
    for name in linears():
        a, b = (weights[f"{name}.lora_{ab}.default.weight"] for ab in "AB")
        assert a.shape[0] == b.shape[1] == rank
        added = merged[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(added, scale * b @ a, rtol=0, atol=1e-6)


def test_half_precision_trains_fp32_adapters(base, pack):
    model = adapted(base, dtype=torch.bfloat16, moved=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert model(pack).dtype == torch.bfloat16
    model(pack, lambda h, w: token_logps(h, w, pack.targets)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert {t.dtype for _, t in merged_weights(model)} == {torch.bfloat16}


def test_without_adapters_the_model_is_the_one_it_started_as(base, pack):
    model, start = adapted(base), load_model(base)
    moved = logits(model, pack)
    with pytest.raises(KeyError), without_adapters(model):
        assert torch.equal(logits(model, pack), logits(start, pack))
        raise KeyError  # an error leaves the adapters on
    assert torch.equal(logits(model, pack), moved) and not torch.allclose(moved, logits(start, pack), atol=0.1)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters()


def test_what_is_saved_computes_what_the_adapted_model_computes(base, pack, make_prompt, hf_logits, tmp_path):
    """The merged weights by themselves, the adapter with PEFT and the base; the model is unchanged."""
    model = adapted(base)
    before, expected = copy.deepcopy(model.state_dict()), logits(model, pack)
    save_pretrained(model, SimpleNamespace(save_pretrained=lambda folder: None), tmp_path / "saved")
    assert same(model.state_dict(), before)

    def close(other):
        return torch.allclose(other, expected, rtol=0, atol=1e-5)

    merged = load_model(tmp_path / "saved")
    assert close(logits(merged, pack))
    assert same(dict(merged.named_parameters()), dict(merged_weights(model)))
    prompt = make_prompt([(1, 4, 6), (1, 2, 4)])
    read = Qwen2VLForConditionalGeneration.from_pretrained
    with torch.no_grad():
        theirs, info = read(tmp_path / "saved", output_loading_info=True)
        assert not any(info.values()), info
        assert close(hf_logits(theirs.eval(), prompt)[:-1])
        theirs = PeftModel.from_pretrained(read(base), tmp_path / "saved/adapter").eval()
        assert close(hf_logits(theirs, prompt)[:-1])
        with theirs.disable_adapter():
            assert not close(hf_logits(theirs, prompt)[:-1])


def test_grpo_trains_adapters_against_the_model_without_them(world, monkeypatch):
    """No copy is made for the reference: its log-probabilities are the starting model's, to the bit, at every step."""
    seen, loaded = [], []
    logps = grpo.logps

    def watched(pack, *arguments):
        seen.append((pack, logps(pack, *arguments)))
        return seen[-1][1]

    monkeypatch.setattr(run, "frozen_copy", None)
    monkeypatch.setattr(grpo, "logps", watched)
    options = lora_options(world, "against")
    grpo.train(options, Ranks(), run.Hooks(model_loaded=loaded.append))
    start = load_model(options.model)
    with torch.no_grad():
        assert len(seen) == 3 and all(torch.equal(ref, start(p, partial(logps, p, 1.0))) for p, ref in seen)
    metrics = lines(world / "against")
    assert all(m["grad_norm"] > 0 for m in metrics) and metrics[0]["kl"] == 0 < metrics[-1]["kl"]

    (end,) = loaded
    first, last = adapted(options.model, moved=False).state_dict(), end.state_dict()
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {name for name in first if ".lora_" in name}
    assert same(load_file(world / "against/model.safetensors"), dict(merged_weights(end)))


def test_sft_trains_adapters(world):
    changes = {"max_steps": 10, "learning_rate": 1e-2, "lora_rank": 8, "freeze_vision": True}
    sft.train(sft_options(world, "sft_lora", **changes), Ranks())
    losses = [m["loss"] for m in lines(world / "sft_lora")]
    assert losses[-1] < 0.9 * losses[0]
    before, after = (load_file(world / name / "model.safetensors") for name in ("initial", "sft_lora"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight" for name in linears(3)}
    saved = {p.name for p in (world / "sft_lora/adapter").iterdir()}
    assert saved == {"adapter_config.json", "adapter_model.safetensors"}


def test_a_resumed_run_ends_as_an_undisturbed_one(world):
    """The checkpoint holds the adapters alone, and the base comes from `--model`."""
    options = {"max_steps": 4, "save_steps": 2, "lora_alpha": 4}
    grpo.train(lora_options(world, "whole", **options), Ranks())
    half = world / "whole/checkpoint-2"
    assert all("lora" in name or name == "schedule" for name in load_file(half / "trainer/rank0.safetensors"))
    grpo.train(lora_options(world, "resumed", **options, resume=str(half)), Ranks())
    assert untimed_lines(world / "resumed") == untimed_lines(world / "whole")[2:]
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert same(*(load_file(world / run / file) for run in ("whole", "resumed")))
        assert not same(*(load_file(folder / file) for folder in (half, world / "whole")))
    with pytest.raises(ValueError, match="made with lora_alpha 4, this run has 8"):
        grpo.train(lora_options(world, "other", **options | {"lora_alpha": 8}, resume=str(half)), Ranks())


@pytest.mark.slow
def test_two_ranks_equal_one_on_stored_completions(world):
    changes = {"max_steps": 5, "num_iterations": 2, "rollout_file": str(world / "stored.jsonl")}
    grpo.train(lora_options(world, "one", **changes), Ranks())
    finish(start_forked(ROOT / "trainer/grpo.py", lora_options(world, "two", **changes, rollout="replay")))
    one, two = lines(world / "one"), lines(world / "two")
    assert [m["loss"] for m in one] == pytest.approx([m["loss"] for m in two], abs=1e-5)
    assert len(one) == 5 and any(abs(m["loss"]) > 1e-3 for m in one)  # there was something to agree on


def test_vllm_gets_merged_weights_and_repeats_the_local_run(world, monkeypatch):
    grpo.train(lora_options(world, "by_policy"), Ranks())
    engines = fake_vllm.install(monkeypatch, seed=42)
    grpo.train(lora_options(world, "by_vllm", rollout="vllm"), Ranks())
    assert engines[0].loaded == [{f"{name}.weight" for name in linears(3)}] * 3
    for a, b in zip(lines(world / "by_policy"), lines(world / "by_vllm"), strict=True):
        assert a["reward"] == b["reward"] and a["completions/mean_length"] == b["completions/mean_length"]
        assert b["sampling/sampling_logp_difference/max"] < 1e-4


def test_without_peft_the_error_names_the_remedy(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora_rank is 4 and an import fails.*pip install 'peft>=0.18'"):
        adapted(base)
