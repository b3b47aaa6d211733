"""Qwen2-VL on packed tokens: vision tower, decoder and head, under the published checkpoints' names; and their FLOP.

FLOP are those of the method, not of the code: a prompt counts once for its G completions, and a layer's forward once
even where checkpointing repeats it. A product's backward costs two of its forward, and one where its weight is frozen.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxgrpo.kernels import quick_gelu, rotate_qk
from boxgrpo.model.attention import PackedAttention, pick_backend, varlen
from boxgrpo.model.batch import Group, PackedBatch, Pixels, to_device
from boxgrpo.model.decoder import Attend, Decoder, cos_and_sin, rotate


class PatchProjection(nn.Conv3d):
    """A convolution whose stride equals its kernel, (E, 3, 2, 14, 14): computed as one matrix product."""

    def forward(self, patches: Pixels | Tensor) -> Tensor:
        values = patches.values(self.weight) if isinstance(patches, Pixels) else patches.to(self.weight)
        return F.linear(values, self.weight.flatten(1))


class VisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int], cu_seqlens: Tensor | None) -> Tensor:
        """(P, E) -> (P, E); `lengths` are the patches of each image, which attends to itself alone.

        `cu_seqlens`: their offsets on the device, (I + 1) int32, where attention is one varlen call; else None.
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
        elif len(set(lengths)) == 1:  # images of one size are one batch
            q, k, v = (t.view(len(lengths), lengths[0], self.heads, -1).transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            parts = zip(*(t.transpose(0, 1)[None].split(lengths, dim=2) for t in (q, k, v)), strict=True)
            mixed = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)[0].transpose(0, 1)
        return self.proj(mixed.reshape(x.shape))


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu(x) if x.is_cuda else x * torch.sigmoid(1.702 * x)


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.embed_dim, config.embed_dim * config.mlp_ratio
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(config)
        mlp = OrderedDict(fc1=nn.Linear(width, inner), act=QuickGelu(), fc2=nn.Linear(inner, width))
        self.mlp = nn.Sequential(mlp)

    def forward(self, x: Tensor, *images) -> Tensor:
        """(P, E) -> (P, E); `images` are the other arguments of `VisionAttention.forward`."""
        x = x + self.attn(self.norm1(x), *images)
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Patches in, one embedding for each merged block of 2×2 out. Module names are those of the checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        projection = PatchProjection(config.in_channels, config.embed_dim, kernel, stride=kernel, bias=False)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        merged = config.embed_dim * config.spatial_merge_size**2  # four neighbouring patches become one embedding
        mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, config.hidden_size))
        self.merger = nn.ModuleDict({"ln_q": nn.LayerNorm(config.embed_dim, eps=1e-6), "mlp": mlp})

    def forward(self, patches: Pixels | Tensor | None, image_grid_thw: Tensor) -> Tensor:
        """Image embeddings.

        Args:
            patches: all images one after the other on any device, 8-bit or normalised (P, 1176); None: no images.
            image_grid_thw: (I, 3) int64 on the CPU, patches per image.

        Returns:
            (P / 4, H) in the tower's dtype.
        """
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
        # Half of the frequencies turn with the row, half with the column.
        theta = (getattr(c, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
        half = c.embed_dim // c.num_heads // 2
        x = self.patch_embed(patches)
        frequencies = theta ** -(torch.arange(0, half, 2, dtype=torch.float32, device=x.device) / half)
        places = to_device(torch.cat(coordinates), x.device)  # (P, 2)
        angles = places.float()[:, :, None] * frequencies  # (P, 2, half / 2)
        cos, sin = cos_and_sin(angles.flatten(1))
        cu_seqlens = None
        if lengths and pick_backend(x) != "sdpa":
            cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(x.device, torch.int32, non_blocking=True)
        for block in self.blocks:
            x = block(x, cos, sin, lengths, cu_seqlens)
        merged = self.merger["ln_q"](x).view(len(x) // m**2, c.embed_dim * m**2)
        return self.merger["mlp"](merged)


class Qwen2VL(nn.Module):
    """`config` is transformers' Qwen2VLConfig. A tied head is the embedding itself: `lm_head` is None."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision_config)
        self.model = Decoder(config.text_config)
        text = config.text_config
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(text.hidden_size, text.vocab_size, bias=False)

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
        if images is not None:
            x = x.index_copy(0, batch.image_rows, images.to(x.dtype))
        return self.model(x, batch.position_ids, attend)

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


def forward_flop(config, prompt: int, completions: Sequence[int], scored: int) -> float:
    """FLOP of decoder and head over a prompt of `prompt` tokens, image tokens included, and completions of so many.

    Linear layers, causal attention, and the head over `scored` rows. Backward costs twice as much in each of them, so
    shares of a step's work are shares of this. `config` is a Qwen2VLConfig.
    """
    text = config.text_config
    width, kv_width = text.hidden_size, text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    weights = 2 * width * (width + kv_width) + 3 * width * text.intermediate_size
    pairs = prompt**2 / 2 + sum(own * (prompt + own / 2) for own in completions)  # of a query and a key
    layers = text.num_hidden_layers * (2 * weights * (prompt + sum(completions)) + 4 * width * pairs)
    return layers + 2 * scored * text.vocab_size * width


def group_flop(config, group: Group, *, tower_passes: float = 0.0) -> float:
    """FLOP of a forward of decoder and head over a group, and of that many passes of the tower over its images.

    Sampling the completions, prefill included, costs the decoder and head the same. A group without completions is a
    conversation, scored where its `loss_mask` is set.
    """
    lengths = [len(c) for c in group.completions]
    scored = sum(lengths) if lengths else int(group.prompt.loss_mask.sum())
    tower = tower_passes * tower_flop(config, group.prompt.image_grid_thw) if tower_passes else 0.0
    return forward_flop(config, len(group.prompt.input_ids), lengths, scored) + tower


def tower_flop(config, grids: Tensor) -> float:
    """FLOP of the vision tower over images of `grids` (I, 3) patches; attention is within each image."""
    vision = config.vision_config
    patches, inner = grids.prod(1).double(), int(vision.embed_dim * vision.mlp_ratio)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    blocks = vision.depth * (4 * vision.embed_dim**2 + 2 * vision.embed_dim * inner)
    merged = vision.embed_dim * vision.spatial_merge_size**2
    merger = (merged**2 + merged * config.text_config.hidden_size) / vision.spatial_merge_size**2
    linear = 2 * patches.sum() * (patch * vision.embed_dim + blocks + merger)
    return float(linear + 4 * vision.embed_dim * vision.depth * patches.square().sum())
