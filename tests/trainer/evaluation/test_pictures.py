"""Pictures show the boxes where they are, survive any prediction, and the curves of a run become a file."""

import json

import numpy as np
import pytest
from PIL import Image

from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.evaluation.grade import grade_texts
from boxgrpo.trainer.evaluation.pictures import (
    GOLD,
    IMAGE_HEIGHT,
    MARGIN,
    MIN_WIDTH,
    PREDICTED,
    _curve,
    _running_mean,
    annotate,
    contact_sheet,
    draw_cases,
    plot_run,
)
from scoring import text

GREY = Image.new("RGB", (IMAGE_HEIGHT, IMAGE_HEIGHT), (128, 128, 128))  # shown at its own size
TEXT = {"question": "Where is it?", "reasoning": "It is at the top left."}


def near(page, colour, x, y, reach=4):
    """Is `colour` within `reach` pixels of (x, y)?"""
    patch = np.asarray(page)[y - reach : y + reach + 1, x - reach : x + reach + 1]
    return (patch == colour).all(-1).any()


@pytest.mark.parametrize("predicted", [(500, 625, 1000, 875), (1000, 875, 500, 625)], ids=["upright", "inverted"])
def test_both_boxes_are_drawn_at_their_edges_on_the_target_image_only(predicted):
    page = annotate([GREY, GREY], gold=(250, 125, 500, 750), predicted=predicted, target_image=1, **TEXT)
    left, top = 2 * MARGIN + IMAGE_HEIGHT, MARGIN
    edges = {
        GOLD: [(60, 100), (120, 100), (90, 30), (90, 180)],  # left, right, top, bottom
        PREDICTED: [(120, 195), (239, 180), (180, 150), (180, 210)],
    }
    for colour, points in edges.items():
        for x, y in points:
            assert near(page, colour, left + x, top + y), (colour, x, y)
        drawn = (np.asarray(page)[: top + IMAGE_HEIGHT] == colour).all(-1).sum()
        assert drawn == pytest.approx({GOLD: 3 * 2 * (60 + 150), PREDICTED: 2 * 2 * (120 + 60)}[colour], rel=0.15)
    first = np.asarray(page)[MARGIN : MARGIN + IMAGE_HEIGHT, MARGIN : MARGIN + IMAGE_HEIGHT]
    assert (first == 128).all()


def test_equal_boxes_show_both_colours_and_an_edge_shows_on_an_object_of_its_colour():
    red = Image.new("RGB", GREY.size, PREDICTED)
    box = (250, 250, 750, 750)
    page = annotate([red], gold=box, predicted=box, **TEXT)
    edge = np.asarray(page)[MARGIN + 120, MARGIN + 52 : MARGIN + 68]  # across the left edge at 60
    assert [tuple(p) for p in edge].count(GOLD) == 3
    inside = [tuple(p) for p in edge[8:]]
    assert inside[:3] == [PREDICTED, PREDICTED, (255, 255, 255)], "no seam between the red line and the red object"


def test_the_page_holds_all_images_at_one_height_and_grows_with_the_text():
    photo = Image.new("RGB", (1000, 500))
    page = annotate([photo, GREY], **TEXT)
    assert page.width == 480 + 240 + 3 * MARGIN and page.mode == "RGB"
    assert annotate([photo, GREY], question="Where?", reasoning="word " * 200).height > page.height + 100
    assert annotate([photo, GREY], title="common_object", **TEXT).height > page.height
    assert annotate([GREY], **TEXT).width == MIN_WIDTH
    strip = annotate([Image.new("L", (2000, 10))], gold=(0, 0, 1000, 1000), **TEXT)
    assert strip.width == 3 * IMAGE_HEIGHT + 2 * MARGIN
    large = annotate([photo, GREY], image_height=2 * IMAGE_HEIGHT, **TEXT)
    assert large.size == (960 + 480 + 3 * MARGIN, page.height + IMAGE_HEIGHT)


