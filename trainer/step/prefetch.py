"""A step's groups with their image embeddings, which a GPU computes one step ahead."""

import contextlib

import torch

from boxgrpo.model.batch import Group
from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.data.loader import Loader
from boxgrpo.trainer.rollout.local import embed_images


class PrefetchedBatches:
    """The loader's samples as groups; with a frozen tower also the embeddings of their images.

    On a GPU the tower computes the next step's images on a stream of its own while this step decodes, which leaves the
    matrix units nearly idle. On a CPU they are computed when they are needed.

    Args:
        early: whether to compute ahead; None: on a GPU. Not where the tower's weights are gathered for a while only.
        sharded: whether ranks synchronise in the tower's layers.

    Attributes:
        position: the loader's, without the samples taken ahead: where to go on after a restart.
    """

    def __init__(
        self, loader: Loader, policy: Qwen2VL, *, frozen: bool, early: bool | None = None, sharded: bool = False
    ):
        self.loader, self.policy, self.frozen, self.sharded = loader, policy, frozen, sharded
        on_gpu = policy.device.type == "cuda"
        self.early = frozen and (on_gpu if early is None else early)
        self.stream = torch.cuda.Stream(policy.device) if on_gpu and self.early else None
        self.position = loader.position
        self._batches = iter(loader)
        self._ahead: tuple[list[Group], int] | None = None

    def next(self) -> list[Group]:
        """The next step's groups; they have embeddings where those were computed ahead."""
        groups, self.position = self._ahead or self._take()
        self._ahead = None
        return groups

    def embed(self, groups: list[Group]) -> list[Group]:
        """The groups with embeddings, none with a trained tower, which runs in every pack; then starts the next step's.

        A group whose images do not fit into memory is left out and named.
        """
        if self.frozen and not self.early:
            return embed_images(self.policy, groups, sharded=self.sharded)
        if self.early:
            if self.stream:
                here = torch.cuda.current_stream()
                here.wait_stream(self.stream)
                for group in groups:
                    if group.image_embeds is not None:
                        group.image_embeds.record_stream(here)
            self._ahead = self._take()
        return groups

    def _take(self) -> tuple[list[Group], int]:
        """The loader's next groups, and its position behind them."""
        samples = next(self._batches)
        groups = [Group(s.item, serial=s.serial, record=s.example) for s in samples]
        if self.early:
            if self.stream:
                self.stream.wait_stream(torch.cuda.current_stream())  # the first time, for the weights
            with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
                groups = embed_images(self.policy, groups, sharded=self.sharded)
        return groups, self.loader.position
