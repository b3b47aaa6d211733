"""Torch twins of the grounding rewards: Python's `re` on the CPU."""

import re

import torch
from torch import Tensor

from .boxes import box_iou_torch
from .vocabulary import EOS, MARK, unpacked

FORMATS = FORMAT_THINK, FORMAT_BOX, FORMAT_MARKED, FORMAT_LIST, FORMAT_FRACTIONS = range(5)
ANSWER_FORMATS = dict(zip(("think", "box", "marked", "list", "fractions"), FORMATS))  # codes of `answer_format`
COORDINATE_LIMIT = 2**31 - 1  # larger numbers saturate here

_BOX = rb"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)"
_BARE = {  # formats whose box counts wherever it stands
    FORMAT_BOX: _BOX,
    FORMAT_MARKED: rb"<\|box_start\|>" + _BOX + rb"<\|box_end\|>",
    FORMAT_LIST: rb"\[\s*" + rb",\s*".join([rb"(\d+)"] * 4) + rb"\s*\]",
    FORMAT_FRACTIONS: rb"\[\s*" + rb",\s*".join([rb"(\d+(?:\.\d+)?)"] * 4) + rb"\s*\]",
}
_DOTALL_ASCII = re.DOTALL | re.ASCII


def grounding_rewards_torch(text: Tensor, offsets: Tensor, gold: Tensor, formats: Tensor) -> tuple[Tensor, ...]:
    """Twin: Python's `re` on the CPU. (M), (n+1), (n, 4), (n) -> the fields of `GroundingRewards`."""
    raw, bounds, codes = text.cpu().numpy().tobytes(), offsets.tolist(), formats.tolist()
    if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > len(raw):
        raise IndexError(f"offsets must not fall and must stay inside the {len(raw)} bytes of the text.")
    if unknown := set(codes) - set(FORMATS):
        raise ValueError(
            f"answer_format holds the code {unknown.pop()}; codes are 0 to {FORMATS[-1]}, see ANSWER_FORMATS."
        )
    parsed = [_parse(raw[start:end], code) for start, end, code in zip(bounds, bounds[1:], codes, strict=False)]
    boxes, found, well_formed, spans = zip(*parsed, strict=True) if parsed else ((), (), (), ())
    boxes = torch.tensor(boxes, dtype=torch.float32, device=gold.device).view(-1, 4)
    return (
        box_iou_torch(boxes.double(), gold.double()).float(),
        torch.tensor(well_formed, dtype=torch.float32, device=gold.device),
        boxes,
        torch.tensor(found, dtype=torch.bool, device=gold.device),
        torch.tensor(spans, dtype=torch.int32, device=gold.device).view(-1, 4),
    )


def grounding_rewards_from_ids_torch(
    ids: Tensor, lengths: Tensor, data: Tensor, entries: Tensor, gold: Tensor, formats: Tensor
) -> tuple[Tensor, ...]:
    """Twin: writes the text out, then parses it."""
    n, width = ids.shape
    starts, sizes, roles = unpacked(entries)
    live = torch.arange(width, device=ids.device) < lengths.unsqueeze(1)
    known = live & (ids >= 0) & (ids < len(entries))
    live &= ((roles == EOS)[torch.where(known, ids, 0)] & known).cumsum(1) == 0
    foreign = ids[live & ~known]
    if len(foreign):
        raise IndexError(f"ids holds {foreign[0]}; the table covers 0 to {len(entries) - 1}. Build it for every id.")
    row, token = live.nonzero()[:, 0], ids[live]
    silent = (roles[token] == MARK) & (formats[row] != FORMAT_MARKED)
    starts, sizes = starts[token], sizes[token].masked_fill(silent, 0)
    ends = sizes.cumsum(0)
    within = torch.arange(int(sizes.sum()), device=ids.device) - torch.repeat_interleave(ends - sizes, sizes)
    text = data[torch.repeat_interleave(starts, sizes) + within]
    row_sizes = torch.zeros(n + 1, dtype=torch.int64, device=ids.device)
    row_sizes.index_add_(0, row + 1, sizes)
    return grounding_rewards_torch(text, row_sizes.cumsum(0), gold, formats)


def _parse(text: bytes, answer_format: int) -> tuple[list[float], bool, bool, list[int]]:
    """Box, whether there is one, whether the format is right, spans."""
    think = re.search(rb"<think>(.*?)</think>", text, _DOTALL_ASCII)
    answer = re.search(rb"<answer>(.*?)</answer>", text, _DOTALL_ASCII)
    spans = [*(think.span(1) if think else (-1, -1)), *(answer.span(1) if answer else (-1, -1))]
    if answer_format == FORMAT_THINK:
        box = re.search(_BOX, answer[1], _DOTALL_ASCII) if answer else None
        well_formed = bool(re.search(rb"<think>.*?</think>\s*<answer>" + _BOX + rb"</answer>$", text, _DOTALL_ASCII))
    else:
        box = re.search(_BARE[answer_format], text, _DOTALL_ASCII)
        well_formed = box is not None
    number = _thousandths if answer_format == FORMAT_FRACTIONS else _saturated
    return [number(digits) for digits in box.groups()] if box else [0] * 4, box is not None, well_formed, spans


def _saturated(digits: bytes) -> int:
    # int() refuses more than 4300 digits, and a model can write them.
    digits = digits.lstrip(b"0")
    return COORDINATE_LIMIT if len(digits) > 10 else min(int(digits or b"0"), COORDINATE_LIMIT)


def _thousandths(decimal: bytes) -> float:
    whole, _, decimals = decimal.partition(b".")
    billionths = _saturated(whole) * 10**9 + int(decimals[:9].ljust(9, b"0"))
    return min(float(billionths) / 1e6, COORDINATE_LIMIT)
