"""What each CUDA kernel of csrc/ takes of a GPU, by nvcc: no GPU and no CUDA build of torch is needed.

python bench/kernel_bench/compile_cuda.py
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).resolve().parents[2] / "csrc/box_parser_cuda.cu"
CAPABILITIES = (80, 90)
KERNELS = ("score_texts", "score_tokens", "overlap")


class KernelResources(NamedTuple):
    registers: int  # of a thread
    shared: int  # bytes of a block
    spilled: int  # bytes a thread stores to and loads from local memory for want of registers
    stack: int  # bytes of a thread in local memory


def compile_cuda(source: Path, capability: int) -> dict[str, KernelResources]:
    """Kernel -> resources, of `source` compiled for one compute capability.

    Raises:
        RuntimeError: nvcc refuses the source.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", "-O3", "-fmad=false", f"-arch=sm_{capability}", "--ptxas-options=-v"]
        done = subprocess.run(
            [*command, "-I", str(SOURCE.parent), "-c", str(source), "-o", f"{folder}/object.o"],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(f"nvcc does not compile {source} for sm_{capability}: {done.stderr}")
    found = {}
    for part in done.stderr.split("Compiling entry function")[1:]:
        name = part.split("'")[1]
        name = next((kernel for kernel in KERNELS if kernel in name), name)
        stack, stores, loads = map(int, re.search(r"(\d+) bytes stack.*?(\d+) .*?stores, (\d+)", part).groups())
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        found[name] = KernelResources(registers, int(shared[1]) if shared else 0, stores + loads, stack)
    return found


def main() -> None:
    if shutil.which("nvcc") is None:
        print("compile_cuda: skipped, no nvcc here")
        return
    spilled = 0
    for capability in CAPABILITIES:
        for name, r in compile_cuda(SOURCE, capability).items():
            spilled += r.spilled
            print(
                f"sm_{capability} {name}: {r.registers} registers, {r.shared} bytes shared, {r.spilled} bytes spilled"
            )
    sys.exit(f"{spilled} bytes are spilled." if spilled else 0)


if __name__ == "__main__":
    main()
