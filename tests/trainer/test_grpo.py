"""The loops on a tiny model: they learn, they replay, two ranks equal one, and options arrive where they are used."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import fake_vllm
from boxgrpo.kernels import fused_grpo_loss
from boxgrpo.model.checkpoint import load_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.rewards.grounding import step_rewards
from boxgrpo.trainer.run import Hooks, frozen_copy
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import ROOT, finish, grpo_options, lines, sft_options, start, start_forked, untimed_lines


def on_two_ranks(script, options):
    finish(start(ROOT / "trainer" / script, options))


def test_sft_learns_and_writes_its_files(world):
    losses = [m["loss"] for m in lines(world / "sft")]
    assert losses[-1] < 0.5 * losses[0]
    assert {p.name for p in (world / "sft").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "options.yaml",
        "tensorboard",
    }


def test_grpo_reports_under_trls_names(world, capsys, monkeypatch):
    monkeypatch.setattr(grpo, "grpo_flop", lambda *_: 3e9)
    grpo.train(grpo_options(world, "names", log_completions=1, max_steps=1, peak_tflops=0.5), Ranks())
    (metrics,) = lines(world / "names")
    assert metrics["perf/mfu"] == pytest.approx(3e9 / (metrics["step_time"] * 0.5e12))
    expected = """loss grad_norm learning_rate epoch num_tokens step_time reward reward_std frac_reward_zero_std
        rewards/accuracy/mean rewards/accuracy/std rewards/format/mean rewards/format/std completions/mean_length
        completions/min_length completions/max_length completions/clipped_ratio kl entropy clip_ratio/low_mean
        clip_ratio/high_mean clip_ratio/region_mean difficulty/easy difficulty/medium difficulty/hard
        difficulty/weight_mean difficulty/gradient_easy timing_s/data timing_s/rollout timing_s/reward
        timing_s/reference timing_s/policy
        timing_s/optimizer perf/tokens_per_second perf/peak_memory_gb data/skipped""".split()
    assert not set(expected) - metrics.keys()
    assert all(metrics[k] == metrics[k] for k in expected)  # no NaN
    shares = [metrics[f"difficulty/{k}"] for k in ("easy", "medium", "hard")]
    assert sum(shares) == pytest.approx(1)
    assert "completion" in capsys.readouterr().out  # the table of sampled completions


@pytest.mark.parametrize(
    "name, changes",
    [
        ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.0, "num_iterations": 2}),
        ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0, "gradient_accumulation_steps": 2}),
        ("vespo", {"loss_type": "vespo", "num_iterations": 2, "tokens_per_pass": 150}),
        ("gspo", {"importance_sampling_level": "sequence", "scale_rewards": "batch", "tokens_per_pass": 150}),
        ("trained_tower", {"freeze_vision": False, "difficulty": "log", "loss_type": "bnpo"}),
        ("dr", {"loss_type": "dr_grpo", "gradient_checkpointing": True, "difficulty": "none"}),
    ],
)
def test_every_variant_trains(world, name, changes):
    grpo.train(grpo_options(world, name, **changes), Ranks())
    first, second = lines(world / name)
    assert first["grad_norm"] > 0
    assert second["epoch"] > first["epoch"]


@pytest.mark.parametrize(
    ("loss_type", "global_count"),
    [
        *((name, 128) for name in ("grpo", "sapo", "luspo")),
        *((name, 3000) for name in ("dapo", "cispo", "vespo")),
        ("dr_grpo", 128 * 32),
        ("bnpo", None),
    ],
)
def test_the_denominator_is_the_steps_global_count_over_the_ranks(loss_type, global_count):
    """128 completions of 3000 tokens on two ranks: each divides by half, since gradients are averaged afterwards."""
    options = GrpoOptions(loss_type=loss_type, max_completion_length=32)
    denominator = grpo.loss_denominator(options, 128.0, 3000.0, Ranks(0, 2))
    assert (denominator if global_count is None else float(denominator) * 2) == global_count


def test_batch_scaled_advantages_use_the_rewards_of_all_ranks():
    class Two(Ranks):
        def gather(self, value):
            return [(theirs, theirs / 2), value]  # we are rank 1

    ours, theirs = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[0.5, 1.0], [2.0, 2.0]])
    options = GrpoOptions(scale_rewards="batch", difficulty="none", num_generations=2)
    scored = SimpleNamespace(accuracy=ours.view(-1) / 2, format=ours.view(-1) / 2)
    rewards = step_rewards(options, scored, Two(1, 2))
    std = torch.cat([ours, theirs]).std() + 1e-4
    torch.testing.assert_close(rewards.advantages, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) / std)
    assert rewards.miou.tolist() == [0.5, 0.5] and rewards.weights.tolist() == [1.0, 1.0]


def seen_by_the_loss(monkeypatch) -> list[tuple]:
    """Arguments and options of every call of the loss from here on."""
    seen = []

    def door(*args, temperature, options):
        seen.append((args, options._asdict() | {"temperature": temperature}))
        return fused_grpo_loss(*args, temperature=temperature, options=options)

    monkeypatch.setattr(grpo, "fused_grpo_loss", door)
    return seen


def test_the_loss_gets_every_option(world, monkeypatch):
    """What the flags say arrives at the kernel's door, and so do the pack's tensors."""
    seen = seen_by_the_loss(monkeypatch)
    flags = {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.1, "epsilon_high": 0.3}
    flags |= {"delta": 5.0, "beta": 0.02, "temperature": 0.9}
    grpo.train(grpo_options(world, "door", max_steps=1, num_iterations=2, **flags), Ranks())
    (_, _, targets, advantages, completion_cu), options = seen[-1]
    assert options["sampler_factor"] is None
    assert {name: options[name] for name in flags} == flags
    assert options["old_logps"].shape == options["ref_logps"].shape == targets.shape
    assert options["weights"].shape == advantages.shape == (len(completion_cu) - 1,)
    assert options["denominator"] > 0


def test_vllm_with_the_policys_weights_repeats_the_local_run(world, monkeypatch):
    """Two rollouts, two optimizer steps on each, packs too small for the whole: a weight handed over wrongly, or a
    log-probability at another token's place, and the second rollout or the factors are others."""
    changes = {"num_iterations": 2, "tokens_per_pass": 150, "freeze_vision": False}
    grpo.train(grpo_options(world, "by_policy", **changes), Ranks())
    engines = fake_vllm.install(monkeypatch, seed=42)
    seen = seen_by_the_loss(monkeypatch)
    grpo.train(grpo_options(world, "by_vllm", rollout="vllm", **changes), Ranks())
    local, theirs = lines(world / "by_policy"), lines(world / "by_vllm")
    assert any(abs(m["loss"]) > 1e-3 for m in local) and len(engines[0].loaded) == len(local) == 2
    for a, b in zip(local, theirs, strict=True):
        assert a["reward"] == b["reward"] and a["completions/mean_length"] == b["completions/mean_length"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert b["sampling/sampling_logp_difference/max"] < 1e-4
        for part in ("min", "mean", "max"):
            assert b[f"sampling/importance_sampling_ratio/{part}"] == pytest.approx(1, abs=1e-4)
        assert not any(name.startswith("sampling/") for name in a)
    assert all(torch.allclose(o["sampler_factor"], torch.ones(()), atol=1e-4) for _, o in seen)


def test_a_sampler_that_is_off_is_corrected_token_by_token(world, monkeypatch):
    packs = []
    logps = grpo.logps

    def spy(pack, *arguments):
        packs.append((pack, logps(pack, *arguments)))
        return packs[-1][1]

    monkeypatch.setattr(grpo, "logps", spy)
    fake_vllm.install(monkeypatch, seed=42, noise=0.1)
    seen = seen_by_the_loss(monkeypatch)
    flags = {"beta": 0.0, "max_steps": 1, "vllm_importance_sampling_clip_max": 1.5, "loss_type": "bnpo"}
    grpo.train(grpo_options(world, "off", rollout="vllm", **flags), Ranks())
    (metrics,), ((_, options),), ((pack, old),) = lines(world / "off"), seen, packs
    factor = (old - pack.sampler_logps).exp().clamp(max=1.5)
    assert torch.equal(options["sampler_factor"], factor) and torch.equal(options["old_logps"], old)
    assert factor.max() == 1.5 and factor.min() < 0.9
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(float(factor.min()))
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(float(factor.mean()))
    assert metrics["sampling/importance_sampling_ratio/max"] == 1.5
    difference = (old - pack.sampler_logps).abs()
    assert metrics["sampling/sampling_logp_difference/mean"] == pytest.approx(float(difference.mean()))
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(float(difference.max()))
    # At ratio 1 the loss is the mean of -phi A factor over the tokens.
    advantages = (pack.advantages * pack.weights).repeat_interleave(pack.completion_cu.diff())
    assert metrics["loss"] == pytest.approx(-float((advantages * factor).mean()), abs=1e-6)


def test_small_packs_do_not_change_the_step(world):
    stored = str(world / "packs.jsonl")
    grpo.train(grpo_options(world, "whole", rollout_file=stored), Ranks())
    small = grpo_options(world, "small", rollout_file=stored, rollout="replay", tokens_per_pass=140)
    grpo.train(small, Ranks())
    for a, b in zip(lines(world / "whole"), lines(world / "small"), strict=True):
        for key in ("loss", "grad_norm", "kl", "entropy"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


def test_two_ranks_equal_one_on_stored_completions(world):
    """`torchrun --nproc_per_node 2` gives, over 5 steps, the losses of one rank at the same global batch."""
    stored = str(world / "ranks.jsonl")
    changes = {"max_steps": 5, "num_iterations": 2, "rollout_file": stored}
    grpo.train(grpo_options(world, "one", **changes), Ranks())
    two = grpo_options(world, "two", **changes, rollout="replay")
    on_two_ranks("grpo.py", two)
    one, both = lines(world / "one"), lines(world / "two")
    assert len(one) == len(both) == 5
    for a, b in zip(one, both, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert a["reward"] == pytest.approx(b["reward"])
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-4)  # far above 1 at this rate: its last digits are rounding
    assert any(abs(m["loss"]) > 1e-3 for m in one)  # there was something to agree on


def test_two_ranks_of_sft_equal_one(world):
    sft.train(sft_options(world, "sft_one", max_steps=4), Ranks())
    on_two_ranks("sft.py", sft_options(world, "sft_two", max_steps=4))
    losses = [[m["loss"] for m in lines(world / name)] for name in ("sft_one", "sft_two")]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_run_without_updates_ends(world):
    """And saves no checkpoint before it is due."""
    options = grpo_options(world, "nan", save_steps=5, max_skipped=1, max_steps=5)
    with pytest.raises(ValueError, match="2 updates in 2 steps had a loss or a gradient that is NaN.*max_skipped is 1"):
        grpo.train(options, Ranks(), Hooks(pack_loss=lambda loss: loss * float("nan")))
    assert len(lines(world / "nan")) == 2 and not list((world / "nan").glob("checkpoint-*"))


def test_the_policy_keeps_a_frozen_tower_and_the_reference_needs_none(world):
    policy = load_model(world / "sft")
    policy.freeze_vision()
    reference = frozen_copy(policy, without_vision=True)
    assert reference.visual is None and policy.visual is not None
    assert reference.model is not policy.model
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in policy.model.parameters())
    assert torch.equal(reference.head_weight, policy.head_weight)


def test_groups_of_equal_rewards_cost_no_policy_pass(world, monkeypatch):
    """Without KL they have no gradient: leaving them out changes the packs, not the step, even if all are left out."""
    stored = world / "equal.jsonl"
    grpo.train(grpo_options(world, "equal", rollout_file=str(stored), beta=0.0), Ranks())
    groups = [json.loads(line) for line in stored.read_text().splitlines()]
    groups[1]["ids"] = groups[1]["ids"][:1] * 4
    for group in groups[4:]:  # the second step
        group["ids"] = group["ids"][:1] * 4
    stored.write_text("".join(json.dumps(group) + "\n" for group in groups))
    options = {"rollout": "replay", "rollout_file": str(stored), "beta": 0.0}
    seen = seen_by_the_loss(monkeypatch)
    grpo.train(grpo_options(world, "without", **options), Ranks())
    scored = sum(len(advantages) for (_, _, _, advantages, _), _ in seen)
    assert scored % 4 == 0 and scored <= 12
    seen.clear()
    of = grpo.trained_groups
    # A KL so small that it changes nothing keeps every group.
    monkeypatch.setattr(grpo, "trained_groups", lambda o, *rest: of(dataclasses.replace(o, beta=1e-30), *rest))
    grpo.train(grpo_options(world, "with", **options), Ranks())
    assert sum(len(advantages) for (_, _, _, advantages, _), _ in seen) == 32
    for a, b in zip(lines(world / "without"), lines(world / "with"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5, abs=1e-9)
    assert lines(world / "without")[1]["grad_norm"] == 0


SIGNAL = {1, 6, 7, 9, 10, 11, 12, 15, 16, 18, *range(31, 35)}  # slots whose rewards are not all equal


def signal_in_some(groups, rewards):
    """Rewards by the slot, whatever the completions are."""
    accuracy = [[0.2, 0.4, 0.6, 0.8] if group.serial in SIGNAL else [0.5] * 4 for group in groups]
    return rewards._replace(accuracy=torch.tensor(accuracy).view(-1), format=torch.ones(4 * len(groups)))


def test_groups_without_a_signal_are_replaced_in_the_streams_order(world, monkeypatch):
    """Step 1 takes 11 slots in three rounds, step 2 8 in two, step 3 finds nothing in 12, and step 4 needs no refill.

    The third moves neither weights nor moments; a run that is resumed at slot 19 takes the same.
    """
    trained, completions, real = [], [], {name: getattr(grpo, name) for name in ("trained_groups", "loss_denominator")}

    def trained_groups(o, groups, rewards):
        trained.append([g.serial for g in groups])
        return real["trained_groups"](o, groups, rewards)

    def loss_denominator(o, count, tokens, r):
        completions.append(count)
        return real["loss_denominator"](o, count, tokens, r)

    monkeypatch.setattr(grpo, "trained_groups", trained_groups)
    monkeypatch.setattr(grpo, "loss_denominator", loss_denominator)
    changes = {"dynamic_sampling": True, "max_refills": 2, "max_steps": 4, "max_completion_length": 8, "save_steps": 1}
    changes |= {"beta": 0.0, "weight_decay": 0.1, "lr_scheduler_type": "linear"}
    grpo.train(grpo_options(world, "refilled", **changes), Ranks(), Hooks(rewards=signal_in_some))
    assert trained == [[1, 6, 7, 9], [11, 12, 15, 16], [], [31, 32, 33, 34]] and completions == [16, 16, 0, 16]
    found = lines(world / "refilled")
    counts = [[m[f"dynamic_sampling/{n}"] for n in ("refills", "sampled_groups", "trained_groups")] for m in found]
    assert counts == [[2, 11, 4], [1, 8, 4], [2, 12, 0], [0, 4, 4]]
    assert [round(m["frac_reward_zero_std"], 3) for m in found] == [0.545, 0.375, 1, 0], "of all that were sampled"
    assert [m["epoch"] * 48 for m in found] == pytest.approx([11, 19, 31, 35])
    assert [m["learning_rate"] for m in found] == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0])
    assert found[2]["loss"] == found[2]["grad_norm"] == found[2]["num_tokens"] - found[1]["num_tokens"] == 0
    states = [load_file(world / f"refilled/checkpoint-{k}/trainer/rank0.safetensors") for k in (1, 2, 3, 4)]
    moved = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in itertools.pairwise(states)]
    assert moved[1] == {"schedule"} and len(moved[0]) == len(moved[2]) > 30
    resumed = grpo_options(world, "resumed", **changes, resume=str(world / "refilled/checkpoint-2"))
    grpo.train(resumed, Ranks(), Hooks(rewards=signal_in_some))
    assert trained[4:] == trained[2:4] and untimed_lines(world / "resumed") == untimed_lines(world / "refilled")[2:]
    assert (world / "resumed/model.safetensors").read_bytes() == (world / "refilled/model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, 3))])
def test_two_ranks_refill_as_one(world, tmp_path, stage):
    """The same slots have a signal, by stored completions of which one or none has the format; steps begin anywhere."""
    tokenizer = Processor.from_pretrained(world / "sft", min_pixels=784, max_pixels=784).tokenizer
    right, wrong = (
        tokenizer.encode(f"<think>Here.</think><answer>(0, 0), {end}</answer><|im_end|>") for end in ("(9, 9)", "")
    )
    ids = {slot: [right if slot in SIGNAL else wrong, *[wrong] * 3] for slot in range(40)}
    stored = tmp_path / "stored"
    stored.write_text("".join(json.dumps({"serial": slot, "ids": ids[slot]}) + "\n" for slot in ids))
    changes = {"rollout": "replay", "rollout_file": str(stored), "dynamic_sampling": True, "max_refills": 2}
    changes |= {"max_steps": 4, "max_completion_length": 64, "scale_rewards": "batch"}
    grpo.train(grpo_options(world, "", **changes, output_dir=str(tmp_path / "one")), Ranks())
    changes |= {
        "output_dir": str(tmp_path / "two"),
        "engine": "deepspeed" if stage else "ddp",
        "zero_stage": stage or 2,
    }
    finish(start_forked(ROOT / "trainer/grpo.py", grpo_options(world, "", **changes)))
    one, both = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [m["dynamic_sampling/sampled_groups"] for m in one] == [11, 8, 12, 4]
    means_of_ranks = {"rewards/accuracy/std", "rewards/format/std"}
    for a, b in zip(one, both, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        for name in a.keys() - means_of_ranks:
            if name.startswith(("dynamic_sampling/", "reward", "frac", "difficulty/", "epoch", "completions/")):
                assert a[name] == pytest.approx(b[name], rel=1e-6), name
    ours, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, tensor in alone.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-4, msg=name)


def test_a_cold_start_with_little_memory_is_the_same(world, monkeypatch):
    """The model refuses packs above 150 tokens: SFT starts over with smaller ones, and learns the same."""
    sft.train(sft_options(world, "roomy", max_steps=3), Ranks())
    forward, sizes = Qwen2VL.forward, []

    def limited(model, batch, head=None):
        sizes.append(len(batch.input_ids))
        if len(batch.input_ids) > 150:
            raise torch.OutOfMemoryError("no room")
        return forward(model, batch, head)

    monkeypatch.setattr(Qwen2VL, "forward", limited)
    sft.train(sft_options(world, "narrow", max_steps=3), Ranks())
    assert max(sizes) > 300
    roomy, narrow = (lines(world / name) for name in ("roomy", "narrow"))
    assert [m["loss"] for m in narrow] == pytest.approx([m["loss"] for m in roomy], abs=1e-5)
    assert [m["grad_norm"] for m in narrow] == pytest.approx([m["grad_norm"] for m in roomy], rel=1e-3)


def test_data_of_which_no_record_can_be_prepared_is_refused_before_the_weights_are_read(world, write):
    """The images of every record are elsewhere, or no prompt fits; nothing is written."""
    data = str(write(json.loads((world / "world/train.json").read_text())[:3], "elsewhere.json"))
    for changes, reason in (({"data": data}, "There is no image"), ({"max_prompt_length": 2}, "over the budget of 2")):
        with pytest.raises(
            ValueError, match=rf"none of the \d+ records can be prepared\. The first: .*{reason}.*--data"
        ):
            grpo.train(grpo_options(world, "unprepared", **changes), Ranks())
        assert not (world / "unprepared").exists()


def test_a_replay_that_cannot_be_ends_before_its_folder_is_claimed(world):
    """Case 17: a file that is cut off, before weights are read; completions of other prompts, or of too few steps."""
    stored = world / "one_step.jsonl"
    grpo.train(grpo_options(world, "one_step", rollout_file=str(stored), max_steps=1), Ranks())
    options = {"rollout": "replay", "rollout_file": str(stored), "max_steps": 1}
    for cut, changes, message in (
        (None, {"seed": 1}, "one_step.jsonl: the completions of sample 0 belong to another prompt than train.json#"),
        (None, {"max_steps": 2}, "one_step.jsonl holds no completions for sample 4, of the run's step 2 of 2. Lower"),
        (-9, {"model": "gone"}, "one_step.jsonl: line 4 is cut off"),
    ):
        stored.write_bytes(stored.read_bytes()[:cut])
        with pytest.raises(ValueError, match=message):
            grpo.train(grpo_options(world, "replayed", **options | changes), Ranks())
        assert not (world / "replayed").exists()
