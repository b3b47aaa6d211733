"""Records in the users' formats become examples; each kind of faulty record is refused by name."""

import json
import logging
import os
import pickle
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from boxgrpo.trainer.data import images, readers
from boxgrpo.trainer.data.example import Source
from boxgrpo.trainer.data.images import resolve_images
from boxgrpo.trainer.data.readers import read_examples, read_usable
from boxgrpo.trainer.data.scan import scan

GOOD = {"images": ["a.png", "b.png"], "question": "Where is it?", "answer": [100, 200, 300, 400]}
CHAT = {
    "messages": [
        {"role": "user", "content": "<image><image>Where is the cup?"},
        {"role": "assistant", "content": "<think>On it.</think><answer>(125, 250), (500, 750)</answer>"},
    ],
    "images": ["a.png", "b.png"],
}


def test_all_real_records_parse_but_two(shared, tmp_path):
    """The two that MIG-Bench has wrong are refused by name; the questions' wording names the target images."""
    folder = shared / "data/mig_bench"
    faulty, sample = (json.loads((folder / f"MIG_data.{name}.json").read_text()) for name in ("faulty", "sample"))
    (tmp_path / "both.json").write_text(json.dumps([*faulty, *sample]))
    examples, faults = read_examples(tmp_path / "both.json", image_root=folder)
    assert [(f.source, f.reason) for f in faults] == [("both.json#0", "box_inverted"), ("both.json#1", "box_outside")]
    assert "[0.027, 0.18, 0.143, 0.051]" in faults[0].message
    assert "[0.319, 0.186, 1.048, 0.535]" in faults[1].message and "0 to 1." in faults[1].message

    assert len(examples) == 121 and len({e.task for e in examples}) == 10
    first = examples[0]
    assert first.gold == (0.0, 51.0, 573.0, 887.0)  # fractions times 1000
    assert first.images[0].endswith("mig_bench/MIG-Bench/images/common/Stuffed_Toy/objects365_v2_01293223.jpg")
    assert any("<|box_start|>(146,211),(237,593)<|box_end|>" in e.question for e in examples)  # marks stay text

    by_question = {e.question.strip(): e.target_image for e in examples}
    in_the_third = "These images share one object in common. Recognize and locate this object in the 3th image."
    assert by_question[in_the_third] == 2
    assert by_question["Find and locate where does the object in image-1 locate in the image-2."] == 1
    assert all(e.target_image == 0 for e in examples if e.task == "region")  # "in the source image", the first
    ship = next(e for e in examples if "a large ship in the water" in e.question)
    assert ship.target_image == 0  # only additional_info names it


@pytest.mark.parametrize(
    ("change", "reason", "value"),
    [
        ({"answer": None}, "no_gold_box", "None"),
        ({"answer": [1, 2, 3]}, "box_length", "[1, 2, 3]"),
        ({"answer": [1, 2, 3, "4"]}, "box_not_numbers", "'4'"),
        ({"answer": [1, 2, 3, float("nan")]}, "box_not_numbers", "nan"),
        ({"answer": [1, 2, 3, 10**400]}, "box_not_numbers", "1000"),
        ({"answer": [300, 200, 100, 400]}, "box_inverted", "[300, 200, 100, 400]"),
        ({"answer": [100, 200, 100, 400]}, "box_inverted", "[100, 200, 100, 400]"),
        ({"answer": [-1, 200, 300, 400]}, "box_outside", "-1"),
        ({"answer": [100, 200, 300, 1001]}, "box_outside", "0 to 1000"),
        ({"images": None}, "no_images", "None"),
        ({"images": []}, "no_images", "[]"),
        ({"question": " <image> "}, "no_question", "<image>"),
        ({"question": None}, "no_question", "None"),
        ({"question": "half \ud83e"}, "bad_text", "surrogates"),
        ({"target_image": 2}, "bad_target_image", "0 to 1"),
        ({"answer_format": "json"}, "bad_answer_format", "'json'"),
    ],
)
def test_a_faulty_record_names_itself_the_rule_and_the_value(write, change, reason, value):
    examples, faults = read_examples(write([GOOD, GOOD | change]), schema="univg_stage2")
    assert len(examples) == 1
    (fault,) = faults
    assert (fault.source, fault.reason) == ("data.json#1", reason)
    assert fault.message.startswith("data.json#1: ") and value in fault.message


