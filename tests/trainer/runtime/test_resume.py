"""Runs that are killed, stopped or hit by NaN: they go on, and end where an undisturbed run ends, bit for bit."""

import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from boxgrpo.bench.processes import kill
from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.options import SftOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import ROOT, finish, grpo_options, lines, start, told

GRPO = ROOT / "trainer/grpo.py"


def wait_for(run, condition, seconds: float = 100) -> bool:
    """Until the condition holds; False when the run ends before."""
    end = time.monotonic() + seconds
    while not condition():
        if run.poll() is not None:
            return False
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.01)
    return True


def same_end(one, other) -> None:
    """Weights, metrics and samples of two runs are the same to the bit."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert told(one) == told(other)
    for rank in ("", ".rank1"):
        assert (one / f"samples{rank}").read_bytes() == (other / f"samples{rank}").read_bytes()


@pytest.mark.parametrize("engine", ["ddp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_if_it_had_not_been(world, tmp_path, engine):
    """Two ranks; SIGKILL for every process three times: before the first checkpoint, at some moment, while saving."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    steps = {"max_steps": 12, "save_steps": 3, "save_total_limit": 2, "resume": "auto", "num_iterations": 2}
    steps |= {"engine": engine, "zero_stage": 2}

    def run_into(folder):
        return grpo_options(world, "", **steps, output_dir=str(folder), rollout_file=str(folder / "samples"))

    folder = tmp_path / "killed"
    undisturbed, killed = run_into(tmp_path / "undisturbed"), run_into(folder)
    finish(start(GRPO, undisturbed))

    def at_step(n):
        return lambda: len(lines(folder)) >= n

    for moment in (at_step(1), at_step(random.Random().randint(4, 8)), lambda: list(folder.glob(".checkpoint-*.part"))):
        run = start(GRPO, killed)
        assert wait_for(run, moment)
        kill(run)
        assert not (folder / "model.safetensors").exists()
    finish(start(GRPO, killed))
    assert [line["step"] for line in lines(folder)] == list(range(1, 13))
    same_end(tmp_path / "undisturbed", folder)
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}


def test_sigterm_saves_and_the_run_goes_on(world):
    """To the launcher, as a scheduler sends it: all ranks finish their step, save, and leave with 143."""
    options = {"max_steps": 400, "resume": "auto", "dataloader_num_workers": 1}
    run = start(GRPO, grpo_options(world, "stopped", **options))
    assert wait_for(run, lambda: len(lines(world / "stopped")) >= 2)
    os.kill(run.pid, signal.SIGTERM)
    out, _ = run.communicate(timeout=100)
    assert run.returncode != 0
    (saved,) = (world / "stopped").glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert f"asked to stop: saved {saved}" in out
    options |= {"max_steps": step + 2}
    assert f"resumed {saved} at step {step}" in finish(start(GRPO, grpo_options(world, "stopped", **options)))
    assert [line["step"] for line in lines(world / "stopped")] == list(range(1, step + 3))


def test_a_single_process_leaves_with_143(world, monkeypatch):
    """And a checkpoint of one rank goes on with two: the same data, the same state."""
    options = grpo_options(world, "alone", max_steps=3)
    ranks = Ranks()
    with ranks.noting_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as left:
            grpo.train(options, ranks)
    assert left.value.code == 143 and len(lines(world / "alone")) == 1
    whole = grpo_options(world, "whole", max_steps=3)
    grpo.train(whole, Ranks())
    options.resume = "auto"
    finish(start(GRPO, options))
    for a, b in zip(lines(world / "alone"), lines(world / "whole"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["epoch"] == b["epoch"]


def test_sft_goes_on_where_it_was(world):
    values = {"model": str(world / "newborn"), "data": str(world / "world/cold_start.json"), "max_steps": 6}
    values |= {"train_batch_size": 8, "learning_rate": 1e-3, "freeze_vision": False, "dataloader_num_workers": 0}
    sft.train(SftOptions(**values, output_dir=str(world / "sft_whole")), Ranks())
    values["output_dir"] = str(world / "sft_parts")
    ranks = Ranks()
    for left in range(2):
        with ranks.noting_sigterm(), pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            sft.train(SftOptions(**values, resume="auto"), ranks)
        ranks.stop_asked = False
        assert len(lines(world / "sft_parts")) == left + 1
    sft.train(SftOptions(**values, resume="auto"), Ranks())
    assert told(world / "sft_parts") == told(world / "sft_whole")
    a, b = (load_file(world / name / "model.safetensors") for name in ("sft_whole", "sft_parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


NAN_ON_RANK_1 = """
import sys
import torch
from boxgrpo.trainer import grpo
from boxgrpo.trainer.runtime.ranks import run_as_script

calls = 0
loss = grpo.fused_grpo_loss

def faulty(hidden, *args, **options):
    global calls
    calls += 1
    value, stats = loss(hidden, *args, **options)
    if calls == 2 and torch.distributed.get_rank() == 1:
        {fault}
    return value, stats

grpo.fused_grpo_loss = faulty
run_as_script(grpo.main, "grpo.py")
"""


@pytest.mark.parametrize(
    "fault",
    [
        "value = value * float('nan')",
        "value = value + float('inf')",  # its gradient is finite
        "hidden.register_hook(lambda g: g * float('inf'))",
    ],
    ids=["NaN", "infinite loss", "infinite gradient"],
)
def test_every_rank_skips_a_step_that_is_not_finite_on_one(world, tmp_path, fault):
    script = tmp_path / "faulty.py"
    script.write_text(NAN_ON_RANK_1.format(fault=fault))
    folder = tmp_path / "run"
    options = grpo_options(world, "unused", output_dir=str(folder), max_steps=3, save_steps=1)
    finish(start(script, options))
    assert [m["skipped_steps"] for m in lines(folder)] == [0, 1, 1]
    after = [load_file(folder / f"checkpoint-{n}/model.safetensors") for n in (1, 2, 3)]
    assert all(torch.equal(after[0][k], after[1][k]) for k in after[0]), "no rank has updated"
    assert not all(torch.equal(after[1][k], after[2][k]) for k in after[0]), "and the next step has"
    assert all(tensor.isfinite().all() for tensor in after[2].values())
