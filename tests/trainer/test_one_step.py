"""How much code a step of GRPO runs through: what a reader must know to follow one from its records to the update."""

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

from boxgrpo.trainer import grpo, run
from boxgrpo.trainer.runtime import spans
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import ROOT, grpo_options, lines

FUNCTIONS, FILES = 146, 32
STAGES = ["data", "rollout", "reward", "pack", "reference", "policy", "optimizer"]


def test_a_step_enters_few_functions_in_few_files(world, monkeypatch):
    """The second of three steps, logging included: two prompts, a reference model, no loader processes."""
    entered: dict[str, set[str]] = defaultdict(set)
    opened: list[str] = []  # spans
    within: dict[str, list[str]] = {}  # spans around a function's first call
    traced = False

    def note(frame, event, argument):
        code = frame.f_code
        if traced and event == "call" and not code.co_name.startswith("<"):  # comprehensions and lambdas
            path = Path(code.co_filename)
            if path.is_relative_to(ROOT) and "tests" not in path.parts and ".venv" not in path.parts:
                entered[str(path.relative_to(ROOT))].add(code.co_qualname)
                within.setdefault(code.co_qualname, [*opened])

    def step_taken(step):
        nonlocal traced
        traced = step == 1

    listener = SimpleNamespace(enter=opened.append, leave=opened.remove)
    monkeypatch.setattr(spans, "listeners", [listener])
    options = grpo_options(world, "traced", prompts_per_step=2, max_steps=3)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        grpo.train(options, Ranks(), run.Hooks(step_taken=step_taken))
    finally:
        sys.setprofile(before)
    table = "\n".join(f"{path}: {', '.join(sorted(names))}" for path, names in sorted(entered.items()))
    assert "trainer/grpo.py" in entered and "kernels/head.py" in entered, table
    assert sum(map(len, entered.values())) <= FUNCTIONS, table
    assert len(entered) <= FILES, table
    stages = {name.removeprefix("timing_s/") for name in lines(world / "traced")[1] if name.startswith("timing_s/")}
    assert stages >= {*STAGES}
    around = {"make_packs": "pack", "trained_groups": "pack", "prefill": "prefill", "embed_images": "vision"}
    assert {name: within[name][-1] for name in around} == around


def test_the_loops_are_short():
    """grpo.py and sft.py whole, and GRPO's loop on one screen."""
    text = Path(grpo.__file__).read_text().splitlines()
    assert len(text) <= 200 and len((ROOT / "trainer/sft.py").read_text().splitlines()) <= 120
    start = next(i for i, line in enumerate(text) if line.startswith("    for step in run.steps"))
    end = next(i for i, line in enumerate(text) if i > start and line.startswith("def "))
    assert end - start <= 70
