"""What a step of the published models launches, moves and waits for on a GPU, counted on fake CUDA tensors.

Vision, prefill, a token of decoding, reference and policy forward; autograd's engine, and so the backward pass, does
not run on fake devices. In CI, where all that it takes is installed, it fails instead of being skipped.
"""

import os
import re
import shutil
from importlib.util import find_spec

import pytest

from boxgrpo.bench.processes import run_isolated
from boxgrpo.bench.step_bench import dry_run
from boxgrpo.kernels.dispatch import interpreting
from counted import count_everything

DOCUMENT = dry_run.Path(dry_run.__file__).parents[2] / "ARCHITECTURE.md"
LACKS = [name for name in ("liger_kernel", "peft") if find_spec(name) is None]  # with whose kernels the caps are met
LACKS += [] if shutil.which("g++") else ["g++"]
pytestmark = [
    pytest.mark.skipif(interpreting(), reason="Triton's interpreter takes the kernels' place"),
    pytest.mark.skipif(bool(LACKS) and "CI" not in os.environ, reason=f"no {', '.join(LACKS)} here"),
]

# Launches and GB at most; 16 prompts of 4 images, 8 completions of 256 tokens. "decode" is one token. Lower them.
CAPS = {
    "2B": {
        "vision": (440, 465),
        "prefill": (558, 182),
        "decode": (355, 5.8),
        "keep": (135, 2.0),
        "pack": (90, 0.45),
        "reference": (3140, 460),
        "policy_forward": (3180, 495),
        "policy_with_adapters": (10250, 2050),
        "pack_pixels": (90, 0.2),
        "policy_with_tower": (5640, 970),
    },
    "7B": {
        "vision": (440, 465),
        "prefill": (558, 405),
        "decode": (355, 19.2),
        "keep": (135, 3.9),
        "pack": (90, 1.0),
        "reference": (3140, 1000),
        "policy_forward": (3180, 1045),
        "policy_with_adapters": (10250, 4420),
        "pack_pixels": (90, 0.2),
        "policy_with_tower": (5640, 1520),
    },
}
# Allowed: PEFT adds fp32 results to the layers' bf16.
MIXES = {"policy_with_adapters": {f"add in model/decoder.py {name}.forward" for name in ("Attention", "Mlp")}}
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
    assert counted[model][phase].mixes.keys() <= MIXES.get(phase, set())


def test_every_phase_runs(counted):
    assert all(counted[model].keys() == caps.keys() for model, caps in CAPS.items())
    assert counted["7B"]["prefill"].launches["_flash_attention_forward"] == 28  # not SDPA's padded buckets
    assert counted["7B"]["policy_forward"].launches["fused_kernel"]


def test_a_step_decodes_all_its_tokens(counted, monkeypatch):
    monkeypatch.setattr(dry_run, "run_isolated", lambda _, case, variants: counted[case.model])
    step, phases = dry_run.counts_of(dry_run.published_case("7B")), counted["7B"]
    assert step["decode"]["launches"] == 256 * phases["decode"].launches.total()
    assert step["prefill"] == {
        "launches": phases["prefill"].launches.total(),
        "moved_bytes": phases["prefill"].moved.total(),
        "waits": phases["prefill"].waits.total(),
    }


@pytest.mark.parametrize(("model", "launches"), [("2B", 46), ("7B", 39)])
def test_the_head_moves_what_its_document_says(counted, model, launches):
    """ARCHITECTURE.md, Floors."""
    (row,) = re.findall(r"bytes, of which dweight's sums \| (\S+) GB, \S+ \| (\S+) GB", DOCUMENT.read_text())
    found, gigabytes = counted["heads"][model], dict(zip(CAPS, map(float, row), strict=True))
    assert (found.launches.total(), round(found.moved.total() / 1e9, 1)) == (launches, gigabytes[model])


@pytest.mark.parametrize("model", CAPS)
def test_a_layer_decodes_a_token_in_few_launches(counted, model):
    """Both models have 28 layers."""
    launches = counted[model]["decode"].launches
    assert launches["_flash_attention_forward"] == 2 * 28 and launches["merge_attention_kernel"] == 28
    assert sum(times // 28 for times in launches.values()) <= 11, launches


@pytest.mark.parametrize(("model", "kv_heads", "gigabytes"), [("2B", 2, 0.85), ("7B", 4, 1.35)])
def test_a_token_moves_no_scores(counted, model, kv_heads, gigabytes):
    """Products apart, a token reads the keys and values of 16 prompts of 2124 tokens and of half of the own slots once.
    The rest is far below the 2 GB that scores may take: one pass over them in bf16 would be 0.2 (2B) and 0.5 GB."""
    moved = counted[model]["decode"].moved
    layers, sides, size, d, slots = 28, 2, 2, 128, 128 * 256
    keys = layers * sides * size * d * kv_heads * (16 * 2124 + slots // 2)
    assert keys < moved["_flash_attention_forward"] < 1.15 * keys
    assert moved.total() - moved["mm"] - moved["addmm"] - keys < 1e9 * gigabytes


def test_the_cache_drops_rows_layer_by_layer(counted):
    """It holds one layer of 28 twice, the kept half of 0.14 GB and the half's prompts; on a GPU the freed ones are
    reused only by the stream that they were allocated for."""
    assert 0 < counted["7B"]["keep"].peak < 0.15e9


FLASH = 12 + 8 + 48 + 12 + 24  # offsets, lengths, output, log-sum-exp, the state of dropout
BYTES = {
    "views": (0, 0),
    "sum": (1, 64 + 64),
    "sums": (4, 64 + 64 + 3 * (64 + 64 + 64)),
    "sum in place": (1, 64 + 64),
    "expanded": (1, 16 + 64),
    "fill": (1, 64),
    "rows read": (1, 3 * 16 + 3 * 8 + 3 * 16),
    "rows written": (1, 16 + 8 + 16),
    "product": (1, 64 + 64 + 4 * 4 * 4),
    "kept on the host": (0, 0),
    "all keys": (1, 3 * 48 + FLASH),
    "used keys": (1, 48 + 2 * 32 + FLASH),
    "two dtypes": (1, 64 + 128 + 128),
}


@pytest.mark.parametrize("snippet", BYTES)
def test_launches_and_bytes_are_counted(counted, snippet):
    found = counted["snippets"][snippet]
    assert (found.launches.total(), found.moved.total()) == BYTES[snippet]


def test_memory_is_counted_until_it_is_freed(counted):
    peaks = {name: counted["snippets"][name].peak for name in ("views", "sum", "sum in place", "sums")}
    assert peaks == {"views": 64, "sum": 64, "sum in place": 0, "sums": 128}


def test_waits_and_mixes_are_found(counted):
    found = counted["snippets"]
    waiting = {"to the host", "from the host", "from the host, not blocking, large", "a list", "a value", "a mask"}
    waiting |= {"into host memory", "from pinned memory, blocking"}
    assert {name for name, counts in found.items() if counts.waits} == waiting
    assert {name for name, counts in found.items() if counts.mixes} == {"two dtypes", "two devices", "a weight's cast"}
