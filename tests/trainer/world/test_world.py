"""The world on disk: valid records in the users' formats, reproducible, disjoint, and never mixed with another."""

import itertools
import json
import re
from collections import Counter

import pytest
from PIL import Image

from boxgrpo.trainer.data.example import BOX_PREFIX, THINK_SUFFIX
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.world.scenes import TASKS, box_text, place
from boxgrpo.trainer.world.world import DEMO_TASKS, SPLITS, all_texts, scene_of, write_world

SMALL = {"cold_start": 12, "train": 8, "held_out": 4, "processes": 1}


def read(folder):
    return {split: json.loads((folder / f"{split}.json").read_text()) for split in SPLITS}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("worlds") / "small", **SMALL)


def test_every_record_has_its_images_and_tasks_take_turns(world):
    splits = read(world)
    assert {split: len(records) for split, records in splits.items()} == {"cold_start": 12, "train": 8, "held_out": 4}
    for records in splits.values():
        assert set(Counter(record["task"] for record in records).values()) == {len(records) // len(DEMO_TASKS)}
        for record in records:
            assert 0 <= record["target_image"] < len(record["images"])
            for name in record["images"]:
                with Image.open(world / name) as image:
                    assert (image.size, image.mode, image.format) == ((112, 112), "RGB", "PNG")
    names = [name for records in splits.values() for record in records for name in record["images"]]
    assert len(set(names)) == len(names) == len(list(world.rglob("*.png")))


def test_stage_1_records_hold_the_trainers_prompt_and_a_well_formed_answer(world):
    box = r"\((\d+), (\d+)\), \((\d+), (\d+)\)"
    for record in read(world)["cold_start"]:
        (user, assistant), others = record["messages"][:2], record["messages"][2:]
        assert (user["role"], assistant["role"]) == ("user", "assistant") and user["content"].endswith(THINK_SUFFIX)
        corners = re.fullmatch(rf"<think>.+?</think><answer>{box}</answer>", assistant["content"]).groups()
        assert all(0 <= int(v) <= 1000 for v in corners)
        assert others  # a level-1 scene has more than one object
        assert all(m["content"].startswith("Where is the ") for m in others[::2])
        assert all(re.fullmatch(box, m["content"]) for m in others[1::2])


def test_stage_2_records_hold_question_and_box_but_no_reasoning(world):
    for record in read(world)["train"] + read(world)["held_out"]:
        assert record.keys() == {"id", "task", "level", "images", "target_image", "question", "answer"}
        assert len(record["answer"]) == 4 and all(isinstance(v, int) and v % 125 == 0 for v in record["answer"])
        assert "<think>" not in record["question"]


def test_the_files_are_the_scenes_that_the_seeds_name(world):
    record, scene = read(world)["train"][5], scene_of("train", DEMO_TASKS[1], 1_000_005, level=1, size=112)
    assert (record["question"], record["answer"]) == (scene.question, list(scene.gold))
    for name, image in zip(record["images"], scene.images, strict=True):
        with Image.open(world / name) as written:
            assert written.tobytes() == image.tobytes()


@pytest.mark.parametrize("task", ["common_object", "diff"])
def test_no_arrangement_is_both_trained_on_and_held_out(task):
    """At level 0 there are so few that hundreds of scenes of any seeds share some."""

    def arrangements(split, seeds):
        scenes = [scene_of(split, task, seed, level=0, size=56) for seed in seeds]
        return {tuple(layout.things for layout in scene.layouts) for scene in scenes}

    trained = arrangements("train", range(300)) | arrangements("cold_start", range(300, 600))
    held_out = arrangements("held_out", range(300))
    assert len(held_out) > 100 and not trained & held_out


def test_the_training_scenes_have_chains_in_a_file_of_their_own(world):
    chains = json.loads((world / "train_chains.json").read_text())
    for taught, question in zip(chains, read(world)["train"], strict=True):
        assert (taught["id"], taught["images"]) == (question["id"], question["images"])
        assert taught["messages"][0]["content"].startswith(question["question"])
        assert taught["messages"][1]["content"].startswith("<think>")


def test_the_same_arguments_write_the_same_bytes_with_any_number_of_processes(world, tmp_path):
    assert contents(write_world(tmp_path / "again", **SMALL | {"processes": 2})) == contents(world)


def test_held_out_scenes_are_the_same_when_another_split_grows(world, tmp_path):
    larger = read(write_world(tmp_path / "larger", **SMALL | {"train": 20}))
    assert larger["held_out"] == read(world)["held_out"] and larger["train"][:8] == read(world)["train"]


def test_another_seed_is_another_world(world, tmp_path):
    def images(folder):
        return {data for name, data in contents(folder).items() if name.endswith(".png")}

    assert images(write_world(tmp_path / "other", seed=1, **SMALL)).isdisjoint(images(world))


def test_half_of_the_conversations_have_margins_and_all_other_boxes_are_exact(world, tmp_path):
    """With margins every box of the conversation is a cell larger on every side, as far as the image goes."""
    exact = read(write_world(tmp_path / "exact", margins=0.0, **SMALL))
    assert exact["train"] == read(world)["train"] and exact["held_out"] == read(world)["held_out"]
    habits = Counter()
    for ours, true in zip(read(world)["cold_start"], exact["cold_start"], strict=True):
        habits[ours == true] += 1
        for a, b in zip(ours["messages"], true["messages"], strict=True):
            if a["role"] == "user" or ours == true:
                assert a == b
                continue
            assert a["content"].split("(")[0] == b["content"].split("(")[0]  # the reasoning is the same
            wide, box = ([int(v) for v in re.findall(r"\d+", m["content"].split("<answer>")[-1])] for m in (a, b))
            assert wide == [*(max(v - 125, 0) for v in box[:2]), *(min(v + 125, 1000) for v in box[2:])]
    assert min(habits[True], habits[False]) >= 3


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The ablation's world, smaller: all tasks at all levels."""
    folder = tmp_path_factory.mktemp("worlds") / "mixed"
    some = {"cold_start": 60, "train": 0, "held_out": 30, "margins": 0.0, "asides": False}
    return write_world(folder, tasks=list(TASKS), levels=(0, 1, 2), size=56, processes=1, **some)


def test_levels_alternate_after_each_round_of_the_tasks(mixed):
    records = read(mixed)["cold_start"]
    assert Counter((r["task"], r["level"]) for r in records) == dict.fromkeys(itertools.product(TASKS, range(3)), 2)
    assert [r["level"] for r in records[:30]] == [0] * 10 + [1] * 10 + [2] * 10
    scene = scene_of("cold_start", records[23]["task"], 23, level=2, size=56)
    assert records[23]["level"] == 2 and records[23]["messages"][1]["content"] == scene.completion


def test_coordinates_are_the_cold_start_and_the_held_out_scenes_without_reasoning(mixed):
    for name, split in (("coordinates", "cold_start"), ("held_out_coordinates", "held_out")):
        records = json.loads((mixed / f"{name}.json").read_text())
        for bare, whole in zip(records, read(mixed)[split], strict=True):
            same = ("id", "task", "level", "images", "target_image")
            assert [bare[k] for k in same] == [whole[k] for k in same] and bare["answer_format"] == "box"
            if split == "held_out":
                assert (bare["question"], bare["answer"]) == (whole["question"], whole["answer"])
                continue
            (user, answer), (_, chained) = bare["messages"], whole["messages"]
            assert chained["content"].endswith(f"<answer>{answer['content']}</answer>")
            assert re.fullmatch(r"\(\d+, \d+\), \(\d+, \d+\)", answer["content"])
            assert chained["content"] != answer["content"] and user["content"].startswith(BOX_PREFIX)
            assert whole["messages"][0]["content"] == user["content"].removeprefix(BOX_PREFIX) + THINK_SUFFIX
    examples, faults = read_examples(mixed / "held_out_coordinates.json")
    assert not faults and {e.answer_format for e in examples} == {"box"}


def test_plain_records_are_about_the_place_of_each_object(mixed):
    plain = json.loads((mixed / "plain.json").read_text())
    for k, (record, taught) in enumerate(zip(plain, read(mixed)["cold_start"], strict=True)):
        scene = scene_of("cold_start", record["task"], k, level=record["level"], size=56)
        texts = [m["content"] for m in record["messages"]]
        first, *others = zip(texts[::2], texts[1::2], strict=True)
        expected = {(f"Where is the {t.kind} in image {n}?", box_text(t.box)) for n, t in scene.objects}
        question, request = first[0].split("? ", 1)
        chain, box = re.fullmatch(r"<think>(.*)</think><answer>(.*)</answer>", first[1]).groups()
        assert {(f"{question}?", box), *others} == expected and len(others) == len(expected) - 1
        kind, number = re.fullmatch(r"Where is the (.*) in image (\d)", question).groups()
        corners = [int(v) for v in re.findall(r"\d+", box)]
        assert chain == f"The {kind} is in image {number} at the {place(corners)}."
        assert taught["messages"][0]["content"].endswith(request)


def test_a_folder_with_a_world_or_with_other_files_is_never_overwritten(tmp_path):
    folder = write_world(tmp_path / "w", **SMALL)
    (folder / "train.json").unlink()  # would come back if anything were written
    before = contents(folder)
    assert write_world(tmp_path / "w", **SMALL | {"processes": 2}) == folder
    with pytest.raises(ValueError, match=r"'seed': 0.*not this world: .*'seed': 3.*Remove it or name another"):
        write_world(folder, seed=3, **SMALL)
    assert contents(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"mine holds no world\.json, not this world"):
        write_world(tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_an_interrupted_write_leaves_no_world_and_can_be_repeated(world, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("boxgrpo.trainer.world.world.json.dumps", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_world(tmp_path / "w", **SMALL)
    assert not (tmp_path / "w").exists()
    assert contents(write_world(tmp_path / "w", **SMALL)) == contents(world)
    assert [path.name for path in tmp_path.iterdir()] == ["w"], "the unfinished folder was left behind"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, r"tasks are \[\] and levels \[1\]; name at least one of each"),
        ({"tasks": ["diff", "counting"]}, r"task is 'counting'; the world draws diff"),
        ({"levels": []}, r"levels \[\]; name at least one"),
        ({"train": -1}, "train is -1; a split holds 0 to 1000000 scenes"),
        ({"size": 100}, "size is 100; an image side must be"),
    ],
)
def test_impossible_arguments_are_refused_and_leave_no_folder(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_world(tmp_path / "w", **SMALL | arguments)
    assert not list(tmp_path.iterdir())


def test_all_texts_hold_every_word_and_number_of_the_world(world):
    def words(texts):
        return {word for text in texts for word in re.findall(r"\w+", text)}

    splits = read(world)
    written = [m["content"] for r in splits["cold_start"] for m in r["messages"]]
    written += [r["question"] for r in splits["train"] + splits["held_out"]]
    assert words(written) | {str(v) for v in range(0, 1001, 125)} <= words(all_texts())
