"""HeadSweep's chunks for Triton: rows by whole waves, buffers that need no fill, sums without a pass of their own."""

import pytest
import torch

from boxgrpo.kernels import chunks
from kernel_cases import Recorded, seeded

QWEN = {"2B": (151_936, 1536), "7B": (152_064, 3584)}


def head(n, vocabulary, width, dtype=torch.float64):
    g = seeded()
    return [torch.randn(size, width, generator=g, dtype=torch.float64).to(dtype) for size in (n, vocabulary)]


@pytest.mark.parametrize(
    "size, n, rows, waves",
    [
        ("2B", 8192, (512, 2816), (288, 3)),
        ("2B", 6144, (512, 6144), (216, 3)),
        ("7B", 8192, (512, 8192), (288, 7)),
        ("7B", 16_384, (512, 4736), (576, 14)),
        ("7B", 300, (300, 300), (14, 1)),
    ],
)
def test_rows_are_chosen_by_waves(size, n, rows, waves):
    """Of the logits' products and of dhidden's: no smaller number of rows needs fewer."""
    vocabulary, width = QWEN[size]
    assert chunks.sweep_rows(n, vocabulary, width, 2, True) == rows

    def total(step, columns):
        return sum(chunks.waves(min(step, n - at), columns) for at in range(0, n, step))

    for step, columns, counted in zip(rows, (vocabulary, width), waves, strict=True):
        assert total(step, columns) == counted
        assert step == n or all(total(fewer, columns) >= counted for fewer in range(128, step, 128))


@pytest.fixture
def new_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("new_memory_is_nan")
@pytest.mark.parametrize("rows", [(16, 32), (16, 48), (64, 64)], ids=str)
@pytest.mark.parametrize("n", [0, 5, 40, 48])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_need_no_filled_buffer(n, rows, wanted, monkeypatch):
    """Several products or one, chunks and gradients that end early, and no rows at all."""
    monkeypatch.setattr(chunks, "sweep_rows", lambda *_: chunks.SweepRows(*rows))
    hidden, weight = head(n, 50, 6)
    sweep, seen = chunks.HeadSweep(hidden, weight, *wanted), []
    for part, logits, dlogits in sweep:
        torch.softmax(logits, 1, out=dlogits)
        seen.append(part)
    assert [row for part in seen for row in range(n)[part]] == list(range(n))
    dlogits = (hidden @ weight.T).softmax(1)
    for ours, exact, grad in zip(sweep.results(), (dlogits @ weight, dlogits.T @ hidden), wanted, strict=True):
        torch.testing.assert_close(ours, exact if grad else exact.new_empty(0))


@pytest.mark.usefixtures("new_memory_is_nan")
@pytest.mark.parametrize("way", ["blocks", "chunks"])
def test_rows_that_are_left_out_have_gradients_of_zero(way):
    (hidden, weight), live = head(6, 50, 4), torch.tensor([0, 1.0, 0, 0, 2.0, 0])
    sweep = chunks.HeadSweep(hidden, weight, True, True)
    if way == "blocks":
        for _, log_softmax, out in sweep.blocks(1.0, live, live_is_final=True):
            torch.exp(log_softmax, out=out)
    else:
        for rows, logits in sweep.chunks(live=live):
            sweep.add(rows, logits.softmax(1))
    dlogits = (hidden @ weight.T).softmax(1) * (live != 0).unsqueeze(1)
    for ours, exact in zip(sweep.results(), (dlogits @ weight, dlogits.T @ hidden), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize(("n", "products"), [(0, 0), (6144, 1), (8192, 3)])
def test_one_product_gives_the_rounded_gradient(n, products):
    """In bf16, by shapes alone: no fp32 sum of dweight where all rows fit at once, and zeros only if there are none."""
    hidden, weight = (torch.empty(size, 1536, dtype=torch.bfloat16, device="meta") for size in (n, 151_936))
    with Recorded() as operators:
        sweep = chunks.HeadSweep(hidden, weight, True, True)
        for _ in sweep:
            pass
        assert [x.dtype for x in sweep.results()] == [torch.bfloat16] * 2
    counts = {name: operators.names.count(f"aten::{name}") for name in ("addmm.dtype_out", "_to_copy")}
    assert counts == {"addmm.dtype_out": max(products - 1, 0), "_to_copy": products > 1}
    written_apart = [name for name in operators.names if any(word in name for word in ("zero", "fill", "copy_"))]
    assert written_apart == ["aten::zeros_like"] * (n == 0)
