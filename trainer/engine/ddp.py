"""Plain data parallelism: every rank holds the whole model.

Gradients are averaged once, after the step's last pack, in a few flat buffers. Overlapping this with the backward pass
would save little, as a step is mostly sampling, and would require the same number of packs on every rank.
"""

import functools
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .optimizer import load_state, make_optimizer, make_schedule, save_state, set_optimizer_state

BUCKET_BYTES = 64 << 20


class DataParallelEngine:
    """An `Engine` that keeps fp32 master weights for parameters of lower precision.

    Attributes:
        masters: the fp32 tensors that are updated, by the parameters' names; a parameter in fp32 is its own master.
        rounded: (parameter, master) pairs of the parameters of lower precision.
    """

    lockstep = False  # ranks synchronise in `step` alone
    min_packs = 0
    shards_weights = False
    gathered_weights = staticmethod(nullcontext)
    check_memory = None

    def __init__(self, model: nn.Module, options, ranks, total_steps: int):
        self.model, self.ranks, self.max_grad_norm = model, ranks, options.max_grad_norm
        if ranks.world_size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: self.master_of(p) for name, p in trained.items()}
        self.rounded = [(p, self.masters[name]) for name, p in trained.items() if p is not self.masters[name]]
        for p, master in self.rounded:
            p.register_post_accumulate_grad_hook(functools.partial(_move_gradient, master))
        self.optimizer = make_optimizer([*self.masters.values()], options)
        # The moments are allocated here, not at the first update, so that the first packs fit beside them.
        for master in self.masters.values():
            moments = {"exp_avg": torch.zeros_like(master), "exp_avg_sq": torch.zeros_like(master)}
            set_optimizer_state(self.optimizer, master, {"step": torch.zeros(()), **moments})
        self.schedule = make_schedule(self.optimizer, options, total_steps)

    @staticmethod
    def master_of(p: nn.Parameter) -> nn.Parameter:
        """The fp32 tensor that is updated in place of `p`: in bf16 an update of 1e-6 would be rounded away."""
        return p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        return model

    def backward(self, loss: Tensor) -> None:
        # If the loss is not finite, all gradients become NaN, after the all-reduce on every rank.
        (loss * (1 + 0 * loss.detach())).backward()

    def restart_step(self, error: torch.OutOfMemoryError) -> None:
        self.optimizer.zero_grad()
        self.model.zero_grad()  # of a parameter whose gradient could not be moved to its master

    @torch.no_grad()
    def step(self) -> tuple[Tensor, bool]:
        masters = [*self.masters.values()]
        for master in masters:
            if master.grad is None:  # no pack of this rank used it
                master.grad = torch.zeros_like(master)
        if self.ranks.world_size > 1:
            self._average_gradients([master.grad for master in masters])
        grad_norm = nn.utils.clip_grad_norm_(masters, self.max_grad_norm or float("inf"))
        updates = bool(grad_norm.isfinite())
        if updates:
            self.optimizer.step()
            for p, master in self.rounded:
                p.copy_(master)
        self.schedule.step()
        self.optimizer.zero_grad()
        return grad_norm, updates

    def save(self, folder: Path) -> None:
        """Weights, moments and schedule are the same on every rank: rank 0 writes them."""
        if self.ranks.is_main:
            save_state(folder / "rank0.safetensors", self.masters, self.optimizer, self.schedule)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, on any number of ranks."""
        load_state(folder / "rank0.safetensors", self.masters, self.optimizer, self.schedule)
        for p, master in self.rounded:
            p.copy_(master)

    def _average_gradients(self, gradients: list[Tensor]) -> None:
        bucket: list[Tensor] = []
        for gradient in gradients:
            bucket.append(gradient)
            if sum(g.nbytes for g in bucket) < BUCKET_BYTES and gradient is not gradients[-1]:
                continue
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            flat /= self.ranks.world_size
            for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(part.view_as(g))
            bucket = []


def _move_gradient(master: nn.Parameter, p: nn.Parameter) -> None:
    """Add a gradient to the master's in fp32 and free it: no second set of gradients is kept, no sum is in bf16."""
    master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
    p.grad = None
