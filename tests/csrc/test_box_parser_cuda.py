"""The CUDA half of csrc/: it compiles without spills, its kernels run here as coroutines, and on a GPU as they are."""

import ctypes
import pathlib
import random
import re
import shutil
import subprocess

import pytest
import torch

from boxgrpo.kernels import (
    ANSWER_FORMATS,
    GroundingRewards,
    VocabularyBytes,
    box_iou,
    grounding_rewards,
    grounding_rewards_from_ids,
    pack_texts,
)
from boxgrpo.kernels.resources import CUDA_CAPABILITIES, KERNELS, SOURCE, compile_cuda
from boxgrpo.kernels.vocabulary import unpack_entries
from fuzz_rewards import completions, tokenized

HERE = pathlib.Path(__file__).resolve().parent
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
GOLD = torch.tensor([100.0, 200.0, 300.0, 400.0])


def test_the_parser_and_the_kernels_include_no_torch_and_no_stl():
    """So that nvcc compiles them anywhere, and a foreign program takes the header as it is."""
    allowed = {"cstdint", "cstring", "cassert", "emmintrin.h", "box_parser.h", "launch.h"}
    for name in ("box_parser.h", "launch.h", "token_row.h", "box_parser_cuda.cu"):
        found = set(re.findall(r'#include [<"](.*)[>"]', (SOURCE.parent / name).read_text()))
        assert found and found <= allowed, name


@needs_nvcc
@pytest.mark.parametrize("capability", CUDA_CAPABILITIES)
def test_the_kernels_compile_without_spills(capability):
    found = compile_cuda(SOURCE, capability)
    assert found.keys() == set(KERNELS)
    assert all(r.spilled == 0 and 0 < r.registers <= 128 for r in found.values()), found


@needs_nvcc
def test_a_spill_is_detected(tmp_path):
    """A kernel with more in flight than the registers it may have: the check above can fail."""
    source = tmp_path / "greedy.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) greedy(float* x) {\n  float kept[128];\n"
        "#pragma unroll\n  for (int i = 0; i < 128; ++i) kept[i] = x[i * 1024 + threadIdx.x];\n  __syncthreads();\n"
        "#pragma unroll\n  for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = kept[127 - i] * kept[i / 2];\n}\n"
    )
    (found,) = compile_cuda(source, 90).values()
    assert found.spilled > 0


def structure(name, *fields):
    """A C struct of csrc/launch.h: pointers are written *name."""
    kinds = {"*": ctypes.c_void_p, "?": ctypes.c_bool}
    typed = [(field.lstrip("*?"), kinds.get(field[0], ctypes.c_int64)) for field in fields]
    return type(name, (ctypes.Structure,), {"_fields_": typed})


Texts = structure("Texts", "*bytes", "*offsets", "size")
Tokens = structure("Tokens", "*ids", "width", "*lengths", "?wide", "*bytes", "*entries", "size", "vocabulary")
Rewards = structure("Rewards", "*gold", "*formats", "*accuracy", "*format", "*boxes", "*found", "*spans", "n")
Overlaps = structure("Overlaps", "*a", "*b", "*out", "n", "m", "?pairwise", "?generalized")


