"""Which implementation of an op runs, and how ops are registered under `torch.ops.boxgrpo`.

An op has a torch twin, `<op>_torch` in x_torch.py, and one fast implementation: `<op>_triton` in x_triton.py, which is
imported when it first runs, or the operator that csrc/ compiles ("extension").
"""

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

try:
    importlib.import_module("._C", __package__)  # loading it registers csrc/'s operators
    MISSING = None
except ImportError as error:
    MISSING = str(error)

# Without the option pip builds where no torch is, and leaves the parser out again.
REMEDY = "With a compiler (for a GPU, nvcc and a CUDA build of torch), run `pip install --no-build-isolation` again"

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_COMPILED: set[tuple[str, str]] = set()  # (op, device type) that csrc/ was built for


def is_fast(op: str, backend: str, *tensors: Tensor, fast: str = "triton") -> bool:
    """Whether `op` runs its fast implementation, "triton" or "extension", and not its torch twin.

    "auto" is Triton for tensors on a GPU that it can take, and the compiled operator, which has a stand-in where it was
    not built. The fast one's own name is that one or an error. "torch" is the twin.

    Raises:
        ValueError: another backend, or a fast implementation that cannot take the tensors.
    """
    if fast == "extension" and backend == "triton":
        raise ValueError(
            f"backend is 'triton' and {op} has no Triton implementation. Use backend='auto', 'extension' or 'torch'."
        )
    if backend not in ("auto", fast, "torch"):
        raise ValueError(f"backend is {backend!r}; it is one of 'auto', {fast!r}, 'torch'.")
    if backend == "torch":
        return False
    find_obstacle = _triton_obstacle if fast == "triton" else _extension_obstacle
    obstacle = next(filter(None, (find_obstacle(op, tensor) for tensor in tensors)), None)
    if backend == "auto":
        return fast == "extension" or (obstacle is None and tensors[0].is_cuda)
    if obstacle:
        raise ValueError(f"backend is {backend!r} and {obstacle}")
    return True


def interpreting() -> bool:
    """Whether Triton runs its interpreter, on CPU tensors. Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_obstacle(op: str, tensor: Tensor) -> str | None:
    if tensor.device.type != ("cpu" if interpreting() else "cuda"):
        reason = f"got a {tensor.device.type.upper()} tensor"
    elif tensor.dtype == torch.float64:
        reason = "got fp64, which only the torch twin computes in"
    elif not _HAS_TRITON:
        reason = "finds no triton package"
    else:
        return None
    return f"{op} {reason}. Use backend='auto' or 'torch'."


def _extension_obstacle(op: str, tensor: Tensor) -> str | None:
    if (op, tensor.device.type) in _COMPILED:
        return None
    reason = f" ({MISSING})" if MISSING else ""
    return f"csrc/ was not compiled for {tensor.device.type.upper()} tensors{reason}. {REMEDY}, or use backend='auto'."


def register(schema: str, twin: Callable, fake: Callable) -> tuple[torch.library.CustomOpDef, Callable]:
    """Register the op of the twin `<op>_torch`, with an argument `bool triton` that chooses `<op>_triton`.

    Args:
        schema: arguments and results, without the op's name.
        twin: takes the op's arguments without `triton`, in their order. Its module's name ends in `_torch`; the one
            that ends in `_triton` instead has the Triton implementation, of the same arguments.
        fake: gives empty results for the op's arguments.

    Returns:
        The op, to which an autograd formula may be added, and the plain function beneath it.
    """
    op, at = twin.__name__.removesuffix("_torch"), schema[: schema.index(")")].split(", ").index("bool triton")
    module = f"{twin.__module__.removesuffix('_torch')}_triton"

    def run(*args, **options):
        f = getattr(importlib.import_module(module), f"{op}_triton") if args[at] else twin
        return f(*args[:at], *args[at + 1 :], **options)

    return _define(op, schema, run, fake), run


def register_compiled(schema: str, twin: Callable, fake: Callable) -> None:
    """Register what csrc/ leaves open of an op, and `<op>_torch`, the twin on any device.

    Where csrc/ was not built for the tensors' device, the op is the twin with one warning. `schema` is
    csrc/binding.cpp's, without the name.
    """
    op = twin.__name__.removesuffix("_torch")

    @functools.wraps(twin)
    def stand_in(*args):
        _warn_once()
        return twin(*args)

    _define(f"{op}_torch", schema, twin, fake)
    if MISSING is not None:
        _define(op, schema, stand_in, fake)
        return
    torch.library.register_fake(f"boxgrpo::{op}", fake)
    _COMPILED.add((op, "cpu"))
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"boxgrpo::{op}", "CUDA"):
        _COMPILED.add((op, "cuda"))
    else:
        torch.library.impl(f"boxgrpo::{op}", "cuda", stand_in)


def compiled_op(op: str, backend: str, tensor: Tensor) -> Callable:
    """The registered op that a public function calls for its `backend`; errors as in `is_fast`."""
    return getattr(torch.ops.boxgrpo, op if is_fast(op, backend, tensor, fast="extension") else f"{op}_torch")


def _define(op: str, schema: str, run: Callable, fake: Callable) -> torch.library.CustomOpDef:
    defined = torch.library.custom_op(f"boxgrpo::{op}", run, mutates_args=(), schema=schema)
    defined.register_fake(fake)
    return defined


@functools.cache
def _warn_once() -> None:
    reason = MISSING or "it has no CUDA part"
    frame, depth = sys._getframe(1), 2
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(("boxgrpo.kernels.", "torch.")):
        frame, depth = frame.f_back, depth + 1  # up to the caller of the public function
    warnings.warn(
        f"boxgrpo runs without its compiled box parser ({reason}): Python's re reads the answers, a hundred times "
        f"slower. {REMEDY}.",
        RuntimeWarning,
        stacklevel=depth,
    )
