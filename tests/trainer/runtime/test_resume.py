"""Runs that were killed or stopped end, once resumed, as undisturbed ones."""

import os
import random
import signal

import pytest
from safetensors.torch import load_file

from boxgrpo.bench.processes import kill
from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import ROOT, finish, grpo_options, lines, sft_options, start, start_forked, untimed_lines, wait_for

GRPO = ROOT / "trainer/grpo.py"


def check_same_end(one, other) -> None:
    """Weights and metrics of two runs are the same to the bit."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert untimed_lines(one) == untimed_lines(other)


@pytest.mark.parametrize("engine", ["ddp", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_killed_run_ends_as_an_undisturbed_one(world, tmp_path, engine):
    """Two ranks. Every process is killed three times: before the first checkpoint, at a random step, while saving.

    With dynamic sampling on plain ranks.
    """
    if engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    steps = {"max_steps": 6, "save_steps": 2, "save_total_limit": 2, "resume": "auto", "num_iterations": 2}
    steps |= {
        "engine": engine,
        "zero_stage": 2,
        "dynamic_sampling": engine == "ddp",
        "prompts_per_step": 2,
        "num_generations": 2,
    }

    def start_into(folder):
        options = grpo_options(world, "", **steps, output_dir=str(folder), rollout_file=str(folder / "samples"))
        return start_forked(GRPO, options)

    folder = tmp_path / "killed"
    finish(start_into(tmp_path / "undisturbed"))
    at_random = random.randint(2, 4)
    moments = (
        lambda: len(lines(folder)) >= 1,
        lambda: len(lines(folder)) >= at_random,
        lambda: list(folder.glob(".checkpoint-*.part")),
    )
    for moment in moments:
        run = start_into(folder)
        assert wait_for(run, moment)
        kill(run)
        assert not (folder / "model.safetensors").exists()
    finish(start_into(folder))
    assert [line["step"] for line in lines(folder)] == list(range(1, 7))
    check_same_end(tmp_path / "undisturbed", folder)
    assert engine != "ddp" or any(line["dynamic_sampling/refills"] for line in lines(folder))
    for samples in ("samples", "samples.rank1"):
        assert (tmp_path / "undisturbed" / samples).read_bytes() == (folder / samples).read_bytes()
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize("launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_run_is_resumed_after_sigterm(world, launcher):
    """Sent to the launcher, as a scheduler does: all ranks finish their step, save, and leave with 143."""
    options = {"max_steps": 400, "resume": "auto", "dataloader_num_workers": int(launcher == "torchrun")}
    folder, begin = world / launcher, {"forked": start_forked, "torchrun": start}[launcher]
    run = begin(GRPO, grpo_options(world, launcher, **options))
    assert wait_for(run, lambda: len(lines(folder)) >= 2)
    os.kill(run.pid, signal.SIGTERM)
    out, _ = run.communicate(timeout=100)
    assert run.returncode == {"forked": 143, "torchrun": 1}[launcher]
    (saved,) = folder.glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert f"SIGTERM received: saved {saved}" in out
    options |= {"max_steps": step + 2, "dataloader_num_workers": 0}
    assert f"resumed {saved} at step {step}" in finish(start_forked(GRPO, grpo_options(world, launcher, **options)))
    assert [line["step"] for line in lines(folder)] == list(range(1, step + 3))


def test_a_single_process_leaves_with_143(world):
    """And a checkpoint of one rank is resumed by two: the same data, the same state."""
    options = grpo_options(world, "alone", max_steps=3)
    ranks = Ranks()
    with ranks.record_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SystemExit) as left:
            grpo.train(options, ranks)
    assert left.value.code == 143 and len(lines(world / "alone")) == 1
    whole = grpo_options(world, "whole", max_steps=3)
    grpo.train(whole, Ranks())
    options.resume = "auto"
    finish(start_forked(GRPO, options))
    for a, b in zip(lines(world / "alone"), lines(world / "whole"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["epoch"] == b["epoch"]


def test_a_run_that_is_to_end_before_its_checkpoint_is_refused(world):
    """Before the weights are loaded; its result would be that of more steps than were asked for."""
    sft.train(sft_options(world, "three", max_steps=3, save_steps=3), Ranks())
    with pytest.raises(ValueError, match=r"checkpoint-3 is at step 3; the run is to end with step 2\. Raise"):
        sft.train(sft_options(world, "three", max_steps=2, resume="auto"), Ranks())


def test_case_11_a_lower_learning_rate_holds_from_the_first_resumed_update(world):
    """A run at 1e-3 is continued at 1e-9: no weight moves by more, and the metrics have that rate."""
    for steps, rate in ((1, 1e-3), (2, 1e-9)):
        options = {"max_steps": steps, "learning_rate": rate, "lr_scheduler_type": "constant", "resume": "auto"}
        sft.train(sft_options(world, "slower", save_steps=1, **options), Ranks())
    before, after = (load_file(world / "slower" / name / "model.safetensors") for name in ("checkpoint-1", "."))
    assert max((after[name] - before[name]).abs().max() for name in before) < 2e-9
    assert [line["learning_rate"] for line in lines(world / "slower")] == [1e-3, 1e-9]


def test_sft_is_resumed_to_the_bit(world):
    sft.train(sft_options(world, "sft_whole"), Ranks())
    options = sft_options(world, "sft_parts", resume="auto")
    for step in (1, 2):
        ranks = Ranks()
        with ranks.record_sigterm(), pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            sft.train(options, ranks)
        assert len(lines(world / "sft_parts")) == step
    sft.train(options, Ranks())
    check_same_end(world / "sft_whole", world / "sft_parts")
