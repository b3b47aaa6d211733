"""Prove that a refactoring changes no result: run the loops, store their results without times, compare two revisions.

    python tests/shared/prove_same.py run OUT            in each revision's own checkout and environment
    python tests/shared/prove_same.py compare OUT OTHER  exit status 1, and the first difference, where they differ

Metrics, sampled completions and checksums of the weights of: the demo's SFT and GRPO over 20 steps on two ranks; GRPO
with KL, several iterations, a trained tower and evaluations; LoRA; ZeRO-2 on two ranks; and a run that is killed and
resumed. About two minutes on two cores.
"""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import runs
from boxgrpo.bench.processes import kill
from boxgrpo.trainer.world import recipe
from runs import ROOT

TIMED = ("timing_s/", "perf/", "step_time", "sampling_s")
COMMON = {"dataloader_num_workers": 1, "dtype": "float32", "seed": 0}
SFT = COMMON | {"freeze_vision": False, "max_steps": 20, "train_batch_size": 16, "learning_rate": 1e-3}
SFT |= {"lr_scheduler_type": "warmup_stable_decay", "adam_beta2": 0.99, "warmup_ratio": 0.03, "tokens_per_pass": 16384}
GRPO = COMMON | {"max_steps": 20, "prompts_per_step": 16, "learning_rate": 3e-4, "beta": 0.0}
GRPO |= {"max_completion_length": 32, "tokens_per_pass": 16384}
SHORT = {"max_steps": 6, "prompts_per_step": 4, "num_generations": 4}
EVAL = {"eval_every": 3, "eval_data": "world/held_out.json", "eval_max_completion_length": 16}
MORE = {"beta": 0.04, "num_iterations": 2, "freeze_vision": False, "log_completions": 2, "epsilon_high": 0.28}
ZERO2 = {"engine": "deepspeed", "zero_stage": 2}


def train(out: Path, name: str, script: str, values: dict, *, ranks: int = 2, kill_at: int = 0) -> None:
    """One run into out/name; with `kill_at` it is killed once it has logged that step, and started again."""
    values = {key: str(out / value) if key.endswith("data") else value for key, value in values.items()}
    values["output_dir"] = str(out / name)
    if script.endswith("grpo.py"):
        values["rollout_file"] = str(out / name / "samples")
    options = SimpleNamespace(**values)
    run = runs.start(ROOT / script, options, ranks)
    if kill_at and runs.wait_for(run, lambda: len(runs.lines(out / name)) >= kill_at, seconds=3600):
        kill(run)
        run = runs.start(ROOT / script, options, ranks)
    runs.finish(run, timeout=3600)


def run(out: Path) -> None:
    out.mkdir(parents=True)
    options = recipe.DemoOptions(str(out), from_nothing=True, levels="0", cold_start=320, train=400, held_out=16)
    recipe.draw_world(options)
    recipe.make_initial_checkpoint(options)
    sft = SFT | {"model": out / "initial", "data": "world/cold_start.json"}
    train(out, "sft", "trainer/sft.py", sft)
    grpo = GRPO | {"model": out / "sft", "data": "world/train.json"}
    train(out, "grpo", "trainer/grpo.py", grpo)
    train(out, "resumed", "trainer/grpo.py", grpo | {"save_steps": 5, "resume": "auto"}, kill_at=12)
    train(out, "more", "trainer/grpo.py", grpo | SHORT | EVAL | MORE, ranks=1)
    train(out, "lora", "trainer/grpo.py", grpo | SHORT | {"lora_rank": 4, "beta": 0.04}, ranks=1)
    train(out, "zero2", "trainer/grpo.py", grpo | ZERO2 | {"beta": 0.04})
    train(out, "sft_zero2", "trainer/sft.py", sft | ZERO2 | {"max_steps": 5})


def results_of(out: Path) -> dict[str, list[dict] | str]:
    """Each run's results: metrics without times, and checksums of samples, weights and records."""
    found: dict[str, list[dict] | str] = {}
    for path in sorted(p for p in out.rglob("*") if "checkpoint-" not in str(p)):
        name = str(path.relative_to(out)).replace("newborn", "initial")  # its earlier name
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in lines]
        elif path.name.startswith("samples"):
            stored = [json.loads(line) for line in path.read_text().splitlines()]
            ids = json.dumps([[line["serial"], line["ids"]] for line in stored])
            found[name] = hashlib.sha256(ids.encode()).hexdigest()
        elif path.name.startswith(("model.safetensors", "train.json", "cold_start.json")):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def compare(one: Path, other: Path) -> None:
    a, b = results_of(one), results_of(other)
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) == b.get(name):
            continue
        if isinstance(a.get(name), list) and isinstance(b.get(name), list):
            for x, y in zip(a[name], b[name]):
                if x != y:
                    keys = [k for k in sorted(x.keys() | y.keys()) if x.get(k) != y.get(k)]
                    sys.exit(f"{name}, step {x['step']}: " + ", ".join(f"{k} {x.get(k)} / {y.get(k)}" for k in keys))
        sys.exit(f"{name} differs, or is on one side only")
    lines = sum(len(v) for v in a.values() if isinstance(v, list))
    print(f"the same: {len(a)} files, {lines} lines of metrics")


if __name__ == "__main__":
    action, *paths = sys.argv[1:]
    run(Path(paths[0]).resolve()) if action == "run" else compare(*map(Path, paths))
