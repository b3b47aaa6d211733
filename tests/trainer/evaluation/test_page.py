"""The page of an evaluation: one file that loads nothing, a picture for each case, and foreign text only as text."""

import base64
import dataclasses
import io
import re

import numpy as np
import pytest
from markupsafe import escape
from PIL import Image

from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.evaluation.benches import BENCHES
from boxgrpo.trainer.evaluation.grade import grade_texts, summarize
from boxgrpo.trainer.evaluation.pictures import GOLD, PREDICTED
from boxgrpo.trainer.evaluation.report import choose_cases, render_page

HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>&amp; \" '"
RIGHT = "<answer>(100, 200), (700, 600)</answer>"


@pytest.fixture
def case(tmp_path):
    """A wide and a narrow image, the box in the narrow one."""
    Image.new("RGB", (900, 300), "gray").save(tmp_path / "wide.png")
    Image.new("RGB", (60, 600), "gray").save(tmp_path / "narrow.png")
    images = (str(tmp_path / "wide.png"), str(tmp_path / "narrow.png"))
    gold = (100.0, 200.0, 700.0, 600.0)
    return Example("0", "diff", images, HOSTILE, gold, target_image=1, source="data.json#0")


def written(example, text, **options) -> str:
    answers = grade_texts([example], [text])
    summary = summarize(answers, resamples=50) | {"skipped": len(options.get("skipped", ()))}
    options = {"name": "ours", "skipped": (), "count": 8, "seed": 0} | options
    return render_page(BENCHES["mig"], summary, list(zip(answers, [example])), **options)


def test_a_case_has_one_picture_with_its_boxes_and_nothing_is_loaded(case):
    html = written(case, "<think>A thought.</think><answer>(900, 1200), (300, 500)</answer>")  # inverted, and outside
    (uri,) = re.findall(r'(?:src|href)="([^#"][^"]*)"', html)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    pixels = np.asarray(picture.convert("RGB"), dtype=int)
    for colour in (GOLD, PREDICTED):
        assert (abs(pixels - colour).sum(-1) < 60).sum() > 50, colour
    assert "default-src 'none'; img-src data:" in html and "url(" not in html


def test_foreign_text_is_escaped(case):
    example = dataclasses.replace(case, task=HOSTILE, source=f"{HOSTILE}#0")
    text = f"<think>Thought: {HOSTILE}\nand more.</think>{RIGHT}{HOSTILE}"
    html, shown = written(example, text, name=HOSTILE, skipped=[f"7: {HOSTILE}"]), str(escape(HOSTILE))
    assert HOSTILE not in html and "<script" not in html and html.count("<img src=x") == 0
    for part in (
        f"<title>MIG-Bench: {shown}</title>",
        f"<h3>{shown}</h3>",
        f'<span class="faint">{shown}#0</span>',
        f'<p class="text question">{shown}</p>',
        f'<p class="text thought">Thought: {shown}\nand more.</p>',
        f'<p class="text final">{escape(RIGHT)}{shown}</p>',
        f"<li>7: {shown}</li>",
        f'<tr class="own"><td>{shown}</td>',
        '<span class="badge">IoU 1.00</span>',
    ):
        assert part in html


def test_a_case_without_its_images_and_without_a_box_names_both(case, tmp_path):
    gone = dataclasses.replace(case, images=(case.images[0], str(tmp_path / "gone.png")))
    html = written(gone, "I do not know.")
    assert re.search(r'<p class="faint">There is no image at .*gone\.png', html) and "<img" not in html
    assert "read from the answer: no box found" in html and "<details" not in html


def test_the_page_fits_its_window(browser, case, tmp_path):
    (tmp_path / "report.html").write_text(written(case, RIGHT), encoding="utf-8")
    shown = browser.new_page()
    shown.goto((tmp_path / "report.html").as_uri())
    for width in (1200, 400):
        shown.set_viewport_size({"width": width, "height": 900})
        assert shown.evaluate("document.documentElement.scrollWidth") <= width, "the page itself never scrolls sideways"
    assert shown.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    shown.close()


def test_cases_are_of_every_task_and_none_comes_twice():
    """One task is worse than the other throughout; still both have their worst and their best shown."""
    answers = [{"task": "diff", "iou": i / 100} for i in range(10)]
    answers += [{"task": "region", "iou": 0.5 + i / 100} for i in range(10)]
    cases = [(answer, None) for answer in answers]
    sections = choose_cases(cases, 4, seed=0)
    found = {name: [(a["task"], a["iou"]) for a, _ in chosen] for name, chosen in sections}
    assert found["Worst"] == [("diff", 0.0), ("region", 0.5), ("diff", 0.01), ("region", 0.51)]
    assert found["Best"] == [("region", 0.59), ("diff", 0.09), ("region", 0.58), ("diff", 0.08)]
    every = [case for chosen in found.values() for case in chosen]
    assert len(every) == len(set(every)) == 12
    assert choose_cases(cases, 4, seed=0) == sections != choose_cases(cases, 4, seed=1)
    assert [len(chosen) for _, chosen in choose_cases(cases[:5], 4, seed=0)] == [4, 1, 0]
