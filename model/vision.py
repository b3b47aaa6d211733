"""The vision tower: patches in, one embedding per merged 2×2 block out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import pick_backend, sdpa, varlen
from .rope import rotate, vision_rope


class PatchProjection(nn.Conv3d):
    """A convolution by its weight's shape (E, 3, 2, 14, 14), a matrix product by what it does: stride equals kernel."""

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1))


class VisionAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        # Rotation in fp32, as the original does: at low precision neighbouring positions would merge.
        q, k = (rotate(t.float(), cos, sin).to(v.dtype) for t in (q, k))
        return self.proj(self._attend(q, k, v, lengths).reshape(x.shape))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        if not lengths:  # no images: the projections stay in the graph all the same
            return q + k + v
        backend = pick_backend(q)
        if backend != "sdpa":
            cu = torch.tensor([0, *lengths]).cumsum(0).to(q.device, torch.int32, non_blocking=True)
            longest = max(lengths)
            return varlen(q, k, v, cu, cu, longest, longest, causal=False, backend=backend)
        if len(set(lengths)) == 1:  # images of one size are one batch
            q, k, v = (t.view(len(lengths), lengths[0], self.heads, -1).transpose(1, 2) for t in (q, k, v))
            return sdpa(q, k, v).transpose(1, 2)
        parts = zip(*(t.transpose(0, 1)[None].split(lengths, dim=2) for t in (q, k, v)), strict=True)
        return torch.cat([sdpa(*part) for part in parts], dim=2)[0].transpose(0, 1)


class VisionMlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.embed_dim * config.mlp_ratio
        self.fc1 = nn.Linear(config.embed_dim, width)
        self.fc2 = nn.Linear(width, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # quick GELU


class VisionBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMlp(config)

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


class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = PatchProjection(config.in_channels, config.embed_dim, kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


class VisionTower(nn.Module):
    """Module names are those of the published checkpoints (`visual.*`)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, pixel_values: Tensor | None, image_grid_thw: Tensor) -> Tensor:
        """Image embeddings.

        Args:
            pixel_values: (P, 1176) normalised patches, all images one after the other; None: no images.
            image_grid_thw: (I, 3) int64 on the CPU, patches per image.

        Returns:
            (P / 4, H) in the tower's dtype.
        """
        c = self.config
        if pixel_values is None:
            assert len(image_grid_thw) == 0, "images without pixel values or embeddings"
            pixel_values = self.merger.ln_q.weight.new_empty(0, c.in_channels * c.temporal_patch_size * c.patch_size**2)
        theta = (getattr(c, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
        cos, sin = vision_rope(
            image_grid_thw,
            head_dim=c.embed_dim // c.num_heads,
            theta=theta,
            spatial_merge_size=c.spatial_merge_size,
        )
        cos, sin = cos.to(pixel_values.device), sin.to(pixel_values.device)
        lengths = [h * w for t, h, w in image_grid_thw.tolist() for _ in range(t)]
        x = self.patch_embed(pixel_values)
        for block in self.blocks:
            x = block(x, cos, sin, lengths)
        return self.merger(x)
