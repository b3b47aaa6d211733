"""What every public door asks of its arguments. Shapes and dtypes only: nothing here reads a tensor's values."""

import os

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)


def use_triton(door: str, backend: str, *tensors: Tensor) -> bool:
    """Whether `door` runs on Triton: "auto" wherever it can on a GPU, "triton" or else it raises, "torch" never."""
    _check_name(backend)
    if backend == "torch":
        return False
    obstacle = next(filter(None, map(_obstacle, tensors)), None)
    if backend == "triton" and obstacle:
        raise ValueError(f"backend is 'triton' and {door} {obstacle}. Use backend='auto' or 'torch'.")
    return obstacle is None and (backend == "triton" or tensors[0].is_cuda)


def _check_name(backend: str) -> None:
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend is {backend!r}; it is one of 'auto', 'triton', 'torch'.")


def interpreting() -> bool:
    """Whether Triton runs its interpreter, on CPU tensors. Triton reads the variable when a kernel is made."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _obstacle(tensor: Tensor) -> str | None:
    if tensor.device.type != ("cpu" if interpreting() else "cuda"):
        return f"got a {tensor.device.type.upper()} tensor"
    if tensor.dtype == torch.float64:
        return "got fp64, which only the torch twin computes in"
    return None if _has_triton() else "finds no triton package"


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


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


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    """Refuse a head's inputs, hidden (N, H), weight (V, H) and targets (N), that do not fit together."""
    check_tensor("hidden", hidden, (None, None), FLOATS)
    check_tensor("weight", weight, (None, hidden.shape[1]), (hidden.dtype,))
    check_targets(targets, hidden.shape[0], temperature)


def check_logits(logits: Tensor, targets: Tensor, temperature: float) -> None:
    """Refuse logits (N, V) and targets (N) that do not fit together."""
    check_tensor("logits", logits, (None, None), FLOATS)
    check_targets(targets, logits.shape[0], temperature)


def check_writable(option: str, logits: Tensor) -> None:
    """Refuse to write over logits of which several are one number in memory."""
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(
            f"{option} is set and the logits {tuple(logits.shape)} are expanded, strides {logits.stride()}; what is "
            "written over must lie apart. Pass logits.contiguous()."
        )


def check_targets(targets: Tensor, n: int, temperature: float) -> None:
    """Refuse targets that are not (n) int64, and a temperature that is not above 0."""
    check_tensor("targets", targets, (n,), (torch.int64,))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; a scored token needs one above 0.")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
