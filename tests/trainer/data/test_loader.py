"""The stream of prepared examples is one and the same for any number of workers, ranks and restarts."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from itertools import chain, islice
from multiprocessing import forkserver
from operator import attrgetter

import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from boxgrpo.bench.processes import process_tree
from boxgrpo.model.batch import Pixels
from boxgrpo.trainer.data.example import Example
from boxgrpo.trainer.data.loader import Loader, _ctrl_c_delayed, take_ahead
from boxgrpo.trainer.data.processor import Processor
from boxgrpo.trainer.data.vocabulary import demo_tokenizer


def examples(n, **changes):
    fields = {"task": "diff", "images": (), "question": "Where?", "gold": None}
    return [Example(**fields | {"id": str(i), "source": f"data.json#{i}"} | changes) for i in range(n)]


def loader(n=10, prepare=attrgetter("id"), **options):
    return Loader(examples(n), prepare, **{"batch_size": 4, "seed": 0, "workers": 0} | options)


def refuse(*bad):
    def prepare(example):
        if example.id in bad:
            raise ValueError(f"{example.id} is bad")
        return example.id

    return prepare


def take(stream, steps):
    return [[(g.serial, g.record.id, g.prompt) for g in step] for step in islice(stream, steps)]


def flat(steps):
    return list(chain.from_iterable(steps))


def test_an_epoch_is_every_record_once_in_an_order_of_its_own():
    stream = flat(take(loader(), 5))  # 20 slots, two epochs of 10; the third step has records of both
    assert [serial for serial, _, _ in stream] == list(range(20))
    assert all(example == item for _, example, item in stream)
    first, second = [i for _, i, _ in stream[:10]], [i for _, i, _ in stream[10:]]
    assert sorted(first) == sorted(second) == sorted(map(str, range(10)))
    assert first != second


def test_the_seed_fixes_the_order():
    assert take(loader(), 5) == take(loader(), 5)
    assert take(loader(), 5) != take(loader(seed=1), 5)
    unshuffled = flat(take(loader(shuffle=False), 5))
    assert [i for _, i, _ in unshuffled] == [str(i % 10) for i in range(20)]


@pytest.mark.parametrize("options", [{}, {"batch_size": 2, "rank": 1, "world_size": 2}], ids=["alone", "one of two"])
def test_a_restart_goes_on_where_the_run_stopped(options):
    """`position` counts the slots of all ranks."""
    whole, first = take(loader(**options), 7), loader(**options)
    assert take(first, 3) == whole[:3] and first.position == 12
    assert take(loader(start=first.position, **options), 4) == whole[3:]
    assert take(first, 4) == whole[3:]  # iterating again goes on, too


def test_any_slot_can_be_the_first():
    """Also one that is not rank 0's; the step that is looked at beforehand is the one that follows."""
    whole = flat(take(loader(), 5))
    ranks = [loader(batch_size=2, rank=r, world_size=2, start=5) for r in (0, 1)]
    peeked = [[g.serial for g in rank.peek_step()] for rank in ranks]
    assert peeked == [[6, 8], [5, 7]]
    parts = [take(rank, 2) for rank in ranks]
    assert [[serial for serial, *_ in steps[0]] for steps in parts] == peeked
    assert sorted(flat(flat(parts))) == whole[5:13]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_holds_the_same_records_for_any_number_of_ranks(world_size):
    bad = refuse("3", "7")
    alone = take(loader(prepare=bad), 6)
    ranks = [
        take(loader(prepare=bad, batch_size=4 // world_size, rank=r, world_size=world_size), 6)
        for r in range(world_size)
    ]
    assert [sorted(flat(parts)) for parts in zip(*ranks)] == alone


def test_a_bad_record_is_replaced_by_the_next_and_named_once(caplog):
    caplog.set_level(logging.WARNING)
    whole = flat(take(loader(), 5))
    with_bad = loader(prepare=refuse("3", "7"))
    stream = flat(take(with_bad, 5))
    assert len(stream) == 20 and [serial for serial, _, _ in stream] == list(range(20))
    for slot, (old, new) in enumerate(zip(whole, stream)):
        if old[1] not in "37":
            assert new == old  # no other slot moves
        else:
            after = [whole[slot // 10 * 10 + (slot + k) % 10] for k in range(1, 10)]
            assert new[1] == next(i for _, i, _ in after if i not in "37")
    assert with_bad.faults == {"data.json#3": "3 is bad", "data.json#7": "7 is bad"}
    assert caplog.messages.count("skipped data.json#3: 3 is bad") == 1 and len(caplog.messages) == 2


def test_a_set_without_one_usable_record_ends_with_the_reason():
    with pytest.raises(ValueError, match=r"none of the 3 records can be prepared\. 1 of them: \d is bad"):
        next(iter(loader(3, prepare=refuse("0", "1", "2"))))


def test_other_errors_are_bugs_and_stop_the_run():
    with pytest.raises(AttributeError):
        next(iter(loader(prepare=attrgetter("nothing"))))


def test_a_thread_takes_one_item_ahead_and_its_error_comes_in_turn():
    taken, threads, held = [], set(), []

    def items():
        workers = threading.Event()  # stands for something that must be freed
        held.append(weakref.ref(workers))
        for i in range(3):
            taken.append(i)
            threads.add(threading.current_thread())
            yield i
        raise ValueError("no fourth")

    ahead = take_ahead(items())
    for i in range(3):
        assert next(ahead) == i
        while len(taken) < min(i + 2, 3):
            time.sleep(0.001)
        time.sleep(0.01)
        assert taken == list(range(min(i + 2, 3))) and threading.main_thread() not in threads
    with pytest.raises(ValueError, match="no fourth") as caught:
        next(ahead)
    assert "in items" in caught.value.__notes__[0] and held[0]() is None, "the error names its place and holds nothing"


def test_closing_waits_for_the_thread():
    """Otherwise the loader's workers could not be ended: it would still read from them."""
    begun, finished = threading.Event(), []

    def items():
        yield 0
        begun.set()
        time.sleep(0.05)
        finished.append(True)
        yield 1

    ahead = take_ahead(items())
    next(ahead)
    begun.wait()
    ahead.close()
    assert finished


@pytest.mark.parametrize("pin_for", [None, torch.device("cuda:3")])
def test_pixels_are_pinned_for_the_gpu_that_is_named(pictured, monkeypatch, pin_for):
    """By a fake; prompts without images and skipped records have none."""
    monkeypatch.setattr(Pixels, "pin", lambda self, device: device)
    records, prepare = pictured
    records = [*records[:3], *examples(1, id="text")]
    step = next(iter(Loader(records, prepare, batch_size=4, seed=0, workers=0, shuffle=False, pin_for=pin_for)))
    assert [g.record.id for g in step] == ["0", "1", "text", "text"]
    assert [g.prompt.pixels for g in step][2:] == [None, None]
    assert all(g.prompt.pixels == pin_for if pin_for else len(g.prompt.pixels.patches) for g in step[:2])


@pytest.fixture
def pictured(tmp_path):
    """Six real examples, of which one has lost its image."""
    records = []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        if i != 2:
            Image.effect_noise((56 + 28 * i, 56), 60).save(path)
        records += examples(1, id=str(i), images=(str(path),), source=f"data.json#{i}")
    processor = Processor(demo_tokenizer(["Where"]), Qwen2VLImageProcessorPil(), min_pixels=784, max_pixels=9408)
    return records, processor.prompt


def test_case_18_workers_prepare_the_same_beside_folders_named_as_packages(pictured, tmp_path, monkeypatch):
    """Also in a folder whose own `kernels` or `tokenizers` would stand in the dependency's place."""
    records, prepare = pictured
    for name in ("kernels", "datasets", "tokenizers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write({name!r})")
    monkeypatch.chdir(tmp_path)
    forkserver._forkserver._stop()  # an earlier test's; the next one starts here
    options = {"batch_size": 4, "seed": 3}
    inline, parallel = Loader(records, prepare, workers=0, **options), Loader(records, prepare, workers=2, **options)
    for here, there in zip(islice(inline, 3), islice(parallel, 3)):
        assert [(g.serial, g.record) for g in here] == [(g.serial, g.record) for g in there]
        for a, b in zip((g.prompt for g in here), (g.prompt for g in there)):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.position_ids, b.position_ids)
            assert torch.equal(a.pixel_values, b.pixel_values) and torch.equal(a.image_grid_thw, b.image_grid_thw)
            assert not b.pixels.patches.is_shared()  # came through a pipe, not through /dev/shm
    assert inline.faults == parallel.faults and list(inline.faults) == ["data.json#2"]
    assert not (tmp_path / "imported").exists() and "PYTHONSAFEPATH" not in os.environ


@pytest.fixture
def interruptible():
    """A shell starts what runs in its background with SIGINT ignored, which all that this starts inherits."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_workers_end_with_the_run(tmp_path, interruptible, how):
    script = tmp_path / "run.py"
    script.write_text(
        "from operator import attrgetter\n"
        "from boxgrpo.trainer.data.loader import Loader\n"
        "from boxgrpo.trainer.data.example import Example\n"
        "if __name__ == '__main__':\n"
        "    records = [Example(str(i), 'diff', (), 'Where?', None) for i in range(9)]\n"
        "    for step in Loader(records, attrgetter('id'), batch_size=2, seed=0, workers=2):\n"
        "        print(step[0].prompt, flush=True)\n"
    )
    command = [sys.executable, script]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert run.stdout.readline().strip()
    if how == "ctrl-c":
        os.killpg(run.pid, signal.SIGINT)  # a terminal sends it to the workers, too
    else:
        run.kill()
    _, errors = run.communicate(timeout=60)  # ends when the last worker has let go of the pipes
    assert run.returncode == (-signal.SIGKILL if how == "kill" else -signal.SIGINT)
    assert how == "kill" or b"KeyboardInterrupt" in errors


def test_ctrl_c_delayed_until_a_queue_has_been_left(interruptible):
    handler, finished = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), _ctrl_c_delayed():
        signal.raise_signal(signal.SIGINT)
        finished.append(True)
    assert finished and signal.getsignal(signal.SIGINT) is handler


def test_workers_outlive_a_sigterm(pictured):
    """A launcher sends it to every process of a run, which still wants to finish its step and save."""
    prepared, prepare = pictured
    steps = iter(Loader(prepared, prepare, batch_size=4, seed=0, workers=2))
    next(steps)
    below = [child.pid for child in process_tree(os.getpid())[1:]]
    assert len(below) >= 3  # the workers and their server
    for pid in below:
        os.kill(pid, signal.SIGTERM)
    for _ in range(8):
        assert len(next(steps)) == 4
