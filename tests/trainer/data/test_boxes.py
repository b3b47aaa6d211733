"""Gold boxes mean the same whatever unit and image size their file is written in, or the file is refused."""

import itertools
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from boxgrpo.trainer.data import images, schemas
from boxgrpo.trainer.data.boxes import Written, likeliest_unit
from boxgrpo.trainer.data.example import Source
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.options import BOX_UNITS

FORMS = {
    "refcoco": lambda box: {"image": "a.png", "problem": "x", "solution": box},
    "lisa": lambda box: {"image_path": "a.png", "instruction": "x", "boxes": [box]},
    "llmseg": lambda box: {"image_path": "a.png", "question": "x", "bbox": [box]},
    "univg_stage2": lambda box: {"images": ["a.png"], "question": "x", "answer": box},
}


@pytest.fixture
def draw(tmp_path):
    """draw(name, width, height): the image, in the test's folder."""

    def make(name, width, height, **more):
        Image.new("RGB", (width, height)).save(tmp_path / name, **more)

    return make


@pytest.mark.parametrize("form", FORMS)
def test_case_03_fractions_are_recognised_in_every_form(write, draw, caplog, form):
    """Case 3: in an image of 112 x 56 pixels, [0.25, 0.25, 0.5, 0.5] is a quarter, and the log says so."""
    draw("a.png", 112, 56)
    caplog.set_level("INFO")
    ((example,), faults) = read_examples(write([FORMS[form]([0.25, 0.25, 0.5, 0.5])]))
    assert example.gold == (250, 250, 500, 500) and not faults
    assert "gold boxes are taken in fractions of their images, for the first box likelier than " in caplog.text


def test_a_fraction_just_above_1_is_a_fraction_all_the_same(write, draw):
    """Its record is refused, instead of being read as a thousandth."""
    draw("a.png", 112, 56)
    path = write([FORMS["univg_stage2"]([0.25, 0.25, right, 0.5]) for right in (0.5, 1.004)])
    ((example,), (fault,)) = read_examples(path)
    assert example.gold == (250, 250, 500, 500) and fault.reason == "box_outside"


WIDTH, HEIGHT = 640, 480
SIDES = {"fractions": (1, 1), "percent": (100, 100), "thousandths": (1000, 1000), "pixels": (WIDTH, HEIGHT)}


def written(unit, count, seed=0):
    """Boxes in the unit, as a file has them, and in thousandths."""
    corners = np.sort(np.random.default_rng(seed).uniform(0, 1, (count, 2, 2)), axis=1).reshape(count, 4)
    digits = {"fractions": 4, "percent": 2}.get(unit, 1)
    return (corners * [*SIDES[unit], *SIDES[unit]]).round(digits).tolist(), corners * 1000


@pytest.mark.parametrize("form", ["refcoco", "univg_stage2"])
@pytest.mark.parametrize("unit", SIDES)
def test_twenty_records_tell_the_unit(write, draw, form, unit):
    """A faulty one among them, far outside, does not mislead; nor does one of fractions, which is refused elsewhere."""
    draw("a.png", WIDTH, HEIGHT)
    boxes, gold = written(unit, 20)
    boxes[7] = [v * 5 for v in boxes[7]]
    boxes[3] = [v / side for v, side in zip(boxes[3], SIDES[unit] * 2)]
    examples, faults = read_examples(write([FORMS[form](box) for box in boxes]))
    found = {fault.source: fault.reason for fault in faults}
    assert found == {"data.json#7": "box_outside"} | ({} if unit == "fractions" else {"data.json#3": "fractions"})
    remedy = "--box_unit thousandths" if unit == "pixels" else "--box_unit pixels"
    assert remedy in next(fault.message for fault in faults if fault.reason == "box_outside")
    left = np.delete(gold, [int(source.partition("#")[2]) for source in found], axis=0)
    np.testing.assert_allclose([e.gold for e in examples], left, atol=0.3)


@pytest.mark.parametrize("usual", ["pixels", "thousandths"])
def test_the_usual_unit_is_never_mistaken(usual):
    """Small and large images, one record or many, objects of all sizes or small: at most, a few files are refused."""
    random, refused = np.random.default_rng(0), Counter()
    for size in ((84, 84), (112, 56), (640, 480), (900, 900), (2000, 1500)):
        scale = np.array([*size, *size] if usual == "pixels" else [1000] * 4)
        for count, extent, _ in itertools.product((1, 2, 5, 50), (0.1, 0.9), range(10)):
            sides = random.uniform(0.02, extent, (count, 2))
            start = random.uniform(0, 1 - sides)
            boxes = (np.concatenate([start, start + sides], axis=1) * scale).tolist()
            try:
                unit, _ = likeliest_unit([Written(box, size) for box in boxes], usual)
                assert unit == usual, (size, count, extent)
            except ValueError:
                refused[count] += 1
    assert refused.keys() <= {2, 5} and refused.total() <= 5  # of 400


