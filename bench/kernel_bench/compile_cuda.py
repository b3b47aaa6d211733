"""What each CUDA kernel of csrc/ takes of a GPU, by nvcc: no GPU and no CUDA build of torch is needed.

python bench/kernel_bench/compile_cuda.py
"""

import shutil
import sys

from boxgrpo.kernels.resources import CUDA_CAPABILITIES, SOURCE, compile_cuda


def main() -> None:
    if shutil.which("nvcc") is None:
        print("compile_cuda: skipped, no nvcc here")
        return
    spilled = 0
    for capability in CUDA_CAPABILITIES:
        for name, r in compile_cuda(SOURCE, capability).items():
            spilled += r.spilled
            words = f"{r.registers} registers, {r.shared} bytes shared, {r.spilled} bytes spilled"
            print(f"sm_{capability} {name}: {words}")
    sys.exit(f"{spilled} bytes are spilled." if spilled else 0)


if __name__ == "__main__":
    main()