def test_a_file_without_one_good_record_counts_the_reasons(write):
    bad = [GOOD | {"answer": [9, 9, 1, 1]}, GOOD | {"answer": [9, 9, 1, 2]}, GOOD | {"images": []}]
    with pytest.raises(ValueError, match=r"0 of 3 records.*box_inverted 2, no_images 1.*data\.json#0"):
        read_examples(write(bad))
    with pytest.raises(ValueError, match="0 of 0 records"):
        read_examples(write([]))
    near = {
        "univg_stage2, has images, question and answer": {"img": "a.png", "caption": "x"},
        "lisa, has image_path, instruction and boxes": {"image_path": "a.png", "instruction": "x", "box": [1, 2, 3, 4]},
        "univg_stage2, has images": {"images": ["a.png"], "prompt": [{"role": "user", "content": "x"}]},
    }
    for nearest, record in near.items():
        with pytest.raises(ValueError, match=f"the keys {', '.join(sorted(record))} fit no .* The nearest, {nearest}"):
            read_examples(write([record]))


def test_a_file_that_is_no_list_of_records_says_what_one_is(tmp_path):
    """Case 24: an object whose list stands elsewhere, and files of other kinds."""
    texts = {
        '{"info": {}, "data": []}': r"one object, whose data is a list of 0; .* begins with it as data .*docs/data.md",
        '{"annotations": [{"id": 1}]}': "whose annotations is a list of 1; a file of records is a list, or an object",
        '{"tags": ["a", "b", "c"], "records": [{"img": "a.png"}]}': "one object, whose records is a list of 1; a file",
        '{"img": "a.png", "tags": []}': "records with the keys img, tags fit no known form. The nearest, univg_stage2,",
        '["a.png", "b.png"]': "holds no JSON object: its first is 'a.png'. Name a JSON, JSONL, Parquet or Arrow file",
        "image,question\na.png,x": "holds no JSON object: Expecting value: line 1 .* Name a JSON, JSONL, Parquet",
    }
    for text, message in texts.items():
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_examples(tmp_path / "data.json", min_usable=0)


def test_a_refusal_of_one_record_has_one_remedy(write):
    for value in (GOOD | {"images": []}, CHAT | {"messages": []}, GOOD | {"answer": 3}):
        with pytest.raises(ValueError) as refused:
            read_examples(write([value]))
        assert len(re.findall(r"\b(?:Add|Correct|Drop|Name)\b", str(refused.value))) == 1
        with pytest.raises(ValueError, match="They are read as --schema lisa.$"):
            read_examples(write([value]), schema="lisa")


def test_an_unforeseen_error_is_a_fault_of_its_record_alone(write, monkeypatch):
    """Not so an error in finding the file's unit, which would hide it."""
    parse = readers.parse

    def fails_once(record, *args, **how):
        return record["missing"] if record["id"] == 1 else parse(record, *args, **how)

    path = write([GOOD | {"id": 0}, GOOD | {"id": 1}, GOOD | {"id": 2}])
    with monkeypatch.context() as patched:
        patched.setattr(readers, "parse", fails_once)
        examples, (fault,) = read_examples(path)
    assert len(examples) == 2 and fault.source == "data.json#1"
    assert fault.message.endswith("reading it fails with KeyError: 'missing'. Drop it.")
    monkeypatch.setattr(readers, "known_size", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_examples(write([CHAT]))


def test_boxes_of_a_file_have_one_unit(write):
    fractions = [GOOD | {"need_format": True, "answer": answer} for answer in ([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1])]
    assert [e.gold for e in read_examples(write(fractions))[0]] == [(100, 200, 300, 400), (0, 0, 1000, 1000)]
    # The revised file is in 0-1000; a tiny box in the corner does not make it a file of fractions.
    thousands = [
        GOOD | {"need_format": True, "answer": answer} for answer in ([0, 0, 1, 1], [1, 2, 30, 40], [5, 5, 900, 90])
    ]
    assert [e.gold for e in read_examples(write(thousands))[0]] == [(0, 0, 1, 1), (1, 2, 30, 40), (5, 5, 900, 90)]


def test_chats_of_both_spellings(write):
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in CHAT["messages"]]
    other = {"id": 7, "conversations": turns, "images": CHAT["images"]}
    examples, faults = read_examples(write([CHAT, other]))
    assert not faults and [example.id for example in examples] == ["data-0", "7"]
    for example in examples:
        assert [role for role, _ in example.turns] == ["user", "assistant"] and example.gold == (125, 250, 500, 750)


