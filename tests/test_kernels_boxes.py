"""box_iou against boxes worked out by hand."""

import math

import pytest
import torch

from boxgrpo.kernels import box_iou

BY_HAND = {
    "the same box": ((10, 20, 30, 60), (10, 20, 30, 60), 1.0),
    "left half": ((0, 0, 100, 100), (0, 0, 50, 100), 0.5),
    "corners overlap": ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
    "inside": ((0, 0, 10, 10), (2, 3, 4, 8), 0.1),
    "one unit of overlap counts": ((0, 0, 10, 10), (9, 9, 19, 19), 1 / 199),
    "edges touch": ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
    "apart in both axes": ((0, 0, 1, 1), (5, 5, 6, 6), 0.0),
    "leaves the image": ((-50, 0, 50, 100), (0, 0, 50, 100), 0.5),
    "inverted in x": ((30, 20, 10, 60), (10, 20, 30, 60), 0.0),
    "inverted in both": ((30, 60, 10, 20), (10, 20, 30, 60), 0.0),
    "both inverted alike": ((30, 60, 10, 20), (30, 60, 10, 20), 0.0),
    "a point": ((10, 10, 10, 10), (10, 10, 10, 10), 0.0),
    "a line inside": ((2, 5, 8, 5), (0, 0, 10, 10), 0.0),
    "infinite": ((0, 0, math.inf, math.inf), (0, 0, math.inf, math.inf), 0.0),
    "area beyond fp32": ((0, 0, 1e25, 1e25), (0, 0, 1e25, 2e25), 0.5),
    "not a number": ((0, 0, math.nan, 1), (0, 0, 1, 1), 0.0),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand_and_either_way_round(name):
    a, b, want = BY_HAND[name]
    pair = torch.tensor([a, b], dtype=torch.float32)
    assert box_iou(pair, pair.flip(0)).tolist() == pytest.approx([want, want], abs=1e-7)


def test_never_above_one_and_close_to_fp64():
    """A million boxes with themselves and with neighbours: rounding may not push IoU over 1."""
    g = torch.Generator().manual_seed(0)
    corner, size = torch.rand(10**6, 2, generator=g) * 1000, torch.rand(10**6, 2, generator=g) * 300
    boxes = torch.cat([corner, corner + size], 1)
    shifted = boxes + torch.randn(10**6, 1, generator=g)
    for other in (boxes, shifted):
        iou, exact = box_iou(boxes, other), box_iou(boxes.double(), other.double())
        assert iou.dtype == torch.float32 and exact.dtype == torch.float64
        assert iou.min() >= 0 and iou.max() <= 1
        wide = size.amin(1) > 30  # slivers lose digits to their own width
        assert (iou - exact)[wide].abs().max() < 1e-5


def test_dtypes_and_empty():
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    assert box_iou(box.bfloat16(), box.half()).dtype == torch.float32
    assert box_iou(box, box.double()).dtype == torch.float64
    assert box_iou(box[:0], box[:0]).shape == (0,)


def test_compiles_without_a_graph_break():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0]])
    compiled = torch.compile(box_iou, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(boxes, boxes.flip(0)), box_iou(boxes, boxes.flip(0)))


def test_what_is_refused():
    box = torch.zeros(2, 4)
    for message, args, options in (
        (r"a has shape \(2, 3\); it must be \(any, 4\)", (box[:, :3], box), {}),
        (r"b has shape \(1, 4\); it must be \(2, 4\)", (box, box[:1]), {}),
        ("a is int64; it must be float16 or", (box.long(), box), {}),
        ("box_iou has no Triton implementation", (box, box), {"backend": "triton"}),
    ):
        with pytest.raises(ValueError, match=message):
            box_iou(*args, **options)
