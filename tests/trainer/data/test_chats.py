"""A chat is used as it is written, or refused by name."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from boxgrpo.model.batch import Group, pack_groups
from boxgrpo.model.checkpoint import load_model
from boxgrpo.trainer import grpo, sft
from boxgrpo.trainer.data import images, readers
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.readers import read_examples, read_usable
from boxgrpo.trainer.evaluation.evaluate import evaluate
from boxgrpo.trainer.options import EvalOptions, GrpoOptions, SftOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import lines

BOX = "<think>There.</think><answer>(125, 250), (500, 750)</answer>"
SIZES = {"a.png": (112, 56), "b.png": (60, 140), "c.png": (84, 84)}


@pytest.fixture
def folder(tmp_path):
    for name, size in SIZES.items():
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / name)
    return tmp_path


def chat(*texts, images=("a.png",), **keys):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns, "images": list(images), **keys}


def image(name):
    return {"type": "image", "image": name}


def said(text):
    return {"type": "text", "text": text}


@pytest.fixture
def read(write, tmp_path):
    """read(record) -> its example, with the images' names instead of their paths."""

    def only(record, **options):
        (example,), faults = read_examples(write([record]), **options)
        assert not faults
        names = tuple(path.removeprefix(f"{tmp_path}/") for path in example.images)
        return example, names

    return only


@pytest.fixture
def refused(write):
    """refused(record) -> the reason's code and the message."""

    def why(record):
        examples, (fault,) = read_examples(write([record]), min_usable=0)
        assert not len(examples) and fault.message.startswith("data.json#0: ")
        return fault.reason, fault.message.removeprefix("data.json#0: ")

    return why


def test_case_09_and_case_10_the_systems_text_is_used(read, refused):
    """A top-level `system`, also of a record that is no chat; or the first turn, empty too."""
    first = {"role": "system", "content": "Answer in pixels."}
    keyed, turned = chat("Where?", BOX, system="Answer in pixels."), chat("Where?", BOX)
    turned["messages"] = [first, *turned["messages"]]
    for record in (keyed, turned, turned | {"system": "Answer in pixels."}):
        example, _ = read(record)
        assert example.system == "Answer in pixels." and example.turns == (("user", "Where?"), ("assistant", BOX))
        assert example.gold == (125, 250, 500, 750)
    question = {"images": ["a.png"], "question": "Where?", "answer": [1, 2, 3, 4]}
    assert read(question | {"system": "Be brief."})[0].system == "Be brief."
    silent = chat("Where?", BOX) | {"messages": [{"role": "system", "content": ""}, *chat("Where?", BOX)["messages"]]}
    for record in (silent, silent | {"system": ""}, chat("Where?", BOX, system=""), question | {"system": ""}):
        assert read(record)[0].system == "", "it is not the default text"
    assert read(chat("Where?", BOX, system=None))[0].system is None
    assert refused(turned | {"system": "Be brief."})[0] == refused(turned | {"system": ""})[0] == "two_systems"
    assert refused(keyed | {"system": 7}) == ("no_system", "system is 7; text is needed. Add it.")
    late = chat("Where?", BOX) | {"messages": [*chat("Where?", BOX)["messages"], first]}
    assert refused(late)[0] == "turn_order" and "one turn may be the system's" in refused(late)[1]


def test_case_04_and_case_05_marks_are_counted(read, refused):
    two = ("a.png", "b.png")
    assert refused(chat("<image><image>Where?", BOX)) == (
        "image_marks",
        "marks <image>: 2, images: 1; one mark for each image is needed, or none: then all images stand first. "
        "Correct the record.",
    )
    assert refused(chat("<image>Where?", BOX, images=two))[0] == "image_marks"
    assert refused({"images": list(two), "question": "<image>?", "answer": [1, 2, 3, 4]})[0] == "image_marks"
    assert refused(chat("<image>Where?", f"In <image>. {BOX}", images=two))[0] == "mark_in_answer"
    between = "Compare <image> with the first. <image> Where is the cup? "
    assert read(chat(between, BOX, images=two))[0].question == between


def test_the_target_image_is_one_that_the_first_question_shows(read, refused):
    later = chat("<image>Where?", BOX, "And in <image><image>?", "No.", images=SIZES)
    assert read(later)[0].target_image == 0
    assert refused(later | {"target_image": 1})[1] == "target_image is 1; it must be 0 to 0. Correct it."
    blind = chat("Is this box in image 1?", BOX, "In <image>?", "No.")
    assert read(blind)[0].gold is None, "no image was shown that it could lie in"
    assert read(chat("Where?", BOX, images=SIZES))[0].target_image == 2


