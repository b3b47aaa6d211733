"""The sides of the step benchmark, each to be run in a process of its own: our loop, TRL's GRPOTrainer, and the paper's
trainer as `step_univg` re-enacts it.

All load the same checkpoint, read the same records and images, keep the vision tower frozen, sample without vision
tokens and ends, so that every completion has its full length, and are paid alike: the rule's rewards, and a stand-in
without which random weights would earn nothing and every advantage would be zero.
"""

import contextlib
import functools
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch

from boxgrpo.bench.launches import resident_kb
from boxgrpo.kernels.dropin import format_reward_rec, iou_reward
from boxgrpo.trainer import grpo
from boxgrpo.trainer.data.processor import THINK_SUFFIX, Processor
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.engine.ddp import DataParallelEngine
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.rollout import local as rollout
from boxgrpo.trainer.runtime.ranks import keep_freed_memory, ranks

from .cases import StepCase

BETA, LEARNING_RATE = 0.04, 1e-6
# What was fastest on two cores among what was tried.
OURS = {"dataloader_num_workers": 0}
# Tried for TRL too, and slower: a static cache, half a group in a batch (in less memory), a loader process, huge pages.
TRL = {"dataloader_num_workers": 0}
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

    A GPU works behind the host's back. With `waits` each phase waits for it, and is charged its own work; the overlap
    of phases is lost. Without, only steps wait.
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
        """Give what has passed to the phase that runs."""
        now = self.now(wait or self.waits)
        if self.steps:
            self.steps[-1][self.inside[-1]] += now - self.last
        self.last = now

    def begin_step(self) -> None:
        self.charge(wait=True)
        self.steps.append(defaultdict(float))

    @contextlib.contextmanager
    def span(self, name: str, *_size: int):
        if name == "data":
            self.begin_step()
        self.charge()
        self.inside.append(name)
        try:
            yield
        finally:
            self.charge()
            self.inside.pop()

    def whole_steps(self) -> list[dict[str, float]]:
        """The last one ends with the run and is none."""
        return [dict(step) for step in self.steps[:-1]]


class Memory:
    """The most memory since the model was loaded: resident on a CPU, allocated on a GPU."""

    def __init__(self):
        self.base: int | None = None

    def start(self, model) -> None:
        for p in model.parameters():
            p.sum()  # a mapped file's pages count from here on
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        elif (refs := Path("/proc/self/clear_refs")).exists():
            refs.write_text("5")  # the high-water mark starts anew
            self.base = 1024 * resident_kb(os.getpid())

    def peak(self) -> int | None:
        if self.base is None:
            return None
        most = (
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * resident_kb(os.getpid(), "VmHWM")
        )
        return most - self.base


def stand_in(ids) -> float:
    """Share of even ids, 0-1: some spread within each group."""
    return sum(int(i) % 2 == 0 for i in ids) / len(ids)


@contextlib.contextmanager
def whole_and_paid():
    """In the block our loop samples no ends, pays the stand-in beside the rule's rewards, and saves no weights."""

    def vocabulary(processor, config, device):
        found = of(processor, config, device)
        ends = torch.tensor(found.eos_token_ids, device=found.forbidden.device)
        return replace(found, forbidden=torch.cat((found.forbidden, ends)))

    def score(completions, *args):
        rewards = rule(completions, *args)
        shares = [stand_in(c.tolist()) for group in completions for c in group]
        return rewards._replace(accuracy=rewards.accuracy + rewards.accuracy.new_tensor(shares))

    of, rule = grpo.Vocabulary.of, grpo.score
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(grpo, "score", score))
        patches.enter_context(mock.patch.object(grpo, "save_pretrained", lambda *_: None))  # no part of a step
        patches.enter_context(mock.patch.object(grpo.Vocabulary, "of", staticmethod(vocabulary)))
        yield


def our_options(case: StepCase, folder: Path, output_dir: str, steps: int, **more) -> GrpoOptions:
    """What `grpo.py` is told for so many steps of the case; `more` options on top."""
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


