"""Optimizer, schedule and gradient exchange: data parallelism in the plainest form.

Gradients are averaged once, after the step's last pack, in a few flat buffers. Overlapping that with the backward pass
would win little where a step is mostly sampling, and without it ranks may run different numbers of packs.
"""

import functools
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import get_scheduler

BUCKET_BYTES = 64 << 20
DECAY_RATIO = 0.2  # share of the steps in which `warmup_stable_decay` falls to zero


class Engine:
    """Data parallelism, every rank with the whole model.

    Trains the parameters of `model` that require a gradient; below fp32 it keeps fp32 master weights.
    """

    lockstep = False  # ranks meet in `step` alone: each may run as many packs as it likes

    def __init__(self, model: nn.Module, options, ranks, total_steps: int):
        self.model = model
        self.ranks = ranks
        self.max_grad_norm = options.max_grad_norm
        if ranks.world_size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)
        self.names, self.parameters = zip(
            *((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True
        )
        # An update of 1e-6 is lost in bf16: it is added to a copy that can hold it. (fp32: the copy is the parameter.)
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters]
        for p, master in zip(self.parameters, self.masters, strict=True):
            if p is not master:
                p.register_post_accumulate_grad_hook(functools.partial(_move_gradient, master))
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=options.learning_rate,
            betas=(0.9, options.adam_beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )
        shape = None
        if options.lr_scheduler_type == "warmup_stable_decay":
            shape = {"num_decay_steps": round(DECAY_RATIO * total_steps)}
        self.schedule = get_scheduler(
            options.lr_scheduler_type,
            self.optimizer,
            num_warmup_steps=round(options.warmup_ratio * total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=shape,
        )

    @property
    def learning_rate(self) -> float:
        return self.schedule.get_last_lr()[0]

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of one pack; its loss is already divided by the step's global count."""
        loss.backward()

    def clear(self) -> None:
        """Forget the gradients accumulated so far."""
        self.optimizer.zero_grad()

    def step(self, loss: Tensor) -> tuple[Tensor, bool]:
        """Average over ranks, clip, update, clear.

        Where the `loss` or a gradient of any rank is NaN or infinite, no rank updates; the schedule goes on.

        Returns:
            The gradient's norm before clipping, a 0-dim tensor, and whether there was an update; alike on every rank.
        """
        for master in self.masters:
            if master.grad is None:  # a step whose packs had no use for it, on this rank at least
                master.grad = torch.zeros_like(master)
        self.masters[0].grad.view(-1)[0] += 0 * loss.detach()  # NaN when the loss is not finite; the average tells all
        if self.ranks.world_size > 1:
            self._average_gradients()
        grad_norm = nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm or float("inf"))
        updates = bool(grad_norm.isfinite())
        if updates:
            self.optimizer.step()
            with torch.no_grad():
                for p, master in zip(self.parameters, self.masters, strict=True):
                    if p is not master:
                        p.copy_(master)
        self.schedule.step()
        self.optimizer.zero_grad()
        return grad_norm, updates

    def save(self, folder: Path) -> None:
        """Trained weights in fp32, moments and the schedule's place: the same on every rank, written by rank 0."""
        if not self.ranks.is_main:
            return
        tensors = {"schedule": torch.tensor([self.schedule.last_epoch, self.learning_rate], dtype=torch.float64)}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"{name}/weight"] = master.detach()
            tensors |= {f"{name}/{key}": value for key, value in self.optimizer.state[master].items()}
        save_file(tensors, folder / "rank0.safetensors")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """What `save` wrote, on any number of ranks."""
        tensors = load_file(folder / "rank0.safetensors")
        for name, p, master in zip(self.names, self.parameters, self.masters, strict=True):
            master.copy_(tensors[f"{name}/weight"])
            p.copy_(master)
            moments = {k: tensors[f"{name}/{k}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{k}" in tensors}
            if moments:
                self.optimizer.state[master] = {k: v.to(master.device) for k, v in moments.items()}
        place, rate = tensors["schedule"].tolist()
        here = {"last_epoch": int(place), "_step_count": int(place) + 1, "_last_lr": [rate]}
        self.schedule.load_state_dict(self.schedule.state_dict() | here)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _average_gradients(self) -> None:
        bucket: list[torch.Tensor] = []
        for master in self.masters:
            bucket.append(master.grad)
            if sum(g.nbytes for g in bucket) < BUCKET_BYTES and master is not self.masters[-1]:
                continue
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            flat /= self.ranks.world_size
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []


def _move_gradient(master: nn.Parameter, p: nn.Parameter) -> None:
    """Add a pack's gradient to the master's fp32 one as soon as it is there: no second full set, no sums in bf16."""
    master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
    p.grad = None
