"""Qwen2-VL on packed tokens: vision tower, decoder and head, under the published checkpoints' names."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from boxgrpo.model.attention import PackedAttention, pick_backend, varlen
from boxgrpo.model.batch import PackedBatch
from boxgrpo.model.decoder import Attend, Decoder, cos_and_sin, rotate


class PatchProjection(nn.Conv3d):
    """A convolution by its weight's shape (E, 3, 2, 14, 14), a matrix product in effect: stride equals kernel."""

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.weight), self.weight.flatten(1))


class VisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        """(P, E) -> (P, E); `lengths` are the patches of each image, which attends to itself alone."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        # Rotation in fp32, as in the published code: lower precision would round neighbouring positions to one.
        q, k = (rotate(t.float(), cos, sin).to(v.dtype) for t in (q, k))
        backend = pick_backend(q)
        if not lengths:  # no images: the projections stay in the graph, with gradients of zero
            mixed = q + k + v
        elif backend != "sdpa":
            cu = torch.tensor([0, *lengths]).cumsum(0).to(q.device, torch.int32, non_blocking=True)
            mixed = varlen(q, k, v, cu, cu, max(lengths), max(lengths), causal=False, backend=backend)
        elif len(set(lengths)) == 1:  # images of one size are one batch
            q, k, v = (t.view(len(lengths), lengths[0], self.heads, -1).transpose(1, 2) for t in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            parts = zip(*(t.transpose(0, 1)[None].split(lengths, dim=2) for t in (q, k, v)), strict=True)
            mixed = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=2)[0].transpose(0, 1)
        return self.proj(mixed.reshape(x.shape))


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.embed_dim, config.embed_dim * config.mlp_ratio
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(config)
        mlp = OrderedDict(fc1=nn.Linear(width, inner), act=QuickGELUActivation(), fc2=nn.Linear(inner, width))
        self.mlp = nn.Sequential(mlp)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Four neighbouring patches become one embedding of the decoder's width."""

    def __init__(self, config):
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(x.numel() // self.width, self.width))


class VisionTower(nn.Module):
    """Patches in, one embedding for each merged block of 2×2 out. Module names are those of the checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        projection = PatchProjection(config.in_channels, config.embed_dim, kernel, stride=kernel, bias=False)
        self.patch_embed = nn.Sequential(OrderedDict(proj=projection))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixel_values: Tensor | None, image_grid_thw: Tensor) -> Tensor:
        """Image embeddings.

        Args:
            pixel_values: (P, 1176) normalised patches on any device, all images one after the other; None: no images.
            image_grid_thw: (I, 3) int64 on the CPU, patches per image.

        Returns:
            (P / 4, H) in the tower's dtype.
        """
        c = self.config
        if pixel_values is None:
            assert len(image_grid_thw) == 0, "images without pixel values or embeddings"
            pixel_values = torch.empty(0, c.in_channels * c.temporal_patch_size * c.patch_size**2)
        x = self.patch_embed(pixel_values)
        cos, sin = (t.to(x.device) for t in self.rotation(image_grid_thw))
        lengths = [h * w for t, h, w in image_grid_thw.tolist() for _ in range(t)]
        for block in self.blocks:
            x = block(x, cos, sin, lengths)
        return self.merger(x)

    def rotation(self, image_grid_thw: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine for `rotate`: two of (P, 1, head_dim) fp32 on the CPU.

        Patches are in the image processor's order, merge blocks first; half of the frequencies turn with the row and
        half with the column.
        """
        c, m = self.config, self.config.spatial_merge_size
        theta = (getattr(c, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
        coordinates = [torch.empty(0, 2, dtype=torch.int64)]
        for t, h, w in image_grid_thw.tolist():
            grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)  # (h, w, 2)
            blocks = grid.view(h // m, m, w // m, m, 2).transpose(1, 2).reshape(-1, 2)
            coordinates.append(blocks.repeat(t, 1))
        half = c.embed_dim // c.num_heads // 2
        frequencies = theta ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
        angles = torch.cat(coordinates).float()[:, :, None] * frequencies  # (P, 2, half / 2): rows, then columns
        return cos_and_sin(angles.flatten(1))


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
            images = self.visual(batch.pixel_values, batch.image_grid_thw)
        if images is not None:
            x = x.index_copy(0, batch.image_rows, images.to(x.dtype))
        return self.model(x, batch.position_ids, attend)

    @torch.no_grad()
    def embed_images(self, pixel_values: Tensor | None, image_grid_thw: Tensor) -> Tensor:
        """(P / 4, H) without gradient: a frozen tower's output, for rollout, reference and policy."""
        return self.visual(pixel_values, image_grid_thw)

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
