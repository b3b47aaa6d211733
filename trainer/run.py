"""The code that both training loops share: model, engine, data, checkpoints, reports, evaluation and stopping."""

import copy
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from boxgrpo.model.checkpoint import load_model
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.data.loader import Loader, check_preparable
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_usable
from boxgrpo.trainer.engine.base import Engine
from boxgrpo.trainer.engine.ddp import DataParallelEngine
from boxgrpo.trainer.engine.deepspeed import DeepSpeedEngine
from boxgrpo.trainer.engine.lora import add_adapters, save_pretrained
from boxgrpo.trainer.evaluation.validation import Validation
from boxgrpo.trainer.options import DataOptions, profile_is_too_late, profile_window, resolve_dtype
from boxgrpo.trainer.profiling.profiler import profiled
from boxgrpo.trainer.runtime.checkpoints import Checkpoints, Progress
from boxgrpo.trainer.runtime.ranks import STOPPED, Ranks, RunFailed
from boxgrpo.trainer.runtime.reporter import Reporter, check_output_dir, claim_output_dir, peak_memory_gb
from boxgrpo.trainer.runtime.spans import named_range, pop_timings
from boxgrpo.trainer.step.metrics import peak_flop
from boxgrpo.trainer.step.pack import Budget

log = logging.getLogger(__name__)


def make_engine(model: nn.Module, options: DataOptions, ranks: Ranks, total_steps: int) -> Engine:
    """The engine that `options.engine` names."""
    kind = DeepSpeedEngine if options.engine == "deepspeed" else DataParallelEngine
    return kind(model, options, ranks, total_steps)


@dataclass
class Hooks:
    """Callbacks for a program that runs a training loop, such as a benchmark; the defaults change nothing."""

    model_loaded: Callable[[Qwen2VL], Any] = lambda model: None
    make_engine: Callable[..., Engine] = make_engine
    examples: Callable[..., tuple[Sequence, list]] = read_usable  # called with the options and needs=
    vocabulary: Callable[[Any], Any] = lambda vocabulary: vocabulary  # a rollout.base.Vocabulary
    rewards: Callable[[list, Any], Any] = lambda groups, rewards: rewards  # takes sampled groups and GroundingRewards
    pack_loss: Callable[[Tensor], Tensor] = lambda loss: loss  # called before the backward pass
    step_taken: Callable[[int], Any] = lambda step: None
    write_model: Callable | None = None  # called with a folder, instead of writing the weights there


