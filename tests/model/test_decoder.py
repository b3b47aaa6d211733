"""liger-kernel's operations in the decoder against torch's."""

import copy

import pytest
import torch

from boxgrpo.kernels.dispatch import interpreting
from boxgrpo.model import decoder

pytest.importorskip("liger_kernel")


def with_gradients(f, *inputs):
    """f's results, and the gradients of their weighted sum."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = f(*(leaf * 1 for leaf in leaves))  # liger overwrites its inputs
    total = sum((x * torch.linspace(-1, 2, x.numel(), device=x.device).view_as(x)).sum() for x in found)
    return *(x.detach().clone() for x in found), *torch.autograd.grad(total, leaves)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET=1 runs it on a CPU")),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def test_ligers_rotation_is_ours(device):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(7, heads, 16, generator=g).to(device) for heads in (4, 2))
    positions = torch.randint(50, (3, 7), generator=g).to(device)
    cos, sin = decoder.mrope(positions, head_dim=16, theta=100.0, sections=[2, 3, 3])
    ours = with_gradients(lambda q, k: (decoder.rotate(q, cos, sin), decoder.rotate(k, cos, sin)), q, k)
    theirs = with_gradients(lambda q, k: decoder.rotate_liger(q, k, cos, sin), q, k)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_layer_with_liger_is_a_layer_without(twins, monkeypatch):
    """Output and gradients of a whole layer, with any attention: norms, rotation and SwiGLU."""
    layer = copy.deepcopy(twins("tiny")[0].model.layers[0]).cuda()
    x = torch.randn(9, 64, device="cuda")
    positions = torch.arange(9, device="cuda").expand(3, -1)
    width = layer.self_attn.head_dim
    cos, sin = decoder.mrope(positions, head_dim=width, theta=100.0, sections=[2, 3, 3])
    runs = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(decoder, "liger_for", lambda x: None)
        seen = []

        def attend(number, q, k, v):
            seen.extend((q, k))  # noqa: B023 - called within this turn of the loop
            return (q.unflatten(1, (k.shape[1], -1)) * k[:, :, None] + v[:, :, None]).flatten(1, 2)

        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        out = layer(leaf, cos, sin, attend)
        (out * torch.linspace(-1, 2, out.numel(), device="cuda").view_as(out)).sum().backward()
        runs.append([out, *seen, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
