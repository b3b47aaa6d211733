"""Rewards from token ids beside the path they replace, and the parser's rate on bytes.

    python bench/reward_bench/run.py [--merges merges.txt] [--json FILE|-]

`make bench` keeps the results. On a CPU everything runs on one core: 128 completions of 256 tokens by
`grounding_rewards_from_ids`, and by `batch_decode`, regular expressions and IoU in Python, in turn; then a few MB of
completions as bytes. On a GPU 1,024 completions of 256 tokens, with a cold L2, and any synchronisation is an error.
"""

import os
import random
import re
from pathlib import Path

import torch
from torch import Tensor

from boxgrpo.bench.publish.tables import table as results_table
from boxgrpo.bench.records import begin, flags, output
from boxgrpo.bench.reward_bench.vocabularies import benchmark_tokenizer
from boxgrpo.bench.timing import milliseconds, take_turns
from boxgrpo.kernels import VocabularyBytes, grounding_rewards, grounding_rewards_from_ids, pack_texts
from boxgrpo.trainer.data.vocabulary import box_mark_ids, token_bytes
from boxgrpo.trainer.runtime.ranks import run_as_script

TOKENS, ROWS = 256, 151_936  # of a completion; of the 2B's head
WORDS = (
    "The first image shows a red cup on a wooden table near the window, and the second one shows the same cup from "
    "another side; so the object that both images share is at the lower left of the picture. It can't be the plate, "
    "which only the third image (taken later) has."
).split()
TEXTS = (" ".join(WORDS), "<think>Here.</think><answer>(0, 0), (500, 500)</answer>")  # what is tokenized
BOX = r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)"
FORMAT = re.compile(rf"<think>.*?</think>\s*<answer>{BOX}</answer>$", re.ASCII | re.DOTALL)
ANSWER = re.compile(rf"<answer>(?:(?!</answer>).)*?{BOX}.*?</answer>", re.ASCII | re.DOTALL)


def completions(tokenizer, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (n, 256) of reasoning that ends in an answer and an end token, lengths (n), gold (n, 4) near the answer."""
    draw, rows, gold = random.Random(seed), [], []
    for _ in range(count):
        x, y, w, h = (draw.randrange(50, 450) for _ in range(4))
        answer = f"</think><answer>({x}, {y}), ({x + w}, {y + h})</answer><|im_end|>"
        tail = tokenizer.encode(answer, add_special_tokens=False)
        words = tokenizer.encode("<think>" + " ".join(draw.choices(WORDS, k=TOKENS)), add_special_tokens=False)
        rows.append(words[: TOKENS - len(tail)] + tail)
        gold.append([x + draw.randrange(40), y, x + w, y + h + draw.randrange(40)])
    return torch.tensor(rows), torch.full((count,), TOKENS), torch.tensor(gold, dtype=torch.float32)


def decoded_and_searched(tokenizer, ids: Tensor, gold: list[list[float]]) -> tuple[Tensor, Tensor]:
    """The path that ours replaces: accuracy (n) and format (n)."""
    accuracy, form = [], []
    for text, target in zip(tokenizer.batch_decode(ids, skip_special_tokens=True), gold, strict=True):
        form.append(1.0 if FORMAT.search(text) else 0.0)
        found = ANSWER.search(text)
        accuracy.append(_iou([int(digits) for digits in found.groups()], target) if found else 0.0)
    return torch.tensor(accuracy), torch.tensor(form)


def _iou(a: list[float], b: list[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    return overlap / union if union > 0 else 0.0


def rows_of(runs: dict, turns: int) -> list[dict]:
    """A row for each run, of turns of ten rounds, without the first turn.

    `first_ms` is the first round of a turn, which finds the caches full of another run's data; the others make `ms`.
    """
    rows = []
    for name, taken in take_turns(runs, turns, 10).items():
        warm = sorted(x for turn in taken[1:] for x in turn[1:])
        first = milliseconds([turn[0] for turn in taken[1:]])
        rows.append({"run": name, "rounds": len(warm), **milliseconds(warm)})
        rows[-1] |= {"first_ms": first["ms"], "samples_first_ms": first["samples_ms"]}
    return rows


def on_cpu(tokenizer, table: VocabularyBytes) -> list[dict]:
    ids, lengths, gold = completions(tokenizer, 128)
    targets = gold.tolist()
    ours = grounding_rewards_from_ids(ids, lengths, table, gold)
    theirs = decoded_and_searched(tokenizer, ids, targets)
    assert torch.allclose(ours.accuracy, theirs[0]) and torch.equal(ours.format, theirs[1]) and ours.format.all()
    runs = {
        "ids": lambda: grounding_rewards_from_ids(ids, lengths, table, gold),
        "decode, re, IoU": lambda: decoded_and_searched(tokenizer, ids, targets),
    }
    rows = [r | {"completions": 128, "tokens": TOKENS} for r in rows_of(runs, 20)]
    raw = [text.encode() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)] * 20
    text, offsets = pack_texts(raw)
    targets = gold.repeat(20, 1)
    worst, ends = pack_texts([b"<think><answer>(1, 2), (3, 4)</answer>" * 100_000])  # no byte to skip
    runs = {
        "bytes, think": lambda: grounding_rewards(text, offsets, targets),
        "bytes, list": lambda: grounding_rewards(text, offsets, targets, answer_format="list"),
        "bytes, tags and boxes only": lambda: grounding_rewards(worst, ends, gold[:1]),
    }
    for r in rows_of(runs, 10):
        size = len(worst if r["run"] == "bytes, tags and boxes only" else text)
        rows.append(r | {"bytes": size, "gb_per_second": round(size / r["ms"] / 1e6, 2)})
    return rows


def on_gpu(tokenizer, table: VocabularyBytes) -> list[dict]:
    from triton.testing import do_bench

    ids, lengths, gold = (x.cuda() for x in completions(tokenizer, 1024))
    table, formats = table.to("cuda"), torch.zeros(1024, dtype=torch.uint8, device="cuda")

    def rewards():
        return grounding_rewards_from_ids(ids, lengths, table, gold, answer_format=formats, backend="extension")

    assert rewards().format.all()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    rewards()
    torch.cuda.set_sync_debug_mode("default")
    taken = [ms / 1e3 for ms in do_bench(rewards, return_mode="all")]
    return [{"run": "ids", "completions": 1024, "tokens": TOKENS, "rounds": len(taken), **milliseconds(taken)}]


def run(merges: str | Path | None) -> dict:
    """The rows. On a CPU this process has one core and one thread from then on."""
    gpu = torch.cuda.is_available()
    if not gpu:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, for the tokenizer's threads too
        torch.set_num_threads(1)
    tokenizer, vocabulary = benchmark_tokenizer(merges, TEXTS)
    table = VocabularyBytes.build(
        token_bytes(tokenizer, ROWS), [tokenizer.eos_token_id], mark_ids=box_mark_ids(tokenizer)
    )
    rows = (on_gpu if gpu else on_cpu)(tokenizer, table)
    return {"threads": torch.get_num_threads(), "vocabulary": vocabulary, "rows": rows}


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--merges", help="Qwen2's merges.txt; default: data/qwen2_tokenizer under BOXGRPO_SHARED")
    args = parser.parse_args()
    record = begin() | {"rewards": run(args.merges)}
    output(record, args.json, results_table("rewards", record["rewards"]))


if __name__ == "__main__":
    run_as_script(main, "bench_rewards.py")
