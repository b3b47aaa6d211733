"""Format and accuracy rewards of answers that hold a box (ARCHITECTURE.md, section "The mathematics")."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .boxes import box_iou_torch
from .dispatch import INTS, check_tensor, register_compiled, runs_fast
from .vocabulary import EOS, MARK, VocabularyBytes, unpack_entries

FORMATS = FORMAT_THINK, FORMAT_BOX, FORMAT_MARKED, FORMAT_LIST, FORMAT_FRACTIONS = range(5)
ANSWER_FORMATS = dict(zip(("think", "box", "marked", "list", "fractions"), FORMATS))  # codes of `answer_format`
COORDINATE_LIMIT = 2**31 - 1  # larger numbers are read as this one
EXPONENT_LIMIT = 63  # likewise; beyond it any number but 0 is over COORDINATE_LIMIT, or 0 in fp32

_BOX = rb"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)"
_NUMBERS = rb",\s*".join([rb'"?(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"?'] * 4)
_UNTAGGED = {  # patterns of the formats whose box may be anywhere in the text
    FORMAT_BOX: _BOX,
    FORMAT_MARKED: rb"<\|box_start\|>" + _BOX + rb"<\|box_end\|>",
    **dict.fromkeys((FORMAT_LIST, FORMAT_FRACTIONS), rb"\[\s*" + _NUMBERS + rb"\s*\]"),
}
_DOTALL_ASCII = re.DOTALL | re.ASCII


class GroundingRewards(NamedTuple):
    """Rewards of n completions.

    `spans` are byte offsets from the start of the completion, [think start, think end, answer start, answer end):
    the text between the first `<think>` and the next `</think>`, and likewise for answer, tags left out; -1, -1 where
    the pair of tags is absent. They do not depend on the answer format.
    """

    accuracy: Tensor  # (n) fp32, IoU with gold, 0-1
    format: Tensor  # (n) fp32, 0 or 1
    boxes: Tensor  # (n, 4) fp32, the box as written, times 1000 in "fractions"; 0 where none was found
    found: Tensor  # (n) bool, whether a box was found where the answer format requires it
    spans: Tensor  # (n, 4) int32


def pack_texts(texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """n texts end to end, as `grounding_rewards` takes them: (M) uint8 and (n+1) int64 on the CPU."""
    offsets = torch.tensor([0, *itertools.accumulate(map(len, texts))])
    joined = bytearray(b"".join(texts))
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8), offsets


def grounding_rewards(
    text: Tensor, offsets: Tensor, gold: Tensor, *, answer_format: str | Tensor = "think", backend: str = "auto"
) -> GroundingRewards:
    """Score n answers against their gold boxes, in one pass over their bytes.

    The answer formats, and which box each reads. Digits and white space are ASCII; numbers above COORDINATE_LIMIT
    are read as COORDINATE_LIMIT, those below its negative as its negative:

    - "think": `<think>…</think>` and, with white space between or none, `<answer>(x1, y1), (x2, y2)</answer>` at the
      end, or before one last newline, has a format reward of 1. The box is the first in the first `<answer>…</answer>`.
    - "box": the first `(x1, y1), (x2, y2)` of the text.
    - "marked": the first `<|box_start|>(x1,y1),(x2,y2)<|box_end|>`, as Qwen2-VL writes it.
    - "list": the first `[x1, y1, x2, y2]` of JSON's numbers, each with quotation marks or without, white space allowed
      inside the brackets and behind the commas. Decimals after the ninth are ignored.
    - "fractions": such a list of fractions of the image. The box returned is on the 0-1000 scale.

    In every format but "think" the format reward is 1 where a box was found.

    Args:
        text: (M) uint8, the completions' UTF-8 bytes end to end.
        offsets: (n+1) int64, where each completion starts in `text`, and M. A completion is shorter than 2 GiB.
        gold: (n, 4) fp32, x1 y1 x2 y2 on the 0-1000 scale.
        answer_format: one name for all answers, or (n) uint8 codes, the values of ANSWER_FORMATS.
        backend: "extension" is csrc/'s parser, "torch" the twin, "auto" the parser where it was compiled for the
            tensors' device, else the twin with one warning.

    Returns:
        `GroundingRewards`, on gold's device; on a GPU csrc/'s parser is one launch and does not synchronise. Every
        text is accepted, and no result is NaN: a box that is inverted or degenerate has IoU 0, one that extends
        beyond the image its ordinary IoU.

    Raises:
        ValueError: shapes, dtypes, devices, answer_format or backend do not fit.
        IndexError: offsets that decrease or leave the text, or a completion of 2 GiB. On a GPU a device-side assertion.
    """
    fast = runs_fast("grounding_rewards", backend, gold, fast="extension")
    check_tensor("text", text, (None,), (torch.uint8,))
    check_tensor("gold", gold, (None, 4), (torch.float32,))
    check_tensor("offsets", offsets, (gold.shape[0] + 1,), (torch.int64,))
    formats = _formats(answer_format, gold)
    op = torch.ops.boxgrpo.grounding_rewards if fast else torch.ops.boxgrpo.grounding_rewards_torch
    return GroundingRewards(*op(text, offsets, gold, formats))


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

    Special tokens have no text, except the box marks in the answer format "marked".

    Args:
        ids: (n, C) int64. Ids at or after a row's length and ids after its first EOS are ignored.
        lengths: (n) int32 or int64, tokens of each completion, clamped to 0..C.
        table: the vocabulary's bytes; it must cover every id that is not ignored. A completion's text is shorter
            than 2 GiB, which is not checked.
        gold, answer_format, backend: as in `grounding_rewards`.

    Returns:
        `GroundingRewards`; spans are in bytes of the text, not in tokens.

    Raises:
        ValueError: shapes, dtypes, devices, answer_format or backend do not fit.
        IndexError: an id that is not ignored is outside the table. On a GPU a device-side assertion.
    """
    fast = runs_fast("grounding_rewards_from_ids", backend, gold, fast="extension")
    check_tensor("ids", ids, (None, None), (torch.int64,))
    check_tensor("lengths", lengths, (ids.shape[0],), INTS)
    check_tensor("gold", gold, (ids.shape[0], 4), (torch.float32,))
    formats = _formats(answer_format, gold)
    op = torch.ops.boxgrpo.grounding_rewards_from_ids if fast else torch.ops.boxgrpo.grounding_rewards_from_ids_torch
    return GroundingRewards(*op(ids, lengths, *table, gold, formats))


