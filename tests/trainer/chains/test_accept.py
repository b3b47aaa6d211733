"""The page on which people accept chains, and the rate from its saved answers."""

import dataclasses
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from boxgrpo.trainer.chains.accept import AcceptOptions, acceptance_rate, draw_records, main, wilson, write_sheet
from boxgrpo.trainer.data.example import THINK_SUFFIX

HOSTILE = "<script>document.title='run'</script>\"><img src=x onerror=\"document.title='run'\">&amp; '"


@pytest.fixture
def options(tmp_path):
    """options(count, **changes) -> AcceptOptions for so many stage-1 records of two images, hostile in every text."""
    for k, size in enumerate(((300, 200), (120, 240))):
        Image.new("RGB", size, "white").save(tmp_path / f"{k}.png")

    def made(count, **changes):
        records = []
        for k in range(count):
            answer = f"<think>{HOSTILE}</think><answer>(100, 100), (500, 900)</answer>"
            question = f"<image><image>{k} {HOSTILE}{THINK_SUFFIX}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            record = {"id": f"{k} {HOSTILE}", "task": HOSTILE, "images": ["0.png", "1.png"], "messages": messages}
            records.append(record | {"target_image": 0, "cot": {"gold": [0, 100, 500, 900]}})
        (tmp_path / "cold_start.json").write_text(json.dumps(records))
        values = {"data": str(tmp_path / "cold_start.json"), "output_dir": str(tmp_path / "sheet")}
        return AcceptOptions(**values | changes)

    return made


def read_page(o):
    return Path(o.output_dir, "index.html").read_text()


def shown(page):
    """The numbers of the records on a page."""
    return [int(k) for k in re.findall(r'<fieldset data-record="(\d+)">', page)]


def save(o, decide):
    """What the sheet saves: `decide(record number)` for each that it shows."""
    page = read_page(o)
    sheet = json.loads(html.unescape(re.search(r'<form data-sheet="([^"]*)">', page)[1]))
    path = Path(o.output_dir, "acceptance.json")
    path.write_text(json.dumps({"sheet": sheet, "answers": {str(k): decide(k) for k in shown(page)}}))
    return dataclasses.replace(o, answers=str(path))


@pytest.mark.parametrize(("records", "share", "count"), [(100, 0.07, 7), (40, 0.1, 4), (41, 0.1, 5), (1, 0.1, 1)])
def test_the_share_is_exact_rounded_up_and_drawn_by_the_seed(records, share, count):
    drawn = draw_records(records, share, 0)
    assert len(drawn) == len(set(drawn)) == count and drawn == sorted(drawn) and set(drawn) <= set(range(records))
    assert draw_records(76_000, 0.1, 42) == draw_records(76_000, 0.1, 42) != draw_records(76_000, 0.1, 43)


def test_the_sheet_shows_a_tenth_and_escapes_all_text(options):
    o = options(40)
    assert write_sheet(o) == 4
    page, numbers = read_page(o), draw_records(40, 0.1, 42)
    assert shown(page) == numbers
    assert re.findall('<img src="(.*?)"', page) == [f"pictures/{k:06d}.jpg" for k in numbers]
    assert page.count("<script") == 1 and 'onerror="' not in page
    assert page.count("&lt;script&gt;document.title=") == 12  # task, question and reasoning of each
    assert THINK_SUFFIX not in page and "(100, 100), (500, 900)" in page and page.count('type="radio"') == 8
    write_sheet(dataclasses.replace(o, seed=1))  # in the place of the first
    names = {path.name for path in Path(o.output_dir, "pictures").iterdir()}
    assert names == {f"{k:06d}.jpg" for k in draw_records(40, 0.1, 1)}


def test_the_gold_box_and_the_answers_are_drawn(options):
    o = options(1)
    write_sheet(o)
    with Image.open(Path(o.output_dir, "pictures/000000.jpg")) as picture:
        red, green, _ = np.asarray(picture.convert("RGB"), dtype=int)[:260].transpose(2, 0, 1)
    greens, reds = np.argwhere((green > 100) & (red < 100))[:, 1], np.argwhere((red > 150) & (green < 100))[:, 1]
    # Shown 240 high: 360 wide from x = 12, y = 12. Gold reaches from 0 to half the width, the answer from a tenth.
    assert greens.min() <= 12 and 185 <= greens.max() <= 197
    assert 44 <= reds.min() <= 52


