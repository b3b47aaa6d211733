"""Qwen2.5-VL, where it differs from Qwen2-VL: RMSNorm, SwiGLU and attention within windows in the vision tower."""

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig

from boxgrpo.model.batch import Pixels, to_device
from boxgrpo.model.decoder import Mlp, RMSNorm

from .qwen2_vl import Qwen2VL, TowerSizes, VisionTower, varlen_offsets


def window_side(config) -> int:
    """Side of a window in merged blocks."""
    return config.window_size // (config.spatial_merge_size * config.patch_size)


def order_by_window(blocks: Tensor, side: int) -> tuple[Tensor, list[int]]:
    """An order of merged blocks in which those of each window are neighbours, and the number of blocks by window.

    A frame stays one stretch, for the blocks of the tower that attend to all of it. Within it, windows of as many
    blocks are neighbours, whose attention is one batch. Windows at the right and lower edges are smaller.

    Args:
        blocks: (I, 3) int64, merged blocks of each image.
        side: of a window.

    Returns:
        (P / 4) int64, and for each window an int.
    """
    order, sizes, first = [torch.empty(0, dtype=torch.int64)], [], 0
    for t, h, w in blocks.tolist():
        columns = -(-w // side)
        window = (torch.arange(h)[:, None] // side * columns + torch.arange(w) // side).flatten()  # each block's
        counts = window.bincount()
        frame = (counts[window] * len(counts) + window).argsort(stable=True)
        for _ in range(t):
            order.append(frame + first)
            sizes += counts.sort().values.tolist()
            first += h * w
    return torch.cat(order), sizes


class WindowTower(VisionTower):
    mlp_matrices = 3

    @staticmethod
    def sizes(config) -> TowerSizes:
        return TowerSizes(config.hidden_size, config.intermediate_size, config.out_hidden_size)

    @staticmethod
    def norm(width: int) -> nn.Module:
        return RMSNorm(width, eps=1e-6)

    @staticmethod
    def make_mlp(width: int, inner: int) -> nn.Module:
        return Mlp(width, inner, bias=True)

    def forward(self, patches: Pixels | Tensor | None, image_grid_thw: Tensor) -> Tensor:
        """As `VisionTower.forward`. The patches stand window by window from the first block to the merger."""
        c, m = self.config, self.config.spatial_merge_size
        x, places, frames = self.embed(patches, image_grid_thw)
        order, sizes = order_by_window(image_grid_thw // torch.tensor([1, m, m]), window_side(c))
        there, back = (to_device(index, x.device) for index in (order, order.argsort()))
        x, places = (t.view(len(order), m**2, t.shape[1]).index_select(0, there).flatten(0, 1) for t in (x, places))
        rotation = self.rotation(places)
        whole, within = ((n, varlen_offsets(n, x)) for n in (frames, [m**2 * size for size in sizes]))
        for i, block in enumerate(self.blocks):
            x = block(x, *rotation, *(whole if i in c.fullatt_block_indexes else within))
        return self.merger(x).index_select(0, back)

    @staticmethod
    def count_pairs(config, grids: Tensor) -> Tensor:
        side = window_side(config) * config.spatial_merge_size  # in patches
        whole, rest = grids[:, 1:] // side, grids[:, 1:] % side
        within = grids[:, 0] * (whole * side**2 + rest**2).double().prod(1)  # a sum over windows is one over both sides
        full = len({i for i in config.fullatt_block_indexes if i < config.depth})
        return full * grids.prod(1).double().square().sum() + (config.depth - full) * within.sum()


class Qwen25VL(Qwen2VL):
    """`config` is transformers' Qwen2_5_VLConfig."""

    family, published_sizes = "Qwen2.5-VL", "3B, 7B, 32B or 72B"
    config_class, architecture = Qwen2_5_VLConfig, "Qwen2_5_VLForConditionalGeneration"
    tower_class, activation, out_width = WindowTower, "silu", "out_hidden_size"

    @classmethod
    def settings(cls, config) -> dict[str, tuple]:
        size, block = config.vision_config.window_size, 2 * cls.patch_size
        return super().settings(config) | {"vision_config.window_size": (size, max(size // block, 1) * block)}
