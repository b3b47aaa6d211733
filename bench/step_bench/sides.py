"""What the sides of the step benchmark share, and our side. Each side runs in a process of its own: our loop, TRL's
GRPOTrainer (`trl_side.py`), and the paper's trainer as `univg.py` re-enacts it.

All load the same checkpoint, read the same records and images, keep the vision tower frozen, sample without vision
tokens and ends, so that every completion has its full length, and have the same rewards: the rule's, and a stand-in
without which random weights would earn nothing and every advantage would be zero.
"""

import contextlib
import json
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from boxgrpo.bench.processes import PeakMemory
from boxgrpo.trainer import grpo
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.engine.ddp import DataParallelEngine
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.run import Hooks
from boxgrpo.trainer.runtime import spans
from boxgrpo.trainer.runtime.ranks import keep_freed_memory, ranks

from .cases import StepCase

BETA, LEARNING_RATE = 0.04, 1e-6
# The fastest on two cores of what was tried.
OURS = {"dataloader_num_workers": 0}
ATTENTION = "sdpa"
CHECKPOINTED = ("7B",)  # whose activations the peers can only hold with activation checkpointing
FREED_MEMORY = "kept by glibc on a CPU"  # on both sides: less time, for memory that is not given back


class WithoutMasters(DataParallelEngine):
    """The weights themselves are updated, and moments are of their dtype."""

    @staticmethod
    def master_of(p):
        return p


def engine_of(case: StepCase) -> type[DataParallelEngine]:
    return DataParallelEngine if case.masters else WithoutMasters


@dataclass
class Side:
    """What one side took."""

    steps: list[dict[str, float]]  # seconds by phase, each phase without those inside it; they add up to the step
    peak_bytes: int | None  # the most above the loaded model
    prompt_tokens: float  # of a prompt, on average
    trained: int  # parameters
    threads: int
    settings: dict = field(default_factory=dict)

    @property
    def seconds(self) -> list[float]:
        return [sum(step.values()) for step in self.steps]


class Clock:
    """Seconds by phase and step. A phase's seconds are without those of the phases inside it.

    A GPU runs behind the host. With `waits` each phase waits for it, and is charged its own work; the overlap of phases
    is lost. Without, only steps wait.
    """

    def __init__(self, *, waits: bool = True):
        self.waits = waits
        self.steps: list[dict[str, float]] = []
        self.inside = ["other"]
        self.last = self.now(True)

    @staticmethod
    def now(wait: bool) -> float:
        if wait and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def charge(self, *, wait: bool = False) -> None:
        """Add the time since the last call to the phase that runs."""
        now = self.now(wait or self.waits)
        if self.steps:
            self.steps[-1][self.inside[-1]] += now - self.last
        self.last = now

    def begin_step(self, *_) -> None:
        self.charge(wait=True)
        self.steps.append(defaultdict(float))

    def enter(self, name: str) -> None:
        if name == "data":
            self.begin_step()
        self.charge()
        self.inside.append(name)

    def leave(self, name: str) -> None:
        self.charge()
        self.inside.pop()

    @contextlib.contextmanager
    def span(self, name: str):
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)

    def whole_steps(self) -> list[dict[str, float]]:
        """The last one begins as the run ends and is none."""
        return [dict(step) for step in self.steps[:-1]]


def start_memory(model) -> PeakMemory:
    """The most memory above the loaded model, from here on."""
    for p in model.parameters():
        p.sum()  # a mapped file's pages count as the model's
    memory = PeakMemory(gpu=torch.cuda.is_available())
    memory.start()
    return memory


def load_peer(case: StepCase, folder: Path):
    """The peers' model, transformers' own, its tower frozen."""
    from transformers import Qwen2VLForConditionalGeneration  # which our side does without

    if not torch.cuda.is_available():
        keep_freed_memory()  # as our loop does
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        folder / "model", dtype=getattr(torch, case.dtype), attn_implementation=ATTENTION
    )
    model.model.visual.requires_grad_(False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def load_processor(folder: Path) -> Processor:
    o = GrpoOptions()
    return Processor.from_pretrained(folder / "model", min_pixels=o.min_pixels, max_pixels=o.max_pixels)


def trained_parameters(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def stand_in(ids) -> float:
    """Share of even ids, 0-1: some spread within each group."""
    return sum(int(i) % 2 == 0 for i in ids) / len(ids)


def benchmark_hooks(case: StepCase, **more) -> Hooks:
    """Our loop then samples no ends, adds the stand-in to the rewards, and saves no weights."""

    def without_ends(vocabulary):
        ends = torch.tensor(vocabulary.eos_token_ids, device=vocabulary.forbidden.device)
        return replace(vocabulary, forbidden=torch.cat((vocabulary.forbidden, ends)))

    def with_stand_in(groups, rewards):
        shares = [stand_in(c.tolist()) for group in groups for c in group.completions]
        return rewards._replace(accuracy=rewards.accuracy + rewards.accuracy.new_tensor(shares))

    common = {"vocabulary": without_ends, "rewards": with_stand_in, "make_engine": engine_of(case)}
    return Hooks(**common | {"write_model": lambda *_: None} | more)


def our_options(case: StepCase, folder: Path, output_dir: str, steps: int, **more) -> GrpoOptions:
    """The loop's options for so many steps of the case; `more` options on top."""
    return GrpoOptions(
        model=str(folder / "model"),
        data=str(folder / "records.json"),
        output_dir=output_dir,
        dtype=case.dtype,
        max_steps=steps,
        prompts_per_step=case.prompts,
        num_generations=case.generations,
        max_completion_length=case.tokens,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        **OURS | more,
    )


def check_log(lines: list[dict], case: StepCase) -> None:
    for line in lines:
        assert line["completions/min_length"] == case.tokens and line["grad_norm"] > 0, line


def ours(case: StepCase, folder: Path, steps: int, *, waits: bool = False) -> Side:
    """`grpo.train` as it is, its spans on this clock."""
    clock, seen = Clock(waits=waits), {}

    def loaded(model) -> None:
        seen.update(model=model, memory=start_memory(model))

    # A GPU's steps look at the next one's images, the last at none: it is one more, and is not counted.
    ahead = torch.cuda.is_available()
    hooks = benchmark_hooks(case, model_loaded=loaded, **({} if ahead else {"write_model": clock.begin_step}))
    with tempfile.TemporaryDirectory() as out, ranks() as r:
        spans.listeners.append(clock)
        try:
            grpo.train(our_options(case, folder, out, steps + ahead), r, hooks)
        finally:
            spans.listeners.remove(clock)
        peak = seen["memory"].peak()
        logged = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    check_log(logged, case)
    tokens = logged[-1]["num_tokens"] / len(logged) / case.prompts - case.generations * case.tokens
    settings = OURS | {"masters": case.masters, "freed_memory": FREED_MEMORY}
    trained = trained_parameters(seen["model"])
    return Side(clock.whole_steps(), peak, tokens, trained, torch.get_num_threads(), settings)
