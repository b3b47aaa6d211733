"""The distribution `boxgrpo`.

The folders stay top-level, the import names do not: a top-level package called `kernels` would shadow the Hugging Face
distribution of that name, which transformers imports.

The compiled box parser, `boxgrpo.kernels._C`, is optional: what cannot be compiled here is left out, and its torch twin
serves. torch must be installed before (pip's --no-build-isolation).
"""

import os
import warnings

from setuptools import find_packages, setup

try:
    from torch import cuda, version
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:  # for the metadata alone, or no torch yet
    BuildExtension = object
    warnings.warn("No torch here: boxgrpo is installed without its compiled box parser.")

# No contraction of a product and a sum: CPU and GPU round alike.
CXX_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-g0"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-UNDEBUG"]  # what a kernel is given is asserted
# For machines that build without a GPU in sight, where torch finds no architecture and gives up; the last one is PTX.
ARCHITECTURES = [
    f"-gencode=arch=compute_{of},code={code}" for of, code in ((80, "sm_80"), (90, "sm_90"), (90, "compute_90"))
]


FOLDERS = ("kernels", "model", "trainer", "bench")


def subpackages(folder: str) -> list[str]:
    return [f"{folder}.{name}" for name in find_packages(folder)]


def candidates() -> list:
    """The extensions to try, best first."""
    name, sources = "boxgrpo.kernels._C", ["csrc/binding.cpp", "csrc/box_parser.cpp"]
    depends = ["csrc/box_parser.h", "csrc/launch.h", "csrc/token_row.h"]
    found = [CppExtension(name, sources, extra_compile_args={"cxx": CXX_FLAGS}, depends=depends)]
    if CUDA_HOME and version.cuda:
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST") or cuda.device_count()
        nvcc_flags = NVCC_FLAGS if chosen else [*NVCC_FLAGS, *ARCHITECTURES]
        flags = {"cxx": [*CXX_FLAGS, "-DBOXGRPO_CUDA"], "nvcc": nvcc_flags}
        sources = [*sources, "csrc/box_parser_cuda.cu"]
        found.insert(0, CUDAExtension(name, sources, extra_compile_args=flags, depends=depends))
    return found


class BuildWhatCompiles(BuildExtension):
    def run(self):
        compiler, inplace = self.compiler, self.inplace  # options, which a run that fails leaves overwritten
        for extension in candidates():
            self.compiler, self.inplace = compiler, inplace
            vars(self.extensions[0]).update(vars(extension))  # which keeps what setuptools noted in it
            try:
                return super().run()
            except Exception as error:  # no compiler, one that torch refuses, a CUDA of another version
                warnings.warn(f"Could not compile {', '.join(extension.sources)}: {error}")
        self.extensions = []
        return None


optional = {}
if BuildExtension is not object:
    optional = {"ext_modules": candidates()[:1], "cmdclass": {"build_ext": BuildWhatCompiles}}

setup(
    name="boxgrpo",
    version="0.1.0",
    description="A custom-kernel GRPO trainer for visual grounding with Qwen2-VL",
    license="Apache-2.0",
    python_requires=">=3.11",
    entry_points={"console_scripts": ["boxgrpo = boxgrpo.trainer.cli:main"]},
    package_dir={f"boxgrpo.{folder}": folder for folder in FOLDERS},
    packages=[f"boxgrpo.{package}" for folder in FOLDERS for package in (folder, *subpackages(folder))],
    package_data={
        "boxgrpo.trainer": ["recipes/*.yaml"],
        "boxgrpo.trainer.chains": ["templates/*"],
        "boxgrpo.trainer.world": ["base/*"],
        "boxgrpo.trainer.evaluation": ["templates/*.html", "benchmarks.json"],
        "boxgrpo.trainer.apps": ["page/*"],
        "boxgrpo.bench.publish": ["templates/*", "demands.json"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pillow>=11",
        "pyyaml>=6",
        "tqdm>=4.66",
        "rich>=13",
        "matplotlib>=3.9",
        "tensorboard>=2.17",
        "nvtx>=0.2.10",
        "jinja2>=3.1",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "hypothesis>=6.100",
            "psutil>=5.9",
            "ruff>=0.9",
            "trl>=1.16",
            "liger-kernel>=0.8",
            "deepspeed>=0.19",
            "peft>=0.18",
            "pycocotools>=2.0.8",
            "pyarrow>=15",
            "flask>=3.1",
            "waitress>=3",
            "playwright>=1.50",
            "openai>=3",
            "transformers[serving]>=5.17",
            "scikit-learn>=1.5",
        ],
        "cot": ["openai>=3"],
        "gpu": ["liger-kernel>=0.8", "flash-attn>=2.7"],
        "deepspeed": ["deepspeed>=0.19"],
        "lora": ["peft>=0.18"],
        "serve": ["flask>=3.1", "waitress>=3"],
        "vllm": ["vllm>=0.22"],
        "mmiu": ["pyarrow>=15"],
        "odinw": ["pycocotools>=2.0.8"],
        "digits": ["scikit-learn>=1.5"],
    },
    **optional,
)
