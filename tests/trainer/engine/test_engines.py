"""Two ranks under every engine train as one rank does, and go on from their checkpoints to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from boxgrpo.trainer import grpo
from boxgrpo.trainer.options import SftOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import ROOT, finish, grpo_options, lines, told
from runs import start_forked as start

GRPO = ROOT / "trainer/grpo.py"


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


@pytest.mark.parametrize(
    ("stage", "lora_rank", "resumed"),
    [
        (2, 0, True),
        pytest.param(3, 0, False, marks=pytest.mark.slow),
        pytest.param(1, 0, False, marks=pytest.mark.slow),
        pytest.param(1, 4, False, marks=pytest.mark.slow),
        pytest.param(2, 4, False, marks=pytest.mark.slow),
        pytest.param(3, 4, False, marks=pytest.mark.slow),
        pytest.param(1, 0, True, marks=pytest.mark.slow),
        pytest.param(3, 0, True, marks=pytest.mark.slow),
        pytest.param(2, 4, True, marks=pytest.mark.slow),
        pytest.param(3, 4, True, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_under_deepspeed_equal_one(world, one, tmp_path, stage, lora_rank, resumed):
    """Packs of unequal number on the ranks, a checkpoint on the way, and the same end from there."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    one = one[lora_rank]
    changes = {"max_steps": 5, "rollout": "replay", "rollout_file": str(world / "stored"), "save_steps": 3}
    changes |= {"engine": "deepspeed", "zero_stage": stage, "lora_rank": lora_rank, "tokens_per_pass": 200}
    folder = tmp_path / "run"
    finish(start(GRPO, grpo_options(world, "", **changes, output_dir=str(folder))))
    for a, b in zip(lines(one), lines(folder), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert all(m["grad_norm"] > 1e-3 for m in lines(one))  # there was something to agree on
    ours, alone = (load_file(f / "model.safetensors") for f in (folder, one))
    for name, tensor in alone.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-4, msg=name)
    if resumed:
        again = tmp_path / "again"
        changes |= {"output_dir": str(again), "resume": str(folder / "checkpoint-3")}
        finish(start(GRPO, grpo_options(world, "", **changes)))
        assert told(again) == told(folder)[3:]
        end = load_file(again / "model.safetensors")
        assert all(torch.equal(end[name], tensor) for name, tensor in ours.items())


SHARDED = {"engine": "deepspeed", "zero_stage": 3}


