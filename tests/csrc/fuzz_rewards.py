"""The compiled box parser against Python's `re`, on completions made to show a difference.

    python tests/csrc/fuzz_rewards.py [--seconds 60] [--seed 0] [--json FILE]

Three runs of so many seconds: the operators, from text and from token ids that cut it anywhere; the parser's header
under AddressSanitizer and UndefinedBehaviorSanitizer, by g++; and libFuzzer on it, by clang. A run whose compiler is
missing is left out by name. Any difference ends the program with the texts that show it, and the seed.
"""

import argparse
import json
import random
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from boxgrpo.bench.machine import machine
from boxgrpo.kernels import ANSWER_FORMATS, VocabularyBytes, grounding_rewards, grounding_rewards_from_ids, pack_texts

DRIVER = Path(__file__).resolve().parent / "fuzz_box_parser.cpp"
HEADERS = DRIVER.parents[2] / "csrc"
BATCH = 2000
MARKS = (b"<|box_start|>", b"<|box_end|>")
TAGS = (b"<think>", b"</think>", b"<answer>", b"</answer>", *MARKS)
BOXES = {
    "think": b"(100, 200), (300, 400)",
    "box": b"(100,200),(300,400)",
    "marked": b"<|box_start|>(100,200),(300,400)<|box_end|>",
    "list": b"[100, 200, 300, 400]",
    "fractions": b"[0.1, 0.25, 1.0, 0.999]",
}
NUMBERS = (b"0", b"7", b"007", b"42", b"999", b"1000", b"2147483647", b"2147483648", b"4294967296", b"99999999999")
DECIMALS = (b"0.5", b"1.", b".5", b"0.123456789", b"0.9999999999", b"1.0000000001", b"12.5", b"0.1.2")
JSON = (b"-1", b"-0.25", b"1e2", b"2.5E-3", b"1e+099", b"-7e-12345", b'"0.5"', b'"30"', b"1e", b"1e+", b"--1", b'""')
SPACES = (b" ", b"\n", b"\t", b"\r", b"\v", b"\f", b"\x1c", b"\x85", b"\xa0", "\u00a0".encode(), "\u3000".encode())
SIGNS = (*(bytes([c]) for c in b'()[],.<>/|-+eE" \n\0'), b"), (", b"),(", b"<|", b"</", b"<<", b"((", b"[[")
WORDS = (b"a", b"It is here", b"think", b"answer>", b"box_", "é".encode(), "世界".encode(), "١٢".encode(), b"\xff\xfe")
FOREIGN = (-100, -1, 1 << 40)  # no ids: what may stand behind an end
SOUP = (*TAGS * 4, *BOXES.values(), *NUMBERS, *DECIMALS, *JSON, *SPACES, *SIGNS * 2, *WORDS)


def completions(draw: random.Random, count: int) -> tuple[list[bytes], list[str]]:
    """Texts and an answer format for each."""
    names = draw.choices(list(ANSWER_FORMATS), (4, 1, 2, 1, 2), k=count)
    return [_completion(draw, name) for name in names], names


def _completion(draw: random.Random, name: str) -> bytes:
    kind = draw.random()
    if kind < 0.35:
        return b"".join(draw.choices(SOUP, k=draw.randrange(24)))
    if kind < 0.4:
        return draw.randbytes(draw.randrange(80))
    text = _well_formed(draw, name)
    for _ in range(draw.choice((0, 0, 1, 1, 2, 4))):
        text = _mutated(draw, text)
    return text


def _well_formed(draw: random.Random, name: str) -> bytes:
    numbers = [draw.choice(NUMBERS) if draw.random() < 0.5 else str(draw.randrange(1200)).encode() for _ in range(4)]
    if draw.random() < 0.03:
        numbers[draw.randrange(4)] = bytes(draw.choices(b"0123456789", k=draw.randrange(10, 400)))
    if name in ("list", "fractions"):
        numbers = [_json_number(draw, number) if draw.random() < 0.5 else number for number in numbers]
    x1, y1, x2, y2 = numbers
    s = b"" if draw.random() < 0.5 else b" "
    box = b"(%b,%b%b),%b(%b,%b%b)" % (x1, s, y1, s, x2, s, y2)
    if name in ("list", "fractions"):
        box = b"[%b]" % (b"," + s).join(numbers)
    if name == "marked":
        box = MARKS[0] + box + MARKS[1]
    words = b" ".join(draw.choices((*WORDS, *BOXES.values()), k=draw.randrange(4)))
    if name != "think":
        return words + box + draw.choice(WORDS)
    between = b"".join(draw.choices(SPACES[:6], k=draw.randrange(3)))
    return b"<think>%b</think>%b<answer>%b</answer>" % (words, between, box) + draw.choice((b"", b"", b"\n", b"\n\n"))


