"""Cold start: supervised fine-tuning on reasoning chains, packed without padding.

    torchrun trainer/sft.py --model CHECKPOINT --data stage1.json      one process per GPU: --nproc_per_node 8

The loss is the mean negative log-probability of the assistant's tokens, all turns, over the whole step's tokens.
There is deliberately no padding, no truncation (a conversation over --cutoff_len is skipped) and no full logits.
"""

import functools

import torch

from boxgrpo.kernels import token_logps
from boxgrpo.model.batch import PackedBatch
from boxgrpo.trainer.arguments import parse
from boxgrpo.trainer.options import SftOptions, check_command, validate_sft
from boxgrpo.trainer.run import Hooks, Run
from boxgrpo.trainer.runtime.ranks import Ranks, join_ranks, run_as_script
from boxgrpo.trainer.runtime.spans import named_range, span
from boxgrpo.trainer.step.metrics import sft_flop
from boxgrpo.trainer.step.pack import balance_across_ranks, make_packs, run_packs_that_fit


def train(options: SftOptions, r: Ranks, hooks: Hooks | None = None) -> None:
    """Train `options.model` on `options.data`; write the checkpoint and the metrics to `options.output_dir`."""
    o = options
    validate_sft(o, r.world_size)
    size = {"max_tokens": o.cutoff_len, "batch_size": o.train_batch_size}
    run = Run(o, r, hooks or Hooks(), needs="turns", **size)
    policy, engine, progress, loader = run.policy, run.engine, run.progress, run.loader
    run.begin("sft")
    batches = iter(loader)
    # A frozen tower runs only the forward pass, one of three (a backward pass counts as two).
    cost = functools.partial(policy.group_flop, tower_passes=1 / 3 if o.freeze_vision else 1.0)
    make = functools.partial(make_packs, engine, cost, policy.config.image_token_id)

    for _ in run.steps(lambda: loader.position):
        with span("data"):
            groups = next(batches)
            trained = balance_across_ranks(groups, cost, r)
            scored = r.sum(sum(int(g.prompt.loss_mask[1:].sum()) for g in groups))[0]
        with span("policy", len(trained)):
            update = functools.partial(accumulate, run, scored)
            packs, loss = run_packs_that_fit(trained, run.budget, engine, make, update)
        with span("optimizer"):
            grad_norm, updated = engine.step()
        progress.skipped_steps += not updated
        run.log_step(
            loss=loss,
            grad_norm=grad_norm,
            tokens=sum(len(p.input_ids) for p in packs),
            flop=sft_flop(o, policy, trained) if run.peak_flop else 0.0,
            shown={"loss": float(loss)},
        )


def accumulate(run: Run, scored: float, packs: list[PackedBatch]):
    """Accumulate the packs' gradients; returns them and this rank's loss (0-dim). `scored`: tokens of all ranks."""
    loss = torch.zeros((), device=run.ranks.device)
    for pack in packs:
        with named_range("forward", len(pack.input_ids)):
            logps = run.engine.model(pack, functools.partial(head, pack.targets))  # (N)
            pack_loss = -logps.sum() * (run.ranks.world_size / scored)  # ranks average their gradients afterwards
            pack_loss = run.hooks.pack_loss(pack_loss)
        with named_range("backward", len(pack.input_ids)):
            run.engine.backward(pack_loss)
        loss += pack_loss.detach()
    return packs, loss


def head(targets, hidden, weight):
    """(N) fp32 log-probabilities of the targets. The model calls this as its head, with (N, H) and (V, H)."""
    with named_range("head+loss", len(hidden), len(weight)):
        return token_logps(hidden, weight, targets)


def main(args: list[str] | None = None) -> None:
    options = parse(SftOptions, args, prog="sft.py")
    check_command(options)
    with join_ranks(options.timeout) as r, r.record_sigterm():
        train(options, r)


if __name__ == "__main__":
    run_as_script(main, "sft.py")
