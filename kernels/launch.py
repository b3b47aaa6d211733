"""A Triton kernel with its arguments bound: what the ops launch is what the compile-only test compiles."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
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
