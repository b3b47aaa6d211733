"""Log-probabilities of heads with a bias, a scale or a soft cap, which `token_logps` does not support."""

from typing import NamedTuple

import torch
from torch import Tensor

from boxgrpo.kernels.chunks import HeadSweep
from boxgrpo.kernels.dispatch import FLOATS, check_scored_rows, check_tensor
from boxgrpo.kernels.logps import token_logps, token_logps_from_logits

# Extra outputs (n), without a gradient, of the logits z (n, V) and targets (n).
EXTRAS = {
    "log_sum_sq_probs": lambda z, targets: (2 * z.log_softmax(1)).logsumexp(1),
    "mean_logits": lambda z, targets: z.mean(1),
    "is_top1": lambda z, targets: z.argmax(1) == targets,
}


class LogitMap(NamedTuple):
    """z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature."""

    temperature: float = 1.0
    softcap: float | None = None  # None: no tanh
    scale: float = 1.0

    def checked(self) -> "LogitMap":
        """Return self; raise ValueError unless temperature and soft cap are above 0."""
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; a scored token needs one above 0.")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"the soft cap of the logits is {self.softcap}; it must be above 0. Use None for no cap.")
        return self

    def __call__(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """hidden @ weight.T (n, V) and bias (V) or None -> z (n, V), a new tensor."""
        z = logits if bias is None else logits + bias
        if self.softcap is not None:
            return torch.tanh(z * (self.scale / self.softcap)) * (self.softcap / self.temperature)
        return z * (self.scale / self.temperature)


def head_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    logit_map: LogitMap,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    entropy: bool = False,
    extras: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """`token_logps` for a head with a bias, a scale or a soft cap, in chunks; it calls `token_logps` where it can.

    Args:
        hidden: (N, H) float; row n predicts targets[n].
        weight: (V, H) float. bias: (V) float.
        targets: (N) int64.
        dtype: of the product's operands, None: hidden's. Gradients of another dtype are not rounded to it.
        entropy: also return "entropy".
        extras: further names, of those in `EXTRAS`.

    Returns:
        "log_probs" (N) in nats, fp32 (fp64 for fp64 inputs), differentiable once in hidden, weight and bias; with
        `entropy` also "entropy" (N) in nats, differentiable likewise; each of `extras` (N), without a gradient.

    Raises:
        ValueError: shapes, dtypes, temperature or soft cap do not fit.
    """
    temperature, softcap, scale = logit_map.checked()
    dtype = hidden.dtype if dtype is None else dtype
    if bias is None and softcap is None and scale > 0 and not extras and dtype == hidden.dtype == weight.dtype:
        found = token_logps(hidden, weight, targets, temperature=temperature / scale, entropy=entropy)
        return dict(zip(("log_probs", "entropy"), found if entropy else (found,), strict=False))
    check_scored_rows(hidden, targets, temperature, weight.to("meta", hidden.dtype))
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), FLOATS)
    names = ("log_probs", *(("entropy",) if entropy else ()), *extras)
    found = _ChunkedHead.apply(hidden, weight, bias, targets, logit_map, entropy, extras, dtype)
    return dict(zip(names, found, strict=True))


class _ChunkedHead(torch.autograd.Function):
    """Computes the logits of each chunk in the forward and again in the backward: 8·N·V·H FLOP, as `token_logps`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, logit_map, entropy, extras, dtype):
        columns = []
        for rows, product in HeadSweep(hidden.to(dtype), weight.to(dtype)).chunks():
            z, chosen = logit_map(product, bias), targets[rows]
            found = token_logps_from_logits(z, chosen, entropy=entropy)
            columns.append([*(found if entropy else (found,)), *(EXTRAS[name](z, chosen) for name in extras)])
        outputs = [torch.cat(column) for column in zip(*columns, strict=True)]
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.logit_map, ctx.entropy, ctx.n_differentiable, ctx.dtype = logit_map, entropy, 1 + entropy, dtype
        ctx.mark_non_differentiable(*outputs[ctx.n_differentiable :])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream):
        hidden, weight, bias, targets = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        rounded = ctx.dtype == hidden.dtype == weight.dtype
        sweep = HeadSweep(hidden.to(ctx.dtype), weight.to(ctx.dtype), want_hidden, want_weight, rounded)
        dbias = weight.new_zeros(weight.shape[0], dtype=sweep.dtype) if want_bias else None
        upstream = upstream[: ctx.n_differentiable]
        live = torch.stack(upstream).any(0)
        for rows, product in sweep.chunks(live=live):
            product.requires_grad_()
            with torch.enable_grad():
                z = ctx.logit_map(product, bias)
                found = token_logps_from_logits(z, targets[rows], entropy=ctx.entropy, inplace_backward=True)
            (dproduct,) = torch.autograd.grad(found, product, tuple(given[rows] for given in upstream))
            if want_bias:
                dbias += dproduct.sum(0)
            sweep.add(rows, dproduct)
        gradients = zip(sweep.results(), (hidden, weight), (want_hidden, want_weight), strict=True)
        dhidden, dweight = (gradient.to(x.dtype) if want else None for gradient, x, want in gradients)
        return dhidden, dweight, dbias, None, None, None, None, None
