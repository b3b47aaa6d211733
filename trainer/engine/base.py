"""What the loops ask of an engine: optimizer, schedule, gradient exchange and sharding behind one interface."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn


class PeerOutOfMemory(torch.OutOfMemoryError):
    """Memory ran out on another rank, and this one starts the step over with it."""


class Engine(Protocol):
    """Trains the parameters of a model that require a gradient.

    A step is `check_room(packs)`, then for each pack `model(pack, head)` and `backward(loss)`, then `step()`; where
    memory runs out in between, `start_over(error)`.

    Attributes:
        model: to be called in place of the module it was made from.
        ranks: the processes that train together.
        lockstep: ranks synchronise in each pack, so all must run the same number, empty packs if need be.
        least_packs: packs that must run before `step`.
        shards_weights: no rank holds all weights outside `gathered_weights`.
    """

    model: nn.Module
    lockstep: bool
    least_packs: int
    shards_weights: bool

    @property
    def learning_rate(self) -> float: ...

    def frozen(self, model: nn.Module) -> nn.Module:
        """A model that is never trained, ready to be called; sharded where the engine shards."""

    def gathered_weights(self) -> AbstractContextManager:
        """Within the block every rank has all weights; every rank enters and leaves it together."""

    def check_room(self, packs) -> None:
        """Raise NoRoom before any pack is run where one cannot fit, on engines whose ranks cannot start over."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one pack; its loss is already divided by the step's global count."""

    def start_over(self, error: torch.OutOfMemoryError) -> None:
        """Forget the gradients accumulated since the last update, after memory ran out."""

    def step(self) -> tuple[Tensor, bool]:
        """Average over ranks, clip, update, clear.

        Where a loss or a gradient of any rank is NaN or infinite, no rank updates; the schedule advances all the same.

        Returns:
            The gradient's norm before clipping, a 0-dim tensor, and whether there was an update; alike on every rank.
        """

    def save(self, folder: Path) -> None:
        """Write trained weights in fp32, moments and the schedule's state."""

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
