"""What a step of the published models launches, moves and waits for on a GPU, counted on fake CUDA tensors.

Vision, prefill, a token of decoding, reference and policy forward; autograd's engine, and so the backward pass, does
not run on fake devices.
"""

import shutil
from importlib.util import find_spec

import pytest

from boxgrpo.bench.processes import run_isolated
from boxgrpo.bench.step_bench import dry_run
from boxgrpo.kernels.dispatch import interpreting
from counted import count_everything

pytestmark = [
    pytest.mark.skipif(interpreting(), reason="Triton's interpreter takes the kernels' place"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here"),
    pytest.mark.skipif(find_spec("liger_kernel") is None, reason="the caps are those of its kernels"),
]

# Launches and GB at most; 16 prompts of 4 images, 8 completions of 256 tokens. "decode" is one token. Lower them.
CAPS = {
    "2B": {
        "vision": (440, 465),
        "prefill": (585, 182),
        "decode": (355, 6.2),
        "pack": (90, 0.45),
        "reference": (3300, 460),
        "policy_forward": (3365, 515),
    },
    "7B": {
        "vision": (440, 465),
        "prefill": (585, 405),
        "decode": (355, 20),
        "pack": (90, 1.0),
        "reference": (3300, 1000),
        "policy_forward": (3345, 1045),
    },
}
PHASES = [(model, phase) for model, caps in CAPS.items() for phase in caps]


@pytest.fixture(scope="module")
def counted():
    return run_isolated(count_everything)


@pytest.mark.parametrize(("model", "phase"), PHASES)
def test_a_phase_keeps_its_caps(counted, model, phase):
    found, (launches, gigabytes) = counted[model][phase], CAPS[model][phase]
    assert found.launches.total() <= launches, found.launches.most_common(10)
    assert found.moved.total() / 1e9 <= gigabytes, found.moved.most_common(10)


@pytest.mark.parametrize(("model", "phase"), PHASES)
def test_the_host_does_not_wait(counted, model, phase):
    assert not counted[model][phase].waits


@pytest.mark.parametrize(("model", "phase"), PHASES)
def test_dtypes_do_not_mix(counted, model, phase):
    """No operator takes floats of two dtypes, and no weight is cast as a whole; two devices would raise."""
    assert not counted[model][phase].mixes


def test_every_phase_runs(counted):
    assert all(counted[model].keys() == caps.keys() for model, caps in CAPS.items())
    assert counted["7B"]["prefill"].launches["_flash_attention_forward"] == 28  # not SDPA's padded buckets
    assert counted["7B"]["policy_forward"].launches["fused_kernel"]


def test_a_step_decodes_all_its_tokens(counted, monkeypatch):
    monkeypatch.setattr(dry_run, "run_isolated", lambda _, case: counted[case.model])
    step, phases = dry_run.counts_of(dry_run.published_case("7B")), counted["7B"]
    assert step["decode"]["launches"] == 256 * phases["decode"].launches.total()
    assert step["prefill"] == {
        "launches": phases["prefill"].launches.total(),
        "moved_bytes": phases["prefill"].moved.total(),
        "waits": phases["prefill"].waits.total(),
    }


@pytest.mark.parametrize(("model", "launches", "gigabytes"), [("2B", 47, 33.0), ("7B", 40, 37.4)])
def test_the_head_moves_what_its_document_says(counted, model, launches, gigabytes):
    """ARCHITECTURE.md, Floors."""
    found = counted["heads"][model]
    assert (found.launches.total(), round(found.moved.total() / 1e9, 1)) == (launches, gigabytes)


@pytest.mark.parametrize("model", CAPS)
def test_a_layer_decodes_a_token_in_few_launches(counted, model):
    """Both models have 28 layers. Attention never writes scores: its parts and what is element-wise move little."""
    launches, moved = (getattr(counted[model]["decode"], name) for name in ("launches", "moved"))
    assert launches["_flash_attention_forward"] == 2 * 28 and launches["merge_attention_kernel"] == 28
    assert sum(times // 28 for times in launches.values()) <= 11, launches
    # The kernel that rotates writes one slot of the caches that it is given.
    counted_apart = {"mm", "addmm", "_flash_attention_forward", "rotate_into_cache_kernel"}
    assert sum(size for name, size in moved.items() if name not in counted_apart) < 0.9e9


BYTES = {
    "views": (0, 0),
    "sum": (1, 64 + 64),
    "sum in place": (1, 64 + 64),
    "expanded": (1, 16 + 64),
    "fill": (1, 64),
    "rows read": (1, 3 * 16 + 3 * 8 + 3 * 16),
    "rows written": (1, 16 + 8 + 16),
    "product": (1, 64 + 64 + 4 * 4 * 4),
    "kept on the host": (0, 0),
    "two dtypes": (1, 64 + 128 + 128),
}


@pytest.mark.parametrize("snippet", BYTES)
def test_launches_and_bytes_are_counted(counted, snippet):
    found = counted["snippets"][snippet]
    assert (found.launches.total(), found.moved.total()) == BYTES[snippet]


def test_waits_and_mixes_are_found(counted):
    found = counted["snippets"]
    waiting = {"to the host", "from the host", "from the host, not blocking, large", "a list", "a value", "a mask"}
    waiting |= {"into host memory", "from pinned memory, blocking"}
    assert {name for name, counts in found.items() if counts.waits} == waiting
    assert {name for name, counts in found.items() if counts.mixes} == {"two dtypes", "two devices", "a weight's cast"}
