"""liger-kernel's ops in the decoder's place, beside torch's."""

import pytest
import torch

from boxgrpo.kernels.dispatch import interpreting
from boxgrpo.model import ops
from boxgrpo.model.rope import mrope

pytest.importorskip("liger_kernel")


def rotary_inputs(device="cpu"):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(7, heads, 16, generator=g).to(device) for heads in (4, 2))
    positions = torch.randint(50, (3, 7), generator=g).to(device)
    return q, k, *mrope(positions, head_dim=16, theta=100.0, sections=[2, 3, 3])


def with_gradients(f, *inputs):
    """f's results, and the gradients of their weighted sum."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = f(*(leaf * 1 for leaf in leaves))  # liger writes over what it is given
    found = found if isinstance(found, tuple) else (found,)
    total = sum((x * torch.linspace(-1, 2, x.numel(), device=x.device).view_as(x)).sum() for x in found)
    return *(x.detach().clone() for x in found), *torch.autograd.grad(total, leaves)


@pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=1 runs it on a CPU")
def test_ligers_rotation_is_ours_in_the_interpreter():
    check_rotation("cpu")


@pytest.mark.gpu
def test_ligers_rotation_is_ours():
    check_rotation("cuda")


def check_rotation(device):
    q, k, cos, sin = rotary_inputs(device)
    ours = with_gradients(lambda q, k: (ops.rotate(q, cos, sin), ops.rotate(k, cos, sin)), q, k)
    theirs = with_gradients(lambda q, k: ops.rotate_liger(q, k, cos, sin), q, k)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_ligers_norm_and_swiglu_are_torchs(monkeypatch):
    x, weight, gate, up = (torch.randn(*shape, device="cuda") for shape in ((9, 64), (64,), (9, 64), (9, 64)))
    runs = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(ops, "_fused", lambda x: False)
        norm = with_gradients(lambda x, w: ops.rms_norm(x, w, 1e-6), x, weight)
        runs.append((*norm, *with_gradients(ops.swiglu, gate, up)))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
