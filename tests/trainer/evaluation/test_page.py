"""The page of an evaluation: in a real browser, from a file, its boxes where they belong and foreign text only text."""

import dataclasses

import pytest
from PIL import Image

from boxgrpo.trainer.data.readers import Example
from boxgrpo.trainer.evaluation.benches import BENCHES
from boxgrpo.trainer.evaluation.grade import grade_texts, summarize
from boxgrpo.trainer.evaluation.page import choose, page

HOSTILE = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>&amp; \" '"


@pytest.fixture
def case(tmp_path):
    """A wide and a narrow image, the box in the narrow one; the gold box is not the answer's."""
    Image.new("RGB", (900, 300), "gray").save(tmp_path / "wide.png")
    Image.new("RGB", (60, 600), "gray").save(tmp_path / "narrow.png")
    images = (str(tmp_path / "wide.png"), str(tmp_path / "narrow.png"))
    gold = (100.0, 200.0, 700.0, 600.0)
    return Example("0", "diff", images, HOSTILE, gold, target_image=1, source="data.json#0")


def written(examples, texts, path, **options):
    answers = grade_texts(examples, texts)
    summary = summarize(answers, resamples=50) | {"skipped": len(options.get("skipped", ()))}
    path.write_text(page(BENCHES["mig"], summary, answers, examples, **{"name": "ours"} | options), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser):
    """opened(path) -> a page in the browser, and the addresses that it asked for."""
    shown = browser.new_page(viewport={"width": 1200, "height": 900})
    asked = []
    shown.on("request", lambda request: asked.append(request.url))

    def open_file(path):
        shown.goto(path.as_uri())
        return shown, asked

    yield open_file
    shown.close()


def test_boxes_stand_on_their_image_and_nothing_is_loaded(opened, case, tmp_path):
    """Also where a caption is wider than the image, and on a narrow screen."""
    answer = f"<think>{HOSTILE}</think><answer>(900, 1200), (300, 500)</answer>"  # inverted, and out of the image
    shown, asked = opened(written([case], [answer], tmp_path / "report.html"))
    assert asked == [(tmp_path / "report.html").as_uri(), *[url for url in asked if url.startswith("data:image/jpeg")]]
    for width in (1200, 400):
        shown.set_viewport_size({"width": width, "height": 900})
        wide, narrow = (image.bounding_box() for image in shown.locator("#cases-worst ~ article img").all())
        assert narrow["height"] == pytest.approx(10 * narrow["width"], rel=0.05)
        marks = {kind: shown.locator(f".frame .{kind}") for kind in ("gold", "box")}
        for kind, (x1, y1, x2, y2) in (("gold", (0.1, 0.2, 0.7, 0.6)), ("box", (0.3, 0.5, 0.9, 1.0))):
            mark = marks[kind].bounding_box()
            assert mark["x"] == pytest.approx(narrow["x"] + x1 * narrow["width"], abs=1)
            assert mark["y"] == pytest.approx(narrow["y"] + y1 * narrow["height"], abs=1)
            assert mark["width"] == pytest.approx((x2 - x1) * narrow["width"], abs=1)
            assert mark["height"] == pytest.approx((y2 - y1) * narrow["height"], abs=1)
        assert wide["x"] + wide["width"] <= width
        assert shown.evaluate("document.documentElement.scrollWidth") <= width, "the page itself never scrolls sideways"
    assert shown.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


def test_foreign_text_is_shown_and_never_run(opened, case, tmp_path):
    example = dataclasses.replace(case, task=HOSTILE, source=f"{HOSTILE}#0")
    text = f"<think>Thought: {HOSTILE}\nand more.</think><answer>(100, 200), (700, 600)</answer>{HOSTILE}"
    shown, _ = opened(written([example], [text], tmp_path / "a.html", name=HOSTILE, skipped=[f"7: {HOSTILE}"]))
    assert shown.title() == f"MIG-Bench: {HOSTILE}"
    for part, said in {
        "h3": HOSTILE,
        ".source": f"{HOSTILE}#0",
        ".question": HOSTILE,
        ".thought": f"Thought: {HOSTILE}\nand more.",
        ".said": f"<answer>(100, 200), (700, 600)</answer>{HOSTILE}",
        "details li": f"7: {HOSTILE}",
        ".own td >> nth=0": HOSTILE,
    }.items():
        assert shown.locator(part).first.text_content() == said
    assert shown.locator("script, img[src=x]").count() == 0
    assert shown.locator(".badge").text_content() == "IoU 1.00"


def test_what_is_missing_is_said(opened, case, tmp_path):
    gone = dataclasses.replace(case, images=(case.images[0], str(tmp_path / "gone.png")))
    shown, _ = opened(written([gone], ["I do not know."], tmp_path / "b.html"))
    assert shown.locator(".missing").text_content() == "gone.png cannot be shown"
    assert shown.locator("img").count() == 1 and shown.locator(".mark").count() == 0
    assert "read from the answer: no box found" in shown.locator("article").text_content()
    assert "details" not in shown.content().split("<body>")[1].split("Worst")[0]
    assert shown.locator("details").count() == 0


def test_cases_are_of_every_task_and_none_comes_twice():
    """One task is worse than the other throughout; still both have their worst and their best shown."""
    answers = [{"task": "diff", "iou": i / 100} for i in range(10)]
    answers += [{"task": "region", "iou": 0.5 + i / 100} for i in range(10)]
    cases = [(answer, None) for answer in answers]
    sections = choose(cases, 4, seed=0)
    found = {name: [(a["task"], a["iou"]) for a, _ in chosen] for name, chosen in sections}
    assert found["Worst"] == [("diff", 0.0), ("region", 0.5), ("diff", 0.01), ("region", 0.51)]
    assert found["Best"] == [("region", 0.59), ("diff", 0.09), ("region", 0.58), ("diff", 0.08)]
    every = [case for chosen in found.values() for case in chosen]
    assert len(every) == len(set(every)) == 12
    assert choose(cases, 4, seed=0) == sections != choose(cases, 4, seed=1)
    assert [len(chosen) for _, chosen in choose(cases[:5], 4, seed=0)] == [4, 1, 0]
