"""Autograd of the losses' ops, which compute the gradients of their inputs in the forward."""

import torch
from torch import Tensor


def register_saved_gradients(op: torch.library.CustomOpDef, count: int, triton_at: int | None = None) -> None:
    """An autograd formula for `op`: (loss, `count` gradients of the first inputs, and more without a gradient).

    `triton_at`: the index of the input that is true if Triton ran; then the gradients are scaled in place.
    """

    def setup_context(ctx, inputs, output) -> None:
        ctx.n_inputs, ctx.in_place = len(inputs), triton_at is not None and inputs[triton_at]
        ctx.save_for_backward(*output[1 : 1 + count])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # otherwise the backward would be given zeros of dweight's size

    op.register_autograd(scale_saved_gradients, setup_context=setup_context)


def scale_saved_gradients(ctx, dloss: Tensor | None, *_) -> tuple:
    """The saved gradients times dloss, and None for the other inputs.

    A copy of them would be as large as the logits. On a CPU they are returned as they are if dloss is 1; in place a
    kernel reads dloss and writes only if it is not 1. Then a second backward through a retained graph raises.
    """
    if dloss is None:  # the graph does not reach the loss
        return (None,) * ctx.n_inputs
    eager = type(dloss) is Tensor  # and not traced
    if ctx.in_place and eager:
        from .scale_triton import scale_triton as scaled
    elif eager and dloss.device.type == "cpu":
        scaled = (lambda gradient, _: gradient) if dloss == 1 else torch.mul
    else:
        scaled = scaled_copy
    saved = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
    gradients = [scaled(gradient, dloss) if wanted else None for gradient, wanted in saved]
    return *gradients, *(None,) * (ctx.n_inputs - len(gradients))


def scaled_copy(gradient: Tensor, dloss: Tensor) -> Tensor:
    """gradient * dloss (0-dim), in gradient's dtype."""
    # Off the CPU torch.mul would round dloss to the gradient's dtype, and a loss scale of 65536 to infinity.
    return (gradient.to(dloss.dtype) * dloss).to(gradient.dtype)