@pytest.fixture(scope="session")
def emulator(tmp_path_factory):
    """csrc/box_parser_cuda.cu, its threads coroutines on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    library = tmp_path_factory.mktemp("cuda") / "cuda_on_cpu.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", "-UNDEBUG"]
    flags += ["-I", str(SOURCE.parent)]
    # A word that is not at a multiple of 8 ends a GPU's kernel, and here the process.
    flags += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
    subprocess.run(["g++", *flags, str(HERE / "cuda_on_cpu.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(library)
    loaded.failed_assertion.restype = ctypes.c_char_p
    return loaded


def emulated(emulator, name, source, gold, formats):
    """What a kernel wrote with its threads run from the first to the last, and from the last to the first."""
    run = getattr(emulator, name)
    found = []
    for last_first in (False, True):
        emulator.run_last_thread_first(last_first)
        found.append(outputs(run, source, gold, formats))
        assert emulator.failed_assertion() is None
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    return found[0]


def outputs(run, source, gold, formats):
    n = len(gold)
    out = GroundingRewards(
        torch.full((n,), torch.nan),
        torch.full((n,), torch.nan),
        torch.full((n, 4), torch.nan),
        torch.ones(n, dtype=torch.bool),
        torch.full((n, 4), -9, dtype=torch.int32),
    )
    rewards = Rewards(gold.data_ptr(), formats.data_ptr(), *(x.data_ptr() for x in out), n)
    run(ctypes.byref(source), ctypes.byref(rewards))
    return out


def tokens(ids, lengths, table):
    wide, sizes = lengths.dtype == torch.int64, map(len, table)
    return Tokens(ids.data_ptr(), ids.shape[1], lengths.data_ptr(), wide, *(x.data_ptr() for x in table), *sizes)


def cases(count, seed):
    """Adversarial completions, some longer than a tile of the kernel or with such a token."""
    draw = random.Random(seed)
    texts, names = completions(draw, count)
    for i in range(0, count, 20):
        texts[i] = draw.randbytes(draw.randrange(1900, 2100)).replace(b"<", b"-") + texts[i] + b" " * i + texts[i]
    ids, lengths, table, spelled = tokenized(draw, texts, names)
    vocabulary, data = len(table.entries), table.data.numpy().tobytes()
    tokens = [data[at : at + size] for at, size, _ in zip(*(x.tolist() for x in unpack_entries(table.entries)))]
    long = b"x" * 5000 + b"<answer>(1, 2), (3, 4)</ans"
    ids[0, :2], lengths[0], texts[0] = torch.tensor([vocabulary, vocabulary + 1]), 2, long + b"wer>"
    # An end, and turns of answers behind it; then an end, and behind it no ids, of the same lane and of others.
    ids[1], lengths[1], ids[1, 0], spelled[1] = 3, 1 << 60, 0, b""  # a length beyond the ids
    ids[2], lengths[2], ids[2, 0], spelled[2] = -100, ids.shape[1], 0, b""
    ids[3], lengths[3], ids[3, 40], spelled[3] = 3, ids.shape[1], 0, tokens[3] * 40
    ids[3, 41::2] = vocabulary + 2
    lengths[4], lengths[5], spelled[4], spelled[5] = -9, -(1 << 60), b"", b""
    table = VocabularyBytes.build([*tokens, long, b"wer>"], [0], mark_ids=[1, 2])
    codes = torch.tensor([ANSWER_FORMATS[name] for name in names], dtype=torch.uint8)
    return texts, [texts[0], *spelled[1:]], ids, lengths, table, GOLD.repeat(count, 1), codes


def same(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        assert torch.equal(a, b), name


def test_the_kernels_agree_with_the_twin(emulator):
    """A warp's gathering, tiles, windows and scans, in blocks that the last completions do not fill."""
    texts, spelled, ids, lengths, table, gold, codes = cases(303, seed=0)
    assert ids.shape[1] > 256 and max(map(len, texts)) > 2048  # more than a turn of a warp, more than a tile
    text, offsets = pack_texts(texts)
    want = grounding_rewards(text, offsets, gold, answer_format=codes, backend="torch")
    got = emulated(emulator, "texts_on_cuda", Texts(text.data_ptr(), offsets.data_ptr(), len(text)), gold, codes)
    same(got, want)
    want = grounding_rewards(*pack_texts(spelled), gold, answer_format=codes, backend="torch")
    for length in (lengths, lengths.int()):
        same(emulated(emulator, "tokens_on_cuda", tokens(ids, length, table), gold, codes), want)
    assert want.found.sum() > 50


def refused(emulator, name, source, n=1):
    """What a kernel asserts of its input and does not find."""
    outputs(getattr(emulator, name), source, GOLD.repeat(n, 1), torch.ones(n, dtype=torch.uint8))
    return (emulator.failed_assertion() or b"").decode()