def test_case_14_content_parts_name_their_images_in_place(read):
    asked = [said("In "), image("b.png"), said(", unlike in "), {"type": "image_url", "image_url": {"url": "a.png"}}]
    record = chat([*asked, said(": where?")], [said(BOX)], [{"type": "image", "path": "c.png"}], "No.", images=())
    example, names = read(record)
    assert names == ("b.png", "a.png", "c.png") and example.gold == (125, 250, 500, 750)
    questions = "In <image>, unlike in <image>: where?", "<image>"
    assert example.turns == (("user", questions[0]), ("assistant", BOX), ("user", questions[1]), ("assistant", "No."))
    placed = chat([{"type": "image"}, said("Where?")], BOX)
    nulls = chat([{"type": "image", "text": None, "image": None}, said("Where?") | {"image": None}], BOX)
    for record in (placed, nulls, chat([image("a.png"), said("Where?")], BOX)):
        assert read(record)[1] == ("a.png",) and read(record)[0].question == "<image>Where?"


def swift(answer, objects, **keys):
    question = "<image><image><image>Find the <ref-object>."
    return chat(question, answer, images=("a.png", "b.png", "c.png"), objects=objects, **keys)


@pytest.mark.parametrize(
    "objects",
    [
        {"ref": ["red cup"], "bbox": [[15, 14, 45, 70.2]], "image_id": [1]},
        {"ref": ["red cup"], "bbox": [[15, 14, 45, 70]], "bbox_type": "real", "image_id": [1]},
        {"ref": ["red cup"], "bbox": [[0.25, 0.1, 0.75, 0.5]], "bbox_type": "norm1", "image_id": [1]},
        [{"caption": "red cup", "bbox": [15, 14, 45, 70], "bbox_type": "real", "image": 1}],
        json.dumps([{"caption": "red cup", "bbox": [250, 100, 750, 500], "bbox_type": "norm_1000", "image": 1}]),
    ],
)
def test_placeholders_are_filled_from_objects(read, folder, objects):
    """As ms-swift writes them for Qwen2-VL: names and boxes between marks, thousandths of the box's own image."""
    end = 501 if "70.2" in str(objects) else 500
    box = f"<|box_start|>(250,100),(750,{end})<|box_end|>"
    example, _ = read(swift("It is at <bbox>.", objects))
    find = "<image><image><image>Find the <|object_ref_start|>red cup<|object_ref_end|>."
    assert example.turns == (("user", find), ("assistant", f"It is at {box}."))
    assert example.gold == (250, 100, 750, end) and example.target_image == 1


def test_objects_fill_in_order_through_all_turns(read, folder):
    objects = {"ref": ["cup", "box"], "bbox": [[0, 0, 28, 28], [28, 28, 56, 56], [56, 0, 112, 56]]}
    objects["image_id"] = [1, 0, 1]
    first, second = "<|box_start|>(0,0),(250,500)<|box_end|>", "<|box_start|>(250,500),(500,1000)<|box_end|>"
    third = "<|box_start|>(500,0),(1000,1000)<|box_end|>"
    texts, twice = ["Not <bbox>: <ref-object>", "<bbox>", "<ref-object>", "<bbox>"], ("a.png", "a.png")
    example, _ = read(chat(*texts, images=twice, objects=objects))
    assert [text for _, text in example.turns] == [
        f"Not {first}: <|object_ref_start|>cup<|object_ref_end|>",
        second,
        "<|object_ref_start|>box<|object_ref_end|>",
        third,
    ]
    assert example.gold == (250, 500, 500, 1000) and example.target_image == 0
    # <bbox> with an end of its own is text.
    assert read(chat("Where?", "<bbox>1,2,3,4</bbox>"))[0].turns[1][1] == "<bbox>1,2,3,4</bbox>"


def pointed(*boxes, **keys):
    """A chat for each box, which lies in b.png, of 60 x 140 pixels, and has no type."""
    return [chat("Where?", "<bbox>", images=["b.png"], objects={"ref": [], "bbox": [box]}, **keys) for box in boxes]