def test_sharded_weights_sample_and_learn_as_whole_ones(world):
    """ZeRO-3 with its own rollout: weights come together and part again."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    finish(start(GRPO, grpo_options(world, "whole", max_steps=2)))
    finish(start(GRPO, grpo_options(world, "sharded", max_steps=2, **SHARDED)))
    for a, b in zip(lines(world / "whole"), lines(world / "sharded"), strict=True):
        assert a["reward"] == pytest.approx(b["reward"])
        assert a["completions/mean_length"] == b["completions/mean_length"]
        assert abs(a["loss"] - b["loss"]) < 1e-5


@pytest.mark.slow
def test_sharded_weights_learn_chains_as_whole_ones(world):
    """SFT with a trained tower."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    values = {"model": str(world / "newborn"), "data": str(world / "world/cold_start.json"), "max_steps": 3}
    values |= {"train_batch_size": 8, "learning_rate": 1e-3, "freeze_vision": False, "dataloader_num_workers": 0}
    finish(start(ROOT / "trainer/sft.py", SftOptions(**values, output_dir=str(world / "sft_whole"))))
    finish(start(ROOT / "trainer/sft.py", SftOptions(**values, **SHARDED, output_dir=str(world / "sft_sharded"))))
    losses = [[m["loss"] for m in lines(world / name)] for name in ("sft_whole", "sft_sharded")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_weights_stay_sharded_while_sampling(world):
    """Ranks then meet in every layer of every token; their completions end at tokens of their own all the same."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    shared = {"max_steps": 2, "max_completion_length": 48, "temperature": 0.7, "gradient_accumulation_steps": 2}
    layered = {"engine": "deepspeed", "zero_stage": 3, "ds3_gather_for_generation": False}
    for name, changes in (("gathered", {}), ("layered", layered)):
        file = str(world / name / "samples")
        finish(start(GRPO, grpo_options(world, name, **shared, **changes, rollout_file=file)))
    longest = []
    for rank in ("", ".rank1"):
        ours, whole = ((world / name / f"samples{rank}").read_text() for name in ("layered", "gathered"))
        assert ours == whole
        longest.append([max(map(len, json.loads(line)["ids"])) for line in ours.splitlines()])
    assert longest[0] != longest[1], "no rank had to wait for the other"
    for a, b in zip(lines(world / "gathered"), lines(world / "layered"), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5


@pytest.mark.slow
def test_bf16_under_deepspeed_learns_as_without(world):
    """fp32 master weights under both: updates of 1e-4 would be lost in bf16."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    changes = {"dtype": "bfloat16", "max_steps": 3, "learning_rate": 1e-4}
    grpo.train(grpo_options(world, "bf16", **changes, rollout_file=str(world / "bf16_stored")), Ranks())
    changes |= {"rollout": "replay", "rollout_file": str(world / "bf16_stored")}
    finish(start(GRPO, grpo_options(world, "bf16_zero", **changes, engine="deepspeed", zero_stage=2)))
    for a, b in zip(lines(world / "bf16"), lines(world / "bf16_zero"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-2)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.1)
    before = load_file(world / "sft/model.safetensors")
    ours, alone = (load_file(world / name / "model.safetensors") for name in ("bf16_zero", "bf16"))
    moved = {n: (alone[n].float() - before[n]).norm() for n in alone if alone[n].ndim == 2 and n in before}
    for name in sorted(moved, key=moved.get)[-5:]:
        apart = (ours[name].float() - alone[name].float()).norm()
        assert apart < 0.5 * moved[name], name


@pytest.mark.slow
def test_another_number_of_ranks_is_refused_by_name(world):
    """DeepSpeed's parts belong to as many ranks as there were."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    options = grpo_options(world, "two", max_steps=1, save_steps=1, engine="deepspeed", zero_stage=2)
    finish(start(GRPO, options))
    options.resume, options.max_steps = "auto", 2
    with pytest.raises(ValueError, match="holds the optimizer in 2 parts, this run has 1 ranks"):
        grpo.train(options, Ranks())


def test_deepspeed_skips_what_is_not_finite(world, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    script = tmp_path / "script.py"
    script.write_text(SKIPS)
    told = finish(start(script, grpo_options(world, "skips", max_steps=1)))
    assert told.count("skipped [True, True, False, False]") == 10, told


SKIPS = """
import itertools
import torch
from torch import nn
from boxgrpo.trainer.run import make_engine
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.runtime.ranks import ranks

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.head_weight = self.linear.weight

    def forward(self, x):
        return self.linear(x)


def weights(engine, model):
    with engine.gathered_weights():
        return model.linear.weight.detach().clone()


with ranks() as r:
    for stage, offload, dtype in itertools.product((1, 2, 3), (False, True), (torch.float32, torch.bfloat16)):
        if (stage, offload) == (3, True):
            continue
        torch.manual_seed(0)
        model = Head().to(dtype)
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


MEMORY = """
import logging
import torch
from boxgrpo.trainer import grpo
from boxgrpo.trainer.runtime.ranks import run_as_script

calls = 0
loss = grpo.fused_grpo_loss

def short_of_memory(*args, **options):
    global calls
    calls += 1
    if calls == 2 and torch.distributed.get_rank() == 1:
        raise torch.OutOfMemoryError("no room")
    return loss(*args, **options)

make_packs = grpo.make_packs

def counted(*args, **options):
    packs = make_packs(*args, **options)
    if calls == 0 and torch.distributed.get_rank() == 1:
        print(f"{sum(len(p.targets) > 0 for p in packs)} packs hold something", flush=True)
    return packs

grpo.fused_grpo_loss, grpo.make_packs = short_of_memory, counted
run_as_script(grpo.main, "grpo.py")
"""


@pytest.mark.parametrize(
    ("stage", "offload"), [(2, False), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((2, True), (1, False)))]
)
def test_memory_that_runs_out_on_one_rank_changes_no_step(world, one, tmp_path, stage, offload):
    """In its second pack, the first of which has left gradients: these are forgotten, and all packs are taken again."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(MEMORY)
    changes = {"max_steps": 5, "rollout": "replay", "rollout_file": str(world / "stored"), "tokens_per_pass": 200}
    changes |= {"engine": "deepspeed", "zero_stage": stage, "offload_optimizer": offload}
    told = finish(start(script, grpo_options(world, "", **changes, output_dir=str(folder))))
    assert "WARNING memory ran out in a pack of" in told
    assert int(told.split(" packs hold something")[0][-1]) > 1, "the second pack is the next step's"
    for a, b in zip(lines(one[0]), lines(folder), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


PLANNED = """
import torch
from boxgrpo.trainer import grpo
from boxgrpo.trainer.engine import room
from boxgrpo.trainer.runtime.ranks import run_as_script

room.free_bytes = lambda device: 13_000_000 if torch.distributed.get_rank() else 1 << 40
run_as_script(grpo.main, "grpo.py")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_where_ranks_meet_packs_are_made_to_fit_before_any_begins(world, one, tmp_path, stage):
    """One rank has little room: its packs shrink, the other waits for it, and the steps are the same."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(PLANNED)
    changes = {"max_steps": 5, "rollout": "replay", "rollout_file": str(world / "stored")}
    changes |= {"engine": "deepspeed", "zero_stage": stage}
    said = finish(start(script, grpo_options(world, "", **changes, output_dir=str(folder))))
    assert "WARNING memory ran out in a pack of" in said and "MB, and 13 are free); again with 105" in said
    for a, b in zip(lines(one[0]), lines(folder), strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-5


@pytest.mark.slow
def test_where_ranks_meet_in_every_layer_lost_memory_ends_the_run(world, tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    (tmp_path / "script.py").write_text(MEMORY)
    options = grpo_options(world, "no memory", tokens_per_pass=200, engine="deepspeed", zero_stage=3, timeout=60)
    run = start(tmp_path / "script.py", options)
    told, _ = run.communicate(timeout=100)
    assert run.returncode and "memory ran out (no room), and at --zero_stage 3 no rank can start over alone" in told


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_without_anything_to_train_keep_step(world, tmp_path, stage):
    """A newborn model's rewards are all 0: without KL no group of any rank has a gradient."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    changes = {"model": str(world / "newborn"), "beta": 0.0, "engine": "deepspeed", "zero_stage": stage}
    finish(start(GRPO, grpo_options(world, "", **changes, output_dir=str(tmp_path))))
    assert [m["loss"] for m in lines(tmp_path)] == [0, 0]
    assert all(m["frac_reward_zero_std"] == 1 for m in lines(tmp_path))
