"""Checks, before any rank runs a step's packs, that they fit into memory.

Where ranks synchronise within a pass, as under ZeRO-3 and in the backward pass of ZeRO-2, a rank whose memory runs out
leaves the others waiting: none can start over. A pack's shape determines its memory to about a tenth (`model/cost.py`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from boxgrpo.model.attention import pick_backend
from boxgrpo.model.batch import PackedBatch
from boxgrpo.model.cost import Pack, Sharding, activation_bytes, bucket_bytes, count, layer_bytes, loss_bytes
from boxgrpo.trainer.runtime.ranks import Ranks

from .base import PeerOutOfMemory

MARGIN = 1.15  # factor that covers what the formulas leave out


class PacksDoNotFit(torch.OutOfMemoryError):
    """This rank's packs need more memory than is free. No pack has run on any rank; there is nothing to start over."""


class PeerPacksDoNotFit(PacksDoNotFit, PeerOutOfMemory):
    """The packs of another rank need more memory than is free there."""


def free_bytes(device: torch.device) -> int | None:
    """A GPU's free memory, including what torch's allocator has reserved and not used; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def make_memory_check(model: nn.Module, options, stage: int, ranks: Ranks) -> Callable[[Sequence[PackedBatch]], None]:
    """Make a check of packs: PacksDoNotFit is raised on a rank that lacks memory for one, PeerPacksDoNotFit on others.

    The activations of a vision tower that is trained are not counted.

    Args:
        model: before DeepSpeed partitions its weights.
    """
    dtype = model.head_weight.dtype
    size, rank = dtype.itemsize, options.lora_rank
    buckets = bucket_bytes(count(model), Sharding("", stage), size)
    head_trained, checkpointing = model.head_weight.requires_grad, options.gradient_checkpointing

    def needed(batch: PackedBatch) -> int:
        config, pack = model.config, shape_of(batch, dtype)
        kept = {"checkpointing": checkpointing, "head_trained": head_trained, "lora_rank": rank}
        beside = loss_bytes(config, pack, size, head_trained=head_trained)
        if checkpointing:
            beside = max(beside, layer_bytes(config, pack, size, rank))
        return round(MARGIN * (activation_bytes(config, pack, size, **kept) + beside)) + buckets

    def check(packs: Sequence[PackedBatch]) -> None:
        free = free_bytes(ranks.device)
        if free is None:
            return
        most = max(map(needed, packs), default=0)
        if ranks.sum(most > free)[0]:
            if most > free:
                raise PacksDoNotFit(f"it needs about {most / 1e6:.0f} MB, and {free / 1e6:.0f} are free")
            raise PeerPacksDoNotFit("on another rank")

    return check


def shape_of(batch: PackedBatch, dtype: torch.dtype) -> Pack:
    """The sizes of a pack that the cost formulas need."""
    plain = pick_backend(batch.input_ids.new_empty(0, dtype=dtype)) == "sdpa"
    # This excludes the padding of SDPA's buckets, which adds at most a third.
    masks = sum(length * (length + parent) for _, length, _, parent in batch.spans if parent) if plain else 0
    return Pack(len(batch.input_ids), len(batch.kv_index), len(batch.targets), masks, plain)
