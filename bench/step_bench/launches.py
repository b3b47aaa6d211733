"""Counts what code launches on fake CUDA tensors and the bytes that it moves, and finds where the host would wait.

A fake tensor has shape, dtype and device, but no values. Each operator that torch dispatches to a GPU is one launch,
unless it returns views or only allocates; so is each Triton kernel. A launch moves all tensors that it reads and all
that it writes, once, except that

- an operator that selects rows reads as many bytes as it returns, one that writes rows in place writes those alone;
- a copy or a fill does not read what it overwrites;
- a dimension of stride 0 is one element;
- flash attention with `seqused_k` reads as many keys and values as `LaunchCounter.used` states of that tensor.

So bytes are upper bounds: caches are not modelled, and attention counts all keys, masked ones too, where its call has
no `seqused_k` or one of which nothing is stated.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

ROOT = Path(__file__).absolute().parents[2]  # as frames name it, through a link too
PRODUCT = tuple(str(ROOT / room) for room in ("kernels", "model", "trainer", "bench"))
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}
SELECT = {"embedding", "index_select", "index", "gather"}
WRITE_ROWS = {"index_copy_", "index_put_", "index_fill_", "scatter_"}
OVERWRITE = {"copy_", "fill_", "zero_"}
COPY = {"_to_copy", "copy_"}
ATTENTION = "_flash_attention_forward"
COMPOSITE = "CompositeImplicitAutograd"
# The host needs the values, or the size of the result depends on them.
WAIT = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal"}
STAGED = 1 << 16  # bytes of pageable memory from which the host waits even for a copy that does not block
IN_PLACE = {"_triton_rope"}  # Triton kernels that write all that they read
ROWS_OF = {"rotate_into_cache_kernel": {"keys": "k", "values": "v"}}  # and those that write rows: as many as are given


@dataclass
class Counts:
    """Of a phase, by the name of an operator or kernel; waits and mixes by "operator in FILE FUNCTION" of ours."""

    launches: Counter = field(default_factory=Counter)
    moved: Counter = field(default_factory=Counter)  # bytes
    waits: Counter = field(default_factory=Counter)  # times that the host waits for the GPU
    mixes: Counter = field(default_factory=Counter)  # operators on several floating dtypes, and casts of whole weights

    peak: int = 0  # bytes of tensors beyond those that there are when the phase begins
    times: int = 1  # as which each launch counts

    def add(self, name: str, moved: int) -> None:
        self.launches[name] += self.times
        self.moved[name] += self.times * moved


def extent(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements."""
    sizes = (n if step else min(n, 1) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.itemsize * torch.Size(sizes).numel()


def running_function() -> str:
    """The file and the name of the function of ours that runs."""
    frame = sys._getframe(1)
    while frame and (frame.f_code.co_filename == __file__ or not frame.f_code.co_filename.startswith(PRODUCT)):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    code = frame.f_code
    return f"{Path(code.co_filename).relative_to(ROOT)} {code.co_qualname.partition('.<locals>')[0]}"


class LaunchCounter(TorchDispatchMode):
    """While it is active, tensors on CUDA are fake and those on the host real. Operators of ours count as what they
    launch. `counts`, those of the phase, receives all of it. What needs a fake tensor's values raises ValueError.
    """

    def __init__(self):
        super().__init__()
        self.fake, self.counts = FakeTensorMode(allow_non_fake_inputs=True), Counts()
        self.found: dict[str, Counts] = {}  # by phase
        self.pinned: dict[int, Tensor] = {}  # by storage
        self.held, self.before = 0, 0  # bytes of all tensors on CUDA, and what the phase began with
        self.storages: set[int] = set()  # which they are
        self.used = WeakTensorKeyDictionary()  # a call's `seqused_k` -> the keys that its segments read together

    def phase(self, name: str, times: int = 1) -> None:
        """What follows belongs to this phase, and counts `times`."""
        self.counts = self.found.setdefault(name, Counts())
        self.counts.times, self.before = times, self.held

    @contextmanager
    def counting(self) -> Iterator["LaunchCounter"]:
        """Active, with Triton kernels counted in the place of their launch."""
        from triton.runtime.jit import JITFunction

        def launch(kernel, *args, **options):
            name, given = kernel.__name__, dict(zip(kernel.arg_names, args, strict=False)) | options
            rows, times = ROWS_OF.get(name, {}), 2 if name in IN_PLACE else 1
            whole = [x for key, x in given.items() if isinstance(x, Tensor) and key not in rows]
            once = {(x.untyped_storage()._cdata, x.storage_offset()): x for x in whole}.values()
            self.counts.add(name, times * sum(map(extent, once)) + sum(extent(given[x]) for x in rows.values()))

        with patch.object(JITFunction, "run", launch), self:
            yield self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.partition("::")[2], kwargs or {}
        if func.namespace in ("boxgrpo", "torch_attn"):
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if name == "is_pinned":
            return self._is_pinned(args[0])
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE):
            with self:  # outside of our operators autograd has split it into its parts
                return func.decompose(*args, **kwargs)
        pins = name == "_pin_memory" or kwargs.get("pin_memory")
        if pins:  # which no host without a GPU can
            func, kwargs = (torch.ops.aten.clone.default, {}) if name == "_pin_memory" else (func, kwargs)
            kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        out = self._run(func, name, args, kwargs)
        if pins:
            self.pinned[out.untyped_storage()._cdata] = out
        return out

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def _run(self, func, name: str, args, kwargs):
        read = {key: value for key, value in kwargs.items() if key != "out"}
        given = [x for x in tree_leaves((args, read)) if isinstance(x, Tensor)]
        on_host = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        if func.namespace == "prim" or (on_host and not any(isinstance(x, FakeTensor) for x in given)):
            return func(*args, **kwargs)
        self._find_wait(name, given, args, kwargs)
        try:
            with self.fake:
                out = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            place = f"{name} in {running_function()}"
            raise ValueError(f"{place} needs values: the host would wait for the GPU. Leave them there.") from None
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.is_cuda for x in [*given, *results]):
            self._count(func, name, given, results)
            self._hold([x.untyped_storage() for x in results if x.is_cuda])
        return out

    def _hold(self, storages: list[torch.UntypedStorage]) -> None:
        for storage in storages:
            key, size = storage._cdata, storage.nbytes()
            if key not in self.storages:
                self.storages.add(key)
                self.held += size
                weakref.finalize(storage, self._free, key, size)
        self.counts.peak = max(self.counts.peak, self.held - self.before)

    def _free(self, key: int, size: int) -> None:
        self.storages.remove(key)
        self.held -= size

    def _count(self, func, name: str, given: list[Tensor], results: list[Tensor]) -> None:
        aliases = [r.alias_info for r in func._schema.returns]
        if not results or name in FREE or all(alias is not None and not alias.is_write for alias in aliases):
            return
        dtypes = {x.dtype for x in given if x.is_floating_point() and x.ndim}
        told = "dtype" in func._overloadname  # the product's accumulator has the dtype that the caller names
        weight = name in COPY and isinstance(given[-1], Parameter) and results[0].dtype != given[-1].dtype
        if weight or (len(dtypes) > 1 and name not in COPY and not told):
            self.counts.mixes[f"{name} in {running_function()}"] += self.counts.times
        first, *rest = map(extent, {id(x): x for x in given}.values()) if given else (0,)
        written = sum(map(extent, results))
        if name in SELECT:
            first = written
        elif name in WRITE_ROWS:
            first, written = 0, rest[-1]
        elif name in OVERWRITE:
            first = 0
        elif name == ATTENTION:
            used = next((self.used[x] for x in given[3:] if x in self.used), None)
            rest += [-extent(x[used:]) for x in given[1:3] if used is not None]
        self.counts.add(name, first + sum(rest) + written)

    def _find_wait(self, name: str, given: list[Tensor], args, kwargs) -> None:
        cuda = any(x.is_cuda for x in given)
        waits = name in WAIT or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        waits |= name in ("index", "index_put_") and any(x.dtype == torch.bool for x in given[1:])
        waits &= cuda
        if name in COPY:
            source, to = given[-1], given[0] if name == "copy_" else None  # whose result torch pins, where it may
            target = to.device if to is not None else torch.device(kwargs.get("device") or source.device)
            if target.type != source.device.type:
                blocks = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
                host = source if target.type == "cuda" else to
                staged = target.type == "cpu" or extent(source) > STAGED
                waits = blocks or (staged and host is not None and not self._is_pinned(host))
        if waits:
            self.counts.waits[f"{name} in {running_function()}"] += self.counts.times
