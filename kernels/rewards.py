"""Format and accuracy rewards of answers that hold a box (DESIGN section 3, "Box answer")."""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import box_iou_torch
from .checks import INTS, check_backend, check_tensor
from .vocabulary import VocabularyBytes

FORMAT_THINK, FORMAT_BOX = 0, 1
ANSWER_FORMATS = {"think": FORMAT_THINK, "box": FORMAT_BOX}  # codes of an `answer_format` tensor
COORDINATE_LIMIT = 2**31 - 1  # larger numbers saturate here

_BOX = rb"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)"
_DOTALL_ASCII = re.DOTALL | re.ASCII


class GroundingRewards(NamedTuple):
    """Rewards of n completions.

    `spans` are byte offsets from the start of the completion, [think start, think end, answer start, answer end):
    the text between the first `<think>` and the next `</think>`, and likewise for answer, tags left out; -1, -1 where
    the pair of tags is absent. They do not depend on the answer format.
    """

    accuracy: Tensor  # (n) fp32, IoU with gold, 0-1
    format: Tensor  # (n) fp32, 0 or 1
    boxes: Tensor  # (n, 4) fp32, the box as written, 0 where none was found
    found: Tensor  # (n) bool, a box was found where the answer format looks for it
    spans: Tensor  # (n, 4) int32


def grounding_rewards(
    text: Tensor, offsets: Tensor, gold: Tensor, *, answer_format: str | Tensor = "think", backend: str = "auto"
) -> GroundingRewards:
    """Score n answers against their gold boxes.

    Args:
        text: (M) uint8, the completions' UTF-8 bytes end to end.
        offsets: (n+1) int64, where each completion starts in `text`, and M.
        gold: (n, 4) fp32, x1 y1 x2 y2 on the 0-1000 scale.
        answer_format: "think" or "box" for all, or (n) uint8 codes, see ANSWER_FORMATS.

    Returns:
        `GroundingRewards`. Never an error and never NaN for any text: a box that is inverted or degenerate has IoU 0.

    Raises:
        ValueError: shapes, dtypes, answer_format or backend do not fit.
    """
    check_backend("grounding_rewards", backend)
    check_tensor("text", text, (None,), (torch.uint8,))
    check_tensor("gold", gold, (None, 4), (torch.float32,))
    check_tensor("offsets", offsets, (gold.shape[0] + 1,), (torch.int64,))
    formats = _formats(answer_format, gold)
    return GroundingRewards(*torch.ops.boxgrpo.grounding_rewards(text, offsets, gold, formats))


def grounding_rewards_from_ids(
    ids: Tensor,
    lengths: Tensor,
    table: VocabularyBytes,
    gold: Tensor,
    *,
    answer_format: str | Tensor = "think",
    backend: str = "auto",
) -> GroundingRewards:
    """`grounding_rewards` of token ids: a completion's text is its tokens' bytes up to the first EOS.

    Args:
        ids: (n, C) int64; what stands at `lengths` and behind it is not read.
        lengths: (n) int32 or int64, tokens of each completion.
        table: the vocabulary's bytes; it must cover every id before `lengths`.
        gold, answer_format, backend: as in `grounding_rewards`.

    Returns:
        `GroundingRewards`; spans are in bytes of the text, not in tokens.

    Raises:
        ValueError: shapes, dtypes, answer_format or backend do not fit.
    """
    check_backend("grounding_rewards_from_ids", backend)
    check_tensor("ids", ids, (None, None), (torch.int64,))
    check_tensor("lengths", lengths, (ids.shape[0],), INTS)
    check_tensor("gold", gold, (ids.shape[0], 4), (torch.float32,))
    formats = _formats(answer_format, gold)
    op = torch.ops.boxgrpo.grounding_rewards_from_ids
    return GroundingRewards(*op(ids, lengths, table.data, table.offsets, table.eos, gold, formats))


def _formats(answer_format: str | Tensor, gold: Tensor) -> Tensor:
    n = gold.shape[0]
    if isinstance(answer_format, Tensor):
        check_tensor("answer_format", answer_format, (n,), (torch.uint8,))
        return answer_format
    if answer_format not in ANSWER_FORMATS:
        raise ValueError(f"answer_format is {answer_format!r}; it is 'think', 'box' or a (n) uint8 tensor.")
    return torch.full((n,), ANSWER_FORMATS[answer_format], dtype=torch.uint8, device=gold.device)