def test_chats_that_cannot_be_learned(write):
    user, assistant = CHAT["messages"]
    inverted = {"role": "assistant", "content": "<answer>(500, 750), (125, 250)</answer>"}
    silent = {"role": "assistant", "content": " "}
    odd = {"role": ["user"], "content": "Where?"}
    chats = [[user, assistant], [], [user], [assistant, user], [user, inverted], [user, silent], [odd, assistant]]
    examples, faults = read_examples(write([CHAT | {"messages": chat} for chat in chats]))
    assert len(examples) == 1
    assert [f.reason for f in faults] == "no_turns no_answer turn_order box_inverted no_answer turn_order".split()


def test_the_papers_single_image_records_ask_for_a_box_only(write):
    refcoco = GOOD | {"images": ["dataset/coco/train2014/COCO_train2014_000000000009.jpg"]}
    examples, _ = read_examples(write([refcoco, GOOD, GOOD | {"answer_format": "box"}]))
    assert [e.answer_format for e in examples] == ["box", "think", "box"]


def test_jsonl_reads_the_same_and_a_broken_line_is_a_fault(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n".join([json.dumps(GOOD), '{"images": [', "3", json.dumps(GOOD)]))
    examples, faults = read_examples(tmp_path / "data.jsonl")
    assert [e.source for e in examples] == ["data.jsonl#0", "data.jsonl#3"]
    assert [(f.source[-2:], f.reason) for f in faults] == [("#1", "not_json"), ("#2", "not_a_record")]
    (tmp_path / "data.json").write_bytes(b'["\xff\xfe"]')
    with pytest.raises(ValueError, match=r"data\.json is not UTF-8"):
        read_examples(tmp_path / "data.json")


def test_image_paths_stay_under_the_image_root(write, tmp_path):
    (example,), _ = read_examples(write([GOOD]))
    assert example.images == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))  # beside the file
    escapes = [["../secret.png"], ["/etc/passwd"], ["x/../../secret.png"], ["../root2/a.png"]]
    records = [GOOD | {"images": ["./sub/../a.png"]}, *(GOOD | {"images": images} for images in escapes)]
    examples, faults = read_examples(write(records), image_root=tmp_path / "root")
    assert [e.images for e in examples] == [(str(tmp_path / "root/a.png"),)]
    assert [f.reason for f in faults] == ["image_outside_root"] * 4 and "../secret.png" in faults[0].message


def test_every_spelling_of_a_path_is_resolved_alike():
    """Plain paths are joined without being resolved."""
    spellings = "a.png x/y/z.png x_y/ä.png .a x/.a ./a x/../a x//a x/ /a //a .. x/.. a.. x\\..\\a".split()
    for root in ("/data/images", "/"):
        expected = tuple(os.path.abspath(os.path.join(root, image)) for image in spellings)
        assert resolve_images(spellings, Source(Path(), "", root, bounded=False)) == expected


@pytest.mark.parametrize(
    ("question", "target"),
    [
        ("Locate the item in Image-2 that can cook the stuff in Image-1.", 1),
        ("For the object in the first image, please locate it in the 3th image.", 2),
        ("The second image shows it too. Find it in the first image.", 0),
        ("Compare the images and find the difference.", 3),
        ("Find it in image-9.", 3),
    ],
)
def test_the_target_image_by_the_wording(write, question, target):
    ((example,), _) = read_examples(write([GOOD | {"question": question, "images": ["a", "b", "c", "d"]}]))
    assert example.target_image == target


def of_sources(data, seed=0):
    return SimpleNamespace(data=data, schema="auto", box_unit="auto", image_root="", seed=seed)