@pytest.mark.parametrize("foreign", [-100, -1, 3, 1 << 40])
def test_an_id_outside_the_table_is_refused_before_an_end_alone(emulator, foreign):
    """Wherever in a turn of the warp, and in a later one, they stand."""
    table, width = VocabularyBytes.build([b"a<", b"b", b"</s>"], [2]), 600
    length = torch.tensor([width])
    for place, end in ((0, 1), (3, 5), (6, 100), (200, 255), (255, 256), (300, 599), (599, None), (0, None)):
        ids = torch.zeros(1, width, dtype=torch.int64)
        ids[0, place] = foreign
        if end is not None:
            ids[0, end] = 2
        assert "ids holds what the table does not cover" in refused(
            emulator, "tokens_on_cuda", tokens(ids, length, table)
        )
        ids[0, place], ids[0, place:] = 0, foreign
        ids[0, place] = 2
        assert not refused(emulator, "tokens_on_cuda", tokens(ids, length, table))


@pytest.mark.parametrize(
    "size, wrong", [(13, ""), (12, "a token of the table leaves its bytes"), (5, "leaves its bytes")]
)
def test_a_table_that_leaves_its_bytes_is_refused(emulator, size, wrong):
    """As on a CPU; a table that `build` makes holds what its entries say."""
    entries = VocabularyBytes.build([b"(1,2),(3,4)", b"xy"], []).entries
    table, ids = VocabularyBytes(torch.zeros(size, dtype=torch.uint8), entries), torch.tensor([[0, 1], [2, 2]])
    found = refused(emulator, "tokens_on_cuda", tokens(ids[:1], ids[1], table))
    assert wrong in found and bool(wrong) == bool(found)


@pytest.mark.parametrize(
    "end, size, wrong",
    [(1 << 31, 1 << 31, "counted in int32"), ((1 << 31) + 5,) * 2 + ("counted in int32",), (9, 8, "leave the text")],
)
def test_a_text_of_2_gib_is_refused(emulator, end, size, wrong):
    """And one that its offsets leave: before a byte of it is read, for there are none here."""
    offsets = torch.tensor([0, end])
    assert wrong in refused(emulator, "texts_on_cuda", Texts(None, offsets.data_ptr(), size))


@pytest.mark.parametrize("device", ["emulator", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("generalized", [False, True])
def test_overlaps_agree_with_the_twin(device, pairwise, generalized, request):
    a, b = boxes(300, 0), boxes(70 if pairwise else 300, 1)
    options = {"pairwise": pairwise, "generalized": generalized}
    want = box_iou(a, b, **options, backend="torch")
    if device == "gpu":
        out = box_iou(a.cuda(), b.cuda(), **options, backend="extension").cpu()
    else:
        out = torch.full_like(want, torch.nan)
        overlaps = Overlaps(a.data_ptr(), b.data_ptr(), out.data_ptr(), len(a), len(b), pairwise, generalized)
        request.getfixturevalue("emulator").overlap_on_cuda(ctypes.byref(overlaps))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)


def boxes(n, seed):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=g) * 800
    return torch.cat((corner, corner + torch.rand(n, 2, generator=g) * 400 - 20), 1)


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_twin_and_nothing_synchronises():
    texts, spelled, ids, lengths, table, gold, codes = cases(4000, seed=1)
    on_gpu = [x.cuda() for x in (*pack_texts(texts), ids, lengths, gold, codes)]
    text, offsets, ids, lengths, gold_gpu, codes_gpu = on_gpu
    table = table.to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        by_text = grounding_rewards(text, offsets, gold_gpu, answer_format=codes_gpu, backend="extension")
        by_ids = grounding_rewards_from_ids(ids, lengths, table, gold_gpu, answer_format=codes_gpu, backend="extension")
        named = grounding_rewards(text, offsets, gold_gpu, answer_format="box", backend="extension")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, raw, form in ((by_text, texts, codes), (by_ids, spelled, codes), (named, texts, "box")):
        want = grounding_rewards(*pack_texts(raw), gold, answer_format=form, backend="torch")
        same(GroundingRewards(*(x.cpu() for x in got)), want)
