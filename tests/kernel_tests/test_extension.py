"""The compiled operators: the twins in their absence, opcheck, refusals, strides, threads and the GIL."""

import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from boxgrpo.kernels import (
    VocabularyBytes,
    box_iou,
    dispatch,
    grounding_rewards,
    grounding_rewards_from_ids,
    pack_texts,
)

ANSWER = b"<think>a</think><answer>(100, 200), (300, 400)</answer>"
GOLD = torch.tensor([[100.0, 200.0, 300.0, 400.0]])
compiled = pytest.mark.skipif(dispatch.IMPORT_FAILURE is not None, reason=f"no csrc/: {dispatch.IMPORT_FAILURE}")

# Without the compiled module: no warning at import, one at first use, and the twin's results.
WITHOUT = """
import sys, warnings
sys.modules["boxgrpo.kernels._C"] = None  # an import of it fails
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import torch
    import boxgrpo.kernels as kernels
text, offsets = kernels.pack_texts([b"<think>a</think><answer>(1, 2), (3, 4)</answer>"])
gold = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
kernels.grounding_rewards(text, offsets, gold, backend="torch")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    rewards = [kernels.grounding_rewards(text, offsets, gold) for _ in range(3)]
    kernels.box_iou(gold, gold)
    compiled = torch.compile(kernels.grounding_rewards, fullgraph=True, backend="aot_eager")
    assert compiled(text, offsets, gold).accuracy == 1
assert all(r.format == 1 and r.accuracy == 1 for r in rewards)
ours = [w for w in caught if "boxgrpo" in str(w.message)]
assert len(ours) == 1 and ours[0].category is RuntimeWarning, caught
assert "without its compiled box parser" in str(ours[0].message)
assert "`pip install --no-build-isolation` again" in str(ours[0].message)
assert ours[0].filename == "<string>", ours[0].filename  # the caller's line, not torch's or ours
try:
    kernels.grounding_rewards(text, offsets, gold, backend="extension")
except ValueError as error:
    assert "csrc/ not compiled for CPU tensors" in str(error) and "backend='auto'" in str(error)
    assert "--no-build-isolation" in str(error)
else:
    raise AssertionError("backend='extension' must be refused")
"""


def test_without_it_the_twin_runs_and_warns_once():
    done = subprocess.run([sys.executable, "-P", "-c", WITHOUT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
def test_with_a_compiler_the_operators_are_compiled():
    """An installation succeeds where a source does not compile, and tests marked `compiled` are skipped then."""
    assert dispatch.IMPORT_FAILURE is None, f"csrc/ is not compiled: {dispatch.IMPORT_FAILURE}. Run `make install`."


@compiled
def test_with_it_nothing_warns(recwarn):
    grounding_rewards(*pack_texts([ANSWER]), GOLD)
    grounding_rewards(*pack_texts([ANSWER]), GOLD, backend="extension")
    box_iou(GOLD, GOLD)
    assert not recwarn.list


@compiled
def test_the_operators_pass_opcheck():
    ops = torch.ops.boxgrpo
    text, offsets = pack_texts([ANSWER, b""])
    gold, formats = GOLD.repeat(2, 1), torch.tensor([0, 1], dtype=torch.uint8)
    table = VocabularyBytes.build([ANSWER, b"</s>"], [1])
    ids, lengths = torch.tensor([[0, 1], [1, 0]]), torch.tensor([2, 2], dtype=torch.int32)
    for suffix in ("", "_torch"):
        torch.library.opcheck(getattr(ops, f"grounding_rewards{suffix}"), (text, offsets, gold, formats))
        arguments = (ids, lengths, *table, gold, formats)
        torch.library.opcheck(getattr(ops, f"grounding_rewards_from_ids{suffix}"), arguments)
        for pairwise in (False, True):
            torch.library.opcheck(getattr(ops, f"box_iou{suffix}"), (gold, gold, pairwise, True))


@compiled
def test_the_operators_refuse_what_they_would_read_beyond():
    """Called directly, without the public function's checks."""
    ops = torch.ops.boxgrpo
    text, offsets = pack_texts([ANSWER])
    formats, ids = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, 3, dtype=torch.int64)
    entries = torch.zeros(5, dtype=torch.int64)
    for message, op, arguments in (
        ("offsets is Long", ops.grounding_rewards, (text, offsets[:1], GOLD, formats)),
        ("text is Char", ops.grounding_rewards, (text.char(), offsets, GOLD, formats)),
        ("gold is Float", ops.grounding_rewards, (text, offsets, GOLD[0], formats)),
        ("formats is Byte", ops.grounding_rewards, (text, offsets, GOLD, formats[:0])),
        ("ids is Long", ops.grounding_rewards_from_ids, (ids[0], ids[0, :1], text, entries, GOLD, formats)),
        ("lengths is Long", ops.grounding_rewards_from_ids, (ids, ids[0], text, entries, GOLD, formats)),
        ("entries is Int", ops.grounding_rewards_from_ids, (ids, ids[0, :1], text, entries.int(), GOLD, formats)),
        ("b is Float", ops.box_iou, (GOLD, GOLD.repeat(2, 1), False, False)),
        ("a is Double", ops.box_iou, (GOLD.double(), GOLD, False, False)),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments)


@compiled
def test_strided_inputs():
    """Columns of a wider tensor, every other number, and a transposed gold."""
    table = VocabularyBytes.build([b"x", ANSWER], [])
    wide = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0]])
    ids, lengths = wide[:, ::2], torch.tensor([9, 2, 9, 2])[1::2]
    gold = GOLD.repeat(2, 1).T.contiguous().T
    got = grounding_rewards_from_ids(ids, lengths, table, gold, backend="extension")
    assert got.format.tolist() == [0, 1] and got.accuracy.tolist() == [0, 1]


@compiled
def test_the_gil_is_released():
    """This thread counts while a long call of another one runs."""
    text, offsets = pack_texts([b"<(" * 20_000_000])  # nothing to skip: tens of ms on one thread
    call = threading.Thread(target=grounding_rewards, args=(text, offsets, GOLD))
    call.start()
    time.sleep(0.005)  # into the call
    ticks = 0
    while call.is_alive():
        time.sleep(0.0005)
        ticks += 1
    assert ticks > 10


@compiled
def test_threads_give_the_results_of_one():
    arguments, threads = (*pack_texts([ANSWER, b""] * 500), GOLD.repeat(1000, 1)), torch.get_num_threads()
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(grounding_rewards(*arguments))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    arguments[1][900] = -5
    with pytest.raises(IndexError, match="offsets go from"):  # an error of one thread is raised in the caller
        grounding_rewards(*arguments)