def test_sources_are_mixed_by_count_and_seed(write, caplog):
    """As the paper mixes its stages: so many of each, drawn by the seed, under names that tell them apart."""
    a = write([GOOD | {"id": f"a{i}"} for i in range(50)], "a.json")
    b = write([GOOD | {"id": f"b{i}"} for i in range(20)], "b.json")
    mixed, faults = read_usable(of_sources([f"{a}#7", f"{b}#3"]), needs="gold")
    ids = [e.id for e in mixed]
    assert len(ids) == len(set(ids)) == 10 and [i[0] for i in ids] == ["a"] * 7 + ["b"] * 3 and not faults
    assert (
        [e.source.split("#")[0] for e in mixed]
        == ["a.json"] * 7 + ["b.json"] * 3
        == [s.split("#")[0] for s in mixed.sources]
    )
    again, other = (read_usable(of_sources([f"{a}#7", f"{b}#3"], seed), needs="gold")[0] for seed in (0, 1))
    assert [e.id for e in again] == ids != [e.id for e in other]
    whole, _ = read_usable(of_sources([str(a), f"{b}#99"]), needs="gold")
    assert len(whole) == 70 and "b.json: 99 records are requested and 20 can be used; all are taken" in caplog.text


def test_the_log_stays_short_whatever_is_faulty(write, caplog):
    path = write([GOOD] + [GOOD | {"answer": [300, 200, 100, 400]}] * 1500)
    _, faults = read_usable(of_sources([str(path)]), needs="gold")
    assert len(faults) == 1500 and caplog.text.count("box [300, 200, 100, 400] is inverted") == 100
    assert "skipped 1400 more (box_inverted 1400); boxgrpo inspect" in caplog.text