def ours(case: StepCase, folder: Path, steps: int, *, waits: bool = False) -> Side:
    """`grpo.train` as it is, its spans on this clock."""
    clock, memory, seen = Clock(waits=waits), Memory(), {}

    def loaded_model(*args):
        model = load(*args)
        memory.start(model)
        seen["model"] = model
        return model

    load = grpo.loaded_model
    with tempfile.TemporaryDirectory() as out, whole_and_paid(), contextlib.ExitStack() as patches, ranks() as r:
        patched = {(grpo, "span"): clock.span, (rollout, "span"): clock.span, (grpo, "loaded_model"): loaded_model}
        patched[grpo, "make_engine"] = engine_of(case)
        # A GPU's steps look at the next one's images, the last at none: it is one more, and ends with nothing.
        ahead = torch.cuda.is_available()
        if not ahead:
            patched[grpo, "save_pretrained"] = lambda *_: clock.begin_step()  # which ends the last step
        for (owner, name), value in patched.items():
            patches.enter_context(mock.patch.object(owner, name, value))
        grpo.train(our_options(case, folder, out, steps + ahead), r)
        peak = memory.peak()
        logged = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    for line in logged:
        assert line["completions/min_length"] == case.tokens and line["grad_norm"] > 0, line
    tokens = logged[-1]["num_tokens"] / len(logged) / case.prompts - case.generations * case.tokens
    trained = sum(p.numel() for p in seen["model"].parameters() if p.requires_grad)
    settings = OURS | {"masters": case.masters, "freed_memory": FREED_MEMORY}
    return Side(clock.whole_steps(), peak, tokens, trained, torch.get_num_threads(), settings)


def trl(case: StepCase, folder: Path, steps: int) -> Side:
    """TRL's `GRPOTrainer` with transformers' generate, a group's completions in one batch."""
    from datasets import Dataset, Image, List
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLProcessor, TrainerCallback
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from trl import GRPOConfig, GRPOTrainer

    class ImageProcessor(Qwen2VLProcessor):
        """Without the video processor, which needs torchvision."""

        def __init__(self, image_processor, tokenizer):
            super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)

    class Steps(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.begin_step()

        def on_step_end(self, *_, **__):
            clock.begin_step()

    def reward(completions, completion_ids, solution, **_):
        rule = zip(iou_reward(completions, solution), format_reward_rec(completions), strict=True)
        return [iou + well + stand_in(ids) for (iou, well), ids in zip(rule, completion_ids, strict=True)]

    if not torch.cuda.is_available():
        keep_freed_memory()  # as our loop does
    # A group in one batch; all groups are generated together, whatever the batches.
    settings = {"per_device_train_batch_size": case.generations, "gradient_accumulation_steps": case.prompts} | TRL
    settings["gradient_checkpointing"] = case.model in CHECKPOINTED
    clock, memory = Clock(), Memory()
    model_folder = str(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    processor = ImageProcessor(Qwen2VLImageProcessorPil.from_pretrained(model_folder), tokenizer)
    never = Processor.from_pretrained(model_folder, min_pixels=1, max_pixels=1)  # knows the ids not to be sampled
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        model_folder, dtype=getattr(torch, case.dtype), attn_implementation=ATTENTION
    )
    model.model.visual.requires_grad_(False)
    if torch.cuda.is_available():
        model.cuda()
    memory.start(model)
    examples, _ = read_examples(folder / "records.json")
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": e.question + THINK_SUFFIX}],
                "images": list(e.images),
                "solution": list(e.gold),
            }
            for e in examples
        ]
    ).cast_column("images", List(Image()))
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            max_steps=steps,
            num_generations=case.generations,
            max_completion_length=case.tokens,
            generation_kwargs={"suppress_tokens": [*never.vision_ids, *never.eos_ids]},
            beta=BETA,
            loss_type="grpo",
            learning_rate=LEARNING_RATE,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            bf16=case.dtype == "bfloat16",
            **settings,
        )
        trainer = GRPOTrainer(
            model, reward, config, train_dataset=data, processing_class=processor, callbacks=[Steps()]
        )
        trainer.train()
        peak = memory.peak()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    for line in logged:
        assert line["completions/min_length"] == case.tokens and line["grad_norm"] > 0, line
    completions = len(logged) * case.prompts * case.generations
    tokens = logged[-1]["num_tokens"] / completions - case.tokens
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    masters = case.dtype == "float32"  # else it updates bf16 weights
    settings |= {"masters": masters, "attn_implementation": ATTENTION, "freed_memory": FREED_MEMORY}
    return Side(clock.whole_steps(), peak, tokens, trained, torch.get_num_threads(), settings)


def univg_r1(case: StepCase, folder: Path, steps: int) -> Side:
    from .univg import univg_r1 as side  # which imports from here

    return side(case, folder, steps)


SIDES = {"ours": ours, "ours_by_phase": functools.partial(ours, waits=True), "trl": trl, "univg_r1": univg_r1}


def run_side(name: str, case: StepCase, folder: Path, steps: int) -> Side | str:
    """One side; where the device's memory is too small for it, or it fails, the error. The others go on."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return SIDES[name](case, folder, steps)
        except torch.OutOfMemoryError as error:
            return f"out of memory: {error}"
        except Exception as error:
            traceback.print_exc()
            return f"failed: {type(error).__name__}: {error}"
