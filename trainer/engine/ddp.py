"""Data parallelism in the plainest form: every rank holds the whole model.

Gradients are averaged once, after the step's last pack, in a few flat buffers. Overlapping that with the backward pass
would win little where a step is mostly sampling, and without it ranks may run different numbers of packs.
"""

import functools
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .optimizer import (
    STATE,
    make_optimizer,
    make_schedule,
    optimizer_state,
    schedule_state,
    set_optimizer_state,
    set_schedule_state,
)

BUCKET_BYTES = 64 << 20


class DataParallelEngine:
    """An `Engine` that keeps fp32 master weights of a model below fp32."""

    lockstep = False  # ranks synchronise in `step` alone
    least_packs = 0
    shards_weights = False
    gathered_weights = staticmethod(nullcontext)
    check_room = None

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
        self.masters = [self.master_of(p) for p in self.parameters]
        for p, master in zip(self.parameters, self.masters, strict=True):
            if p is not master:
                p.register_post_accumulate_grad_hook(functools.partial(_move_gradient, master))
        self.optimizer = make_optimizer(self.masters, options)
        for master in self.masters:  # now, not at the first update: the first packs that fit are then of a size to stay
            moments = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
            set_optimizer_state(self.optimizer, master, {"step": torch.zeros(()), **moments})
        self.schedule = make_schedule(self.optimizer, options, total_steps)

    @staticmethod
    def master_of(p: nn.Parameter) -> nn.Parameter:
        """What is updated in the parameter's place. An update of 1e-6 is lost in bf16: a copy in fp32 can hold it."""
        return p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())

    def frozen(self, model: nn.Module) -> nn.Module:
        return model

    def backward(self, loss: Tensor) -> None:
        # The gradients of a loss that is not finite become NaN: the all-reduce shows that to every rank.
        (loss * (1 + 0 * loss.detach())).backward()

    def start_over(self, error: torch.OutOfMemoryError) -> None:
        self.optimizer.zero_grad()

    def step(self) -> tuple[Tensor, bool]:
        for master in self.masters:
            if master.grad is None:  # a step whose packs had no use for it, on this rank at least
                master.grad = torch.zeros_like(master)
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
        tensors = {"schedule": schedule_state(self.schedule)}
        for name, master in zip(self.names, self.masters, strict=True):
            tensors[f"{name}/weight"] = master.detach()
            tensors |= {f"{name}/{key}": value for key, value in optimizer_state(self.optimizer, master).items()}
        save_file(tensors, folder / "rank0.safetensors")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """What `save` wrote, on any number of ranks."""
        tensors = load_file(folder / "rank0.safetensors")
        for name, p, master in zip(self.names, self.parameters, self.masters, strict=True):
            master.copy_(tensors[f"{name}/weight"])
            p.copy_(master)
            set_optimizer_state(self.optimizer, master, {k: tensors.get(f"{name}/{k}") for k in STATE})
        set_schedule_state(self.schedule, tensors["schedule"])

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
