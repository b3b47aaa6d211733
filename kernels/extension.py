"""The compiled operators of csrc/, and the torch twins that stand in for them where they were not built."""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

try:
    importlib.import_module("._C", __package__)  # its loading registers them
    MISSING = None
except ImportError as error:
    MISSING = str(error)

# Without the option pip builds where no torch is, and leaves the parser out again.
REMEDY = "With a compiler (for a GPU, nvcc and a CUDA build of torch), run `pip install --no-build-isolation` again"

_COMPILED: set[tuple[str, str]] = set()  # (op, device type)


def register(name: str, schema: str, twin: Callable, fake: Callable) -> None:
    """Register the op boxgrpo::`name`, and boxgrpo::`name`_torch, which is the twin on any device.

    The first is csrc/'s where that was built for the tensors' device, else the twin with a warning, once; where csrc/
    was built, for a CPU and for CUDA alone. `schema` is csrc/binding.cpp's, without the name.
    """
    op = f"boxgrpo::{name}"

    @functools.wraps(twin)
    def stand_in(*args):
        _warn_once()
        return twin(*args)

    torch.library.custom_op(f"{op}_torch", twin, mutates_args=(), schema=schema).register_fake(fake)
    if MISSING is not None:
        torch.library.custom_op(op, stand_in, mutates_args=(), schema=schema).register_fake(fake)
        return
    torch.library.register_fake(op, fake)
    _COMPILED.add((name, "cpu"))
    if torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
        _COMPILED.add((name, "cuda"))
    else:
        torch.library.impl(op, "cuda", stand_in)


def chosen(name: str, backend: str, tensor: Tensor) -> Callable:
    """The op that the door `name` calls for a backend of "auto", "extension" or "torch".

    Raises:
        ValueError: another backend, or "extension" where csrc/ was not built for the tensor's device.
    """
    if backend == "triton":
        raise ValueError(
            f"backend is 'triton' and {name} has no Triton implementation. Use backend='auto', 'extension' or 'torch'."
        )
    if backend not in ("auto", "extension", "torch"):
        raise ValueError(f"backend is {backend!r}; it is one of 'auto', 'extension', 'torch'.")
    if backend == "extension" and (name, tensor.device.type) not in _COMPILED:
        raise ValueError(
            f"backend is 'extension' and csrc/ was not compiled for {tensor.device.type.upper()} tensors"
            f"{f' ({MISSING})' if MISSING else ''}. {REMEDY}, or use backend='auto'."
        )
    return getattr(torch.ops.boxgrpo, f"{name}_torch" if backend == "torch" else name)


@functools.cache
def _warn_once() -> None:
    reason = MISSING or "it has no CUDA part"
    frame, depth = sys._getframe(1), 2
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(("boxgrpo.kernels.", "torch.")):
        frame, depth = frame.f_back, depth + 1  # to whoever called the door
    warnings.warn(
        f"boxgrpo runs without its compiled box parser ({reason}): Python's re reads the answers, a hundred times "
        f"slower. {REMEDY}.",
        RuntimeWarning,
        stacklevel=depth,
    )
