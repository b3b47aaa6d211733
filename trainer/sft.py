"""Cold start: supervised fine-tuning on reasoning chains, packed without padding.

    torchrun trainer/sft.py --model CHECKPOINT --data stage1.json      one process per GPU: --nproc_per_node 8

The loss is the mean negative log-probability of the assistant's tokens, all turns, over the whole step's tokens.
Left out, on purpose: padding, truncation (a conversation over --cutoff_len is skipped and named), logits.
"""

import sys
import time

import torch

from boxgrpo.kernels import token_logps
from boxgrpo.model.checkpoint import load_model
from boxgrpo.model.packing import Conversation, Group, PackedBatch, forward_flop, pack_conversations, plan_packs
from boxgrpo.trainer.common import chosen_dtype, make_loader, read_usable, save_checkpoint, total_steps
from boxgrpo.trainer.engine import Engine
from boxgrpo.trainer.metrics import run_metrics
from boxgrpo.trainer.options import SftOptions, parse, validate_sft
from boxgrpo.trainer.packs import even_out
from boxgrpo.trainer.processing import Processor
from boxgrpo.trainer.ranks import Ranks, ranks
from boxgrpo.trainer.reporter import Reporter, check_output_dir, claim_output_dir
from boxgrpo.trainer.spans import span, take_seconds


def train(options: SftOptions, r: Ranks) -> None:
    """Train `options.model` on `options.data`; leaves the checkpoint and the metrics in `options.output_dir`."""
    o = options
    validate_sft(o, r.world_size)
    processor = Processor.from_pretrained(
        o.model, min_pixels=o.min_pixels, max_pixels=o.max_pixels, max_prompt_tokens=o.cutoff_len
    )
    examples, faults = read_usable(o, needs="turns")
    check_output_dir(o, r)
    model = load_model(o.model, dtype=chosen_dtype(o.dtype, r.device), device=r.device)
    model.freeze_vision(o.freeze_vision)
    model.model.gradient_checkpointing = o.gradient_checkpointing
    steps = total_steps(o, len(examples), o.train_batch_size)
    engine = Engine(model, o, r, steps)
    folder = claim_output_dir(o, r)
    loader = make_loader(examples, processor.conversation, o.train_batch_size // r.world_size, o, r)
    batches = iter(loader)
    report = Reporter(folder, r, steps, "sft")
    tokens_seen = logged = 0

    for step in range(1, steps + 1):
        started = time.perf_counter()
        with span("data"):
            packs = make_packs(o, model.config, [s.item for s in next(batches)], r)
            scored = r.sum(sum(len(p.targets) for p in packs))[0]
        loss = torch.zeros((), device=r.device)
        with span("policy"):
            for pack in packs:
                logps = model(pack, lambda h, w, pack=pack: token_logps(h, w, pack.targets))  # (N)
                pack_loss = -logps.sum() * (r.world_size / scored)  # ranks average their gradients afterwards
                engine.backward(pack_loss)
                loss += pack_loss.detach()
        with span("optimizer"):
            grad_norm = engine.step()

        tokens = int(*r.sum(sum(len(p.input_ids) for p in packs)))  # of all ranks
        tokens_seen += tokens
        report.advance(loss=float(loss))  # waits for the device: the clock below then shows the whole step
        if step % o.logging_steps == 0 or step == steps:
            metrics = run_metrics(
                r,
                engine,
                loader,
                loss=loss,
                grad_norm=grad_norm,
                tokens=tokens,
                num_tokens=tokens_seen,
                seconds=time.perf_counter() - started,
                skipped=len(faults),
            )
            metrics |= take_seconds(step - logged)
            report.log(step, r.mean_metrics(metrics))
            logged = step
        if o.save_steps and step % o.save_steps == 0 and step < steps:
            save_checkpoint(model, processor, folder / f"checkpoint-{step}", r)
    save_checkpoint(model, processor, folder, r)
    report.close()


def make_packs(o, config, conversations: list[Conversation], r: Ranks) -> list[PackedBatch]:
    """This rank's share of the ranks' conversations, by cost, in packs within `tokens_per_pass` and of like cost."""

    def flop(c: Conversation) -> float:
        return forward_flop(config, len(c.input_ids), (), int(c.loss_mask.sum()), c.image_grid_thw)

    groups = even_out([Group(c, ()) for c in conversations], [flop(c) for c in conversations], r)
    mine = [g.prompt for g in groups]
    plan = plan_packs([len(c.input_ids) for c in mine], o.tokens_per_pass, [flop(c) for c in mine])
    image = config.image_token_id
    return [pack_conversations([mine[i] for i in chosen], image_token_id=image).to(r.device) for chosen in plan]


def main(args: list[str] | None = None) -> None:
    with ranks() as r:
        train(parse(SftOptions, args, prog="sft.py"), r)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"sft.py: {error}")
