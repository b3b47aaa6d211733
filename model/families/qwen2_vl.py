"""Qwen2-VL on packed tokens: vision tower, decoder and head, under the published checkpoints' names; and their FLOP.

The other families are subclasses, each in a file of its differences.

FLOP are those of the method, not of the code: a prompt counts once for its G completions, and a layer's forward once
even where checkpointing repeats it. A product's backward costs two of its forward, and one where its weight is frozen.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2VLConfig

from boxgrpo.kernels import quick_gelu, rotate_qk
from boxgrpo.model.attention import PackedAttention, pick_backend, varlen
from boxgrpo.model.batch import FRAMES, Group, PackedBatch, Pixels, to_device
from boxgrpo.model.decoder import Attend, Decoder, DecoderKind, cos_and_sin, head_dim, rotate


class PatchProjection(nn.Conv3d):
    """A convolution whose stride equals its kernel, (E, 3, 2, 14, 14): computed as one matrix product."""

    def forward(self, patches: Pixels | Tensor) -> Tensor:
        values = patches.values(self.weight) if isinstance(patches, Pixels) else patches.to(self.weight)
        return F.linear(values, self.weight.flatten(1), self.bias)


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int], cu_seqlens: Tensor | None) -> Tensor:
        """(P, E) -> (P, E); `lengths` are the patches of each image or window, which attends to itself alone.

        `cu_seqlens`: their offsets on the device, int32, where attention is one varlen call; else None.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        # Rotation in fp32, as in the published code: lower precision would round neighbouring angles to the same value.
        if q.is_cuda:
            q, k = rotate_qk(q, k, cos, sin)
        else:
            q, k = (rotate(t.float(), cos, sin).to(v.dtype) for t in (q, k))
        if not lengths:  # no images: the projections stay in the graph, with gradients of zero
            mixed = q + k + v
        elif cu_seqlens is not None:
            offsets = cu_seqlens, cu_seqlens, max(lengths), max(lengths)
            mixed = varlen(q, k, v, *offsets, causal=False, backend=pick_backend(q))
        else:  # neighbours of one length are one batch
            runs = [(length, len([*run])) for length, run in itertools.groupby(lengths)]
            parts = zip(*(t.split([length * n for length, n in runs]) for t in (q, k, v)), strict=True)
            found = []
            for (length, n), part in zip(runs, parts, strict=True):
                batch = (t.view(n, length, self.heads, -1).transpose(1, 2) for t in part)
                found.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
            mixed = torch.cat(found) if len(found) > 1 else found[0]
        return self.proj(mixed.reshape(x.shape))


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu(x) if x.is_cuda else x * torch.sigmoid(1.702 * x)


class VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int, norm: Callable[[int], nn.Module], mlp: nn.Module):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = VisionAttention(width, heads)
        self.mlp = mlp

    def forward(self, x: Tensor, *images) -> Tensor:
        """(P, E) -> (P, E); `images` are the other arguments of `VisionAttention.forward`."""
        x = x + self.attn(self.norm1(x), *images)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Four neighbouring patches become one embedding: (P, E) -> (P / 4, H)."""

    def __init__(self, width: int, merged: int, out: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.merged = merged
        self.ln_q = norm(width)
        self.mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(x.numel() // self.merged, self.merged))


class TowerSizes(NamedTuple):
    width: int  # of a patch
    inner: int  # of a block's MLP
    out: int  # of an image embedding


def varlen_offsets(lengths: list[int], x: Tensor) -> Tensor | None:
    """Offsets, (S + 1) int32, of S stretches of x for one varlen call; None where SDPA attends."""
    if not lengths or pick_backend(x) == "sdpa":
        return None
    return torch.tensor([0, *lengths]).cumsum(0).to(x.device, torch.int32, non_blocking=True)


class VisionTower(nn.Module):
    """Patches in, one embedding for each merged block of 2×2 out. Module names are those of the checkpoints."""

    patch_bias = False
    mlp_matrices = 2  # of a block

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        width, inner, out = self.sizes(config)
        self.head_dim = width // c.num_heads
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        projection = PatchProjection(c.in_channels, width, kernel, stride=kernel, bias=self.patch_bias)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.blocks = nn.ModuleList(
            VisionBlock(width, c.num_heads, self.norm, self.make_mlp(width, inner)) for _ in range(c.depth)
        )
        self.merger = self.make_merger(width, width * c.spatial_merge_size**2, out)

    @staticmethod
    def sizes(config) -> TowerSizes:
        return TowerSizes(config.embed_dim, int(config.embed_dim * config.mlp_ratio), config.hidden_size)

    @staticmethod
    def norm(width: int) -> nn.Module:
        return nn.LayerNorm(width, eps=1e-6)

    @staticmethod
    def make_mlp(width: int, inner: int) -> nn.Module:
        return nn.Sequential(OrderedDict(fc1=nn.Linear(width, inner), act=QuickGelu(), fc2=nn.Linear(inner, width)))

    @classmethod
    def make_merger(cls, width: int, merged: int, out: int) -> nn.Module:
        return Merger(width, merged, out, cls.norm)

    def forward(self, patches: Pixels | Tensor | None, image_grid_thw: Tensor) -> Tensor:
        """Image embeddings.

        Args:
            patches: all images one after the other on any device, 8-bit or normalised (P, 1176); None: no images.
            image_grid_thw: (I, 3) int64 on the CPU, patches per image.

        Returns:
            (P / 4, H) in the tower's dtype; of families whose first decoder layers add features of their own, these
            stand behind the embedding: (P / 4, (1 + D) H).
        """
        x, places, lengths = self.embed(patches, image_grid_thw)
        images = *self.rotation(places), lengths, varlen_offsets(lengths, x)
        for block in self.blocks:
            x = block(x, *images)
        return self.merger(x)

    def embed(self, patches: Pixels | Tensor | None, image_grid_thw: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """The patches' embeddings (P, E), their rows and columns (P, 2) int64, and the number of patches by frame."""
        c, m = self.config, self.config.spatial_merge_size
        if patches is None:
            assert len(image_grid_thw) == 0, "images without pixels or embeddings"
            patches = torch.empty(0, c.in_channels * c.temporal_patch_size * c.patch_size**2)
        coordinates, lengths = [torch.empty(0, 2, dtype=torch.int64)], []
        for t, h, w in image_grid_thw.tolist():  # patches are in the image processor's order: merge blocks first
            grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)  # (h, w, 2)
            blocks = grid.view(h // m, m, w // m, m, 2).transpose(1, 2).reshape(-1, 2)
            coordinates.append(blocks.repeat(t, 1))
            lengths += [h * w] * t
        x = self.patch_embed(patches)
        return x, to_device(torch.cat(coordinates), x.device), lengths

    def rotation(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """For `rotate`, of rows and columns (P, 2): half of the frequencies turn with the row, half with the column."""
        theta = (getattr(self.config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
        half = self.head_dim // 2
        frequencies = theta ** -(torch.arange(0, half, 2, dtype=torch.float32, device=places.device) / half)
        angles = places.float()[:, :, None] * frequencies  # (P, 2, half / 2)
        return cos_and_sin(angles.flatten(1))

    @classmethod
    def flop(cls, config, grids: Tensor) -> float:
        """FLOP over images of `grids` (I, 3) patches; `config` is the tower's."""
        c, (width, inner, out) = config, cls.sizes(config)
        patch, four = c.in_channels * c.temporal_patch_size * c.patch_size**2, c.spatial_merge_size**2
        blocks = c.depth * (4 * width**2 + cls.mlp_matrices * width * inner)
        merger = ((four * width) ** 2 + four * width * out) / four
        linear = 2 * grids.prod(1).double().sum() * (patch * width + blocks + cls.count_mergers(c) * merger)
        return float(linear + 4 * width * cls.count_pairs(c, grids))

    @staticmethod
    def count_mergers(config) -> int:
        return 1

    @staticmethod
    def count_pairs(config, grids: Tensor) -> Tensor:
        """Pairs of a query and a key in all blocks; attention is within each image."""
        return config.depth * grids.prod(1).double().square().sum()


class Qwen2VL(nn.Module):
    """`config` is transformers' Qwen2VLConfig. A tied head is the embedding itself: `lm_head` is None.

    The class attributes describe the family: its name and its sizes, transformers' classes of its config and model, its
    tower, its decoder, and values of the config (`settings`).
    """

    family, published_sizes = "Qwen2-VL", "2B, 7B or 72B"
    config_class, architecture = Qwen2VLConfig, "Qwen2VLForConditionalGeneration"
    tower_class, decoder_kind = VisionTower, DecoderKind()
    patch_size, activation, mrope_section = 14, "quick_gelu", (16, 24, 24)
    out_width = "hidden_size"  # the tower's setting

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = self.tower_class(config.vision_config)
        self.model = Decoder(config.text_config, self.decoder_kind)
        text = config.text_config
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    @classmethod
    def settings(cls, config) -> dict[str, tuple]:
        """Values of the config and the only ones that are implemented; with others the model would differ.

        Where the config has no mrope_section, transformers' default is set.
        """
        text, vision = config.text_config, config.vision_config
        rope, vision_rope = text.rope_parameters, getattr(vision, "rope_parameters", None) or {}
        section = rope.setdefault("mrope_section", [*cls.mrope_section])
        layer_types = getattr(text, "layer_types", None) or ["full_attention"]
        return {
            "hidden_act": (text.hidden_act, "silu"),
            "rope_type": (rope["rope_type"], "default"),
            "a sum of mrope_section of": (sum(section), head_dim(text) // 2),
            "use_sliding_window": (bool(getattr(text, "use_sliding_window", False)), False),
            "layer_types": (sorted(set(layer_types)), ["full_attention"]),
            "attention_dropout": (text.attention_dropout or 0, 0),
            "quantization_config": (getattr(config, "quantization_config", None), None),
            "vision_config.hidden_act": (vision.hidden_act, cls.activation),
            "vision_config.rope_type": (vision_rope.get("rope_type", "axial"), "axial"),
            "vision_config.patch_size": (vision.patch_size, cls.patch_size),
            "vision_config.temporal_patch_size": (vision.temporal_patch_size, FRAMES),
            "vision_config.spatial_merge_size": (vision.spatial_merge_size, 2),
            "vision_config.in_channels": (vision.in_channels, 3),
            f"vision_config.{cls.out_width}": (getattr(vision, cls.out_width), text.hidden_size),
        }

    @staticmethod
    def published_name(name: str) -> str:
        """A parameter's name in the family's published checkpoints."""
        return name

    @property
    def head_weight(self) -> Tensor:
        """(V, H)"""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    def forward(
        self, batch: PackedBatch | None = None, head: Callable | None = None, *, work: Callable[[], Any] | None = None
    ):
        """Hidden states of the rows that predict the scored tokens, or the result of `head` on them.

        Args:
            batch: on the model's device; without `image_embeds` the tower runs here, with gradient if it has any.
            head: called as head(hidden (N, H), weight (V, H)) inside this forward, so that engines which shard
                parameters have the head's weight gathered.
            work: called instead, with the head's weight gathered: sampling with sharded parameters.

        Returns:
            (N, H), or the result of `head` or `work`.
        """
        if work is not None:
            return work()
        hidden = self.hidden(batch, PackedAttention(batch)).index_select(0, batch.predict_from)
        return hidden if head is None else head(hidden, self.head_weight)

    def hidden(self, batch: PackedBatch, attend: Attend) -> Tensor:
        """Hidden states of all rows: (T, H)."""
        x = self.model.embed_tokens(batch.input_ids)
        images = batch.image_embeds
        # A trained tower runs without images too: engines that shard parameters synchronise in every module.
        trained = self.visual is not None and next(self.visual.parameters()).requires_grad
        if images is None and (len(batch.image_rows) or trained):
            images = self.visual(batch.pixels, batch.image_grid_thw)
        added: list[Tensor] = []
        if images is not None:
            images, *added = images.to(x.dtype).split(x.shape[1], 1)
            x = x.index_copy(0, batch.image_rows, images)
        return self.model(x, batch.position_ids, attend, batch.image_rows, added)

    def freeze_vision(self, frozen: bool = True) -> None:
        """Freeze or unfreeze all of `visual`, merger included."""
        self.visual.requires_grad_(not frozen)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> "Qwen2VL":
        """Normal weights of the configs' `initializer_range`, zero biases, unit norms."""
        text_range = self.config.text_config.initializer_range
        towers = [(self.visual, self.config.vision_config.initializer_range), (self.model, text_range)]
        towers += [] if self.lm_head is None else [(self.lm_head, text_range)]
        for tower, std in towers:
            for name, parameter in tower.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, std, generator=generator)
        return self

    def forward_flop(self, prompt: int, completions: Sequence[int], scored: int) -> float:
        """FLOP of decoder and head over a prompt of `prompt` tokens, image tokens included, and completions of so many.

        Linear layers, causal attention, and the head over `scored` rows. Backward costs twice as much in each of them,
        so shares of a step's work are shares of this.
        """
        text = self.config.text_config
        width, kv_width = (n * head_dim(text) for n in (text.num_attention_heads, text.num_key_value_heads))
        weights = 2 * text.hidden_size * (width + kv_width) + 3 * text.hidden_size * text.intermediate_size
        pairs = prompt**2 / 2 + sum(own * (prompt + own / 2) for own in completions)  # of a query and a key
        layers = text.num_hidden_layers * (2 * weights * (prompt + sum(completions)) + 4 * width * pairs)
        return layers + 2 * scored * text.vocab_size * text.hidden_size

    def group_flop(self, group: Group, *, tower_passes: float = 0.0) -> float:
        """FLOP of a forward of decoder and head over a group, and of that many passes of the tower over its images.

        Sampling the completions, prefill included, costs the decoder and head the same. A group without completions is
        a conversation, scored where its `loss_mask` is set.
        """
        lengths = [len(c) for c in group.completions]
        scored = sum(lengths) if lengths else int(group.prompt.loss_mask.sum())
        tower = tower_passes * self.tower_flop(group.prompt.image_grid_thw) if tower_passes else 0.0
        return self.forward_flop(len(group.prompt.input_ids), lengths, scored) + tower

    def tower_flop(self, grids: Tensor) -> float:
        """FLOP of the vision tower over images of `grids` (I, 3) patches."""
        return self.tower_class.flop(self.config.vision_config, grids)
