"""Every Triton kernel compiles for every GPU it is meant for, as its launcher would start it, and spills nothing."""

import re

import pytest
import torch
import triton
import triton.language as tl

from boxgrpo.kernels.dispatch import Launch, interpreting
from boxgrpo.kernels.resources import CAPABILITIES, compile_launch, launches, resources, vision_launches

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