def test_the_rate_is_that_of_the_decided(options, capsys):
    o = options(100)
    write_sheet(o)
    drawn = draw_records(100, 0.1, 42)
    o = save(o, lambda k: {drawn[0]: "reject", drawn[1]: None}.get(k, "accept"))
    found = acceptance_rate(o)
    assert found["interval"] == pytest.approx(wilson(8, 9))
    assert found | {"interval": 0} == {
        "drawn": 10,
        "accepted": 8,
        "rejected": 1,
        "undecided": 1,
        "rate": 8 / 9,
        "interval": 0,
        "rejected_records": [f"cold_start.json#{drawn[0]}"],
    }
    main([f"--data={o.data}", f"--answers={o.answers}"])
    out = capsys.readouterr().out
    assert "accepted 8 of 9 decided: 88.89 % (95 %: 56.50 to 98.01); undecided 1 of 10" in out
    assert f"rejected: cold_start.json#{drawn[0]}" in out
    main([f"--data={o.data}", f"--answers={o.answers}", "--json=-"])
    assert json.loads(capsys.readouterr().out) == found


def test_wilsons_interval():
    """It solves (p - share)^2 = z^2 p (1 - p) / n for p; the paper's 99.87 % of 7600 lie between 99.76 and 99.93."""
    for accepted, n in ((0, 10), (3, 10), (10, 10), (7590, 7600)):
        low, high = wilson(accepted, n)
        for p in (low, high):
            assert (p - accepted / n) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-7)
    assert [round(100 * p, 2) for p in wilson(7590, 7600)] == [99.76, 99.93]
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda saved: saved["answers"].popitem(), "does not hold answers for the 3 drawn records"),
        (lambda saved: saved["answers"].update(dict.fromkeys(saved["answers"], "yes")), "does not hold answers for"),
        (lambda saved: saved["answers"].update(dict.fromkeys(saved["answers"])), "no decision on any of 3"),
        (lambda saved: saved["sheet"].update(digest="0"), "other records than .*Draw a new sheet"),
        (lambda saved: saved["sheet"].update(seed=1), "does not hold answers for"),
        (lambda saved: saved["sheet"].update(share="half"), "no answers of a sheet"),
        (lambda saved: saved.pop("answers"), "no answers of a sheet.*--answers"),
    ],
)
def test_answers_of_another_sheet_are_refused(options, damage, message):
    o = options(30)
    write_sheet(o)
    o = save(o, lambda k: "accept")
    assert acceptance_rate(o)["accepted"] == 3
    saved = json.loads(Path(o.answers).read_text())
    damage(saved)
    Path(o.answers).write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        acceptance_rate(o)


def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="share is 0.*--share"):
        write_sheet(options(10, share=0.0))
    with pytest.raises(ValueError, match="there is no such file"):
        write_sheet(options(10, data="nowhere.json"))


def test_in_a_browser_answers_are_saved_and_loaded(browser, options, tmp_path):
    """From the file system: no text of a record runs, pictures show, the saved file gives the rate."""
    o = options(30)
    write_sheet(o)
    sheet = browser.new_page()
    requested = []
    sheet.on("request", lambda request: requested.append(request.url))
    sheet.goto(Path(o.output_dir, "index.html").as_uri())
    assert sheet.title() == "3 of 30 records of cold_start.json" and sheet.text_content("#count") == "0 of 3 decided"
    sheet.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    sheet.wait_for_function("[...document.images].every(image => image.naturalWidth > 300)")
    assert all(url.startswith("file:") for url in requested) and HOSTILE in sheet.text_content("article .question")

    first, second, _ = draw_records(30, 0.1, 42)
    sheet.check(f"[data-record='{first}'] input[value=accept]")
    sheet.check(f"[data-record='{second}'] input[value=reject]")
    assert sheet.text_content("#count") == "2 of 3 decided"
    with sheet.expect_download() as download:
        sheet.click("#save")
    assert download.value.suggested_filename == "acceptance.json"
    download.value.save_as(tmp_path / "acceptance.json")
    found = acceptance_rate(dataclasses.replace(o, answers=str(tmp_path / "acceptance.json")))
    assert (found["accepted"], found["rejected"], found["undecided"]) == (1, 1, 1)

    sheet.reload()
    sheet.set_input_files("#load", tmp_path / "acceptance.json")
    sheet.wait_for_function("document.getElementById('count').textContent == '2 of 3 decided'")
    assert sheet.is_checked(f"[data-record='{second}'] input[value=reject]")
    messages = []
    sheet.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.accept()))
    (tmp_path / "other.json").write_text("{")
    sheet.set_input_files("#load", tmp_path / "other.json")
    sheet.wait_for_timeout(100)
    assert messages == ["No answers to this page."] and sheet.text_content("#count") == "2 of 3 decided"
    sheet.close()
