"""Qwen3-VL, where it differs from Qwen2-VL.

The tower adds learned positions to the patches, and after some of its blocks further mergers make the features that the
first decoder layers add to the images' rows (DeepStack). The decoder normalises queries and keys, has no biases, and
divides the frequencies of M-RoPE among the three positions in turn.
"""

import functools
import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig

from boxgrpo.model.batch import Pixels, to_device
from boxgrpo.model.decoder import DecoderKind

from .qwen2_vl import Qwen2VL, TowerSizes, VisionTower, varlen_offsets


class DeepMerger(nn.Module):
    """Four neighbouring patches become one embedding: (P, E) -> (P / 4, H). The norm is of `normed` values."""

    def __init__(self, normed: int, merged: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(normed, eps=1e-6)
        self.linear_fc1, self.act, self.linear_fc2 = nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, out)

    def forward(self, x: Tensor) -> Tensor:
        (normed,), merged = self.norm.normalized_shape, self.linear_fc1.in_features
        x = self.norm(x.view(x.numel() // normed, normed)).view(x.numel() // merged, merged)
        return self.linear_fc2(self.act(self.linear_fc1(x)))


class DeepStackTower(VisionTower):
    patch_bias = True

    def __init__(self, config):
        super().__init__(config)
        width, _, out = self.sizes(config)
        merged = width * config.spatial_merge_size**2
        self.pos_embed = nn.Embedding(config.num_position_embeddings, width)
        deep = (DeepMerger(merged, merged, out) for _ in config.deepstack_visual_indexes)
        self.deepstack_merger_list = nn.ModuleList(deep)

    @staticmethod
    def sizes(config) -> TowerSizes:
        return TowerSizes(config.hidden_size, config.intermediate_size, config.out_hidden_size)

    @staticmethod
    def make_mlp(width: int, inner: int) -> nn.Module:
        first, second = nn.Linear(width, inner), nn.Linear(inner, width)
        return nn.Sequential(OrderedDict(linear_fc1=first, act=nn.GELU(approximate="tanh"), linear_fc2=second))

    @staticmethod
    def make_merger(width: int, merged: int, out: int) -> nn.Module:
        return DeepMerger(width, merged, out)

    def forward(self, patches: Pixels | Tensor | None, image_grid_thw: Tensor) -> Tensor:
        """As `VisionTower.forward`, with D features behind each embedding: (P / 4, (1 + D) H)."""
        x, places, frames = self.embed(patches, image_grid_thw)
        x = x + self.positions(places, image_grid_thw).to(x.dtype)
        images = *self.rotation(places), frames, varlen_offsets(frames, x)
        after, features = [*self.config.deepstack_visual_indexes], []
        for i, block in enumerate(self.blocks):
            x = block(x, *images)
            if i in after:
                features.append(self.deepstack_merger_list[after.index(i)](x))
        return torch.cat([self.merger(x), *features], 1)

    def positions(self, places: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Learned positions (P, E) at rows and columns (P, 2): a square grid, stretched over each image, bilinear.

        The corners of the grid and of the image coincide.
        """
        side = math.isqrt(self.config.num_position_embeddings)
        sizes = to_device(image_grid_thw[:, 1:].repeat_interleave(image_grid_thw.prod(1), 0), places.device)  # (P, 2)
        at = places.float() * (side - 1) / (sizes - 1).clamp(min=1)
        low = at.floor()
        row, column = (at - low).unbind(1)  # shares of the next row and column
        low, high = low.long(), (low.long() + 1).clamp(max=side - 1)
        corners = (
            self.pos_embed(y[:, 0] * side + x[:, 1]) * (of_row * of_column)[:, None]
            for y, of_row in ((low, 1 - row), (high, row))
            for x, of_column in ((low, 1 - column), (high, column))
        )
        return functools.reduce(torch.add, corners)

    @staticmethod
    def count_mergers(config) -> int:
        return 1 + len(config.deepstack_visual_indexes)


class Qwen3VL(Qwen2VL):
    """`config` is transformers' Qwen3VLConfig."""

    family, published_sizes = "Qwen3-VL", "2B, 4B, 8B or 32B"
    config_class, architecture = Qwen3VLConfig, "Qwen3VLForConditionalGeneration"
    tower_class, decoder_kind = DeepStackTower, DecoderKind(qkv_bias=False, head_norms=True, interleaved=True)
    patch_size, activation, mrope_section = 16, "gelu_pytorch_tanh", (24, 20, 20)
    out_width = "out_hidden_size"

    @classmethod
    def settings(cls, config) -> dict[str, tuple]:
        text, vision = config.text_config, config.vision_config
        indexes, positions = [*vision.deepstack_visual_indexes], vision.num_position_embeddings
        usable = sorted({i for i in indexes if 0 <= i < vision.depth})[: text.num_hidden_layers]
        return super().settings(config) | {
            "attention_bias": (bool(text.attention_bias), False),
            "mrope_interleaved": (text.rope_parameters.get("mrope_interleaved", True), True),
            "vision_config.num_position_embeddings": (positions, math.isqrt(positions) ** 2),
            "vision_config.deepstack_visual_indexes": (indexes, usable),
        }

    @staticmethod
    def published_name(name: str) -> str:
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
