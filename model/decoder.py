"""The decoder on packed tokens, with its rotary positions. The caller passes the attention: of a pack or of a cache.

On a GPU where liger-kernel is installed its Triton kernels compute norm, rotation and SwiGLU, else torch does.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boxgrpo.kernels import add_rms_norm, silu_mul

from .static_cache import StaticCache

# (layer, q (T, heads, d), k and v (T, kv_heads, d)) -> (T, heads, d)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@functools.cache
def _import_liger():
    """liger-kernel's autograd functions of norm, rotation and SwiGLU, or None where it is not installed."""
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction


def liger_for(x: Tensor):
    """What `_import_liger` returns, for tensors that its kernels take; None for the others."""
    return _import_liger() if x.is_cuda and x.numel() > 0 else None


def mrope_position_ids(
    input_ids: Tensor,
    image_grid_thw: Tensor | None,
    *,
    image_token_id: int,
    video_token_id: int = 151656,
    spatial_merge_size: int = 2,
) -> Tensor:
    """Temporal, height and width position of every token of one sequence (M-RoPE, Qwen2-VL section 2.1).

    Text continues from the largest position so far on all three axes; an image spreads over its merged grid.

    Args:
        input_ids: (P) int64; each image is one run of `image_token_id`, t·h·w / merge² tokens long.
        image_grid_thw: (I, 3) int64, patches per image before the merge; None for text alone.
        video_token_id: the id that must not occur, Qwen2-VL's unless given: there are no positions for videos.

    Returns:
        (3, P) int64, equal to transformers' `get_rope_index`.

    Raises:
        ValueError: image tokens and image grids disagree, or there are video tokens.
    """
    grids = [] if image_grid_thw is None else image_grid_thw.tolist()
    ids = input_ids.tolist()
    if videos := ids.count(video_token_id):
        raise ValueError(
            f"{videos} video tokens (id {video_token_id}) in the prompt; videos are not implemented. Give their frames "
            "as images."
        )
    merged = [(t, h // spatial_merge_size, w // spatial_merge_size) for t, h, w in grids]
    wanted = sum(t * h * w for t, h, w in merged)
    found = ids.count(image_token_id)
    if wanted != found:
        raise ValueError(
            f"{found} image tokens in the prompt but {len(grids)} images of {wanted} tokens; "
            "each image needs t*h*w/merge**2 of them. Build prompts with Processor."
        )
    positions = torch.empty(3, len(ids), dtype=torch.int64)
    row = position = 0
    for t, h, w in merged:
        start = ids.index(image_token_id, row)
        run = ids[start : start + t * h * w].count(image_token_id)
        if run != t * h * w:
            raise ValueError(
                f"{run} image tokens in a row at token {start} for an image of {t * h * w}; grids must be in the "
                "order of their images. Build prompts with Processor."
            )
        positions[:, row:start] = torch.arange(position, position + start - row)
        position += start - row
        grid = torch.stack(torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij"))
        row = start + t * h * w
        positions[:, start:row] = grid.reshape(3, -1) + position
        position += max(h, w)
    positions[:, row:] = torch.arange(position, position + len(ids) - row)
    return positions


def cos_and_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """For `rotate`: (T, d / 2) -> cosine and signed sine, (T, 1, d). The first half of each pair takes -sine."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (T, heads, head_dim), pairing element i with i + head_dim / 2.

    Faster on a CPU, backward included, than four products of halves and their concatenation.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotate_liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate` of q and k by liger-kernel, which may overwrite both, with the halves of `rotate`'s sine exchanged.

    It takes (1, heads, T, d), and reads the first half of the cosine and of the unsigned sine, (1, T, d).
    """
    q, k = (x.transpose(0, 1).unsqueeze(0) for x in (q, k))
    rotated = _import_liger()[1].apply(q, k, cos.transpose(0, 1), sin.transpose(0, 1))
    return tuple(x.squeeze(0).transpose(0, 1) for x in rotated)


class DecoderKind(NamedTuple):
    """What differs between the families' decoders."""

    qkv_bias: bool = True
    head_norms: bool = False  # the heads of queries and keys are normalised before their rotation
    interleaved: bool = False  # neighbouring frequencies turn with different positions


def head_dim(config) -> int:
    """Width of a head of the decoder with this config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32, of any shape."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if liger := liger_for(x):
            return liger[0].apply(x, self.weight, self.eps, 0.0, "llama", False)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def place_together(*linears: nn.Linear) -> None:
    """Move the weights one after the other into one tensor, biases too, for `multiply_together`."""
    for parameters in zip(*(linear.parameters() for linear in linears), strict=False):
        joint = torch.cat([p.detach() for p in parameters])
        for p, part in zip(parameters, joint.split([len(p) for p in parameters]), strict=True):
            p.data = part


def as_one(parameters: Sequence[Tensor]) -> Tensor | None:
    """The rows of all parameters as one tensor, without a copy, where they lie so; None elsewhere."""
    first = parameters[0].detach()
    place, storage = first.storage_offset(), first.untyped_storage()._cdata
    for p in parameters:
        if not p.is_contiguous() or (p.storage_offset(), p.untyped_storage()._cdata) != (place, storage):
            return None
        place += p.numel()
    return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())


def multiply_together(x: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    """Each layer's output for x (n, H), without a gradient: by one product where their weights are adjacent.

    Adapters and engines replace layers or move weights; each layer is then called.
    """
    plain = all(type(linear) is nn.Linear for linear in linears)
    if plain and len({linear.bias is None for linear in linears}) == 1:
        joint = [as_one(parameters) for parameters in zip(*(linear.parameters() for linear in linears), strict=True)]
        if all(parameter is not None for parameter in joint):
            return F.linear(x, *joint).split([linear.out_features for linear in linears], -1)
    return [linear(x) for linear in linears]


class Attention(nn.Module):
    def __init__(self, config, kind: DecoderKind, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim(config)
        width, kv_width = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=kind.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=kind.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=kind.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = self.k_norm = None
        if kind.head_norms:
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, config.rms_norm_eps) for _ in "qk")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if liger_for(q):
            q, k = rotate_liger(q, k, cos, sin)
        else:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, cache: StaticCache) -> Tensor:
        products = multiply_together(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in products)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(cache.attend(self.layer, q, k, v, cos, sin).flatten(1))


class Mlp(nn.Module):
    """SwiGLU: silu(gate) * up, projected down."""

    def __init__(self, width: int, inner: int, *, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        liger = liger_for(gate)
        x = liger[2].apply(gate, up) if liger else F.silu(gate) * up
        del gate, up  # without gradients their memory is free for the projection
        return self.down_proj(x)

    def decode(self, x: Tensor) -> Tensor:
        return self.down_proj(silu_mul(*multiply_together(x, self.gate_proj, self.up_proj)))


class DecoderLayer(nn.Module):
    def __init__(self, config, kind: DecoderKind, layer: int):
        super().__init__()
        self.self_attn = Attention(config, kind, layer)
        self.mlp = Mlp(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))

    def decode(self, x: Tensor, normed: Tensor, cos: Tensor, sin: Tensor, cache: StaticCache) -> tuple[Tensor, Tensor]:
        """The residual stream before the MLP's output is added, and that output; `normed` is x after the first norm."""
        norm = self.post_attention_layernorm
        x, normed = add_rms_norm(x, self.self_attn.decode(normed, cos, sin, cache), norm.weight, eps=norm.eps)
        return x, self.mlp.decode(normed)


class Decoder(nn.Module):
    """Module names are those of the published checkpoints of Qwen2-VL (`model.*`)."""

    def __init__(self, config, kind: DecoderKind):
        super().__init__()
        self.config, self.kind = config, kind
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, kind, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        attend: Attend,
        image_rows: Tensor | None = None,
        added: Sequence[Tensor] = (),
    ) -> Tensor:
        """Hidden states after the last norm: (T, H), from embeddings (T, H) and positions (3, T).

        Args:
            image_rows, added: rows of images (n) int64, and features (n, H) that the first layers, one each, add to
                these rows of their outputs.
        """
        cos, sin = self.rotation(position_ids, x.dtype)
        if liger_for(x):
            sin = sin.roll(sin.shape[-1] // 2, -1)  # as `rotate_liger` wants it
        for layer, features in itertools.zip_longest(self.layers, added):
            if self.gradient_checkpointing and x.requires_grad:
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
            if features is not None:
                x = x.index_add(0, image_rows, features)
        return self.norm(x)

    def decode(self, x: Tensor, position_ids: Tensor, cache: StaticCache) -> Tensor:
        """`forward` of one token of each completion, (n, H) and (3, n), in few launches and without a gradient.

        All norms but the first are computed outside of their modules.
        """
        cos, sin = self.rotation(position_ids, x.dtype)
        normed = self.layers[0].input_layernorm(x)
        for layer, norm in zip(self.layers, (*(after.input_layernorm for after in self.layers[1:]), self.norm)):
            x, delta = layer.decode(x, normed, cos, sin, cache)
            x, normed = add_rms_norm(x, delta, norm.weight, eps=norm.eps)
        return normed

    def join_storage(self) -> None:
        """Let `decode` multiply by query, key and value weights at once, and by those of gate and up."""
        for layer in self.layers:
            a, m = layer.self_attn, layer.mlp
            place_together(a.q_proj, a.k_proj, a.v_proj)
            place_together(m.gate_proj, m.up_proj)

    def rotation(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """For `rotate`, of positions (3, T)."""
        c, device = self.config, position_ids.device
        temporal, height, width = c.rope_parameters["mrope_section"]
        size = head_dim(c)
        index = torch.arange(size // 2, device=device)  # comparisons, not a copied list: no synchronisation
        if self.kind.interleaved:  # height takes every third frequency from the second on, width from the third on
            place = index % 3
            axis = ((place == 1) & (index < 3 * height)) + 2 * ((place == 2) & (index < 3 * width)).long()
        else:  # the first `temporal` frequencies, which are the highest, turn with the temporal position, then `height`
            axis = (index >= temporal).long() + (index >= temporal + height)
        exponents = torch.arange(0, size, 2, device=device, dtype=torch.float32) / size
        frequencies = c.rope_parameters["rope_theta"] ** -exponents
        cos, sin = cos_and_sin(position_ids[axis].T.float() * frequencies)
        return cos.to(dtype), sin.to(dtype)