@pytest.mark.parametrize("unit", SIDES)
@pytest.mark.parametrize("usual", ["pixels", "thousandths"])
def test_another_unit_is_found_refused_or_noted(usual, unit):
    """From two boxes on no file is misread but where `told` is False; 200 boxes from anywhere tell every unit."""
    for count, seed in itertools.product((2, 3, 5, 10, 200), range(20)):
        boxes = [Written(box, (WIDTH, HEIGHT)) for box in written(unit, count, seed)[0]]
        try:
            found, told = likeliest_unit(boxes, usual)
            assert found == unit or (found == usual and not told and count < 10), (count, seed)
        except ValueError:
            assert count < 200


def test_boxes_in_one_corner_tell_no_unit():
    """They may be percent of the image or a twentieth of it in thousandths: however many, they are no proof."""
    corners = np.random.default_rng(0).uniform(0, 20, (200, 2))
    boxes = [Written([x, y, x + 30, y + 30], (2000, 1500)) for x, y in corners.tolist()]
    with pytest.raises(ValueError, match="may be percent or thousandths"):
        likeliest_unit(boxes, "thousandths")


@pytest.mark.parametrize(("side", "unit"), [(1000, "thousandths"), (100, "percent")])
def test_units_that_give_the_same_gold_boxes_need_not_be_told_apart(side, unit):
    """In images of 1000 x 1000 pixels a pixel is a thousandth."""
    boxes = [Written([v * side / 1000 for v in box], (side, side)) for box in written("thousandths", 50)[0]]
    assert likeliest_unit(boxes, "pixels") == ("pixels", True)
    assert likeliest_unit(boxes, "thousandths")[0] in (unit, "pixels")


def test_a_file_that_leaves_the_unit_open_is_refused(write, draw):
    """Eight boxes that fit thousandths and pixels alike; `box_unit` decides."""
    draw("a.png", WIDTH, HEIGHT)
    boxes, gold = written("pixels", 8)
    path = write([FORMS["univg_stage2"](box) for box in boxes])
    with pytest.raises(ValueError, match=r"data\.json: the gold boxes may be pixels or thousandths .*--box_unit"):
        read_examples(path)
    examples, _ = read_examples(path, box_unit="pixels")
    np.testing.assert_allclose([e.gold for e in examples], gold, atol=0.3)
    assert [list(e.gold) for e in read_examples(path, box_unit="thousandths")[0]] == boxes


def test_a_unit_that_is_named_is_used(write, draw):
    draw("a.png", 200, 100)
    path = write([FORMS["refcoco"]([20, 10, 60, 40])])
    expected = {"percent": (200, 100, 600, 400), "thousandths": (20, 10, 60, 40), "pixels": (100, 100, 300, 400)}
    assert {unit: read_examples(path, box_unit=unit)[0][0].gold for unit in expected} == expected
    assert set(BOX_UNITS) == {*expected, "fractions"}


def test_case_08_swapped_sizes_give_way_to_the_files_own(write, draw, caplog):
    """Case 8: 90 x 60 pixels, and the record says 60 x 90. What else contradicts the file is refused by name."""
    draw("90x60.png", 90, 60)
    record = {"image": "90x60.png", "problem": "x", "solution": [30, 20, 60, 40], "width": 60, "height": 90}
    caplog.set_level("INFO")
    examples, (fault,) = read_examples(write([record, record, record | {"width": 120}]))
    assert [e.gold for e in examples] == [(333.333, 333.333, 666.667, 666.667)] * 2
    assert "2 records have width and height swapped; the image files' own are used" in caplog.text
    assert fault.reason == "size_contradicts"
    assert "width and height are 120 and 90; " in fault.message and "90x60.png is 90 x 60 pixels" in fault.message


@pytest.mark.parametrize("unit", ["fractions", "percent", "thousandths", "pixels"])
def test_sizes_are_compared_whatever_the_unit(write, draw, caplog, unit):
    """In text or not; they are those of the second image, which has the box."""
    draw("a.png", 84, 56)
    draw("b.png", 90, 60)
    box = [0.2, 0.2, 0.5, 0.5] if unit == "fractions" else [20, 20, 50, 50]
    record = {"images": ["a.png", "b.png"], "question": "Find it in image 2.", "answer": box}
    sizes = [
        (90, 60),
        ("90", " 60.0"),
        (60, 90),
        (None, None),
        (84, 56),
        ("90 px", 60),
        (90, None),
        (90, True),
        (0, 60),
    ]
    data = write([record | dict(zip(("width", "height"), size)) for size in sizes])
    caplog.set_level("INFO")
    examples, faults = read_examples(data, box_unit=unit)
    assert [e.source for e in examples] == [f"data.json#{n}" for n in range(4)] and len({e.gold for e in examples}) == 1
    assert [fault.reason for fault in faults] == ["size_contradicts", *["bad_size"] * 4]
    assert "width and height are '90 px' and 60; both are numbers of pixels" in faults[1].message
    assert "1 records have width and height swapped" in caplog.text


