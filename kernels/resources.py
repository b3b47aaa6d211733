"""The resources that every Triton kernel and every CUDA kernel of csrc/ takes, compiled here without a GPU.

Triton's interpreter and its compiler cannot share a process: TRITON_INTERPRET must be unset here.
"""

import itertools
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import LossOptions
from .advantages import DIFFICULTIES, SCALES
from .advantages_triton import advantages_launch
from .decode_triton import add_rms_norm_launch, merge_attention_launch, rotate_into_cache_launch, silu_mul_launch
from .dispatch import Launch
from .head_triton import fused_launch
from .logps_triton import gradient_launch, logps_launch
from .loss_triton import grpo_launch, reduce_launch, terms_launch
from .sample_triton import sample_launch
from .scale_triton import scale_launch
from .shared_keys_triton import key_gradients_launch
from .vision_triton import quick_gelu_launch, rotate_qk_launch

CAPABILITIES = (80, 90, 100)
SOURCE = pathlib.Path(__file__).resolve().parents[1] / "csrc/box_parser_cuda.cu"
KERNELS, CUDA_CAPABILITIES = ("score_texts", "score_tokens", "overlap"), (80, 90)  # of SOURCE
QWEN_2B, QWEN_7B = 151_936, 152_064
VOCABULARIES = (QWEN_2B, QWEN_7B, 32_000)  # the last one uses the launch table's other row
N, COMPLETIONS, GROUP = 8192, 128, 8
DECODERS = ((1536, 2, 8960), (3584, 4, 18944), (8192, 8, 29568))  # width, key heads and inner width of 2B, 7B and 72B
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Logits and their gradients: as a model gives them, and as the head's chunks hold them.
DTYPES = ((BF16, BF16), (FP16, FP16), (FP32, BF16), (FP32, FP16), (FP32, FP32))
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
# How rows may lie in memory: end to end; of an odd width; padded by one element, or by two; with columns apart; with
# offsets beyond int32.
LAYOUTS = ("rows", "odd", "padded", "unaligned", "columns", "far")
POINTERS = SHORT | {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


class Resources(NamedTuple):
    registers: int  # per thread
    spilled: int  # bytes of stack and local memory per thread
    shared: int  # bytes per program


def compile_launch(launch: Launch, capability: int):
    """Triton's compiled kernel for compute capability `capability`, specialised as its launcher specialises it."""
    signature, constants, attributes = {}, {}, {}
    values = [*launch.arguments, *(launch.constants[name] for name in launch.kernel.arg_names[len(launch.arguments) :])]
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, values, strict=True)):
        name = parameter.name
        special = not parameter.do_not_specialize
        if name in launch.constants or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{POINTERS[value.dtype]}"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[name] = "fp32"
        # Torch's allocations start at multiples of 16 bytes.
        if isinstance(value, Tensor) or (special and isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": launch.num_warps})


def read_cubin(path: str) -> dict[str, Resources]:
    """Kernel -> what ptxas gave it, read by the cuobjdump inside the triton package."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    numbers = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    found = {name: map(int, taken) for name, *taken in re.findall(numbers, report)}
    return {name: Resources(reg, stack + local, shared) for name, (reg, stack, shared, local) in found.items()}


def resources(compiled) -> Resources:
    """Those of a kernel that Triton has compiled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (found,) = read_cubin(file.name).values()
    return found


class Walk(NamedTuple):
    """A loop over a row, by the instructions that a warp issues for 16 elements of each of its threads."""

    slots: float  # instructions, each in a cycle of its own
    half_rate: float  # those of them that occupy their unit for two cycles
    exponentials: float  # those of them that occupy their unit for eight
    accesses: set[str]  # to global memory


# CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions": 64 results per clock and multiprocessor of
# 9.0, half of fp32's 128: comparisons, minima, selections, shifts, bits, integer sums, conversions to half precision.
# (Integer products have 64 too, but in another unit than these.) MUFU, the exponentials, has 16.
HALF_RATE = "F2FP FMNMX FSEL FSETP IADD3 ISETP LEA LOP3 PLOP3 PRMT SEL SHF VIADD".split()


def walks(launch: Launch, compiled) -> list[Walk]:
    """The loops that copy blocks of a row to shared memory, in the order of the code, read from SASS.

    A loop is what stands between a label and a later branch back to it.
    """
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    labels, opcodes, found = {}, [], []
    for label, opcode, operands in re.findall(
        r"^(?:(\.\w+):|\s+/\*\w+\*/\s+(?:@\S+ +)?(\S+)(.*?);)", sass, re.MULTILINE
    ):
        if label:
            labels[label] = len(opcodes)
            continue
        opcodes.append(opcode)
        start = labels.get(operands.partition("`(")[2].rstrip(") "))
        if opcode.startswith("BRA") and start is not None:
            found.append(opcodes[start:])
    found = [loop for loop in found if any(opcode.startswith("LDGSTS") for opcode in loop)]
    share = 16 * 32 * launch.num_warps / launch.constants["BLOCK"] if found else 0
    return [
        Walk(
            len(loop) * share,
            sum(opcode.split(".")[0] in HALF_RATE for opcode in loop) * share,
            sum(opcode.startswith("MUFU") for opcode in loop) * share,
            {opcode for opcode in loop if opcode.startswith(("LDG", "STG"))} - {"LDGDEPBAR"},
        )
        for loop in found
    ]


def compile_cuda(source: pathlib.Path, capability: int) -> dict[str, Resources]:
    """Kernel -> resources, of `source` compiled by nvcc for one compute capability.

    Raises:
        RuntimeError: nvcc refuses the source.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        command = ["nvcc", "-std=c++20", "-O3", "-fmad=false", f"-arch=sm_{capability}", "-I", str(SOURCE.parent)]
        done = subprocess.run([*command, "-cubin", str(source), "-o", cubin.name], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc does not compile {source} for sm_{capability}: {done.stderr}")
        found = read_cubin(cubin.name)
    return {next((k for k in KERNELS if k in name), name): taken for name, taken in found.items()}


def launches(every_variant: bool) -> Iterator[tuple[str, Launch]]:
    """(name, launch) for each kernel: of a bf16 step of the 2B, or of every shape, dtype, layout and option."""
    shapes = itertools.product(VOCABULARIES, DTYPES)
    for vocabulary, (dtype, gradient) in shapes if every_variant else ((QWEN_2B, DTYPES[0]), (QWEN_2B, DTYPES[2])):
        for name, launch in _row_launches(vocabulary, dtype, gradient, every_variant):
            yield f"{name} V={vocabulary} {SHORT[dtype]}->{SHORT[gradient]}", launch
    layouts = itertools.product(VOCABULARIES, (BF16, FP16, FP32), LAYOUTS[1:])
    for vocabulary, dtype, layout in layouts if every_variant else ():
        for name, launch in _row_launches(vocabulary, dtype, dtype, False, layout):
            yield f"{name} V={vocabulary} {SHORT[dtype]} {layout}", launch
    for dtype, layout in itertools.product((BF16, FP32), ("rows", "padded", "columns")):
        yield f"scale_kernel {SHORT[dtype]} {layout}", scale_launch(_rows(QWEN_2B, dtype, layout), _empty())
    for kind, o in _options(every_variant, levels=("token", "sequence")):
        objective = grpo_launch(_empty(N), *_completions(), o, _empty(N), _empty(5, N))
        for launch in (terms_launch(_empty(3, N), *_completions(), o), objective):
            yield f"{launch.kernel.fn.__name__} {kind}", launch
    yield "reduce_kernel", reduce_launch(_empty(5, N), _empty(), _empty(7))
    variants = itertools.product(DIFFICULTIES, SCALES) if every_variant else (("exp", "group"), ("exp", "batch"))
    for difficulty, scale in variants:
        rewards, out = (_empty(COMPLETIONS // GROUP, GROUP) for _ in range(2))
        groups = (_empty(COMPLETIONS // GROUP) for _ in range(2))
        launch = advantages_launch(rewards, rewards, difficulty, scale, 1e-4, out, *groups)
        yield f"advantages_kernel {difficulty} {scale}", launch
    shapes = itertools.product(DECODERS, (BF16, FP16, FP32))
    for sizes, dtype in shapes if every_variant else [(DECODERS[1], BF16)]:
        for launch in _decode_launches(*sizes, dtype):
            yield f"{launch.kernel.fn.__name__} H={sizes[0]} {SHORT[dtype]}", launch
    for dtype, heads in itertools.product((BF16, FP16, FP32), (2, 4)) if every_variant else ((BF16, 4),):
        read, own = (_empty(rows, heads, 128, dtype=dtype) for rows in (4 * N, N))
        offsets = [_empty(COMPLETIONS + 1, dtype=torch.int32) for _ in range(2)]
        yield f"key_gradients_kernel {SHORT[dtype]} {heads}", key_gradients_launch(read, read, *offsets, N, own, own)
    towers = itertools.product((BF16, FP16, FP32), (80, 128)) if every_variant else ((BF16, 80), (FP32, 80))
    for dtype, d in towers:
        for kind, launch in vision_launches(dtype, 16, d):
            yield f"{launch.kernel.fn.__name__} {kind} {SHORT[dtype]} d={d}", launch


def _rows(vocabulary: int, dtype: torch.dtype, layout: str) -> Tensor:
    """(N, vocabulary) in one of LAYOUTS; of an odd width it is one narrower."""
    if layout == "odd":
        return _empty(N, vocabulary - 1, dtype=dtype)
    strides = {"rows": (vocabulary, 1), "padded": (vocabulary + 1, 1), "unaligned": (vocabulary + 2, 1)}
    strides |= {"columns": (1, N), "far": (2**31 + 16, 1)}
    return torch.empty_strided((N, vocabulary), strides[layout], dtype=dtype, device="meta")


def _row_launches(vocabulary, dtype, gradient, every_variant, layout="rows") -> Iterator[tuple[str, Launch]]:
    logits, dlogits = (_rows(vocabulary, each, layout) for each in (dtype, gradient))
    targets = _empty(N, dtype=torch.int64)
    logps, entropy, peaks, masses = (_empty(N) for _ in range(4))
    finite = dtype != gradient  # the head's own product
    if gradient in (dtype, BF16):  # read once: the gradient's dtype plays no part
        yield "logps_kernel", logps_launch(logits, targets, 0.7, logps, entropy, peaks, masses, finite)
        for sampled in (1.0, 0.0):
            counters = [_empty(N, dtype=torch.int64) for _ in range(3)]
            for forbidden in (None, _empty(6, dtype=torch.int64)):
                launch = sample_launch(logits, 42, *counters, sampled, forbidden, _empty(N, dtype=torch.int64), logps)
                yield f"sample_kernel T={sampled} forbidden={forbidden is not None}", launch
    for upstream in ((None, None), (entropy, entropy)):
        launch = gradient_launch(logits, targets, 0.7, logps, *upstream, peaks, masses, dlogits)
        yield f"gradient_kernel entropy={upstream[0] is not None}", launch
    for kind, o in _options(every_variant, levels=("token",)):
        results = logps, entropy, _empty(5, N), dlogits
        launch = fused_launch(logits, targets, 0.7, _empty(3, N), o, *results, finite=finite)
        yield f"fused_kernel {kind}", launch


def _decode_launches(width: int, kv_heads: int, inner: int, dtype: torch.dtype, d: int = 128) -> Iterator[Launch]:
    """Those of decode.py for COMPLETIONS rows, whose arguments are slices of one product's rows."""
    n, heads = COMPLETIONS, width // d
    x, total, normed, weight = *(_empty(n, width, dtype=dtype) for _ in range(3)), _empty(width, dtype=dtype)
    yield add_rms_norm_launch(x, x, weight, 1e-6, total, normed)
    q, k, v = _empty(n, heads + 2 * kv_heads, d, dtype=dtype).split([heads, kv_heads, kv_heads], 1)
    turn, at = _empty(n, 1, d, dtype=dtype), _empty(1, dtype=torch.int64)
    cache, rows = _empty(n, 256, kv_heads, d, dtype=dtype), _empty(n * heads // kv_heads, kv_heads, d, dtype=dtype)
    yield rotate_into_cache_launch(q, k, v, turn, turn, cache, cache, at, rows)
    lse, merged = _empty(kv_heads, len(rows)), _empty(n, heads, d, dtype=dtype)
    yield merge_attention_launch(rows, lse, rows, lse, heads // kv_heads, merged)
    yield silu_mul_launch(*_empty(n, 2 * inner, dtype=dtype).chunk(2, 1), _empty(n, inner, dtype=dtype))


def vision_launches(dtype: torch.dtype, heads: int, d: int) -> Iterator[tuple[str, Launch]]:
    """Those of vision.py in a block whose queries, keys and values are slices of one product."""
    q, k, _ = _empty(N, 3, heads, d, dtype=dtype).unbind(1)
    angles, new = _empty(N, 1, d), _empty(N, heads, d, dtype=dtype)
    x = _empty(N, 4 * heads * d, dtype=dtype)
    yield "forward", rotate_qk_launch(q, k, angles, angles, False, new, new)
    yield "backward", rotate_qk_launch(new, new, angles, angles, True, new, new)
    yield "forward", quick_gelu_launch(x, None, x)
    yield "backward", quick_gelu_launch(x, x, x)


def _options(every_variant: bool, levels: tuple[str, ...]) -> Iterator[tuple[str, LossOptions]]:
    full = {
        "old_logps": _empty(N),
        "ref_logps": _empty(N),
        "weights": _empty(COMPLETIONS),
        "sampler_factor": _empty(N),
        "denominator": _empty(),
    }
    kinds = {"full": full | {"delta": 1.5}, "on policy": {}}
    if every_variant:
        kinds |= {"cispo": full | {"loss_type": "cispo", "epsilon_high": 5.0}, "bnpo": {"loss_type": "bnpo"}}
        kinds |= {"sapo": full | {"loss_type": "sapo"}, "luspo": {"loss_type": "luspo"}}
        kinds |= {f"{name} only": {name: tensor} for name, tensor in full.items()}
    for level, (kind, options) in itertools.product(levels, kinds.items()):
        yield f"{kind}, {level}", LossOptions(**options, importance_sampling_level=level)
    if every_variant:
        yield "vespo", LossOptions(**full, loss_type="vespo")


def _completions() -> tuple[Tensor, Tensor]:
    return _empty(COMPLETIONS), _empty(COMPLETIONS + 1, dtype=torch.int32)


def _empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
