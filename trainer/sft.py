"""Cold start: supervised fine-tuning on reasoning chains, packed without padding.

    torchrun trainer/sft.py --model CHECKPOINT --data stage1.json      one process per GPU: --nproc_per_node 8

The loss is the mean negative log-probability of the assistant's tokens, all turns, over the whole step's tokens.
Left out, on purpose: padding, truncation (a conversation over --cutoff_len is skipped and named), logits.
"""

import functools
import time
from collections.abc import Sequence

import torch

from boxgrpo.kernels import token_logps
from boxgrpo.model.packing import (
    Conversation,
    Group,
    PackedBatch,
    forward_flop,
    pack_conversations,
    plan_packs,
    tower_flop,
)
from boxgrpo.trainer.data.loader import Sample
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.engine.ddp import make_engine
from boxgrpo.trainer.engine.lora import add_adapters
from boxgrpo.trainer.evaluation.validation import Validation
from boxgrpo.trainer.options import SftOptions, parse, validate_sft
from boxgrpo.trainer.profiling.profiler import profiled
from boxgrpo.trainer.run import loaded_model, make_loader, read_usable, save_pretrained, total_steps
from boxgrpo.trainer.runtime.checkpoints import Checkpoints, Progress
from boxgrpo.trainer.runtime.ranks import Ranks, ranks, run_as_script
from boxgrpo.trainer.runtime.reporter import Reporter, check_output_dir, claim_output_dir
from boxgrpo.trainer.runtime.spans import named_range, span, take_seconds
from boxgrpo.trainer.step.flop import peak_flop, sft_flop
from boxgrpo.trainer.step.metrics import run_metrics
from boxgrpo.trainer.step.pack import Budget, even_out, in_packs_that_fit, missing_packs


def train(options: SftOptions, r: Ranks) -> None:
    """Train `options.model` on `options.data`; leaves the checkpoint and the metrics in `options.output_dir`."""
    o = options
    validate_sft(o, r.world_size)
    processor = Processor.from_pretrained(
        o.model, min_pixels=o.min_pixels, max_pixels=o.max_pixels, max_prompt_tokens=o.cutoff_len
    )
    examples, faults = read_usable(o, needs="turns")
    validation = Validation(o, processor, r)
    checkpoints = Checkpoints(o, r)
    found = checkpoints.find()
    check_output_dir(o, r, found)
    model = loaded_model(o, r)
    model.freeze_vision(o.freeze_vision)
    model.model.gradient_checkpointing = o.gradient_checkpointing
    if o.lora_rank:
        add_adapters(model, o)
    steps = total_steps(o, len(examples), o.train_batch_size)
    engine = make_engine(model, o, r, steps)
    progress = checkpoints.load(found, engine) if found else Progress()
    folder = claim_output_dir(o, r, found, progress.metrics_bytes)
    loader = make_loader(examples, processor.conversation, o.train_batch_size // r.world_size, o, r, progress)
    batches = iter(loader)
    report = Reporter(folder, r, steps, "sft", start=progress.step)
    logged, budget = progress.step, Budget(o.tokens_per_pass)
    write_model = functools.partial(save_pretrained, model, processor)

    make = functools.partial(make_packs, o, model.config, engine)

    def accumulate(packs: list[PackedBatch]):
        """Add the packs' gradients up; the packs and the loss (0-dim, this rank's)."""
        loss = torch.zeros((), device=r.device)
        for pack in packs:
            with named_range("forward", len(pack.input_ids)):
                logps = engine.model(pack, functools.partial(head, pack.targets))  # (N)
                pack_loss = -logps.sum() * (r.world_size / scored)  # ranks average their gradients afterwards
            with named_range("backward", len(pack.input_ids)):
                engine.backward(pack_loss)
            loss += pack_loss.detach()
        return packs, loss

    validation.after_step(progress, steps, model, engine, report)  # where the run was stopped before it
    for step in profiled(range(progress.step + 1, steps + 1), o, r):
        started = time.perf_counter()
        with span("data"):
            samples = next(batches)
            groups = shared_out(o, model.config, samples, r)
            scored = r.sum(sum(int(s.item.loss_mask[1:].sum()) for s in samples))[0]
        with span("policy", len(groups)):
            packs, loss = in_packs_that_fit(groups, budget, engine, make, accumulate)
        with span("optimizer"):
            grad_norm, updated = engine.step()

        flop = sft_flop(o, model.config, [g.prompt for g in groups])
        tokens, flop, asked_to_stop = r.sum(sum(len(p.input_ids) for p in packs), flop, r.stop_asked)  # of all ranks
        progress.step, progress.position, progress.faults = step, loader.position, loader.faults
        progress.num_tokens += int(tokens)
        progress.skipped_steps += not updated
        report.advance(loss=float(loss))  # waits for the device: the clock below then shows the whole step
        if step % o.logging_steps == 0 or step == steps:
            metrics = run_metrics(
                r,
                engine,
                progress,
                loss=loss,
                grad_norm=grad_norm,
                tokens=tokens,
                flop=flop,
                peak=peak_flop(o, r.device),
                epoch=loader.epoch,
                seconds=time.perf_counter() - started,
                unusable=len(faults),
            )
            metrics |= take_seconds(step - logged)
            report.log(step, r.mean_metrics(metrics))
            logged = step
        validation.after_step(progress, steps, model, engine, report, stop=asked_to_stop > 0)
        progress.metrics_bytes = report.bytes_written
        checkpoints.after_step(progress, steps, engine, write_model, stop=asked_to_stop > 0)
    checkpoints.save_result(folder, engine, write_model)
    report.close()


def head(targets, hidden, weight):
    """(N) fp32 log-probabilities of the targets: the model's head, called with (N, H) and (V, H)."""
    with named_range("head+loss", len(hidden), len(weight)):
        return token_logps(hidden, weight, targets)


def conversation_flop(o, config, c: Conversation) -> float:
    """A third of forward and backward; a frozen tower has no backward, which elsewhere is twice the forward."""
    decoder = forward_flop(config, len(c.input_ids), (), int(c.loss_mask.sum()))
    return decoder + tower_flop(config, c.image_grid_thw) / (3 if o.freeze_vision else 1)


def shared_out(o, config, samples: list[Sample], r: Ranks) -> list[Group]:
    """This rank's part of all ranks' conversations, as costly as the others'."""
    groups = [Group(s.item, (), source=s.example.source) for s in samples]
    return even_out(groups, [conversation_flop(o, config, g.prompt) for g in groups], r)


def make_packs(o, config, engine, groups: Sequence[Group], budget: int) -> list[PackedBatch]:
    """Packs of at most `budget` tokens and of like cost; where ranks must run as many as each other, empty ones too."""
    conversations = [g.prompt for g in groups]
    sizes = [len(c.input_ids) for c in conversations]
    plan = plan_packs(sizes, budget, [conversation_flop(o, config, c) for c in conversations])
    plan += [[]] * missing_packs(engine, len(plan))
    image, device = config.image_token_id, engine.ranks.device
    return [pack_conversations([conversations[i] for i in chosen], image_token_id=image).to(device) for chosen in plan]


def main(args: list[str] | None = None) -> None:
    options = parse(SftOptions, args, prog="sft.py")
    with ranks(options.timeout) as r, r.noting_sigterm():
        train(options, r)


if __name__ == "__main__":
    run_as_script(main, "sft.py")