class Run:
    """A training run: everything that surrounds the loop's steps.

    Args:
        needs: what a record must have to be used, `gold` (a box) or `turns` (answer texts).
        max_tokens: longest prompt or conversation.
        batch_size: records per step, over all ranks.
        updates: optimizer updates per step.
        reference: whether the loss needs a reference model, the policy at the start of the run.

    Attributes:
        policy: the model that is trained; call `engine.model` in its place.
        reference: the reference model, or None. With LoRA it is `engine.model`, to be called without its adapters.
        progress: the step, the position in the data, and counts.
        loader: the stream of prepared records from `progress` on.
    """

    def __init__(
        self,
        options: DataOptions,
        r: Ranks,
        hooks: Hooks,
        *,
        needs: str,
        max_tokens: int,
        batch_size: int,
        updates: int = 1,
        reference: bool = False,
    ):
        o = self.options = options
        self.ranks, self.hooks = r, hooks
        self.processor = Processor.from_pretrained(
            o.model, min_pixels=o.min_pixels, max_pixels=o.max_pixels, max_prompt_tokens=max_tokens
        )
        self.examples, self.unusable = hooks.examples(o, needs=needs)
        prepare = self.processor.prompt if needs == "gold" else self.processor.conversation
        check_preparable(self.examples, prepare, "Correct --data or its paths.")
        self.validation = Validation(o, self.processor, r)
        self.checkpoints = Checkpoints(o, r)
        self.checkpoint = self.checkpoints.find()
        check_output_dir(o, r, self.checkpoint)
        self.total_steps = total_steps(o, len(self.examples), batch_size)
        if batch_size > (count := len(self.examples)) and r.is_main:
            log.warning("a step takes %d records and %d can be used: it takes some more than once", batch_size, count)
        if self.checkpoint and (step := self.checkpoints.step_of(self.checkpoint)) > self.total_steps:
            raise ValueError(
                f"{self.checkpoint} is at step {step}; the run is to end with step {self.total_steps}. Raise "
                "--max_steps or --num_train_epochs, or resume an earlier checkpoint."
            )
        if (window := profile_window(o.profile_steps)) and window.start > self.total_steps:
            raise ValueError(profile_is_too_late(o.profile_steps, self.total_steps))
        self.policy = load_policy(o, r)
        hooks.model_loaded(self.policy)
        copied = frozen_copy(self.policy, without_vision=o.freeze_vision) if reference and not o.lora_rank else None
        self.engine = hooks.make_engine(self.policy, o, r, self.total_steps * updates)
        self.reference = None
        if reference:
            self.reference = self.engine.model if copied is None else self.engine.prepare_frozen(copied)
        self.progress = self.checkpoints.load(self.checkpoint, self.engine) if self.checkpoint else Progress()
        self.loader = Loader(
            self.examples,
            prepare,
            batch_size=batch_size // r.world_size,
            seed=o.seed,
            workers=o.dataloader_num_workers,
            rank=r.rank,
            world_size=r.world_size,
            start=self.progress.position,
            pin_for=r.device if r.device.type == "cuda" else None,
        )
        self.loader.faults |= self.progress.faults
        self.budget = Budget(o.tokens_per_pass)
        self.peak_flop = peak_flop(o, r.device)

    def begin(self, title: str) -> None:
        """Claim the output folder and start the report."""
        o, r, progress = self.options, self.ranks, self.progress
        self.folder = claim_output_dir(o, r, self.checkpoint, progress.metrics_bytes)
        self.report = Reporter(self.folder, r, self.total_steps, title, start=progress.step)
        self.logged = progress.step

    def steps(self, position: Callable[[], int], written: Callable[[], dict] = dict) -> Iterator[int]:
        """Yield each step's number; the loop's body ends with `log_step`. Then checkpoint and evaluation follow if due.

        The weights are written before the evaluation, the run's result too, so that nothing it meets can lose them.

        Args:
            position: returns the position in the data stream after the step's records.
            written: returns the bytes written so far to each file of completions, by name.

        Raises:
            SystemExit: with 143 (128 + SIGTERM), after a launcher's SIGTERM.
            RunFailed: more than `max_skipped` steps had no update.
        """
        o, r, progress, total = self.options, self.ranks, self.progress, self.total_steps
        self.position = position
        write_model = self.hooks.write_model or functools.partial(save_pretrained, self.policy, self.processor)
        evaluate = functools.partial(self.validation.after_step, progress, total, self.policy, self.engine, self.report)
        numbers = range(progress.step + 1, total + 1)
        if not numbers:
            self.checkpoints.save_result(self.folder, self.engine, write_model)
        if o.eval_every:
            evaluate()  # if the run was stopped before a due evaluation
        for step in profiled(numbers, o, r) if o.profile_steps or o.memory_snapshot else numbers:
            self.started = time.perf_counter()
            self.is_logged = step % o.logging_steps == 0 or step == total
            progress.step = step
            with named_range("step", step):
                yield step
            progress.position, progress.faults = position(), self.loader.faults
            stop = r.sum(r.stop_requested)[0] > 0
            if progress.skipped_steps > o.max_skipped:
                raise RunFailed(
                    f"{progress.skipped_steps} updates in {step} steps had a loss or a gradient that is NaN or "
                    f"infinite; max_skipped is {o.max_skipped}. Lower --learning_rate, or continue from an "
                    "earlier checkpoint with --resume."
                )
            if stop or (o.save_steps and (step % o.save_steps == 0 or step == total)):
                progress.rollout_bytes = written()
                saved = self.checkpoints.save(progress, self.engine, write_model)
            if stop:
                log.warning("SIGTERM received: saved %s; --resume auto continues from there", saved)
                raise SystemExit(STOPPED)
            if step == total:
                self.checkpoints.save_result(self.folder, self.engine, write_model)
            if o.eval_every:
                evaluate()
            self.hooks.step_taken(step)
        self.report.close()

    def log_step(
        self,
        *,
        loss: Tensor,
        grad_norm: Tensor,
        tokens: int,
        flop: float,
        shown: dict[str, float],
        extra: dict[str, float] | None = None,
    ) -> None:
        """Report the current step of `steps`.

        Args:
            loss, grad_norm: 0-dim tensors.
            tokens, flop: of this rank's part of the step.
            shown: values for the progress bar.
            extra: this rank's further metrics, used if the step `is_logged`.
        """
        r, progress = self.ranks, self.progress
        tokens, flop = r.sum(tokens, flop)
        progress.num_tokens += int(tokens)
        self.report.advance(**shown)  # synchronises with the device, so that the clock below covers the whole step
        if not self.is_logged:
            return
        seconds = time.perf_counter() - self.started
        metrics = {} if self.peak_flop is None else {"perf/mfu": flop / (seconds * self.peak_flop * r.world_size)}
        metrics |= {
            "loss": float(loss),
            "grad_norm": float(grad_norm),
            "learning_rate": self.engine.schedule.get_last_lr()[0],
            "epoch": self.position() / len(self.examples),
            "num_tokens": progress.num_tokens,
            "skipped_steps": progress.skipped_steps,
            "step_time": seconds,
            "data/skipped": len(self.unusable) + len(set().union(*r.gather(set(self.loader.faults)))),
            "perf/tokens_per_second": tokens / seconds,
            "perf/peak_memory_gb": peak_memory_gb(r.device),
        }
        metrics |= (extra or {}) | pop_timings(progress.step - self.logged)
        self.report.log(progress.step, r.mean_metrics(metrics))
        self.logged = progress.step


def load_policy(o: DataOptions, r: Ranks) -> Qwen2VL:
    """Load `o.model` for training; for ZeRO-3 into host memory, from which the engine shards it to the devices."""
    sharded = o.engine == "deepspeed" and o.zero_stage == 3
    device = torch.device("cpu") if sharded else r.device
    policy = load_model(o.model, dtype=resolve_dtype(o.dtype, r.device), device=device)
    policy.freeze_vision(o.freeze_vision)
    policy.model.gradient_checkpointing = o.gradient_checkpointing
    if o.lora_rank:
        add_adapters(policy, o)
    return policy


def frozen_copy(policy: Qwen2VL, *, without_vision: bool) -> Qwen2VL:
    """The reference model. With `without_vision` it has no vision tower: the packs hold the image embeddings."""
    memo = {id(policy.visual): None} if without_vision else {}
    return copy.deepcopy(policy, memo).requires_grad_(False)


def total_steps(options: DataOptions, examples: int, per_step: int) -> int:
    """Optimizer steps of the run: `max_steps`, or as many as the epochs take."""
    return options.max_steps if options.max_steps > 0 else max(1, round(options.num_train_epochs * examples / per_step))
