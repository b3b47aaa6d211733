"""The engine's interface: optimizer, schedule, gradient exchange and sharding of weights."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from boxgrpo.model.batch import PackedBatch
from boxgrpo.trainer.runtime.ranks import Ranks


class PeerOutOfMemory(torch.OutOfMemoryError):
    """Memory ran out on another rank, so this rank must repeat the step, too."""


class Engine(Protocol):
    """Trains the parameters of a model that require a gradient.

    A step calls `check_memory(packs)` if it is not None, `model(pack, head)` and `backward(loss)` for each pack, and
    then `step()`. If memory runs out before that, `restart_step(error)` is called and the packs are made again.

    Attributes:
        model: to be called instead of the module from which the engine was made.
        ranks: the processes that train together.
        lockstep: ranks synchronise in each pack: all must run the same number of packs, empty ones included.
        min_packs: minimum number of packs that must run before `step`.
        shards_weights: outside of `gathered_weights` no rank holds all weights.
        schedule: torch's learning-rate scheduler; `step` advances it.
        check_memory: raises PacksDoNotFit on every rank, before any pack runs, if a pack does not fit on one of them;
            None on engines whose ranks can repeat a step alone.
    """

    model: Callable
    ranks: Ranks
    lockstep: bool
    min_packs: int
    shards_weights: bool
    schedule: torch.optim.lr_scheduler.LRScheduler
    check_memory: Callable[[Sequence[PackedBatch]], None] | None

    def prepare_frozen(self, model: nn.Module) -> Callable:
        """Prepare a model that is never trained; return the callable to use in its place."""

    def gathered_weights(self) -> AbstractContextManager:
        """Within the block every rank has all weights; all ranks must enter and leave it together."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one pack; its loss is already divided by the step's global count."""

    def restart_step(self, error: torch.OutOfMemoryError) -> None:
        """Discard the gradients accumulated since the last update, after memory ran out."""

    def step(self) -> tuple[Tensor, bool]:
        """Average the gradients over ranks, clip them, update the weights, clear the gradients.

        Where a loss or a gradient of any rank is NaN or infinite, no rank updates; the schedule advances in any case.

        Returns:
            The gradient's norm before clipping, a 0-dim tensor, and whether there was an update; equal on all ranks.
        """

    def save(self, folder: Path) -> None:
        """Write trained weights in fp32, moments and the schedule's state."""

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
