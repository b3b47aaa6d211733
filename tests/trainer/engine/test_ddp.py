"""Data parallelism: clipping, schedule, master weights, and the average of gradients over ranks."""

import copy
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from boxgrpo.trainer.engine.ddp import DataParallelEngine
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.runtime.ranks import Ranks
from runs import finish, start_forked


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).to(dtype)


def options(**changes):
    return GrpoOptions(**{"learning_rate": 0.1, "lr_scheduler_type": "constant", **changes})


def test_one_step_is_adamw_on_the_clipped_gradient():
    model = network()
    twin = copy.deepcopy(model)
    x = torch.randn(5, 3)
    engine = DataParallelEngine(model, options(max_grad_norm=0.5), Ranks(), 10)
    engine.backward(model(x).square().sum())
    norm, updated = engine.step()
    assert updated

    twin(x).square().sum().backward()
    expected_norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    torch.optim.AdamW(twin.parameters(), lr=0.1, weight_decay=0.0).step()
    assert norm == pytest.approx(float(expected_norm))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.grad is None


def learning_rates(steps, **changes):
    """Before each step, and after the last."""
    engine, rates = DataParallelEngine(network(), options(**changes), Ranks(), steps), []
    for _ in range(steps):
        rates += engine.schedule.get_last_lr()
        engine.step()
    return rates + engine.schedule.get_last_lr()


def test_schedules_end_at_zero():
    """Linear; and with a warmup, constant until the last fifth."""
    assert learning_rates(4, lr_scheduler_type="linear") == pytest.approx([0.1, 0.075, 0.05, 0.025, 0.0])
    rates = learning_rates(20, lr_scheduler_type="warmup_stable_decay", warmup_ratio=0.1)
    assert rates[:17] == pytest.approx([0.0, 0.05, *[0.1] * 15])
    assert 0.1 > rates[17] > rates[18] > rates[19] > rates[20] == pytest.approx(0.0, abs=1e-9)


def test_bf16_weights_keep_updates_smaller_than_their_precision():
    model = network(torch.bfloat16)
    before = model[0].weight.detach().clone()
    engine = DataParallelEngine(model, options(learning_rate=1e-5), Ranks(), 1000)
    for _ in range(300):  # each update is far below bf16's spacing, all of them together are not
        engine.backward(model(torch.ones(1, 3, dtype=torch.bfloat16)).sum())
        engine.step()
    assert not torch.equal(model[0].weight, before)


def test_gradients_of_bf16_packs_add_up_in_fp32():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    engine = DataParallelEngine(model, options(max_grad_norm=0.0), Ranks(), 10)
    for value in (256.0, 1.0, 1.0):  # in bf16 256 + 1 is 256
        engine.backward(model(torch.full((1, 1), value, dtype=torch.bfloat16)).sum())
        assert model.weight.grad is None  # it is in the master: there is no second set of gradients
    assert engine.step()[0] == 258.0


def test_a_repeated_step_forgets_a_gradient_that_was_not_moved_to_its_master(monkeypatch):
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    engine = DataParallelEngine(model, options(max_grad_norm=0.0), Ranks(), 10)
    with monkeypatch.context() as full:
        full.setattr(Tensor, "float", Mock(side_effect=torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError) as failed:
            engine.backward(model(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
    engine.restart_step(failed.value)
    engine.backward(model(torch.ones(1, 1, dtype=torch.bfloat16)).sum())
    assert engine.step()[0] == 1.0


TWO_RANKS = """
import logging, pathlib, torch
from torch import nn
from boxgrpo.trainer.engine.ddp import DataParallelEngine
from boxgrpo.trainer.options import GrpoOptions
from boxgrpo.trainer.runtime.ranks import join_ranks

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
with join_ranks() as r:
    if r.rank == 1:
        nn.init.zeros_(model[0].weight)  # every rank gets rank 0's weights
    options = GrpoOptions(learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0)
    engine = DataParallelEngine(model, options, r, 10)
    if r.is_main:
        engine.backward(model(torch.tensor([[1.0, 2.0, 3.0]])).sum())
        engine.backward(model(torch.tensor([[0.0, 1.0, 0.0]])).sum())
    engine.step()  # rank 1 had no pack at all
    torch.save(model.state_dict(), pathlib.Path(__file__).with_name(f"{r.rank}.pt"))
    for bad in ("nan", "inf", "gradient", None):  # on rank 1 alone; no rank updates
        before = model[0].weight.detach().clone()
        loss = model(torch.ones(1, 3)).sum()
        if r.rank == 1 and bad == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        elif r.rank == 1 and bad:
            loss = loss + float(bad)
        engine.backward(loss)
        norm, updated = engine.step()
        assert updated == bool(norm.isfinite()) == (bad is None), bad
        assert torch.equal(before, model[0].weight) != updated, bad
    logging.getLogger("boxgrpo.trainer.data.loader").warning("rank %d skipped a record", r.rank)
    logging.getLogger("boxgrpo.trainer.run").warning("rank %d read the file", r.rank)
    # Ranks hold different keys, in different orders.
    means = r.mean_metrics({"b": 1.0, "a": 2.0} if r.is_main else {"c": 5.0, "a": 4.0})
    assert means == {"a": 3.0, "b": 1.0, "c": 5.0}, means
    assert r.sum(1.0 + r.rank, 10.0) == [3.0, 20.0]
"""


def test_ranks_average_gradients_skip_what_is_not_finite_and_gather_metrics(tmp_path):
    (tmp_path / "script.py").write_text(TWO_RANKS)
    shown = finish(start_forked(tmp_path / "script.py", SimpleNamespace()))
    assert [f"rank {rank} skipped a record" in shown for rank in (0, 1)] == [True, True]  # each has its own records
    assert [f"rank {rank} read the file" in shown for rank in (0, 1)] == [True, False]  # both did
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = network()
    engine = DataParallelEngine(alone, options(max_grad_norm=0.0), Ranks(), 10)
    for row in ([1.0, 2.0, 3.0], [0.0, 1.0, 0.0]):
        engine.backward(alone(torch.tensor([row])).sum() / 2)
    engine.step()
    for name, tensor in alone.state_dict().items():
        assert torch.equal(zero[name], one[name])
        torch.testing.assert_close(zero[name], tensor)
