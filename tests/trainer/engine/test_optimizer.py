"""Optimizers by name, and the file of their state."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from boxgrpo.trainer.engine.optimizer import load_state, make_optimizer, make_schedule, save_state, set_optimizer_state
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.run import make_engine
from boxgrpo.trainer.runtime.ranks import Ranks


class CountsInItsGroup(torch.optim.SGD):
    """As apex's FusedAdam, whose name it has."""


CountsInItsGroup.__name__ = "FusedAdam"


class CountsInPython(torch.optim.SGD):
    """As DeepSpeed's Adam for CPUs."""


@pytest.mark.parametrize("kind", [torch.optim.AdamW, CountsInItsGroup, CountsInPython])
def test_moments_and_the_count_of_steps_are_restored(kind, tmp_path):
    """Without its count a resumed Adam would correct its moments as if they were new."""
    moments = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.full((2,), 2.0)}
    weights = [nn.Parameter(torch.full((2,), float(value))) for value in range(2)]
    first, other = optimizers = [kind([weight], lr=0.1) for weight in weights]
    schedules = [make_schedule(optimizer, GrpoOptions(), 10) for optimizer in optimizers]
    set_optimizer_state(first, weights[0], {"step": torch.tensor(7.0), **moments})
    save_state(tmp_path / "state", {"w": weights[0]}, first, schedules[0])
    load_state(tmp_path / "state", {"w": weights[1]}, other, schedules[1])
    step = other.param_groups[0]["step"] if kind is CountsInItsGroup else other.state[weights[1]]["step"]
    assert step == 7 and isinstance(step, torch.Tensor if kind is torch.optim.AdamW else int)
    assert all(torch.equal(other.state[weights[1]][name], value) for name, value in moments.items())
    assert torch.equal(*weights)


@pytest.mark.slow
def test_deepspeeds_adam_is_adam():
    """It is compiled when it is first made."""
    pytest.importorskip("deepspeed.ops.adam", reason="deepspeed is not installed")
    weights = [nn.Parameter(torch.linspace(-1, 1, 64)) for _ in range(2)]
    optimizers = [
        make_optimizer([w], GrpoOptions(optimizer=name, learning_rate=0.01, weight_decay=0.1))
        for w, name in zip(weights, ("adamw", "cpu_adam"), strict=True)
    ]
    for step in range(5):
        for w, optimizer in zip(weights, optimizers, strict=True):
            w.grad = torch.sin(torch.arange(64.0) + step)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


def test_an_optimizer_that_is_not_installed_is_refused(monkeypatch):
    weights = [nn.Parameter(torch.zeros(2))]
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # the other project of that name
    with pytest.raises(ValueError, match="optimizer is 'apex' and an import fails.*another project has that name"):
        make_optimizer(weights, GrpoOptions(optimizer="apex"))
    for name in ("deepspeed", "deepspeed.ops.adam"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="optimizer is 'cpu_adam' and an import fails.*--optimizer adamw"):
        make_optimizer(weights, GrpoOptions(optimizer="cpu_adam"))
    with pytest.raises(ValueError, match="engine is 'deepspeed' and an import fails.*--engine ddp"):
        make_engine(nn.Linear(1, 1), GrpoOptions(engine="deepspeed"), Ranks(), 1)


def test_apex_gets_the_arguments_of_its_own_names(monkeypatch):
    """NVIDIA's FusedAdam takes `adam_w_mode`; it needs a GPU."""
    given = {}
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = lambda parameters, **options: given.update(options)
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    make_optimizer([nn.Parameter(torch.zeros(2))], GrpoOptions(optimizer="apex", weight_decay=0.1))
    assert given == {"lr": 1e-6, "betas": (0.9, 0.999), "weight_decay": 0.1, "adam_w_mode": True}