@pytest.mark.parametrize(
    "predicted",
    [
        None,
        (750, 750, 250, 250),  # inverted
        (500, 500, 500, 500),  # no area
        (-300, 100, 5000, 10**30),  # outside
        (1000, 1000, 1000, 1000),  # in the last corner
    ],
)
def test_any_prediction_can_be_drawn(predicted):
    page = annotate([GREY], gold=(0, 0, 1000, 1000), predicted=predicted, **TEXT)
    assert (np.asarray(page) == PREDICTED).all(-1).any() == (predicted is not None)
    assert near(page, GOLD, MARGIN, MARGIN + 120)


@pytest.mark.parametrize(
    "text",
    ["", "混合 ∑ naïve 🙂", "x" * 3000, "line\nbreak\ttab\x00\ud800", "<answer>(1, 2), (3, 4)</answer>", "עברית"],
)
def test_any_text_can_be_shown(text):
    page = annotate([GREY], question=text, reasoning=text, title=text)
    ink = (np.asarray(page) < 200).any(-1)
    assert not ink[:, -MARGIN + 2 :].any(), "text runs over the right edge"


def test_pictures_are_spread_over_the_tasks(record_file, tmp_path):
    examples = [e for e in read_examples(record_file)[0] if not e.source.endswith("#2")]
    cases = list(zip(grade_texts(examples, [text(e.gold) for e in examples]), examples))
    for count in (100, 2):
        draw_cases(cases, tmp_path / str(count), count)
    more, fewer = ([p.read_bytes() for p in sorted((tmp_path / name).glob("[0-9][0-9].png"))] for name in ("100", "2"))
    assert len(more) == len(set(more)) == 6, "each case once, also where more are requested than there are cases"
    assert fewer == [more[0], more[3]], "one of each task"


def test_a_contact_sheet_keeps_every_picture_whole_and_in_order():
    pictures = [Image.new("RGB", (20 + 10 * k, 30 + 5 * k), (k * 40, 0, 200)) for k in range(5)]
    sheet = contact_sheet(pictures, columns=2)
    assert sheet.size == (60 + 50 + 3 * MARGIN, 35 + 45 + 50 + 4 * MARGIN)
    counted = {colour: count for count, colour in sheet.getcolors()}
    for picture in pictures:
        assert counted[picture.getpixel((0, 0))] == picture.width * picture.height
    assert sheet.getpixel((MARGIN, MARGIN)) == (0, 0, 200)
    assert sheet.getpixel((MARGIN + 60 + MARGIN, MARGIN + 35 + MARGIN)) == (120, 0, 200)


def test_a_run_is_plotted_from_whatever_its_lines_hold(tmp_path):
    def plot(*records):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        plot_run(tmp_path / "metrics.jsonl", tmp_path / "run.png", title="a run")

    with pytest.raises(ValueError, match="holds none of rewards/accuracy/mean"):
        plot({"step": 1, "loss": 2.0})
    assert not (tmp_path / "run.png").exists()
    records = [{"step": t, "rewards/accuracy/mean": t / 50, "difficulty/easy": 0.5} for t in range(50)]
    plot(*records, {"step": 50, "eval/miou": 0.3}, {"note": "no step"}, {"step": 51, "difficulty/easy": float("nan")})
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_a_curve_is_of_the_later_value_of_a_step_and_its_mean_is_that_of_a_window():
    lines = [(2, 9.0), (1, 1.0), (2, 2.0), (3, None), (4, float("nan"))]
    steps, values = _curve([{"step": step, "kl": value} for step, value in lines] + [{"kl": 7.0}, {"step": 5}], "kl")
    assert steps == [1, 2] and values.tolist() == [1.0, 2.0]
    assert _running_mean(np.full(40, 0.25)) == pytest.approx(np.full(40, 0.25))
    values = np.arange(32.0) ** 2
    expected = [values[:3].mean(), values[8:13].mean(), values[29:].mean()]
    assert _running_mean(values)[[0, 10, 31]] == pytest.approx(expected)
    assert _running_mean(np.array([0.7])) == pytest.approx([0.7])
