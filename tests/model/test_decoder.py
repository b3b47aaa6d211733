"""liger-kernel's operations in the decoder against torch's."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from boxgrpo.model import decoder
from kernel_cases import DEVICE, on_triton, seeded

pytest.importorskip("liger_kernel")


def with_gradients(f, *inputs):
    """f's results, and the gradients of their weighted sum."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = f(*(leaf * 1 for leaf in leaves))  # liger overwrites its inputs
    total = sum((x * torch.linspace(-1, 2, x.numel(), device=x.device).view_as(x)).sum() for x in found)
    return *(x.detach().clone() for x in found), *torch.autograd.grad(total, leaves)


@on_triton
def test_ligers_rotation_is_ours():
    g = seeded()
    q, k = (torch.randn(7, heads, 16, generator=g).to(DEVICE) for heads in (4, 2))
    cos, sin = decoder.cos_and_sin(50 * torch.rand(7, 8, generator=g).to(DEVICE))
    ours = with_gradients(lambda q, k: (decoder.rotate(q, cos, sin), decoder.rotate(k, cos, sin)), q, k)
    theirs = with_gradients(lambda q, k: decoder.rotate_liger(q, k, cos, sin.roll(8, -1)), q, k)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def rotation_alone(x):
    """`liger_for` with torch's norm and SwiGLU: of Liger's kernels the interpreter runs the rotation's."""
    norm = SimpleNamespace(apply=lambda x, weight, eps, *_: F.rms_norm(x, weight.shape, weight, eps))
    return norm, None, SimpleNamespace(apply=lambda gate, up: F.silu(gate) * up)


@on_triton
def test_the_model_with_liger_equals_the_model_without(twins, make_prompt, pack_prompt, monkeypatch):
    """Norms, rotation and SwiGLU together: hidden states and all gradients."""
    model, pack = copy.deepcopy(twins("tiny")[0]).to(DEVICE), pack_prompt(make_prompt([(1, 4, 6)])).to(DEVICE)
    runs = []
    for pick in (decoder.liger_for if DEVICE == "cuda" else rotation_alone, lambda x: None):
        monkeypatch.setattr(decoder, "liger_for", pick)
        model.zero_grad()
        hidden = model(pack)
        (hidden * torch.linspace(-1, 2, hidden.numel(), device=DEVICE).view_as(hidden)).sum().backward()
        runs.append([hidden.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*runs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6
