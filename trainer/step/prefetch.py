"""A step's samples and their image embeddings, which a GPU computes one step ahead."""

import contextlib
import logging

import torch
from torch import Tensor

from boxgrpo.model.families.qwen2_vl import Qwen2VL
from boxgrpo.trainer.data.loader import Loader, Sample
from boxgrpo.trainer.rollout.local import embed_prompts

log = logging.getLogger(__name__)


class Ahead:
    """Samples of a loader; with a frozen tower also the embeddings of their images.

    On a GPU the tower sees the next step's images on a stream of its own while this step decodes, which leaves the
    matrix units nearly idle. A CPU has nothing idle: there the images are seen when they are asked for.

    Args:
        early: whether to look ahead; None: on a GPU. Not where the tower's weights are gathered for a while only.
        sharded: whether ranks meet in the tower's layers.

    Attributes:
        position: the loader's, without the samples that are looked at ahead: where to go on after a restart.
    """

    def __init__(
        self, loader: Loader, policy: Qwen2VL, *, frozen: bool, early: bool | None = None, sharded: bool = False
    ):
        self.loader, self.policy, self.frozen, self.sharded = loader, policy, frozen, sharded
        self.early = frozen and (policy.device.type == "cuda" if early is None else early)
        self.stream = torch.cuda.Stream(policy.device) if policy.device.type == "cuda" else None
        self.batches = iter(loader)
        self.position = loader.position
        self.current: tuple[list[Sample], list[Tensor | None] | None, int] | None = None
        self.next = None

    @property
    def epoch(self) -> float:
        """Passes over the data so far, by all ranks."""
        return self.position / len(self.loader)

    @property
    def faults(self) -> dict[str, str]:
        return self.loader.faults

    def samples(self) -> list[Sample]:
        """The next step's."""
        self.current = self.next or self._start()
        self.next = None
        samples, _, self.position = self.current
        return samples

    def embedded(self) -> tuple[list[Sample], list[Tensor | None] | None]:
        """The samples last given, and (p / 4, H) for each; None with a trained tower, which runs in every pack.

        A sample whose images do not fit into memory is left out, and named.
        """
        samples, embeds, _ = self.current
        if self.frozen and embeds is None:
            embeds = self._embed(samples)
        if self.early:
            if self.stream:
                here = torch.cuda.current_stream()
                here.wait_stream(self.stream)
                for tensor in embeds:
                    if tensor is not None:
                        tensor.record_stream(here)
            self.next = self._start()
        if embeds is None:
            return samples, None
        fit = [embed is None or len(embed) > 0 for embed in embeds]
        for sample in (s for s, fits in zip(samples, fit, strict=True) if not fits):
            log.warning("left out %s: its images alone run out of memory", sample.example.source)
        return [s for s, fits in zip(samples, fit) if fits], [e for e, fits in zip(embeds, fit) if fits]

    def _start(self):
        samples = next(self.batches)
        return samples, self._embed(samples) if self.early else None, self.loader.position

    def _embed(self, samples: list[Sample]):
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())  # the first time, for the weights
        with torch.cuda.stream(self.stream) if self.early and self.stream else contextlib.nullcontext():
            return embed_prompts(self.policy, [s.item for s in samples], sharded=self.sharded)