def _formats(answer_format: str | Tensor, gold: Tensor) -> Tensor:
    n = gold.shape[0]
    if isinstance(answer_format, Tensor):
        check_tensor("answer_format", answer_format, (n,), (torch.uint8,))
        return answer_format
    if answer_format not in ANSWER_FORMATS:
        names = ", ".join(map(repr, ANSWER_FORMATS))
        raise ValueError(f"answer_format is {answer_format!r}; it is one of {names}, or a (n) uint8 tensor.")
    return torch.full((n,), ANSWER_FORMATS[answer_format], dtype=torch.uint8, device=gold.device)


def grounding_rewards_torch(text: Tensor, offsets: Tensor, gold: Tensor, formats: Tensor) -> tuple[Tensor, ...]:
    """Twin of `grounding_rewards`, by Python's `re` on the CPU: (M), (n+1), (n, 4), (n) -> its results' fields."""
    raw, bounds, codes = text.cpu().numpy().tobytes(), offsets.tolist(), formats.tolist()
    if bounds != sorted(bounds) or bounds[0] < 0 or bounds[-1] > len(raw):
        raise IndexError(f"offsets must not decrease and must stay inside the {len(raw)} bytes of the text.")
    if unknown := set(codes) - set(FORMATS):
        last = FORMATS[-1]
        raise ValueError(f"answer_format holds the code {unknown.pop()}; codes are 0 to {last}, see ANSWER_FORMATS.")
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
    """Twin of `grounding_rewards_from_ids`: joins the bytes of each row's tokens, then parses them."""
    n, width = ids.shape
    starts, sizes, roles = unpack_entries(entries)
    live = torch.arange(width, device=ids.device) < lengths.unsqueeze(1)
    in_table = live & (ids >= 0) & (ids < len(entries))
    live &= ((roles == EOS)[torch.where(in_table, ids, 0)] & in_table).cumsum(1) == 0
    outside = ids[live & ~in_table]
    if len(outside):
        raise IndexError(f"ids holds {outside[0]}; the table covers 0 to {len(entries) - 1}. Build it for every id.")
    row, token = live.nonzero()[:, 0], ids[live]
    has_no_text = (roles[token] == MARK) & (formats[row] != FORMAT_MARKED)
    starts, sizes = starts[token], sizes[token].masked_fill(has_no_text, 0)
    ends = sizes.cumsum(0)
    within = torch.arange(int(sizes.sum()), device=ids.device) - torch.repeat_interleave(ends - sizes, sizes)
    text = data[torch.repeat_interleave(starts, sizes) + within]
    row_sizes = torch.zeros(n + 1, dtype=torch.int64, device=ids.device)
    row_sizes.index_add_(0, row + 1, sizes)
    return grounding_rewards_torch(text, row_sizes.cumsum(0), gold, formats)


