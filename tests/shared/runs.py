"""Small runs of the loops for several test files: a drawn world, a cold start, options, launches under torchrun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import forked
from boxgrpo.bench.processes import kill
from boxgrpo.trainer import sft
from boxgrpo.trainer.options import EvalOptions, GrpoOptions, SftOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from boxgrpo.trainer.world import recipe

ROOT = Path(__file__).resolve().parents[2]
UNTIMED = ("timing_s/", "perf/", "step_time")  # what no two runs have in common


def make_world(root: Path) -> Path:
    """A small drawn world, an initial model for it, and `sft/`: enough of a cold start to write boxes now and then."""
    options = recipe.DemoOptions(str(root), from_nothing=True, levels="0", cold_start=32, train=48, held_out=8)
    recipe.draw_world(options)
    recipe.make_initial_checkpoint(options)
    sft.train(sft_options(root, "sft", max_steps=40, train_batch_size=16, learning_rate=3e-3), Ranks())
    return root


def grpo_options(world: Path, name: str, **changes) -> GrpoOptions:
    """A run of two steps into `world / name`."""
    values = {
        "model": str(world / "sft"),
        "data": str(world / "world/train.json"),
        "output_dir": str(world / name),
        "max_steps": 2,
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 32,
        "learning_rate": 1e-3,
        "dataloader_num_workers": 0,
    }
    return GrpoOptions(**values | changes)


def sft_options(world: Path, name: str, **changes) -> SftOptions:
    """Six supervised steps from the initial model into `world / name`."""
    values = {
        "model": str(world / "initial"),
        "data": str(world / "world/cold_start.json"),
        "output_dir": str(world / name),
        "max_steps": 6,
        "train_batch_size": 8,
        "learning_rate": 1e-3,
        "freeze_vision": False,
        "dataloader_num_workers": 0,
    }
    return SftOptions(**values | changes)


def eval_options(initial, record_file, **changes) -> EvalOptions:
    """A short evaluation of `record_file` into eval/ beside it."""
    values = {"model": str(initial), "data": str(record_file), "output_dir": str(record_file.parent / "eval")}
    values |= {"max_completion_length": 6, "dataloader_num_workers": 0, "min_pixels": 784, "max_pixels": 9408}
    return EvalOptions(**values | changes)


def lines(folder) -> list[dict]:
    """The run's metrics so far, a step each; a line that is still being written is left out."""
    try:
        text = (Path(folder) / "metrics.jsonl").read_text()
    except FileNotFoundError:  # not begun, or beginning anew
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


def untimed_lines(folder) -> list[dict]:
    """The values of `lines` that do not depend on the clock."""
    return [{k: v for k, v in line.items() if not k.startswith(UNTIMED)} for line in lines(folder)]


def flags(options) -> list[str]:
    """What a command line says for the options."""
    lists = [flag for k, v in vars(options).items() if isinstance(v, list) and v for flag in (f"--{k}", *v)]
    return [f"--{k}={v}" for k, v in vars(options).items() if v not in (None, "") and not isinstance(v, list)] + lists


def start(script, options, ranks: int = 2, launch=("--standalone",), **environment) -> subprocess.Popen:
    """`torchrun script` with the options as flags, in a process group of its own, one thread a rank."""
    command = [str(Path(sys.executable).with_name("torchrun")), *launch, "--nproc_per_node", str(ranks)]
    return subprocess.Popen(
        [*command, str(script), *flags(options)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_forked(script, options, ranks: int = 2) -> forked.Run:
    """`start` in a fraction of its time, without torchrun."""
    return forked.fork(script, flags(options), ranks)


def wait_for(run, condition, seconds: float = 100) -> bool:
    """Until the condition holds; False when the run ends before."""
    end = time.monotonic() + seconds
    while not condition():
        if run.poll() is not None:
            return False
        assert time.monotonic() < end, "the condition was never met"
        time.sleep(0.01)
    return True


def finish(run: subprocess.Popen | forked.Run, timeout: float = 200) -> str:
    """What the run printed. When it fails that is an error; when it hangs, its processes are killed."""
    try:
        out, _ = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(run)
        raise
    assert run.returncode == 0, out
    return out