@pytest.mark.parametrize(
    ("boxes", "unit", "gold"),
    [
        ([[0, 0, 1, 1]], "fractions", (0, 0, 1000, 1000)),
        ([[0.25, 0.5, 0.5, 1], [0, 0, 1, 1]], "fractions", (250, 500, 500, 1000)),
        ([[15, 35, 30, 70], [6, 14, 54, 126]], "pixels", (250, 250, 500, 500)),
        ([[100, 200, 900, 950]] * 3, "thousandths", (100, 200, 900, 950)),
    ],
    ids=["whole numbers", "fractions", "pixels", "thousandths"],
)
def test_the_files_boxes_tell_the_unit_of_objects_without_a_type(write, folder, caplog, boxes, unit, gold):
    """Case 3 in chats: ms-swift means pixels, but not every file of its form does."""
    caplog.set_level("INFO")
    examples, faults = read_examples(write(pointed(*boxes)))
    assert examples[0].gold == gold and not faults and examples.files[0].unit == unit
    assert f"boxes in objects are taken in {unit} of their images, " in caplog.text
    typed = pointed([15, 35, 30, 70])[0]
    typed["objects"]["bbox_type"] = "real"
    named, _ = read_examples(write([typed, *pointed([0.25, 0.25, 0.5, 0.5])]), box_unit="fractions")
    assert [example.gold for example in named] == [(250, 250, 500, 500)] * 2


def test_objects_of_another_unit_than_the_files_are_refused(write, folder, monkeypatch):
    """Also in whole numbers, and where they come after the records that tell the unit."""
    inside, whole = [15, 35, 30, 70], [0, 0, 1, 1]
    examples, faults = read_examples(write(pointed(*[inside] * 4, whole, [0.1, 0.2, 0.3, 0.4])))
    assert len(examples) == 4 and [fault.reason for fault in faults] == ["fractions"] * 2
    assert faults[0].message.endswith("is [0, 0, 1, 1], within 0-1; the file's boxes are in pixels. Write it so.")
    with monkeypatch.context() as patched:
        patched.setattr(readers, "SNIFF_RECORDS", 1)
        (_, late), (fault,) = read_examples(write([chat("Where?", BOX), *pointed(inside, whole)]))
    assert late.gold == (250, 250, 500, 500) and fault.reason == "fractions"
    Image.new("RGB", (640, 480)).save(folder / "b.png")
    images._header_of_file.cache_clear()
    with pytest.raises(ValueError, match=r"the gold boxes may be p\w+ or p\w+ .*: 2 do not tell; .*with --box_unit"):
        read_examples(write(pointed([10, 10, 50, 60], [20, 20, 80, 90])))


UNREAD = {
    "fractions": "<answer>(0.396, 0.2), (0.5, 0.6)</answer>",
    "a list": "<answer>[12, 40, 210, 300]</answer>",
    "no tags": "It is at (125, 250), (500, 750).",
    "an object": '<answer>{"bbox_2d": [12, 40, 210, 300]}</answer>',
    "texts": 'At ["0.1", "0.2", "0.3", "0.4"].',
    "corners": '<answer>{"x1": 12, "y1": 40, "x2": 210, "y2": 300}</answer>',
    "two corners": "[[12, 40], [210, 300]]",
    "spaces": "<box>12 40 210 300</box>",
    "a string": '{"box": "12, 40, 210, 300"}',
}


@pytest.mark.parametrize("answer", UNREAD.values(), ids=UNREAD)
def test_an_answer_whose_box_is_not_read_is_counted_and_named(write, caplog, answer):
    """SFT learns it as it is written, and the log says that it is no gold box; GRPO leaves it out, by name."""
    caplog.set_level("INFO")
    path = write([chat("Where?", BOX), chat("Where?", answer), chat("Is it there?", "No (1, 2), [3].")])
    options = SimpleNamespace(data=[str(path)], schema="auto", box_unit="auto", image_root="", seed=0)
    learned, faults = read_usable(options, needs="turns")
    assert [example.turns[1][1] for example in learned][1] == answer and not faults
    assert "1 records have an answer with a box that is not read: SFT learns it as text" in caplog.text
    scored, faults = read_usable(options, needs="gold")
    assert len(scored) == 1 and [fault.reason for fault in faults] == ["unread_box", "no_gold"]
    assert faults[0].message == (
        "data.json#1: the box in the answer is not read. Write it as <answer>(x1, y1), (x2, y2)</answer>, in "
        "thousandths of the image."
    )


def test_several_boxes_that_are_read_are_not_counted_as_unread(read):
    assert not read(chat("Where?", "<|box_start|>(1,2),(3,4)<|box_end|>, (5, 6), (7, 8)"))[0].unread
    assert not read(chat("Where?", BOX, "In <image>?", "No."))[0].unread, "its image is not shown with the question"


BOXED = {"ref": ["cup"], "bbox": [[1, 2, 3, 4]]}
USER, UNLEARNED = {"from": "human", "value": "Where?"}, {"from": "gpt", "value": BOX, "loss": False}