def _json_number(draw: random.Random, number: bytes) -> bytes:
    sign, exponents = draw.choice((b"", b"", b"-")), (b"", b"", b"e%d", b"E-%d", b"e+0%d")
    decimals = f"{draw.random():.{draw.randrange(1, 12)}f}".encode()[1:]
    exponent = draw.choice(exponents)
    exponent = exponent % draw.randrange(draw.choice((4, 4, 400))) if exponent else exponent
    quote = draw.choice((b"", b"", b'"'))
    return quote + sign + draw.choice((number, b"0" + decimals, number + decimals)) + exponent + quote


def _mutated(draw: random.Random, text: bytes) -> bytes:
    i, j = sorted((draw.randrange(len(text) + 1), draw.randrange(len(text) + 1)))
    kind = draw.randrange(7)
    if kind == 0:
        return text[:i] + text[j:]  # lost
    if kind == 1:
        return text[:j] + text[i:]  # said twice
    if kind == 2:
        return text[:i] + draw.choice(SOUP) + text[i:]
    if kind == 3:
        return text[:i] + draw.randbytes(1) + text[i + 1 :]
    if kind == 4:
        return text + text
    if kind == 5:
        tag = draw.choice(TAGS)
        return text.replace(tag, tag + draw.choice(SOUP), 1)
    return text.replace(draw.choice(TAGS), draw.choice(TAGS), 1)


