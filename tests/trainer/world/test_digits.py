"""The digits' world: real scans, none of them on both sides, and boxes, questions and chains that are true of them."""

import hashlib
import json
import re
import sys
from collections import Counter

import numpy as np
import pytest

from boxgrpo.trainer.world import digits
from boxgrpo.trainer.world.digits import INK, PAPER, WORLDS, Digit, find_scans, load_scans
from boxgrpo.trainer.world.scenes import IMAGES, OTHERS, draw_scene, place_name, tasks_of
from boxgrpo.trainer.world.shapes import Layout, Thing, paint
from boxgrpo.trainer.world.world import DEMO_TASKS, all_texts, draw_split_scene, write_world

TASKS = tasks_of(digits.DigitSketch)
SMALL = {"cold_start": 12, "train": 12, "held_out": 8}
levels = pytest.mark.parametrize("level", [0, 1, 2])


def scenes(task, level, count=30, held_out=False):
    return [draw_scene(task, seed, level=level, sketch=WORLDS["digits"][held_out]) for seed in range(count)]


def gold_thing(scene):
    (thing,) = (t for t in scene.layouts[scene.target_image].things if t.box == scene.gold)
    return thing


def shown(layout):
    return Counter(thing.kind.digit for thing in layout.things)


def test_the_scans_are_the_packages_and_the_package_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    load_scans.cache_clear()
    scans = load_scans()
    assert "sklearn" not in sys.modules and scans.shape == (1797, 65) and scans[:, :64].max() == 16
    assert [len(find_scans(digit, False)) + len(find_scans(digit, True)) for digit in range(10)] == [
        *np.bincount(scans[:, 64])
    ]


def test_an_image_shows_the_scan_in_its_box_and_nothing_outside():
    tint = (110, 120, 130)
    for scan in (0, 700, 1796):
        digit = Digit(int(load_scans()[scan, 64]), scan)
        image = np.asarray(paint(Layout((Thing(digit, (250, 0, 750, 500)),), tint), 112)).astype(float)
        inside = image[:56, 28:84]
        assert (image.sum((0, 1)) - inside.sum((0, 1)) == (112 * 112 - 56 * 56) * np.array(tint)).all()
        ink = (PAPER[0] - inside[..., 0]) / (PAPER[0] - INK[0])
        seen = ink.reshape(8, 7, 8, 7).mean((1, 3))
        assert np.abs(seen - load_scans()[scan, :64].reshape(8, 8) / 16).mean() < 0.1


