"""Choice of an op's implementation, registration of ops under `torch.ops.boxgrpo`, and launch of Triton kernels.

An op has a torch twin, `<op>_torch` in x.py, and one fast implementation: `<op>_triton` in x_triton.py, which is
imported when it first runs, or the operator that csrc/ compiles ("extension").
"""

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ValueError unless the tensor has this shape (None: any length) and one of these dtypes."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; it must be a torch tensor.")
    sizes = tensor.shape
    fits = len(sizes) == len(shape)
    for have, want in zip(sizes, shape):
        fits = fits and (want is None or have == want)
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} has shape {tuple(sizes)}; it must be ({wanted}).")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it must be {wanted}. Cast it.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(choices)}.")


def check_scored_rows(rows: Tensor, targets: Tensor, temperature: float, weight: Tensor | None = None) -> None:
    """Raise ValueError unless `rows`, hidden states (N, H) with `weight` (V, H) or logits (N, V), fit `targets` (N)."""
    check_tensor("logits" if weight is None else "hidden", rows, (None, None), FLOATS)
    if weight is not None:
        check_tensor("weight", weight, (None, rows.shape[1]), (rows.dtype,))
    check_tensor("targets", targets, (rows.shape[0],), (torch.int64,))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; a scored token needs one above 0.")


def check_writable(option: str, logits: Tensor) -> None:
    """Raise ValueError for expanded logits, several of which share one memory location: they cannot be overwritten."""
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True)):
        raise ValueError(
            f"{option} is set and the logits {tuple(logits.shape)} are expanded, strides {logits.stride()}; each logit "
            "needs a memory location of its own to be overwritten. Pass logits.contiguous()."
        )


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where any tensor is fp64, else fp32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


try:
    importlib.import_module("._C", __package__)  # importing it registers the operators of csrc/
    IMPORT_FAILURE = None  # why the compiled module cannot be imported
except ImportError as error:
    IMPORT_FAILURE = str(error)

# Without this option pip builds in an isolated environment that has no torch, and the parser is not compiled.
REMEDY = "With a compiler (for a GPU, nvcc and a CUDA build of torch), run `pip install --no-build-isolation` again"

_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def runs_fast(op: str, backend: str, *tensors: Tensor, fast: str = "triton") -> bool:
    """Whether `op` runs its fast implementation, "triton" or "extension", and not its torch twin.

    "auto": Triton for tensors on a GPU that are not fp64; the compiled operator always, because it runs the twin where
    csrc/ was not built. "triton" or "extension": that implementation or an error. "torch": the twin.

    Raises:
        ValueError: another backend, or a fast implementation that cannot take the tensors.
    """
    if backend not in ("auto", fast, "torch"):
        raise ValueError(f"backend is {backend!r}; for {op} it is one of 'auto', {fast!r}, 'torch'.")
    if backend == "torch":
        return False
    if backend == "auto":
        return fast == "extension" or (tensors[0].is_cuda and not any(map(_triton_obstacle, tensors)))
    find_obstacle = _triton_obstacle if fast == "triton" else _extension_obstacle
    for tensor in tensors:
        if obstacle := find_obstacle(tensor):
            raise ValueError(f"backend is {backend!r} and {op} {obstacle} or use backend='auto'.")
    return True


def interpreting() -> bool:
    """Whether Triton runs its interpreter, on CPU tensors. Triton reads the variable when a kernel is defined."""
    return _INTERPRETING


def _triton_obstacle(tensor: Tensor) -> str | None:
    """Why Triton cannot take the tensor, as a part of `runs_fast`'s message."""
    if not (tensor.is_cpu if interpreting() else tensor.is_cuda):
        return f"got a {tensor.device.type.upper()} tensor. Pass one on another device,"
    if tensor.dtype == torch.float64:
        return "got fp64, which only the torch twin computes in. Cast it,"
    return None if _HAS_TRITON else "finds no triton package. Install it,"


def _extension_obstacle(tensor: Tensor) -> str | None:
    """Why the compiled operator cannot take the tensor, as a part of `runs_fast`'s message."""
    if is_compiled(tensor.device.type):
        return None
    reason = f" ({IMPORT_FAILURE})" if IMPORT_FAILURE else ""
    return f"finds csrc/ not compiled for {tensor.device.type.upper()} tensors{reason}. {REMEDY},"


