"""Rotary positions: three axes for the decoder (M-RoPE, Qwen2-VL section 2.1), two for the vision tower."""

import torch
from torch import Tensor


def mrope_position_ids(
    input_ids: Tensor, image_grid_thw: Tensor | None, *, image_token_id: int, spatial_merge_size: int = 2
) -> Tensor:
    """Temporal, height and width position of every token of one sequence.

    Text counts on from the largest position so far on all three axes; an image spreads over its merged grid.

    Args:
        input_ids: (P) int64; each image is one run of `image_token_id`, t·h·w / merge² tokens long.
        image_grid_thw: (I, 3) int64, patches per image before the merge; None for text alone.

    Returns:
        (3, P) int64, equal to transformers' `get_rope_index`.

    Raises:
        ValueError: when the image tokens and the grids do not tell the same story.
    """
    grids = [] if image_grid_thw is None else image_grid_thw.tolist()
    ids = input_ids.tolist()
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
                f"{run} image tokens in a row at token {start} for an image of {t * h * w}; grids must stand in the "
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


def mrope(position_ids: Tensor, *, head_dim: int, theta: float, sections: list[int]) -> tuple[Tensor, Tensor]:
    """What `rotate` takes, for the decoder's positions (3, T): two of (T, 1, head_dim) fp32.

    `sections` says how many frequencies, from the highest down, follow the temporal, height and width axis.
    """
    device = position_ids.device
    index = torch.arange(head_dim // 2, device=device)  # comparisons, not a copied list: no synchronisation
    axis = (index >= sections[0]).long() + (index >= sections[0] + sections[1])
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    return _turn(position_ids[axis].T.float() * frequencies)


def vision_rope(
    image_grid_thw: Tensor, *, head_dim: int, theta: float, spatial_merge_size: int
) -> tuple[Tensor, Tensor]:
    """What `rotate` takes, for the vision tower's patches: two of (P, 1, head_dim) fp32.

    Patches stand in the image processor's order, merge blocks first; half of the frequencies turn with the row and half
    with the column.
    """
    m = spatial_merge_size
    coordinates = [torch.empty(0, 2, dtype=torch.int64)]
    for t, h, w in image_grid_thw.tolist():
        grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)  # (h, w, 2)
        blocks = grid.view(h // m, m, w // m, m, 2).transpose(1, 2).reshape(-1, 2)
        coordinates.append(blocks.repeat(t, 1))
    coordinates = torch.cat(coordinates).float()  # (P, 2)
    half = head_dim // 2
    frequencies = theta ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)
    angles = (coordinates[:, :, None] * frequencies).flatten(1)  # (P, head_dim / 2): rows, then columns
    return _turn(angles)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (T, heads, head_dim), pairing element i with i + head_dim / 2.

    Faster on a CPU, backward included, than the textbook's four products of halves and their concatenation.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _turn(angles: Tensor) -> tuple[Tensor, Tensor]:
    """(T, d / 2) -> cosine and signed sine, (T, 1, d): the first half of a pair takes the sine with a minus."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