@pytest.mark.parametrize(
    ("record", "reason", "named"),
    [
        (chat("Where?", BOX, tools=[{"name": "zoom"}]), "unused_key", "tools is [{'name': 'zoom'}]"),
        (chat("Where?", BOX, system_prompt="Be brief."), "unused_key", "system_prompt is 'Be brief.'"),
        (chat("Where?", BOX, videos=["a.mp4"]), "video", "videos are not read. Give their frames as images."),
        (chat("Where?", BOX, rejected_response="No."), "unused_key", "rejected_response is 'No.'"),
        (chat("Where?", BOX, label=False), "unused_key", "label is False"),
        (chat("a?", BOX) | {"messages": [USER, UNLEARNED]}, "unused_key", "has loss: False; only from and value"),
        (chat([image("a.png") | {"max_pixels": 9}, said("?")], BOX), "bad_part", "'image' and has image, max_pixels;"),
        (chat([{"type": "video", "video": "a.mp4"}, said("?")], BOX), "bad_part", "of type 'video'"),
        (chat([image("a.png") | {"url": "b.png"}, said("?")], BOX), "bad_part", "has image, url;"),
        (chat(["Where?"], BOX), "bad_part", "of type None and has nothing else"),
        (chat([image("a.png"), said("?")], BOX, images=("b.png",)), "two_image_lists", "['b.png']"),
        (chat("a?", BOX, conversations=chat("b?", BOX)["messages"]), "two_chats", "messages and conversations differ"),
        (chat("Where?", BOX, {"text": "?"}, "No."), "no_question", "turn 2 (question) is {'text': '?'}; text"),
        (chat("Where?", BOX, weight=0.5), "unused_key", "weight is 0.5; it changes what is asked or learned, and"),
        (chat("Where?", BOX, sys="Be brief."), "unused_key", "sys is 'Be brief.'"),
        (chat("Where?", BOX, add_generation_prompt=False), "unused_key", "add_generation_prompt is False"),
        (chat("Where?", BOX, prompt="Be brief."), "unused_key", "prompt is 'Be brief.'"),
        (chat("Where?", BOX, max_pixels=784), "unused_key", "max_pixels is 784"),
        (chat("<video>Where?", BOX), "video", "a text holds <video>; only images are read. Give a video's frames."),
        (chat("Where?", f"<audio>{BOX}"), "video", "a text holds <audio>"),
        (chat("Where?", "<bbox>"), "bad_objects", "the chat has 1 placeholders <bbox>, objects has 0 values for them"),
        (swift("<bbox>", {"ref": ["cup"], "bbox": []}), "bad_objects", "1 placeholders <bbox>, objects has 0"),
        (swift("<bbox>", '[{"caption": "cup"'), "bad_objects", "not JSON (Expecting ',' delimiter: line 1 column 19"),
        (swift("<bbox>", {"ref": ["cup"], "bbox": 7}), "bad_objects", 'it is {"ref": names, "bbox": boxes} or a list'),
        (swift("<bbox>", [["cup", [1, 2, 3, 4]]]), "bad_objects", 'a list of {"caption": name, "bbox": box}'),
        (chat("Where?", BOX, objects={"bbox": [[1, 2, 3, 4]]}), "unused_objects", "the chat has no <ref-object> or"),
        (chat("Where?", BOX, objects='[{"caption": "cup"}]'), "unused_objects", "Place them, or remove objects."),
        (swift("<bbox>", {"ref": [], "bbox": [[1, 2, 3, 4]]}), "bad_objects", "1 placeholders <ref-object>"),
        (swift("<bbox>", {"ref": ["cup"], "bbox": [[1, 2, 3, 4]], "image_id": [3]}), "bad_objects", "in image 3; t"),
        (swift("<bbox>", {"ref": ["cup"], "bbox": [[1, 2, 3, 4]], "bbox_type": "percent"}), "bad_objects", "'percent'"),
        (swift("<bbox>", BOXED | {"width": [60]}), "unused_key", "objects has width: [60]; only ref, bbox, bbox_type"),
        (swift("<bbox>", [{"caption": "cup", "bbox": [1, 2, 3, 4], "frobnicate": 1}]), "unused_key", "frobnicate: 1;"),
        (swift("<bbox>", {"ref": ["cup"], "bbox": [[1, 2]]}), "box_length", "bbox of objects is [1, 2]"),
        (swift("<bbox>", {"ref": ["cup"], "bbox": [[1, 2, 300, 4]]}), "box_outside", "300"),
    ],
)  # fmt: skip
def test_what_would_change_a_chat_is_refused_by_name(refused, folder, record, reason, named):
    found, message = refused(record)
    assert found == reason and named in message and "\n" not in message and len(message) < 240


