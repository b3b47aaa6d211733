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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from boxgrpo.bench.processes import PeakMemory
from boxgrpo.trainer import grpo
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.engine.ddp import DataParallelEngine
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.run import Hooks
from boxgrpo.trainer.runtime import spans
from boxgrpo.trainer.runtime.ranks import join_ranks, keep_freed_memory

from .cases import StepCase

BETA, LEARNING_RATE = 0.04, 1e-6
# The fastest on two cores of what was tried.
OURS = {"dataloader_num_workers": 0}
ATTENTION = "sdpa"
CHECKPOINTED = ("7B",)  # whose activations the peers can only hold with activation checkpointing
FREED_MEMORY = "kept by glibc on a CPU"  # on all sides: less time, for memory that is not given back


class WithoutMasters(DataParallelEngine):
    """The weights themselves are updated, and moments are of their dtype."""

    @staticmethod
    def master_of(p):
        return p


def engine_of(case: StepCase) -> type[DataParallelEngine]:
    return DataParallelEngine if case.masters else WithoutMasters


@dataclass
class Side:
    """The time and memory of one side."""

    steps: list[dict[str, float]]  # seconds by phase, each phase without those inside it; they add up to the step
    peak_bytes: int | None  # the most above the loaded model
    prompt_tokens: float  # of a prompt, on average
    trained: int  # parameters
    settings: dict

    @property
    def seconds(self) -> list[float]:
        return [sum(step.values()) for step in self.steps]


class Measurement:
    """Seconds by phase and step, a phase without those inside it, and memory above the loaded model.

    Phases are the spans of the loop. A GPU runs behind the host. With `waits` each phase waits for it, and is charged
    its own work; the overlap of phases is lost. Without, only steps wait.
    """

    def __init__(self, *, waits: bool = False):
        self.waits = waits
        self.steps: list[dict[str, float]] = []
        self.inside = ["other"]
        self.last = self.now(True)

    def model_loaded(self, model) -> None:
        for p in model.parameters():
            p.sum()  # a mapped file's pages count as the model's
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.memory = PeakMemory(gpu=torch.cuda.is_available())
        self.memory.start()

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
    def listening(self) -> Iterator[None]:
        spans.listeners.append(self)
        try:
            yield
        finally:
            spans.listeners.remove(self)

    def whole_steps(self) -> list[dict[str, float]]:
        """All steps but the last entry, which begins when the last step ends and covers the end of the run."""
        return [dict(step) for step in self.steps[:-1]]

    def side(self, prompt_tokens: float, **settings) -> Side:
        settings |= {"freed_memory": FREED_MEMORY, "threads": torch.get_num_threads()}
        return Side(self.whole_steps(), self.memory.peak(), prompt_tokens, self.trained, settings)


def load_peer(case: StepCase, folder: Path, measurement: Measurement):
    """The peers' model, transformers' own, its tower frozen."""
    from transformers import Qwen2VLForConditionalGeneration  # which our side does without

    if not torch.cuda.is_available():
        keep_freed_memory()  # as our loop does
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        folder / "model", dtype=getattr(torch, case.dtype), attn_implementation=ATTENTION
    )
    model.model.visual.requires_grad_(False)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    measurement.model_loaded(model)
    return model


def load_processor(folder: Path) -> Processor:
    o = GrpoOptions()
    return Processor.from_pretrained(folder / "model", min_pixels=o.min_pixels, max_pixels=o.max_pixels)


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


def prompt_tokens_logged(lines: list[dict], case: StepCase) -> float:
    """Tokens of a prompt, from metrics that add up the tokens of prompts and completions over all steps."""
    for line in lines:
        assert line["completions/min_length"] == case.tokens and line["grad_norm"] > 0, line
    return lines[-1]["num_tokens"] / (len(lines) * case.prompts)


def ours(case: StepCase, folder: Path, steps: int, *, waits: bool = False) -> Side:
    """`grpo.train` as it is, its spans on this clock."""
    m = Measurement(waits=waits)
    # On a GPU one more step is run, and not counted: its images are embedded during the last counted one.
    ahead = torch.cuda.is_available()
    hooks = benchmark_hooks(case, model_loaded=m.model_loaded, **({} if ahead else {"write_model": m.begin_step}))
    with tempfile.TemporaryDirectory() as out, join_ranks() as r, m.listening():
        grpo.train(our_options(case, folder, out, steps + ahead), r, hooks)
        logged = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    tokens = prompt_tokens_logged(logged, case) - case.generations * case.tokens
    return m.side(tokens, **OURS, masters=case.masters)
