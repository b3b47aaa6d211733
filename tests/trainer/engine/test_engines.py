"""Two ranks under DeepSpeed train as one rank does, and continue from their checkpoints to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from boxgrpo.trainer import grpo
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import ROOT, finish, grpo_options, lines, sft_options, untimed_lines
from runs import start_forked as start

pytest.importorskip("deepspeed", reason="deepspeed is not installed")
GRPO = ROOT / "trainer/grpo.py"
SHARDED = {"engine": "deepspeed", "zero_stage": 3}


def check_same_steps(one, other, *, loss=1e-5, grad_norm=1e-3):
    """The losses of two runs differ by at most `loss`, their gradients' norms by a share of at most `grad_norm`."""
    a, b = lines(one), lines(other)
    assert [m["loss"] for m in a] == pytest.approx([m["loss"] for m in b], abs=loss)
    assert [m["grad_norm"] for m in a] == pytest.approx([m["grad_norm"] for m in b], rel=grad_norm)


@pytest.fixture(scope="module")
def one(world):
    """One rank's runs of five steps, without and with adapters, on the same stored completions."""
    stored = {"rollout_file": str(world / "stored")}
    folders = {}
    for rank, rollout in ((0, "local"), (4, "replay")):
        options = grpo_options(world, f"one{rank}", max_steps=5, rollout=rollout, lora_rank=rank, **stored)
        grpo.train(options, Ranks())
        folders[rank] = world / f"one{rank}"
    return folders


def replay(world, folder, stage, script=GRPO, **changes):
    """Two ranks' run of five steps on the completions of `one`; what it printed."""
    stored = {"max_steps": 5, "rollout": "replay", "rollout_file": str(world / "stored"), "output_dir": str(folder)}
    return finish(start(script, grpo_options(world, "", **stored, **SHARDED | {"zero_stage": stage} | changes)))


@pytest.mark.parametrize(
    ("stage", "lora_rank"),
    [(2, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (3, 0), (1, 4), (2, 4), (3, 4)))],
)
def test_two_ranks_under_deepspeed_equal_one(world, one, tmp_path, stage, lora_rank):
    """Packs of unequal number on the ranks, a checkpoint on the way, and the same end from there."""
    one, folder, again = one[lora_rank], tmp_path / "run", tmp_path / "again"
    changes = {"lora_rank": lora_rank, "tokens_per_pass": 200, "save_steps": 3}
    replay(world, folder, stage, **changes)
    check_same_steps(one, folder)
    assert all(m["grad_norm"] > 1e-3 for m in lines(one))  # there was something to agree on
    ours, alone = (load_file(f / "model.safetensors") for f in (folder, one))
    for name, tensor in alone.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-4, msg=name)
    replay(world, again, stage, **changes, resume=str(folder / "checkpoint-3"))
    assert untimed_lines(again) == untimed_lines(folder)[3:]
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_sharded_weights_sample_and_learn_as_whole_ones(world):
    """ZeRO-3 with its own rollout: weights are gathered and partitioned again."""
    finish(start(GRPO, grpo_options(world, "whole", max_steps=2)))
    finish(start(GRPO, grpo_options(world, "sharded", max_steps=2, **SHARDED)))
    check_same_steps(world / "whole", world / "sharded")
    for name in ("reward", "completions/mean_length"):
        assert [m[name] for m in lines(world / "whole")] == [m[name] for m in lines(world / "sharded")]


@pytest.mark.slow
def test_sharded_weights_learn_chains_as_whole_ones(world):
    """SFT with a trained tower."""
    for name, changes in (("sft_whole", {}), ("sft_sharded", SHARDED)):
        finish(start(ROOT / "trainer/sft.py", sft_options(world, name, max_steps=3, **changes)))
    check_same_steps(world / "sft_whole", world / "sft_sharded")


@pytest.mark.slow
def test_weights_stay_sharded_while_sampling(world):
    """Ranks then synchronise in every layer of every token, and their completions end at different tokens."""
    shared = {"max_steps": 2, "max_completion_length": 48, "temperature": 0.7, "gradient_accumulation_steps": 2}
    for name, changes in (("gathered", {}), ("layered", SHARDED | {"ds3_gather_for_generation": False})):
        file = str(world / name / "samples")
        finish(start(GRPO, grpo_options(world, name, **shared, **changes, rollout_file=file)))
    longest = []
    for rank in ("", ".rank1"):
        ours, whole = ((world / name / f"samples{rank}").read_text() for name in ("layered", "gathered"))
        assert ours == whole
        longest.append([max(map(len, json.loads(line)["ids"])) for line in ours.splitlines()])
    assert longest[0] != longest[1], "no rank had to wait for the other"
    check_same_steps(world / "gathered", world / "layered")


@pytest.mark.slow
def test_bf16_under_deepspeed_learns_as_without(world):
    """fp32 master weights under both: updates of 1e-4 would be lost in bf16."""
    changes = {"dtype": "bfloat16", "max_steps": 3, "learning_rate": 1e-4, "rollout_file": str(world / "bf16_stored")}
    grpo.train(grpo_options(world, "bf16", **changes), Ranks())
    changes |= {"rollout": "replay", "engine": "deepspeed", "zero_stage": 2}
    finish(start(GRPO, grpo_options(world, "bf16_zero", **changes)))
    check_same_steps(world / "bf16", world / "bf16_zero", loss=1e-2, grad_norm=0.1)
    before = load_file(world / "sft/model.safetensors")
    ours, alone = (load_file(world / name / "model.safetensors") for name in ("bf16_zero", "bf16"))
    moved = {n: (alone[n].float() - before[n]).norm() for n in alone if alone[n].ndim == 2 and n in before}
    for name in sorted(moved, key=moved.get)[-5:]:
        apart = (ours[name].float() - alone[name].float()).norm()
        assert apart < 0.5 * moved[name], name


