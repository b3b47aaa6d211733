"""The world on disk: valid records in the users' formats, reproducible, disjoint, and never mixed with another."""

import json
import re
from collections import Counter

import pytest
from PIL import Image

from boxgrpo.trainer.data.example import BOX_PREFIX, THINK_SUFFIX
from boxgrpo.trainer.data.readers import read_examples
from boxgrpo.trainer.world.scenes import TASKS, box_text
from boxgrpo.trainer.world.world import FILES, SPLITS, all_texts, draw_split_scene, write_world

SMALL = {"cold_start": 12, "train": 8, "held_out": 4}
LARGER = {"cold_start": 60, "train": 30, "held_out": 30}


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def texts(record):
    return [message["content"] for message in record["messages"]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("worlds") / "small", **SMALL)


@pytest.fixture(scope="module", params=[True, False], ids=["other questions", "no others"])
def exact(request, tmp_path_factory):
    """All tasks at all levels: a folder, whether it has other questions, and scene(split, k)."""
    tasks, levels = list(TASKS), (0, 1, 2)
    options = {"tasks": tasks, "levels": levels, "size": 56, "other_questions": request.param}
    folder = write_world(tmp_path_factory.mktemp("worlds") / "exact", **options, **LARGER)

    def scene(split, k):
        """Tasks take turns, and levels after each round of them."""
        seed = 1_000_000 * SPLITS.index(split) + k
        return draw_split_scene(split, tasks[k % 10], seed, level=levels[k // 10 % 3], size=56)

    return folder, request.param, scene


KEYS = {"id", "task", "level", "images", "target_image"}
CHAT, QUESTION, SHORT = {"messages"}, {"question", "answer"}, {"answer_format"}
HELD = {"chain": CHAT, "coordinates": CHAT | SHORT, "question": QUESTION, "question_box": QUESTION | SHORT}  # by form


@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_the_scenes_that_its_seeds_name(exact, name):
    folder, others, scene_of_record = exact
    split, form = FILES[name]
    records, (examples, faults) = read(folder, name), read_examples(folder / f"{name}.json")
    assert len(records) == len(examples) == LARGER[split] and not faults
    for k, (record, example) in enumerate(zip(records, examples)):
        scene = scene_of_record(split, k)
        assert record.keys() == KEYS | HELD[form] and record["target_image"] == scene.target_image
        assert example.answer_format == ("box" if "answer_format" in record else "think")
        if "messages" not in record:
            assert (record["question"], record["answer"]) == (scene.question, list(scene.gold))
            continue
        first = (scene.question + THINK_SUFFIX, scene.completion)
        if form == "coordinates":
            first = (BOX_PREFIX + scene.question, box_text(scene.gold))
        assert texts(record) == [text for turn in [first, *others * scene.other_questions] for text in turn]
        assert form == "coordinates" or example.gold == scene.gold, "the answer is not well-formed"


def test_every_record_has_its_images_and_tasks_take_turns(exact):
    folder, _, scene_of_record = exact
    names = []
    for split in SPLITS:
        records = read(folder, split)
        assert set(Counter((r["task"], r["level"]) for r in records).values()) == {LARGER[split] // 30}
        for k, record in enumerate(records):
            names += record["images"]
            for name, image in zip(record["images"], scene_of_record(split, k).images, strict=True):
                with Image.open(folder / name) as written:
                    assert (written.size, written.mode, written.format) == ((56, 56), "RGB", "PNG")
                    assert written.tobytes() == image.tobytes()
    assert len(set(names)) == len(names) == len(list(folder.rglob("*.png")))


@pytest.mark.parametrize("task", ["common_object", "diff"])
def test_no_arrangement_is_both_trained_on_and_held_out(task):
    """At level 0 there are so few that hundreds of scenes of any seeds share some."""

    def arrangements(split, seeds):
        scenes = [draw_split_scene(split, task, seed, level=0, size=56) for seed in seeds]
        return {tuple(layout.things for layout in scene.layouts) for scene in scenes}

    trained = arrangements("train", range(300)) | arrangements("cold_start", range(300, 600))
    held_out = arrangements("held_out", range(300))
    assert len(held_out) > 100 and not trained & held_out


def test_the_same_arguments_write_the_same_bytes_in_one_process_or_several(world, tmp_path, monkeypatch):
    monkeypatch.setattr("boxgrpo.trainer.world.world.ONE_PROCESS_SCENES", 3)
    assert contents(write_world(tmp_path / "again", **SMALL)) == contents(world)


def test_held_out_scenes_are_the_same_when_another_split_grows(world, tmp_path):
    larger = write_world(tmp_path / "larger", **SMALL | {"train": 20})
    assert read(larger, "held_out") == read(world, "held_out")
    assert read(larger, "train")[:8] == read(world, "train")


def test_another_seed_is_another_world(world, tmp_path):
    def images(folder):
        return {data for name, data in contents(folder).items() if name.endswith(".png")}

    assert images(write_world(tmp_path / "other", seed=1, **SMALL)).isdisjoint(images(world))


def test_a_folder_with_a_world_or_with_other_files_is_never_overwritten(tmp_path):
    folder = write_world(tmp_path / "w", **SMALL)
    (folder / "train.json").unlink()  # would come back if anything were written
    before = contents(folder)
    assert write_world(tmp_path / "w", **SMALL) == folder
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
    assert not list(tmp_path.iterdir()), "the unfinished folder was left behind"
    assert contents(write_world(tmp_path / "w", **SMALL)) == contents(world)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, r"tasks are \[\] and levels \[1\]; name at least one of each"),
        ({"tasks": ["diff", "counting"]}, r"task is 'counting'; the world draws diff"),
        ({"levels": []}, r"levels \[\]; name at least one"),
        ({"train": -1}, "train is -1; a split holds 0 to 1000000 scenes"),
        ({"size": 100}, "size is 100; an image side must be a multiple of 56"),
        ({"levels": [3]}, "level is 3; the world has levels 0"),
    ],
)
def test_impossible_arguments_are_refused_and_leave_no_folder(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_world(tmp_path / "w", **SMALL | arguments)
    assert not list(tmp_path.iterdir())


def test_all_texts_hold_every_word_and_number_of_the_world(world):
    def words(texts):
        return {word for text in texts for word in re.findall(r"\w+", text)}

    written = [text for record in read(world, "cold_start") for text in texts(record)]
    written += [record["question"] for split in ("train", "held_out") for record in read(world, split)]
    assert words(written) | {str(v) for v in range(0, 1001, 125)} <= words(all_texts())