def tokenized(draw: random.Random, texts: list[bytes], names: list[str]):
    """Ids, lengths and a vocabulary that spell the texts, cut anywhere; and the texts without special tokens."""
    tokens, rows, spelled = [b"[5, 6, 7, 8]", *MARKS, b"<answer>(1, 2), (3, 4)</answer>"], [], []  # an end has no text
    eos, after_eos = 0, 3
    for text, name in zip(texts, names, strict=True):
        row, kept = [], b""
        for part in re.split(rb"(<\|box_start\|>|<\|box_end\|>)", text):
            if part in MARKS and draw.random() < 0.5:  # as the special token, else as text
                row.append(1 + MARKS.index(part))
                kept += part if name == "marked" else b""
                continue
            cuts = sorted(draw.randrange(len(part) + 1) for _ in range(draw.randrange(1 + len(part) // 2)))
            row += range(len(tokens), len(tokens) + len(cuts) + 1)
            tokens += [part[i:j] for i, j in zip([0, *cuts], [*cuts, len(part)], strict=True)]
            kept += part
        rows.append([*row, eos, *draw.choices((after_eos, *FOREIGN), k=3)] if draw.random() < 0.5 else row)
        spelled.append(kept)
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)
    return ids, lengths, VocabularyBytes.build(tokens, [eos], mark_ids=[1, 2]), spelled


def differential(seconds: float, seed: int) -> Counter:
    """Both operators against their twin; the number of cases, and of boxes and of good formats among them."""
    draw, counts, end = random.Random(seed), Counter(), time.monotonic() + seconds
    while time.monotonic() < end:
        texts, names = completions(draw, BATCH)
        want = compare_with_re(texts, names, seed, draw if counts["cases"] // BATCH % 2 else None)
        counts.update(cases=BATCH, boxes=int(want.found.sum()), good_formats=int(want.format.sum()))
    return counts


def compare_with_re(texts: list[bytes], names: list[str], seed: int, draw: random.Random | None = None):
    """What `re` finds, after the operator found the same in the texts, or with `draw` in token ids that spell them."""
    gold = torch.tensor([[100.0, 200.0, 300.0, 400.0]]).repeat(len(texts), 1)
    codes = torch.tensor([ANSWER_FORMATS[name] for name in names], dtype=torch.uint8)
    if draw:
        ids, lengths, table, texts = tokenized(draw, texts, names)
        got = grounding_rewards_from_ids(ids, lengths, table, gold, answer_format=codes, backend="extension")
    else:
        got = grounding_rewards(*pack_texts(texts), gold, answer_format=codes, backend="extension")
    want = grounding_rewards(*pack_texts(texts), gold, answer_format=codes, backend="torch")
    require_same(got._asdict(), want, texts, names, seed)
    return want


def require_same(got: Mapping, want, texts: list[bytes], names: list[str], seed: int) -> None:
    """Each value of `got`, an array or a tensor, is that field of `want`, what `re` finds; else the program ends."""
    for field, a in got.items():
        a, b = torch.as_tensor(a), getattr(want, field)
        wrong = (a != b).view(len(texts), -1).any(1).nonzero().flatten().tolist()
        for i in wrong[:3]:
            print(f"{names[i]} {texts[i]!r}: {field} is {a[i].tolist()}, that of `re` is {b[i].tolist()}")
        if wrong:
            raise SystemExit(f"{len(wrong)} of {len(texts)} cases differ in {field}; seed {seed}.")


def compiled(folder: Path, compiler: str, *flags: str) -> Path:
    program = folder / "fuzz_box_parser"
    options = ["-std=c++20", "-O1", "-g", "-fno-sanitize-recover=all", "-I", str(HEADERS), *flags]
    subprocess.run([compiler, *options, str(DRIVER), "-o", str(program)], check=True)
    return program


def sanitized(seconds: float, seed: int, program: Path) -> Counter:
    """The header under the sanitizers `program` was built with, against the twin and itself cut in pieces."""
    draw, counts, end = random.Random(seed), Counter(), time.monotonic() + seconds
    layout = np.dtype([("boxes", "f4", 4), ("spans", "i4", 4), ("found", "?"), ("format", "?"), ("padding", "u1", 2)])
    while time.monotonic() < end:
        texts, names = completions(draw, BATCH)
        codes = [ANSWER_FORMATS[name] for name in names]
        cases = b"".join(struct.pack("<BI", c, len(text)) + text for c, text in zip(codes, texts, strict=True))
        done = subprocess.run([program], input=cases, capture_output=True)
        if done.returncode:
            raise SystemExit(
                f"{done.stderr.decode(errors='replace')}\n{program} ends with {done.returncode}; seed {seed}."
            )
        got, formats = np.frombuffer(done.stdout, layout), torch.tensor(codes, dtype=torch.uint8)
        want = grounding_rewards(*pack_texts(texts), torch.zeros(BATCH, 4), answer_format=formats, backend="torch")
        require_same({name: got[name].copy() for name in layout.names[:4]}, want, texts, names, seed)
        counts["cases"] += BATCH
    return counts


def guided(seconds: float, seed: int, folder: Path, program: Path) -> dict[str, int]:
    """libFuzzer from the texts of one batch on: the number of cases it tried, and of edges of the program they reached.

    The cases that reached a new edge are then compared with `re`.
    """
    corpus = folder / "corpus"
    corpus.mkdir()
    for i, (text, name) in enumerate(zip(*completions(random.Random(seed), 200), strict=True)):
        (corpus / f"{i}").write_bytes(bytes([ANSWER_FORMATS[name]]) + text)
    options = [f"-max_total_time={seconds:.0f}", f"-seed={seed + 1}", "-max_len=600", f"-artifact_prefix={folder}/"]
    done = subprocess.run([program, corpus, *options], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{done.stderr[-4000:]}\nlibFuzzer ends with {done.returncode}; seed {seed}.")
    cases, coverage = re.findall(r"#(\d+)\s.* cov: (\d+)", done.stderr)[-1]
    kept = [raw for raw in map(Path.read_bytes, corpus.iterdir()) if raw]
    names = [list(ANSWER_FORMATS)[raw[0] % len(ANSWER_FORMATS)] for raw in kept]
    compare_with_re([raw[1:] for raw in kept], names, seed)
    return {"cases": int(cases), "coverage": int(coverage)}


def runs(seconds: float, seed: int) -> Iterator[dict]:
    """A row for each run that found nothing: its counts, or why it was skipped."""
    start = time.monotonic()
    counts = differential(seconds, seed)
    yield {"run": "operators", **counts, "seconds": round(time.monotonic() - start)}
    for name, compiler, flags in (
        ("sanitizers", "g++", ["-fsanitize=address,undefined"]),
        ("libFuzzer", "clang++", ["-fsanitize=fuzzer,address,undefined", "-DBOXGRPO_LIBFUZZER"]),
    ):
        if shutil.which(compiler) is None:
            yield {"run": name, "skipped": f"no {compiler} here"}
            continue
        with tempfile.TemporaryDirectory() as path:
            program, start = compiled(Path(path), compiler, *flags), time.monotonic()
            if name == "libFuzzer":
                found = guided(seconds, seed, Path(path), program)
            else:
                found = sanitized(seconds, seed, program)
            yield {"run": name, **found, "seconds": round(time.monotonic() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each of the three runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the counts there")
    args = parser.parse_args()
    rows = []
    for row in runs(args.seconds, args.seed):
        rows.append(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if args.json:
        found = {"machine": machine(), "seed": args.seed, "rows": rows}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