def test_files_of_one_name_have_labels_of_their_own(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.json").write_text(json.dumps([GOOD]))
    examples, _ = read_usable(of_sources([str(tmp_path / f / "train.json") for f in "xy"]), needs="gold")
    assert len({e.source for e in examples}) == 2 and examples[0].images != examples[1].images


@pytest.mark.parametrize(
    ("source", "needs", "message"),
    [
        ("#0", "gold", "at least 1"),
        ("#x", "gold", "no such file"),
        ("x", "gold", "no such file"),
        # Beside another file that has some: the run would go on without it.
        ("", "turns", r"data\.json: 0 of 1 records can be used .no_turns 1.*there is no answer to learn. Add it, "),
    ],
)
def test_a_source_that_gives_nothing_is_refused(write, source, needs, message):
    with pytest.raises(ValueError, match=message):
        read_usable(of_sources([str(write([CHAT], "chats.json")), f"{write([GOOD])}{source}"]), needs=needs)


def test_examples_are_read_on_access_in_other_processes_too(write):
    path = write([GOOD | {"id": i, "images": ["a.png"] * (i + 1)} for i in range(5)])
    examples, _ = read_examples(path)
    assert examples.max_images == 5
    again = pickle.loads(pickle.dumps(examples[1:4]))
    assert [e.id for e in again] == ["1", "2", "3"] and len(pickle.dumps(examples)) < 3000
    assert again[-1] == examples[3] and examples.sources == [e.source for e in examples]


def test_records_without_what_is_needed_are_named(write):
    """A chat without a box in its answer's tags, whatever stands elsewhere, has none to score."""
    answers = ["Nowhere.", "<answer>none</answer> (1, 2), (3, 4) <answer>b</answer>"]
    boxless = [CHAT | {"messages": [CHAT["messages"][0], {"role": "assistant", "content": text}]} for text in answers]
    examples, faults = read_usable(of_sources([str(write([CHAT, *boxless]))]), needs="gold")
    assert len(examples) == 1
    assert [(f.source[-2:], f.reason) for f in faults] == [("#1", "no_gold"), ("#2", "unread_box")]


def test_a_large_file_is_scanned_once(write, tmp_path, monkeypatch, caplog):
    """Until it changes, or another schema, root or unit is given. A broken cache is made anew."""
    Image.new("RGB", (40, 30)).save(tmp_path / "b.png")  # a box's unit may depend on its image's size
    monkeypatch.setattr(readers, "CACHE_MIN_BYTES", 0)
    monkeypatch.setenv("BOXGRPO_CACHE", str(tmp_path / "cache"))
    scans = []
    monkeypatch.setattr(readers, "scan", lambda path: scans.append(path) or scan(path))
    path = write([GOOD, GOOD | {"images": []}, GOOD | {"id": "third"}])

    def look(**options):
        examples, faults = read_examples(path, **options)
        assert [e.id for e in examples] == ["data-0", "third"] and [f.source for f in faults] == ["data.json#1"]
        return len(scans)

    caplog.set_level(logging.INFO)
    assert [look(), look()] == [1, 1] and caplog.text.count("schema univg_stage2, because 3 of 3") == 2
    assert [look(image_root=tmp_path), look(schema="univg_stage2"), look()] == [2, 3, 3]
    assert [look(box_unit="thousandths"), look()] == [4, 4]
    os.utime(path, ns=(1, 1))
    assert [look(), look()] == [5, 5]
    for kept in (tmp_path / "cache/scans").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    assert [look(), look()] == [6, 6] and "the data is scanned again" in caplog.text


def test_a_scan_that_missed_images_is_not_kept(write, tmp_path, monkeypatch):
    """They are fetched, and the same command finds them; one that goes later is named, and no bug."""
    monkeypatch.setattr(readers, "CACHE_MIN_BYTES", 0)
    monkeypatch.setenv("BOXGRPO_CACHE", str(tmp_path / "cache"))
    path = write([{"image": "photo.jpg", "problem": "Find the cat.", "solution": [20, 10, 100, 60]}])
    examples, (fault,) = read_examples(path, min_usable=0)
    assert not examples and fault.reason == "missing_image"
    Image.new("RGB", (200, 100)).save(tmp_path / "photo.jpg")
    for _ in range(2):
        examples, faults = read_examples(path)
        assert len(examples) == 1 and not faults
    (tmp_path / "photo.jpg").unlink()
    images._header_of_file.cache_clear()  # as in the next process
    with pytest.raises(ValueError, match=r"data\.json#0: .*there is no image at .*photo\.jpg"):
        read_examples(path)[0][0]


def test_a_unit_that_was_derived_without_images_is_not_kept(write, tmp_path, monkeypatch):
    """Once they are there, they show that the boxes are in pixels."""
    monkeypatch.setattr(readers, "CACHE_MIN_BYTES", 0)
    monkeypatch.setenv("BOXGRPO_CACHE", str(tmp_path / "cache"))
    path = write([GOOD | {"images": ["photo.png"], "answer": [n, n, 640, 480]} for n in range(20)])
    assert read_examples(path)[0].files[0].unit == "thousandths"
    Image.new("RGB", (640, 480)).save(tmp_path / "photo.png")
    assert read_examples(path)[0].files[0].unit == "pixels"


DIGITS = "9" * 5000  # more than Python converts


@pytest.mark.parametrize(
    "text",
    [
        "{good}\n" + json.dumps(GOOD).replace("100", DIGITS) + "\n{good}",
        "[{good}, " + json.dumps(GOOD).replace("100", DIGITS) + ", {good}]",
        "{good}\n" + json.dumps(GOOD | {"question": f"Find it in image-{DIGITS}"}) + "\n{good}",
        "{good}\n" + json.dumps(GOOD | {"question": "what " * 20_000 + "in image-1"}) + "\n{good}",
        "{good}\n" + "[" * 100_000 + "\n{good}",
        '{good}\n{"images": "\udcff"}\n{good}',
    ],
    ids=["a large number", "in an array", "an image of 5000 digits", "a long question", "nesting", "half a character"],
)
def test_no_record_ends_a_run_or_stalls_it(tmp_path, text):
    path = tmp_path / "data.jsonl"
    path.write_text(text.replace("{good}", json.dumps(GOOD)), errors="surrogateescape")
    started = time.monotonic()
    examples, faults = read_examples(path)
    assert {"data.jsonl#0", "data.jsonl#2"} <= set(examples.sources) and len(examples) + len(faults) == 3
    assert time.monotonic() - started < 2


def test_a_cache_that_cannot_be_written_costs_only_time(write, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(readers, "CACHE_MIN_BYTES", 0)
    Image.new("RGB", (40, 30)).save(tmp_path / "b.png")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BOXGRPO_CACHE", str(tmp_path / "file"))
    examples, _ = read_examples(write([GOOD]))
    assert len(examples) == 1 and "cannot be kept" in caplog.text