def _parse(text: bytes, answer_format: int) -> tuple[list[float], bool, bool, list[int]]:
    """The box, whether there is one, whether the format is right, and the spans."""
    think = re.search(rb"<think>(.*?)</think>", text, _DOTALL_ASCII)
    answer = re.search(rb"<answer>(.*?)</answer>", text, _DOTALL_ASCII)
    spans = [*(think.span(1) if think else (-1, -1)), *(answer.span(1) if answer else (-1, -1))]
    if answer_format == FORMAT_THINK:
        box = re.search(_BOX, answer[1], _DOTALL_ASCII) if answer else None
        well_formed = bool(re.search(rb"<think>.*?</think>\s*<answer>" + _BOX + rb"</answer>$", text, _DOTALL_ASCII))
    else:
        box = re.search(_UNTAGGED[answer_format], text, _DOTALL_ASCII)
        well_formed = box is not None
    unit = 1000 if answer_format == FORMAT_FRACTIONS else 1
    return [_value(n, unit) for n in box.groups()] if box else [0] * 4, box is not None, well_formed, spans


def _saturated(digits: bytes, limit: int = COORDINATE_LIMIT) -> int:
    # int() refuses more than 4300 digits, which a model may generate.
    digits = digits.lstrip(b"0")
    return limit if len(digits) > 10 else min(int(digits or b"0"), limit)


def _value(number: bytes, unit: int) -> float:
    """The value of a JSON number, times `unit`, by the operations of csrc/'s parser in their order."""
    size, _, exponent = number.lower().lstrip(b"-").partition(b"e")
    whole, _, decimals = size.partition(b".")
    value = _saturated(whole) * unit + int(decimals[:9].ljust(9, b"0")) * 1e-9 * unit
    for _ in range(_saturated(exponent.lstrip(b"+-"), EXPONENT_LIMIT)):
        value *= 0.1 if exponent.startswith(b"-") else 10
    value = min(value, COORDINATE_LIMIT)
    return -value if number.startswith(b"-") else value


def _fake(*args: Tensor) -> tuple[Tensor, ...]:
    gold = args[-2]
    shapes = ((), torch.float32), ((), torch.float32), ((4,), torch.float32), ((), torch.bool), ((4,), torch.int32)
    return tuple(gold.new_empty(gold.shape[0], *shape, dtype=dtype) for shape, dtype in shapes)


_RESULTS = "(Tensor accuracy, Tensor format, Tensor boxes, Tensor found, Tensor spans)"

register_compiled(
    f"(Tensor text, Tensor offsets, Tensor gold, Tensor formats) -> {_RESULTS}", grounding_rewards_torch, _fake
)
register_compiled(
    f"(Tensor ids, Tensor lengths, Tensor data, Tensor entries, Tensor gold, Tensor formats) -> {_RESULTS}",
    grounding_rewards_from_ids_torch,
    _fake,
)
