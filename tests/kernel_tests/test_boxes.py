"""box_iou against boxes worked out by hand."""

import math
import random
from fractions import Fraction

import pytest
import torch

from boxgrpo.kernels import box_iou
from kernel_cases import assert_refused, seeded

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


def generalized_by_hand(a, b):
    """GIoU by its definition, in fractions."""
    a, b = ([Fraction(value) for value in box] for box in (a, b))
    meet = [max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    hull = [max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1)]
    overlap, around = meet[0] * meet[1], hull[0] * hull[1]
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - overlap
    return float(overlap / union - (around - union) / around)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_generalized_is_its_definition(backend):
    draw = random.Random(0)

    def box():
        x1, y1 = draw.uniform(-100, 900), draw.uniform(-100, 900)
        return torch.tensor([x1, y1, x1 + draw.expovariate(0.01), y1 + draw.expovariate(0.01)]).tolist()

    pairs = [(box(), box()) for _ in range(500)]
    a, b = (torch.tensor(boxes) for boxes in zip(*pairs))
    got = box_iou(a, b, generalized=True, backend=backend)
    assert got.tolist() == pytest.approx([generalized_by_hand(x, y) for x, y in pairs], abs=1e-6)
    assert box_iou(a, a, generalized=True, backend=backend).tolist() == [1.0] * 500
    improper = torch.tensor([[5.0, 5, 1, 9], [1, 1, 1, 9], [0, 0, math.inf, 1], [math.nan, 0, 1, 1]])
    assert box_iou(improper, a[:4], generalized=True, backend=backend).tolist() == [-1.0] * 4
    far = torch.tensor([[0.0, 0, 1, 1], [1e30, 1e30, 2e30, 2e30]])
    assert -1 <= box_iou(far[:1], far[1:], generalized=True, backend=backend).item() < -0.7


@pytest.mark.parametrize("generalized", [False, True])
def test_pairwise_is_every_pair_in_turn(generalized):
    g = seeded()
    a, b = torch.rand(7, 4, generator=g) + torch.tensor([0, 0, 0.5, 0.5]), torch.rand(5, 4, generator=g)
    want = [[box_iou(x[None], y[None], generalized=generalized).item() for y in b] for x in a]
    for backend in ("auto", "torch"):
        got = box_iou(a, b, pairwise=True, generalized=generalized, backend=backend)
        torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-7)
    assert box_iou(a, b[:0], pairwise=True).shape == (7, 0)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_no_box_of_any_bits_gives_nan_or_leaves_0_to_1(backend):
    """Two million coordinates of random bits: subnormal, infinite, not a number, near the ends of fp32."""
    bits = torch.randint(-(2**31), 2**31, (500_000, 4), generator=seeded(), dtype=torch.int64)
    boxes = bits.int().view(torch.float32)
    ordered = torch.cat((torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])), 1)
    for a, b in ((boxes, boxes.flip(0)), (ordered, ordered), (ordered, ordered.roll(1, 0))):
        iou, giou = (box_iou(a, b, generalized=generalized, backend=backend) for generalized in (False, True))
        assert iou.min() >= 0 and iou.max() <= 1
        assert giou.min() >= -1 and (giou <= iou).all()


def test_dtypes_and_empty():
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    assert box_iou(box.bfloat16(), box.half()).dtype == torch.float32
    assert box_iou(box, box.double()).dtype == torch.float64
    assert box_iou(box[:0], box[:0]).shape == (0,)


def test_what_is_refused():
    box = torch.zeros(2, 4)
    assert_refused(
        (r"a has shape \(2, 3\); it must be \(any, 4\)", lambda: box_iou(box[:, :3], box)),
        (r"b has shape \(1, 4\); it must be \(2, 4\)", lambda: box_iou(box, box[:1])),
        ("a is int64; it must be float16 or", lambda: box_iou(box.long(), box)),
        ("for box_iou it is one of", lambda: box_iou(box, box, backend="triton")),
    )