SKIPS = """
import itertools
import torch
from torch import nn
from boxgrpo.trainer.run import make_engine
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.runtime.ranks import join_ranks

def weights(engine, model):
    with engine.gathered_weights():
        return model[0].weight.detach().clone()


with join_ranks() as r:
    for stage, offload, dtype in itertools.product((1, 2, 3), (False, True), (torch.float32, torch.bfloat16)):
        if (stage, offload) == (3, True):
            continue
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 1)).to(dtype)
        model.head_weight = model[0].weight
        options = GrpoOptions(learning_rate=0.1, engine="deepspeed", zero_stage=stage, offload_optimizer=offload)
        engine, skipped = make_engine(model, options, r, 10), []
        for bad in (float("nan"), float("inf"), None, None):
            before = weights(engine, model)
            loss = engine.model(torch.ones(1, 3, dtype=dtype)).sum()
            engine.backward(loss + bad if bad and r.rank == 1 else loss)
            norm, updated = engine.step()
            assert updated == (bad is None), (stage, offload, dtype, bad)
            assert torch.equal(before, weights(engine, model)) != updated, (stage, offload, dtype, bad)
            assert bool(norm.isfinite()) == updated
            skipped.append(not updated)
        if r.is_main:
            print(f"skipped {skipped}", flush=True)
"""


def test_deepspeed_skips_what_is_not_finite(world, tmp_path):
    (tmp_path / "script.py").write_text(SKIPS)
    shown = finish(start(tmp_path / "script.py", grpo_options(world, "skips", max_steps=1)))
    assert shown.count("skipped [True, True, False, False]") == 10, shown


MEMORY = """
import torch
from boxgrpo.trainer import grpo
from boxgrpo.trainer.runtime.ranks import run_as_script

calls = 0
loss, make_packs = grpo.fused_grpo_loss, grpo.make_packs

def short_of_memory(*args, **options):
    global calls
    calls += 1
    if calls == 2 and torch.distributed.get_rank() == 1:
        raise torch.OutOfMemoryError("no room")
    return loss(*args, **options)

def counted(*args, **options):
    packs = make_packs(*args, **options)
    if calls == 0 and torch.distributed.get_rank() == 1:
        print(f"{sum(len(p.targets) > 0 for p in packs)} packs have tokens", flush=True)
    return packs

grpo.fused_grpo_loss, grpo.make_packs = short_of_memory, counted
run_as_script(grpo.main, "grpo.py")
"""


@pytest.mark.parametrize(
    ("stage", "offload"), [(2, False), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((2, True), (1, False)))]
)
def test_memory_that_runs_out_on_one_rank_changes_no_step(world, one, tmp_path, stage, offload):
    """In its second pack, after the first has left gradients: these are forgotten, and all packs are computed again."""
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(MEMORY)
    shown = replay(world, folder, stage, script, offload_optimizer=offload, tokens_per_pass=200)
    assert "WARNING memory ran out in a pack of" in shown
    assert int(shown.split(" packs have tokens")[0][-1]) > 1, "the second pack is the next step's"
    check_same_steps(one[0], folder)


PLANNED = """
import torch
from boxgrpo.trainer import grpo
from boxgrpo.trainer.engine import memory_check
from boxgrpo.trainer.runtime.ranks import run_as_script

memory_check.free_bytes = lambda device: 13_000_000 if torch.distributed.get_rank() else 1 << 40
run_as_script(grpo.main, "grpo.py")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_packs_are_made_to_fit_before_any_begins(world, one, tmp_path, stage):
    """One rank has little memory: its packs shrink, the other waits for it, and the steps are the same."""
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(PLANNED)
    shown = replay(world, folder, stage, script)
    assert "WARNING memory ran out in a pack of" in shown and "MB, and 13 are free); again with 105" in shown
    check_same_steps(one[0], folder)


@pytest.mark.slow
def test_under_zero3_lost_memory_ends_the_run(world, tmp_path):
    (tmp_path / "script.py").write_text(MEMORY)
    run = start(tmp_path / "script.py", grpo_options(world, "no memory", tokens_per_pass=200, timeout=60, **SHARDED))
    shown, _ = run.communicate(timeout=100)
    assert run.returncode and "memory ran out (no room), and at --zero_stage 3 no rank can start over alone" in shown


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_without_anything_to_train_run_the_same_steps(world, tmp_path, stage):
    """An initial model's rewards are all 0: without KL no group of any rank has a gradient."""
    changes = {"model": str(world / "initial"), "beta": 0.0, "engine": "deepspeed", "zero_stage": stage}
    finish(start(GRPO, grpo_options(world, "", **changes, output_dir=str(tmp_path))))
    assert [m["loss"] for m in lines(tmp_path)] == [0, 0]
    assert all(m["frac_reward_zero_std"] == 1 for m in lines(tmp_path))
