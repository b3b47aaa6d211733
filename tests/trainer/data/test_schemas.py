"""Each data set's published record becomes the example it means."""

import pytest
from PIL import Image

from boxgrpo.trainer.data.readers import read_examples


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
    (later, several), faults = read_examples(
        write([mgrounding("a?", "None.", "b?", BOX.format(1, 2, 30, 40)), mgrounding("c?", both)])
    )
    assert later.gold is None and several.gold is None and len(several.turns) == 2 and not faults
    good, bad = (mgrounding("a?", BOX.format(x, 2, 3, 4)) for x in (1, 9))
    _, (fault,) = read_examples(write([good, bad]))
    assert (fault.source, fault.reason) == ("data.json#1", "box_inverted")


def test_what_most_records_fit_decides(write, caplog):
    caplog.set_level("INFO")
    plain = {"images": ["a.jpg"], "conversations": mgrounding("Say a.", "a")["conversations"]}
    path = write([plain, mgrounding("a?", BOX.format(1, 2, 3, 4)), mgrounding("a?", BOX.format(1, 2, 3, 4))])
    examples, faults = read_examples(path)
    assert len(examples) == 3 and not faults
    assert "schema mgrounding, because 2 of 3 records have conversations with <|box_start|>" in caplog.text


def test_refcoco_boxes_are_pixels(write, photo):
    vlm_r1, schema = only(write([{"image": "photo.jpg", "problem": "Find the cat.", "solution": [20, 10, 100, 60]}]))
    assert schema == "refcoco" and vlm_r1.gold == (100, 100, 500, 600)
    assert vlm_r1.answer_format == "box" and vlm_r1.question == "Find the cat." and vlm_r1.images == (photo,)
    raw = {"image": "gone.jpg", "width": 400, "height": 200, "expression": "left cat", "bbox": [40, 20, 100, 80]}
    one, schema = only(write([raw]))
    assert schema == "refcoco" and one.gold == (100, 100, 350, 500) and "left cat" in one.question


def test_what_leaves_an_image_by_less_than_a_pixel_is_cut_off(write, photo):
    """Annotators' boxes are rounded. By a pixel or more, it is another image's box."""
    cat = {"image": "photo.jpg", "problem": "Find the cat.", "solution": [-0.4, 10, 200.3, 60]}
    one, _ = only(write([cat]))
    assert one.gold == (0, 100, 1000, 600)
    with pytest.raises(ValueError, match="box_outside 1"):
        read_examples(write([cat | {"solution": [0, 10, 201, 60]}]))


def test_lisa_and_llmseg_ask_in_the_papers_words(write, photo):
    lisa, schema = only(
        write([{"image_path": photo, "instruction": "find what is sweet.", "boxes": [[20, 10, 100, 60], [0, 0, 9, 9]]}])
    )
    assert schema == "lisa" and lisa.gold == (100, 100, 500, 600) and lisa.answer_format == "think"
    asked = "Output the bounding box in the image corresponding to the instruction: find what is sweet."
    assert lisa.question == asked
    llmseg, schema = only(write([{"image_path": photo, "question": "find what is sweet", "bbox": [[20, 10, 100, 60]]}]))
    assert schema == "llmseg" and llmseg.gold == (100, 100, 500, 600) and llmseg.question == asked


def test_videos_are_asked_for_their_third_frame(write, photo, tmp_path):
    boxes = ["[0, 0, 1, 1]"] * 6
    boxes[2] = "[20, 10, 100, 60]"
    frames = ["a.jpg", "b.jpg", photo, "d.jpg", "e.jpg", "f.jpg"]
    for known in (boxes, boxes[:3]):
        one, schema = only(write([{"image_list": frames, "question": "who?", "bbox_list": known}]))
        assert one.gold == (100, 100, 500, 600)
    assert schema == "reasonvos" and one.gold == (100, 100, 500, 600) and one.target_image == 2 and len(one.images) == 6
    assert "in the third image according to the instruction: who?" in one.question
    (tmp_path / "clip").mkdir()
    for n in (0, 7, 10, 11, 2):
        Image.new("RGB", (200, 100)).save(tmp_path / f"clip/{n}.jpg")
    boxes = [[0, 0, 1, 1], [0, 0, 1, 1], [20, 10, 100, 60]]
    one, schema = only(write([{"video_id": "clip", "frames": [0, 1, 3], "question": "who?", "bbox_list": boxes}]))
    names = [path.rsplit("/", 1)[1] for path in one.images]
    assert schema == "revos" and names == ["0.jpg", "2.jpg", "10.jpg"], "frames count the files in their order"
    assert one.gold == (100, 100, 500, 600)


def test_of_more_frames_six_are_taken_uniformly(write, photo):
    frames = [f"{n}.jpg" for n in range(11)]
    frames[4] = photo
    boxes = [[0, 0, 1, 1]] * 11
    boxes[4] = [20, 10, 100, 60]
    one, _ = only(write([{"image_list": frames, "question": "who?", "bbox_list": boxes}]))
    names = [path.rsplit("/", 1)[1] for path in one.images]
    assert names == ["0.jpg", "2.jpg", "photo.jpg", "6.jpg", "8.jpg", "10.jpg"]
    assert one.gold == (100, 100, 500, 600)


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
    examples, (fault,) = read_examples(write([record]), image_root=tmp_path, least=0)
    assert len(examples) == 0 and fault.reason == reason, fault
    assert fault.message.startswith("data.json#0: ")


def test_a_turned_photo_is_measured_as_it_is_shown(write, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (200, 100)).save(tmp_path / "turned.jpg", exif=exif)
    one, _ = only(write([{"image": "turned.jpg", "problem": "a", "solution": [10, 20, 50, 100]}]))
    assert one.gold == (100, 100, 500, 500)
