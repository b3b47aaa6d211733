"""The report of `inspect_data` on a file: counts that add up, faults by reason, lengths, and a sheet of pictures."""

import json
import re

import pytest
from PIL import Image

from boxgrpo.trainer.apps import inspect_data
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples

GOOD = {"task": "diff", "images": ["a.png", "b.png"], "question": "Where is it?", "answer": [100, 200, 300, 400]}


@pytest.fixture
def records(write, tmp_path):
    """Eight records: four usable of two tasks, two without an image file, two with faulty boxes."""
    for name, size in (("a.png", (300, 200)), ("b.png", (90, 400))):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / name)
    found = [GOOD, GOOD, GOOD | {"task": "region", "images": ["a.png"]}, GOOD | {"task": "region"}]
    found += [GOOD | {"images": ["a.png", "gone.png"]}, GOOD | {"images": ["gone.png"]}]
    found += [GOOD | {"answer": [300, 200, 100, 400]}, GOOD | {"answer": [1, 2, 3000, 4]}]
    return write(found)


def found_in(capsys, *args) -> dict:
    inspect_data.main([*map(str, args), "--json", "-"])
    return json.loads(capsys.readouterr().out)


def test_counts_and_reasons_add_up(records, capsys):
    found = found_in(capsys, records)
    assert (found["records"], found["usable"]) == (8, 4)
    assert found["faulty"] == {"missing_image": 2, "box_inverted": 1, "box_outside": 1}
    assert found["tasks"] == {"diff": 2, "region": 2} and found["images_per_record"] == {"1": 1, "2": 3}
    assert found["gold_boxes"] == 4 and found["chats"] == 0 and found["schema"] == "univg_stage2"
    assert [line.split(":")[0] for line in found["faults"]] == [f"data.json#{n}" for n in (6, 7, 4, 5)]


def test_missing_images_can_be_ignored(records, capsys):
    found = found_in(capsys, records, "--no_images")
    assert found["usable"] == 6 and "missing_image" not in found["faulty"]
    assert found["usable"] + sum(found["faulty"].values()) == found["records"]


def test_boxes_in_pixels_need_no_image_either(write, capsys):
    """Without images their sizes are unknown; the order of a box's corners is checked all the same."""
    cat = {"image": "gone.jpg", "problem": "Find the cat.", "solution": [20, 10, 100, 60]}
    data = write([cat, cat | {"solution": [100, 10, 20, 60]}])
    assert found_in(capsys, data, "--no_images")["faulty"] == {"box_inverted": 1}
    assert found_in(capsys, data)["faulty"] == {"missing_image": 2}


def test_a_file_without_records_is_refused(tmp_path, capsys):
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(ValueError, match=r"data\.json holds no record"):
        inspect_data.main([str(tmp_path / "data.json")])


def test_lengths_are_those_of_the_prompts(records, initial, capsys):
    """In tokens, the images' included, by their headers alone."""
    limits = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 16}
    flags = [f"--{k}={v}" for k, v in limits.items()]
    found = found_in(capsys, records, "--model", initial, *flags)["lengths"]
    processor = Processor.from_pretrained(initial, **limits)
    examples, _ = read_examples(records)
    lengths = sorted(len(processor.prompt(examples[i]).input_ids) for i in range(4))
    assert found["unit"] == "tokens" and found["measured"] == 4 and found["prompts"]["max"] == lengths[-1]
    assert found["prompts"]["median"] == int((lengths[1] + lengths[2]) / 2)


def test_the_sheet_shows_the_gold_boxes(records, tmp_path, capsys):
    found_in(capsys, records, "--sheet", tmp_path / "sheet.png", "--samples", 3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        green = sum(count for count, colour in sheet.convert("RGB").getcolors(1 << 24) if colour == (0, 150, 60))
        assert sheet.width > 800 and green > 500


def test_case_03_the_first_gold_boxes_are_shown_with_their_unit(write, tmp_path, capsys):
    """As a newcomer meets them: the unit, and boxes on both scales that can be compared with the picture."""
    Image.new("RGB", (112, 56)).save(tmp_path / "a.png")
    data = write([{"image": "a.png", "problem": "x", "solution": [0.25, 0.25, 0.5, 0.5]}] * 9)
    found = found_in(capsys, data)
    assert found["box_unit"] == "fractions" and len(found["first_boxes"]) == 5
    row = {"source": "data.json#0", "image": str(tmp_path / "a.png"), "box": [250, 250, 500, 500]}
    assert found["first_boxes"][0] == row | {"size": [112, 56], "pixels": [28, 14, 56, 28]}
    assert found_in(capsys, data, "--no_images")["first_boxes"][0] == row
    assert found_in(capsys, data, "--box_unit", "pixels", "--no_images")["box_unit"] == "pixels"
    inspect_data.main([str(data)])
    shown = capsys.readouterr().out
    assert "gold boxes, written in fractions" in shown
    assert "data.json#0: (250, 250), (500, 500), pixels [28, 14, 56, 28] of 112 x 56 in " in shown


def test_the_text_for_people(records, tmp_path, capsys):
    inspect_data.main([str(records)])
    shown = capsys.readouterr().out
    assert "8 records of schema univg_stage2, 4 usable" in shown and re.search(r"^  missing_image +2$", shown, re.M)
    with pytest.raises(ValueError, match=r"gone\.json: there is no such file"):
        inspect_data.main([str(tmp_path / "gone.json")])
