"""What a call costs the host before the device has any work: microseconds as milliseconds of CALLS calls.

Eager is a sum of two small tensors, the least that a call of torch costs the same machine.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch

from boxgrpo.kernels import dispatch, group_advantages
from boxgrpo.model.attention import pick_backend

CALLS = 1000


def host_calls() -> Iterator[tuple[str, dict[str, int], torch.dtype, float, float, Callable]]:
    """The fields of each call's `Case`. No bytes and no FLOP are a floor: the host's time has none."""
    yield "group_advantages, host", {"calls": CALLS, "B": 16, "G": 8}, torch.float32, 1.0, 1.0, _advantages
    yield "pick_backend, host", {"calls": CALLS}, torch.float32, 1.0, 1.0, _backend


def _sides(case, ours: Callable[[], object], small: torch.Tensor) -> dict[str, Callable[[], None]]:
    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(case.shape["calls"]):
                call()

        return run

    return {"boxgrpo": repeated(ours), "eager": repeated(lambda: small + small)}


def _advantages(case, device, seed: int):
    """Triton's path with everything but the launch, on a CPU too: Triton's launcher takes 8 us more."""
    rewards = torch.rand(case.shape["B"], case.shape["G"], generator=torch.Generator().manual_seed(seed)).to(device)
    runs = _sides(case, lambda: group_advantages(rewards, rewards, backend="triton"), rewards)
    through = runs["boxgrpo"]

    def without_launch() -> None:
        with (
            mock.patch.object(dispatch, "interpreting", lambda: device.type == "cpu"),
            mock.patch.object(dispatch.Launch, "run", lambda launch: None),
        ):
            through()

    return runs | {"boxgrpo": without_launch}


def _backend(case, device, seed: int):
    """For a tensor on a GPU; where there is none, for the device and the dtype that the choice reads."""
    small = torch.zeros(16, 8, device=device)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    x = small.bfloat16() if device.type == "cuda" else on_gpu
    return _sides(case, lambda: pick_backend(x), small)