def test_case_08_the_size_of_a_chats_only_image_is_compared(write, folder, caplog):
    """Case 8 in chats: b.png has 60 x 140 pixels. Of several images nobody knows which one is meant."""
    caplog.set_level("INFO")
    alone, several = chat("Where?", BOX, images=["b.png"]), chat("Where?", BOX, images=["b.png", "c.png"])
    sizes = [{"width": 60, "height": 140}, {"width": 140, "height": 60}, {"width": 10, "height": 10}]
    examples, (fault,) = read_examples(write([*(alone | size for size in sizes), several | sizes[2]]))
    assert len(examples) == 3 and fault.reason == "size_contradicts" and "1 records have width and" in caplog.text


def test_labels_of_a_record_are_ignored(read):
    empty = {"tools": None, "videos": [], "rejected": "", "objects": {"ref": [], "bbox": [], "width": None}}
    record = chat("Where?", BOX, source="web", label="cup", quality=0.5, **empty)
    record["messages"][0] |= {"id": 7, "tool_calls": []}
    assert read(record)[0].turns == (("user", "Where?"), ("assistant", BOX))


@pytest.fixture
def data(write, folder):
    """Two chats with images between words, in later turns, and in the system's text."""
    three = chat("Compare <image> with this: <image>\nWhere is it?", BOX, "And <image>?", "No.", images=SIZES)
    return write([three, chat("In <image>?", BOX, images=("c.png", "b.png"), system="<image> is like it.")])


def test_learned_tokens_have_hugging_faces_logps(initial, data):
    """Two interleaved chats in one pack: positions and logps of all learned tokens, each as of the whole chat alone."""
    processor = Processor.from_pretrained(initial, min_pixels=784, max_pixels=50_000)
    examples, faults = read_examples(data)
    conversations = [processor.conversation(example) for example in examples]
    assert not faults and [len(c.image_grid_thw) for c in conversations] == [3, 2]
    ours, theirs = load_model(initial), Qwen2VLForConditionalGeneration.from_pretrained(initial).eval()
    pad = processor.image_token_id
    pack = pack_groups([Group(c) for c in conversations], image_token_id=pad)
    with torch.no_grad():
        logits = ours(pack) @ ours.head_weight.T
        found = logits.log_softmax(-1).gather(1, pack.targets[:, None])[:, 0]
        expected = []
        for c in conversations:
            types = (c.input_ids == pad).int()[None]
            positions, _ = theirs.model.get_rope_index(c.input_ids[None], types, c.image_grid_thw)
            assert torch.equal(c.position_ids, positions[:, 0])
            pictures = {"pixel_values": c.pixel_values, "image_grid_thw": c.image_grid_thw}
            logps = theirs(input_ids=c.input_ids[None], mm_token_type_ids=types, **pictures).logits[0].log_softmax(-1)
            learned = c.loss_mask.nonzero()[:, 0]
            expected.append(logps[learned - 1].gather(1, c.input_ids[learned, None])[:, 0])
    assert (found - torch.cat(expected)).abs().max() < 1e-4


def test_interleaved_chats_train_and_are_evaluated(initial, data, tmp_path):
    """SFT over all turns, GRPO and evaluation on the first question with its own images and the system's text."""
    shown, _ = read_examples(data)
    processor = Processor.from_pretrained(initial, min_pixels=784, max_pixels=50_000)
    values = {"model": str(initial), "data": str(data), "min_pixels": 784, "max_pixels": 50_000}
    values["dataloader_num_workers"] = 0
    sft.train(SftOptions(**values, output_dir=str(tmp_path / "sft"), max_steps=1, train_batch_size=2), Ranks())
    step = {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 4, "max_steps": 1}
    grpo.train(GrpoOptions(**values, output_dir=str(tmp_path / "grpo"), **step), Ranks())
    whole = sum(len(processor.conversation(example).input_ids) for example in shown)
    asked = sum(len(processor.prompt(example).input_ids) for example in shown)
    (learned,), (rewarded,) = lines(tmp_path / "sft"), lines(tmp_path / "grpo")
    assert learned["num_tokens"] == whole and asked < rewarded["num_tokens"] <= asked + 2 * 2 * 4
    for answer_format in ("auto", "marked"):
        out = tmp_path / answer_format
        options = EvalOptions(**values, output_dir=str(out), answer_format=answer_format, max_completion_length=4)
        evaluate(options, Ranks())
        answers = json.loads((out / "results.json").read_text())["answers"]
        assert len(answers) == 2 and all(answer["answer"] for answer in answers)