def grounding_rewards_torch(text: Tensor, offsets: Tensor, gold: Tensor, formats: Tensor) -> tuple[Tensor, ...]:
    """Twin: Python's `re` on the CPU. (M), (n+1), (n, 4), (n) -> the fields of `GroundingRewards`."""
    raw, bounds = text.cpu().numpy().tobytes(), offsets.tolist()
    parsed = [
        _parse(raw[start:end], answer_format)
        for start, end, answer_format in zip(bounds, bounds[1:], formats.tolist(), strict=False)
    ]
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
    ids: Tensor, lengths: Tensor, data: Tensor, token_offsets: Tensor, eos: Tensor, gold: Tensor, formats: Tensor
) -> tuple[Tensor, ...]:
    """Twin: writes the text out, then parses it."""
    n, width = ids.shape
    live = torch.arange(width, device=ids.device) < lengths.unsqueeze(1)
    live &= eos[torch.where(live, ids, 0)].logical_and(live).cumsum(1) == 0
    token = ids[live]
    starts, sizes = token_offsets[token], token_offsets.diff()[token]
    ends = sizes.cumsum(0)
    within = torch.arange(int(sizes.sum()), device=ids.device) - torch.repeat_interleave(ends - sizes, sizes)
    text = data[torch.repeat_interleave(starts, sizes) + within]
    row_sizes = torch.zeros(n + 1, dtype=torch.int64, device=ids.device)
    row_sizes.index_add_(0, live.nonzero()[:, 0] + 1, sizes)
    return grounding_rewards_torch(text, row_sizes.cumsum(0), gold, formats)


def _parse(text: bytes, answer_format: int) -> tuple[list[int], bool, bool, list[int]]:
    """Box, whether there is one, whether the format is right, spans."""
    think = re.search(rb"<think>(.*?)</think>", text, _DOTALL_ASCII)
    answer = re.search(rb"<answer>(.*?)</answer>", text, _DOTALL_ASCII)
    spans = [*(think.span(1) if think else (-1, -1)), *(answer.span(1) if answer else (-1, -1))]
    if answer_format == FORMAT_BOX:
        box = re.search(_BOX, text, _DOTALL_ASCII)
        well_formed = box is not None
    else:
        box = re.search(_BOX, answer[1], _DOTALL_ASCII) if answer else None
        well_formed = bool(re.search(rb"<think>.*?</think>\s*<answer>" + _BOX + rb"</answer>$", text, _DOTALL_ASCII))
    return [_saturated(digits) for digits in box.groups()] if box else [0] * 4, box is not None, well_formed, spans


def _saturated(digits: bytes) -> int:
    # int() refuses more than 4300 digits, and a model can write them.
    digits = digits.lstrip(b"0")
    return COORDINATE_LIMIT if len(digits) > 10 else min(int(digits or b"0"), COORDINATE_LIMIT)


_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_text_op = torch.library.custom_op(
    "boxgrpo::grounding_rewards",
    grounding_rewards_torch,
    mutates_args=(),
    schema=f"(Tensor text, Tensor offsets, Tensor gold, Tensor formats) -> {_RESULTS}",
)
_ids_op = torch.library.custom_op(
    "boxgrpo::grounding_rewards_from_ids",
    grounding_rewards_from_ids_torch,
    mutates_args=(),
    schema="(Tensor ids, Tensor lengths, Tensor data, Tensor token_offsets, Tensor eos, Tensor gold, Tensor formats) "
    f"-> {_RESULTS}",
)


@_text_op.register_fake
def _(text, offsets, gold, formats):
    return _fake(gold)


@_ids_op.register_fake
def _(ids, lengths, data, token_offsets, eos, gold, formats):
    return _fake(gold)


def _fake(gold: Tensor) -> tuple[Tensor, ...]:
    n = gold.shape[0]
    return (
        gold.new_empty(n),
        gold.new_empty(n),
        gold.new_empty(n, 4),
        gold.new_empty(n, dtype=torch.bool),
        gold.new_empty(n, 4, dtype=torch.int32),
    )