def test_an_image_is_opened_only_where_its_size_is_needed(write, draw, monkeypatch):
    """Once for all records; for boxes in thousandths only if a record tells its size."""
    draw("a.png", 84, 56)
    opened = []
    monkeypatch.setattr(images, "_open", lambda path, real=images._open: opened.append(path) or real(path))
    plain = FORMS["univg_stage2"]([10, 20, 500, 700])
    for record, unit, times in ((plain, "thousandths", 0), (plain | {"width": 84, "height": 56}, "thousandths", 1)):
        images._header_of_file.cache_clear()
        file = Source.of(write([record] * 3), None, unit=unit)
        for _ in range(3):
            schemas.SCHEMAS["univg_stage2"].read(record, file)
        assert len(opened) == times


def test_a_turned_photo_measures_its_boxes_upright(write, draw, caplog):
    """Where the record has the sizes from before the turn, nothing tells where the box belongs."""
    caplog.set_level("INFO")
    exif = Image.Exif()
    exif[0x0112] = 6
    draw("turned.png", 90, 60, exif=exif)
    record = {"image": "turned.png", "problem": "x", "solution": [30, 20, 60, 40]}
    sizes = [{}, {"width": 60, "height": 90}, {"width": 90, "height": 60}]
    examples, (fault,) = read_examples(write([record | size for size in sizes]))
    assert [e.gold for e in examples] == [(500, 222.222, 1000, 444.444)] * 2
    assert (fault.source, fault.reason) == ("data.json#2", "turned_image") and "Save it upright" in fault.message
    assert "2 records have an image that its EXIF turns" in caplog.text
    exif[0x0112] = 3
    draw("upside_down.png", 90, 60, exif=exif)
    ((example,), _) = read_examples(write([record | {"image": "upside_down.png", "width": "", "height": []}]))
    assert example.gold == (333.333, 333.333, 666.667, 666.667) and "1 records have an image that its" in caplog.text
    (_, fault) = read_examples(write([record, record | {"solution": [30, 20, 80, 40]}]), box_unit="pixels")
    assert "EXIF turns the image: if the box is that of the unturned one, turn it too. If" in fault[0].message


def test_several_boxes_are_counted_or_refused(write, draw, caplog):
    """A record has one gold box. The zero-shot sets are graded by the first, as in the paper's evaluation."""
    draw("a.png", 112, 280)
    caplog.set_level("INFO")
    boxes = [[10, 20, 90, 200], [1, 2, 30, 40]]
    lisa = FORMS["lisa"]([]) | {"boxes": boxes}
    ((example,), _) = read_examples(write([lisa]))
    assert example.gold == (89.286, 71.429, 803.571, 714.286)
    assert "1 records have several boxes; the first is the gold box" in caplog.text
    raw = {"image": "a.png", "expression": "x", "bbox": [[10, 20, 80, 180]]}  # x, y, width, height
    for same in (raw, lisa | {"boxes": boxes[0]}):
        ((again,), _) = read_examples(write([same]))
        assert again.gold == example.gold
    records = [FORMS["univg_stage2"](box) for box in (boxes, boxes[:1])]
    ((single,), (fault,)) = read_examples(write(records))
    assert single.gold == (10, 20, 90, 200)
    assert fault.reason == "several_boxes" and "answer holds 2 boxes" in fault.message


@pytest.mark.parametrize("unit", ["percent", "thousandths", "pixels"])
def test_boxes_in_a_chats_text_are_thousandths(write, draw, caplog, unit):
    """The text is learned as it is written, so other units are not converted: the log says what they look like."""
    draw("a.png", WIDTH, HEIGHT)
    caplog.set_level("INFO")
    boxes, _ = written(unit, 20)
    texts = ["<answer>({:.0f}, {:.0f}), ({:.0f}, {:.0f})</answer>".format(*box) for box in boxes]
    chats = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": text}] for text in texts]
    path = write([{"images": ["a.png"], "messages": chat} for chat in chats])
    examples, _ = read_examples(path, box_unit="pixels")
    assert examples.files[0].unit == "thousandths" and examples[0].gold == pytest.approx(boxes[0], abs=0.51)
    assert "--box_unit pixels does not apply to boxes in the text of chats: thousandths" in caplog.text
    assert (f"look like {unit} of their images" in caplog.text) == (unit != "thousandths")


def test_a_lone_record_keeps_its_forms_unit(write, draw, caplog):
    """There is no evidence against it, however small its box is; the log says so."""
    caplog.set_level("INFO")
    draw("a.png", WIDTH, HEIGHT)
    found = [read_examples(write([FORMS[form]([10, 10, 20, 20])]))[0] for form in ("refcoco", "univg_stage2")]
    assert [record.levelname for record in caplog.records if "not certain" in record.message] == ["WARNING"] * 2
    assert [examples.files[0].unit for examples in found] == ["pixels", "thousandths"]
    assert "in thousandths of their images, the form's usual unit, which is not certain from the" in caplog.text
    assert found[1][0].gold == (10, 10, 20, 20)
