"""Checks of the public functions' arguments: shapes and dtypes. No tensor's values are read."""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a tensor of another shape (None: any length) or dtype."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; it must be a torch tensor.")
    fits = len(tensor.shape) == len(shape)
    for have, want in zip(tensor.shape, shape, strict=False):
        fits = fits and (want is None or have == want)
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({wanted}).")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {wanted}. Cast it.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an option that is not one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(choices)}.")


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    """Refuse hidden (N, H), weight (V, H) and targets (N) that do not fit together."""
    check_tensor("hidden", hidden, (None, None), FLOATS)
    check_tensor("weight", weight, (None, hidden.shape[1]), (hidden.dtype,))
    check_targets(targets, hidden.shape[0], temperature)


def check_logits(logits: Tensor, targets: Tensor, temperature: float) -> None:
    """Refuse logits (N, V) and targets (N) that do not fit together."""
    check_tensor("logits", logits, (None, None), FLOATS)
    check_targets(targets, logits.shape[0], temperature)


def check_writable(option: str, logits: Tensor) -> None:
    """Refuse to write over expanded logits, of which several share one place in memory."""
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(
            f"{option} is set and the logits {tuple(logits.shape)} are expanded, strides {logits.stride()}; each logit "
            "needs a place of its own to be written over. Pass logits.contiguous()."
        )


def check_targets(targets: Tensor, n: int, temperature: float) -> None:
    """Refuse targets that are not (n) int64, and a temperature that is not above 0."""
    check_tensor("targets", targets, (n,), (torch.int64,))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; a scored token needs one above 0.")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