@pytest.mark.parametrize("task", TASKS)
@levels
def test_boxes_are_squares_of_whole_cells_apart_and_chains_name_the_gold_box(task, level):
    for scene in scenes(task, level):
        for layout in scene.layouts:
            assert max(shown(layout).values(), default=1) == 1
            covered = np.zeros((8, 8), int)
            for x1, y1, x2, y2 in (thing.box for thing in layout.things):
                assert x2 - x1 == y2 - y1 and not any(v % 125 for v in (x1, y1, x2, y2))
                covered[y1 // 125 : y2 // 125, x1 // 125 : x2 // 125] += 1
            assert covered.max(initial=0) <= 1
            for thing in layout.things:
                assert load_scans()[thing.kind.scan, 64] == thing.kind.digit
        gold = gold_thing(scene)
        assert f"in image {scene.target_image + 1} at the {place_name(scene.gold)}." in scene.chain
        assert re.search(rf"\b{gold.kind}\b", scene.chain.split(" in image ")[0]) and "object" not in scene.question


@levels
class TestTheQuestionHasOneAnswer:
    def test_common_object(self, level):
        for scene in scenes("common_object", level):
            assert set.intersection(*(set(shown(k)) for k in scene.layouts)) == {gold_thing(scene).kind.digit}
            scans = [t.kind.scan for layout in scene.layouts for t in layout.things]
            assert len(set(scans)) == len(scans), "a scan is there twice"

    def test_refer_grounding(self, level):
        for scene in scenes("refer_grounding", level):
            (first,) = scene.layouts[0].things
            assert first.kind == gold_thing(scene).kind and first.kind.scan != gold_thing(scene).kind.scan
            assert sum((shown(layout) for layout in scene.layouts[1:]), Counter())[first.kind.digit] == 1

    def test_group_grounding(self, level):
        for scene in scenes("group_grounding", level):
            digit = int(re.search(r"the (\d)[.?]$", scene.question)[1])
            assert gold_thing(scene).kind.digit == digit
            assert sum((shown(layout) for layout in scene.layouts), Counter())[digit] == 1
            low, high = OTHERS[level]
            assert IMAGES[level][0] <= len(scene.layouts) <= IMAGES[level][1]
            assert all(low <= shown(layout).total() <= high + 1 for layout in scene.layouts)

    def test_diff(self, level):
        changes = set()
        for scene in scenes("diff", level):
            first, second = (np.asarray(paint(layout, 112)) for layout in scene.layouts)
            rows, columns = np.nonzero((first != second).any(-1))
            x1, y1, x2, y2 = (v * 112 // 1000 for v in scene.gold)
            assert x1 <= columns.min() and columns.max() < x2 and y1 <= rows.min() and rows.max() < y2
            former = [t for t in scene.layouts[1 - scene.target_image].things if t.box == scene.gold]
            changes.add("changed" if former else "removed" if scene.target_image == 0 else "added")
            assert all(t.kind != gold_thing(scene).kind for t in former)
        assert changes == {"added", "removed", "changed"}


def test_a_seed_names_one_scene_on_every_machine():
    drawn = [(s.question, s.chain, s.gold, s.layouts) for t in TASKS for k in range(3) for s in scenes(t, k, 12)]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest().startswith("fa3c0bdee8c4c0d3")


def test_no_scan_is_both_trained_on_and_held_out():
    """By their pixels: no held-out scan, nor a copy of one, is in a scene of the other splits."""
    scans = load_scans()[:, :64]

    def pixels(found):
        return {scans[t.kind.scan].tobytes() for layouts in found for layout in layouts for t in layout.things}

    def split(name):
        options = {"level": 0, "size": 56, "world": "digits"}
        return [draw_split_scene(name, "group_grounding", seed, **options).layouts for seed in range(800)]

    trained, held_out = pixels(split("train") + split("cold_start")), pixels(split("held_out"))
    assert len(trained) > 800 and len(held_out) > 150 and not trained & held_out
    every = [{scans[k].tobytes() for digit in range(10) for k in find_scans(digit, side)} for side in (False, True)]
    assert not every[0] & every[1] and trained <= every[0] and held_out <= every[1]
    assert sum(map(len, every)) == len({scan.tobytes() for scan in scans})


def test_a_world_on_disk_is_of_digits_and_no_other(tmp_path):
    folder = write_world(tmp_path / "w", world="digits", levels=[0], size=56, **SMALL)
    assert json.loads((folder / "world.json").read_text())["world"] == "digits"
    for split in ("train", "held_out"):
        for k, record in enumerate(json.loads((folder / f"{split}.json").read_text())):
            seed = 1_000_000 * (1 + (split == "held_out")) + k
            scene = draw_split_scene(split, DEMO_TASKS[k % len(DEMO_TASKS)], seed, level=0, size=56, world="digits")
            assert (record["question"], record["answer"]) == (scene.question, list(scene.gold))
    with pytest.raises(ValueError, match="'world': 'digits'.*not this world"):
        write_world(folder, levels=[0], size=56, **SMALL)


def test_the_tokenizers_texts_have_every_digit():
    assert {str(k) for k in range(10)} <= {w for text in all_texts(world="digits") for w in re.findall(r"\w+", text)}


def test_a_task_that_digits_cannot_have_is_refused_by_those_they_can(tmp_path):
    with pytest.raises(ValueError, match=r"task is 'reasoning'; the world draws diff, .*group_grounding\. Name one"):
        write_world(tmp_path / "w", world="digits", tasks=["reasoning"], **SMALL)


def test_without_the_package_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    for cached in (load_scans, find_scans):
        cached.cache_clear()
    with pytest.raises(ValueError, match=r"scikit-learn, which is not installed\. Install it \(pip install 'scikit-l"):
        write_world(tmp_path / "w", world="digits", **SMALL)
    assert not list(tmp_path.iterdir())
