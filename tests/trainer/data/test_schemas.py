"""Each data set's published record becomes the example it means."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from boxgrpo.trainer.data.readers import read_examples

GUIDE = Path(__file__).parents[3] / "docs/data.md"


@pytest.fixture
def photo(tmp_path):
    """A 200 x 100 image."""
    Image.new("RGB", (200, 100)).save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


def only(path, **options):
    examples, faults = read_examples(path, **options)
    assert not faults and len(examples) == 1, faults
    return examples[0], examples.files[0].schema


BOX = "<|box_start|>({},{}),({},{})<|box_end|>"


def mgrounding(*turns, **more):
    chat = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": "m1", "images": ["a.jpg", "b.jpg"], "conversations": chat, "type": "common_object", **more}


def test_mgrounding_has_turns_and_marked_boxes(write):
    one, schema = only(
        write([mgrounding("<image><image>Where is it?", "Here: " + BOX.format(1, 2, 30, 40), "And?", "Nowhere.")])
    )
    assert schema == "mgrounding" and one.gold == (1, 2, 30, 40) and one.task == "common_object"
    assert [role for role, _ in one.turns] == ["user", "assistant"] * 2
    assert BOX.format(1, 2, 30, 40) in one.turns[1][1], "the marks stay: they are tokens"


def test_several_boxes_are_no_single_gold_box(write):
    both = BOX.format(1, 2, 30, 40) + " and " + BOX.format(5, 6, 70, 80)
    records = [mgrounding("a?", "None.", "b?", BOX.format(1, 2, 30, 40)), mgrounding("c?", both)]
    (later, several), (fault,) = read_examples(write([*records, mgrounding("a?", BOX.format(9, 2, 3, 4))]))
    assert later.gold is None and several.gold is None and len(several.turns) == 2
    assert (fault.source, fault.reason) == ("data.json#2", "box_inverted")


def test_what_most_records_fit_decides(write, caplog):
    caplog.set_level("INFO")
    plain = {"images": ["a.jpg"], "conversations": mgrounding("Say a.", "a")["conversations"]}
    path = write([plain, mgrounding("a?", BOX.format(1, 2, 3, 4)), mgrounding("a?", BOX.format(1, 2, 3, 4))])
    examples, faults = read_examples(path)
    assert len(examples) == 3 and not faults
    assert "schema mgrounding, because 2 of 3 records have <|box_start|> in conversations or messages" in caplog.text


def test_refcoco_boxes_are_pixels(write, photo):
    vlm_r1, schema = only(write([{"image": "photo.jpg", "problem": "Find the cat.", "solution": [20, 10, 100, 60]}]))
    assert schema == "refcoco" and vlm_r1.gold == (100, 100, 500, 600)
    assert vlm_r1.answer_format == "box" and vlm_r1.question == "Find the cat." and vlm_r1.images == (photo,)
    raw = {"image": "gone.jpg", "width": 400, "height": 200, "expression": "left cat", "bbox": [40, 20, 100, 80]}
    one, schema = only(write([raw]))
    assert schema == "refcoco" and one.gold == (100, 100, 350, 500) and "left cat" in one.question
    # Annotators' boxes are rounded: what leaves the image by less than a pixel is cut off. By more, it is another's.
    one, _ = only(write([{"image": "photo.jpg", "problem": "Find it.", "solution": [-0.4, 10, 200.3, 60]}]))
    assert one.gold == (0, 100, 1000, 600)


def test_lisa_and_llmseg_ask_in_the_papers_words(write, photo):
    question = "Output the bounding box in the image corresponding to the instruction: find what is sweet."
    lisa = {"image_path": photo, "instruction": "find what is sweet.", "boxes": [[20, 10, 100, 60], [0, 0, 9, 9]]}
    llmseg = {"image_path": photo, "question": "find what is sweet", "bbox": [[20, 10, 100, 60]]}
    for name, record in {"lisa": lisa, "llmseg": llmseg}.items():
        one, schema = only(write([record]))
        assert schema == name and one.gold == (100, 100, 500, 600) and one.answer_format == "think"
        assert one.question == question


@pytest.mark.parametrize(
    ("frames", "boxes", "shown"),
    [(6, 6, [0, 1, 2, 3, 4, 5]), (6, 3, [0, 1, 2, 3, 4, 5]), (11, 11, [0, 2, 4, 6, 8, 10])],
    ids=["six frames", "boxes up to the third", "six of eleven"],
)
def test_the_box_of_a_video_is_in_its_third_frame(write, photo, frames, boxes, shown):
    paths = [f"{n}.jpg" for n in range(frames)]
    paths[shown[2]] = photo
    known = ["[0, 0, 1, 1]"] * boxes
    known[shown[2]] = "[20, 10, 100, 60]"
    one, schema = only(write([{"image_list": paths, "question": "who?", "bbox_list": known}]))
    assert schema == "reasonvos" and one.gold == (100, 100, 500, 600) and one.target_image == 2
    names = [path.rsplit("/", 1)[1].removesuffix(".jpg") for path in one.images]
    assert names == ["photo" if n == shown[2] else str(n) for n in shown]
    assert "in the third image according to the instruction: who?" in one.question


def test_revos_counts_a_videos_files_in_their_order(write, tmp_path):
    (tmp_path / "clip").mkdir()
    for n in (0, 7, 10, 11, 2):
        Image.new("RGB", (200, 100)).save(tmp_path / f"clip/{n}.jpg")
    boxes = [[0, 0, 1, 1], [0, 0, 1, 1], [20, 10, 100, 60]]
    for frames in ([0, 1, 3], ["0.jpg", "2.jpg", "10.jpg"]):
        one, schema = only(write([{"video_id": "clip", "frames": frames, "question": "who?", "bbox_list": boxes}]))
        names = [path.rsplit("/", 1)[1] for path in one.images]
        assert schema == "revos" and names == ["0.jpg", "2.jpg", "10.jpg"] and one.gold == (100, 100, 500, 600)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": "gone.jpg", "problem": "a", "solution": [1, 2, 3, 4]}, "missing_image"),
        ({"image": "photo.jpg", "problem": "a", "solution": [1, 2, 201, 4]}, "box_outside"),
        ({"image": "photo.jpg", "problem": "a", "solution": "x"}, "box_length"),
        ({"image": "bad.jpg", "problem": "a", "solution": [1, 2, 3, 4]}, "image_unreadable"),
        ({"image": 7, "problem": "a", "solution": [1, 2, 3, 4]}, "no_images"),
        ({"image_path": "photo.jpg", "instruction": "a", "boxes": []}, "no_gold_box"),
        ({"image_path": "photo.jpg", "question": " ", "bbox": [[1, 2, 3, 4]]}, "no_question"),
        ({"task": ["diff"], "images": ["a"], "question": "a", "answer": [1, 2, 3, 4]}, "bad_task"),
        ({"image_list": ["a", "b"], "question": "a", "bbox_list": ["1", "2"]}, "too_few_frames"),
        ({"image_list": ["a"] * 6, "question": "a", "bbox_list": ["1 2 3 4"]}, "box_list"),
        ({"video_id": "v", "frames": [0, -1, 2], "question": "a", "bbox_list": [[1, 2, 3, 4]] * 3}, "bad_frames"),
        (
            {"video_id": "../v", "frames": [0, 1, 2], "question": "a", "bbox_list": [[1, 2, 3, 4]] * 3},
            "image_outside_root",
        ),
    ],
)
def test_faulty_records_of_every_set_are_named(write, photo, tmp_path, record, reason):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    examples, (fault,) = read_examples(write([record]), image_root=tmp_path, min_usable=0)
    assert len(examples) == 0 and fault.reason == reason, fault
    assert fault.message.startswith("data.json#0: ")


@pytest.fixture
def forms(tmp_path):
    """(schema, record) of each line of docs/data.md's block of forms, in the order of its sentence; their images."""
    (block,) = re.findall(r"```jsonl\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    order = "univg_stage2 univg_stage1 mgrounding mig_bench refcoco refcoco lisa llmseg reasonvos revos".split()
    (tmp_path / "clip").mkdir()
    for name in ("a.png", "b.png", "clip/0.png", "clip/1.png", "clip/2.png"):
        Image.new("RGB", (640, 480)).save(tmp_path / name)
    return list(zip(order, map(json.loads, block.splitlines()), strict=True))


def test_the_guides_records_are_read(write, forms):
    """All have one and the same gold box."""
    for schema, record in forms:
        example, found = only(write([record]))
        assert (found, example.gold) == (schema, (125, 250, 500, 750)), record


def test_keys_that_change_what_is_asked_are_refused_in_every_form(write, forms):
    keys = (
        "system_prompt system_message tools functions documents chat_template chat_template_kwargs enable_thinking "
        "history audios audio min_pixels max_pixels mm_processor_kwargs"
    ).split()
    for _, record in forms:
        only(write([record | dict.fromkeys(keys) | {"tools": [], "history": [], "system_prompt": ""}]))
        _, faults = read_examples(write([record | {key: "x"} for key in keys]), min_usable=0)
        assert [fault.message.split()[1] for fault in faults if fault.reason == "unused_key"] == keys
    assert faults[0].message == (
        "data.json#0: system_prompt is 'x'; it changes what is asked or learned, and is not used. Remove it or the "
        "record."
    )


def test_the_guides_own_data_is_read(tmp_path, monkeypatch):
    """The program under "Your own data in five lines" writes what `--box_unit pixels` reads."""
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```py\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    exec(program, {})
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (400, 400)).save(tmp_path / "photos/1.jpg")
    example, schema = only(tmp_path / "mine.jsonl", box_unit="pixels")
    assert schema == "univg_stage2" and example.gold == (30, 100, 525, 750) and example.answer_format == "think"
