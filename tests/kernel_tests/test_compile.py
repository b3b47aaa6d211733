"""Every Triton kernel compiles for every GPU it is meant for, as its launcher would start it, and spills nothing."""

import re

import pytest
import torch
import triton
import triton.language as tl

from boxgrpo.kernels.dispatch import Launch, interpreting
from boxgrpo.kernels.resources import CAPABILITIES, compile_launch, launches, resources, vision_launches, walks

pytestmark = pytest.mark.skipif(interpreting(), reason="Triton's interpreter cannot compile")


def spills(capability, every_variant):
    found, seen = [], set()
    for name, launch in launches(every_variant):
        r = resources(compile_launch(launch, capability))
        seen.add(launch.kernel.fn.__name__)
        if r.spilled:
            found.append(f"{name}: {r.spilled} bytes")
    kernels = {"logps", "gradient", "fused", "sample", "terms", "grpo", "reduce", "scale", "advantages"}
    kernels |= {"add_rms_norm", "rotate_into_cache", "merge_attention", "silu_mul", "key_gradients"}
    kernels |= {"rotate_qk", "quick_gelu"}
    assert seen == {f"{kernel}_kernel" for kernel in kernels}
    return found


def test_the_default_launches_compile_without_spills():
    assert spills(90, every_variant=False) == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_variant_compiles_without_spills(capability):
    assert spills(capability, every_variant=True) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_vision_kernel_moves_16_bytes_at_a_time(dtype):
    """Of queries and keys too, whose heads of 80 are no power of two and which are slices of a product."""
    for kind, launch in vision_launches(dtype, 16, 80):
        accesses = re.findall(r"(?:ld|st)\.global\S*", compile_launch(launch, 90).asm["ptx"])
        assert len(accesses) > 1 and all(".v4.b32" in access for access in accesses), (kind, accesses)


@triton.jit
def greedy_kernel(x, out, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    values = tl.load(x + offsets)
    total = tl.sum(values, 0)
    tl.store(out + offsets, values / total)


def test_a_spill_is_detected():
    """A program that keeps twice its registers in flight: the check above can fail."""
    x = torch.empty(1 << 17, device="meta")
    launch = Launch(greedy_kernel, (1,), (x, x), {"SIZE": x.shape[0]}, num_warps=32)
    assert resources(compile_launch(launch, 90)).spilled > 0


@pytest.mark.parametrize("dtypes, stored", [("bf16->bf16", "128"), ("fp32->bf16", "64")])
def test_the_fused_loss_keeps_its_issue_slots(dtypes, stored):
    """Below 180 and 215 cycles for 16 logits and warp: with them, bytes set the time. A head's fp32 logits have fewer.

    Logits are copied 16 bytes at a time, and a thread stores the gradients of those that it has loaded.
    """
    name, launch = next(x for x in launches(False) if x[0].startswith("fused_kernel full") and x[0].endswith(dtypes))
    first, second = walks(launch, compile_launch(launch, 90))
    for walk, limit in ((first, 180), (second, 215)):
        assert max(walk.slots, 2 * walk.half_rate, 8 * walk.exponentials) <= limit, name
        assert 16 <= walk.exponentials <= 17  # one for each logit: the loop is what it is taken for
    assert first.accesses == {"LDGSTS.E.BYPASS.128"}
    assert second.accesses == {"LDGSTS.E.BYPASS.128", f"STG.E.EF.{stored}"}
