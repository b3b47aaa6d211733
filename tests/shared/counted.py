"""What tests/bench/test_dry_run.py measures, in a process of its own: fake CUDA tensors change torch for good."""

import torch

from boxgrpo.bench.step_bench.dry_run import PUBLISHED, count_phases, fake_cuda, published_case
from boxgrpo.bench.step_bench.launches import Counts, LaunchCounter
from boxgrpo.kernels import fused_grpo_loss


def count_everything() -> dict[str, dict[str, Counts]]:
    return {"snippets": count_snippets(), "heads": count_heads()} | {
        model: count_phases(published_case(model)) for model in PUBLISHED
    }


def count_heads() -> dict[str, Counts]:
    """The fused loss of 8192 tokens from the hidden states of a published model, forward and gradients."""
    fake_cuda()
    with LaunchCounter().counting() as counter:
        for name, sizes in {"2B": (151_936, 1536), "7B": (152_064, 3584)}.items():
            head = [torch.empty(n, sizes[1], dtype=torch.bfloat16, device="cuda") for n in (8192, sizes[0])]
            targets, bounds = (torch.empty(n, dtype=torch.int64, device="cuda") for n in (8192, 33))
            advantages = torch.empty(32, device="cuda")
            counter.phase(name)
            fused_grpo_loss(*(x.requires_grad_() for x in head), targets, advantages, bounds)
    return counter.found


def count_snippets() -> dict[str, Counts]:
    """The counts of each snippet below."""
    fake_cuda()
    with LaunchCounter().counting() as counter:
        x, wide = torch.zeros(4, 8, dtype=torch.bfloat16, device="cuda"), torch.zeros(4, 8, device="cuda")
        ids, small, large = torch.zeros(3, dtype=torch.int64, device="cuda"), torch.zeros(8), torch.zeros(1 << 17)
        weight, out = torch.nn.Parameter(x), torch.empty(4, 4, device="cuda")
        q, k, v = (torch.empty_like(x)[:3].view(3, 1, 8) for _ in range(3))
        unknown, known = (ids[:2].int() for _ in range(2))
        segments = q, k, v, *2 * [ids.int()], 2, 2, 0.0, False, False
        counter.used[known] = 2
        snippets = {
            "views": lambda: torch.empty_like(x).view(2, 16).t()[:1],
            "sum": lambda: x + x,
            "sums": lambda: x + x + x + x + x,
            "sum in place": lambda: x.add_(1),
            "expanded": lambda: x[:1].expand(4, 8) + 1,
            "fill": lambda: x.zero_(),
            "rows read": lambda: x[ids],
            "rows written": lambda: x.index_copy_(0, ids[:1], x[:1]),
            "product": lambda: torch.mm(x, x.t(), out=out, out_dtype=torch.float32),
            "all keys": lambda: torch.ops.aten._flash_attention_forward(*segments, seqused_k=unknown),
            "used keys": lambda: torch.ops.aten._flash_attention_forward(*segments, seqused_k=known),
            "kept on the host": lambda: small.tolist(),
            "to the host": lambda: x.cpu(),
            "to the host, not blocking": lambda: x.to("cpu", non_blocking=True),
            "into host memory": lambda: small.copy_(wide[0], non_blocking=True),
            "into pinned memory": lambda: small.pin_memory().copy_(wide[0], non_blocking=True),
            "from the host": lambda: small.to("cuda"),
            "from the host, not blocking": lambda: small.to("cuda", non_blocking=True),
            "from the host, not blocking, large": lambda: large.to("cuda", non_blocking=True),
            "from pinned memory": lambda: large.pin_memory()[1:].to("cuda", non_blocking=True),
            "from pinned memory, blocking": lambda: torch.empty(9, pin_memory=True).to("cuda"),
            "a list": lambda: torch.tensor([1, 2], device="cuda"),
            "a value": lambda: int(ids[0]),
            "a mask": lambda: x[wide > 0],
            "two dtypes": lambda: x + wide,
            "two devices": lambda: wide + small,
            "a weight's cast": lambda: weight.float(),
        }
        for name, snippet in snippets.items():
            counter.phase(name)
            try:
                snippet()
            except ValueError:  # needs a fake tensor's value
                assert counter.counts.waits
            except RuntimeError:
                counter.counts.mixes["two devices"] += 1
    return counter.found