def is_compiled(device_type: str) -> bool:
    """Whether csrc/ was built for this device type. It is built with all of its operators or not at all."""
    may_be_built = IMPORT_FAILURE is None and device_type in ("cpu", "cuda")
    return may_be_built and torch._C._dispatch_has_kernel_for_dispatch_key("boxgrpo::box_iou", device_type.upper())


def register(schema: str, twin: Callable, fake: Callable) -> tuple[torch.library.CustomOpDef, Callable]:
    """Register the op of the twin `<op>_torch`, with an argument `bool triton` that chooses `<op>_triton`.

    Args:
        schema: arguments and results, without the op's name.
        twin: takes the op's arguments without `triton`, in their order. `<op>_triton` takes the same; it is in the
            module whose name is that of the twin's module and `_triton`.
        fake: returns tensors of the results' shapes and dtypes, for tracing.

    Returns:
        The op, to which an autograd formula may be added, and the plain function that it runs.
    """
    run = choose(twin, schema[: schema.index(")")].split(", ").index("bool triton"))
    return _define(twin.__name__.removesuffix("_torch"), schema, run, fake), run


def choose(twin: Callable, at: int) -> Callable:
    """The function of `register` alone: it runs the twin, or `<op>_triton` where its argument number `at` is true."""

    @functools.cache
    def kernel() -> Callable:
        name = twin.__name__.removesuffix("_torch")
        return getattr(importlib.import_module(f"{twin.__module__}_triton"), f"{name}_triton")

    def run(*args, **options):
        return (kernel() if args[at] else twin)(*args[:at], *args[at + 1 :], **options)

    return run


def register_compiled(schema: str, twin: Callable, fake: Callable) -> None:
    """Register `<op>_torch`, the twin on any device, and the fake of the op that csrc/ registers.

    Where csrc/ was not built for the tensors' device, the op runs the twin and warns once. `schema` is that of
    csrc/binding.cpp, without the name.
    """
    op = f"boxgrpo::{twin.__name__.removesuffix('_torch')}"

    def run_twin(*args):
        _warn_once()
        return twin(*args)

    _define(twin.__name__, schema, twin, fake)
    if IMPORT_FAILURE is not None:
        torch.library.define(op, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(op, "default", run_twin)
    elif not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"):
        torch.library.impl(op, "cuda", run_twin)
    torch.library.register_fake(op, fake)


# Types of arguments that do not change what an op does, as a FakeTensor would.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, bool, int, float, str, type(None)))


def call(op: Callable, run: Callable, *args):
    """`op(*args)`, or `run(*args)`, the function that `register` returns, where nothing takes part in the op's call.

    The dispatcher and custom_op's wrappers cost the host 13 us. torch.compile, autograd, a dispatch mode, torch.func, a
    tensor subclass and the profiler need them.
    """
    if (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or not _PLAIN.issuperset(map(type, args))
        or torch._C._autograd._profiler_enabled()
    ):
        return op(*args)
    return run(*args)


def _define(op: str, schema: str, run: Callable, fake: Callable) -> torch.library.CustomOpDef:
    defined = torch.library.custom_op(f"boxgrpo::{op}", run, mutates_args=(), schema=schema)
    defined.register_fake(fake)
    return defined


@functools.cache
def _warn_once() -> None:
    reason = IMPORT_FAILURE or "it has no CUDA part"
    frame, depth = sys._getframe(1), 2
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(("boxgrpo.kernels.", "torch.")):
        frame, depth = frame.f_back, depth + 1  # the frame of the public function's caller
    warnings.warn(
        f"boxgrpo runs without its compiled box parser ({reason}): Python's re reads the answers, a hundred times "
        f"slower. {REMEDY}.",
        RuntimeWarning,
        stacklevel=depth,
    )


class Launch(NamedTuple):
    """A Triton kernel with its arguments: an op runs it, and the compile test compiles the same object."""

    kernel: Any  # a triton.jit function
    grid: tuple[int, ...]
    arguments: tuple[Tensor | int | float | None, ...]  # in the kernel's order
    constants: dict[str, Any]  # its tl.constexpr parameters, which come last
    num_warps: int

    def run(self) -> None:
        if 0 in self.grid:
            return
        tensor = next(x for x in self.arguments if isinstance(x, Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device, whatever the tensors are on
            self.kernel[self.grid](*self.arguments, **self.constants, num_warps=self.num_warps)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv, which kernels can call too, takes 1.6 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, for n of at least 1."""
    return 1 << (n - 1).bit_length()
