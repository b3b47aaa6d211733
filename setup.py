"""The distribution `boxgrpo`.

The folders stay top-level, the import names do not: a top-level package called `kernels` would shadow the Hugging Face
distribution of that name, which transformers imports.
"""

from setuptools import setup

setup(
    name="boxgrpo",
    version="0.1.0",
    description="A custom-kernel GRPO trainer for visual grounding with Qwen2-VL",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={
        "boxgrpo.kernels": "kernels",
        "boxgrpo.kernels.dropin": "kernels/dropin",
        "boxgrpo.model": "model",
        "boxgrpo.trainer": "trainer",
        "boxgrpo.bench": "bench",
    },
    packages=["boxgrpo.kernels", "boxgrpo.kernels.dropin", "boxgrpo.model", "boxgrpo.trainer", "boxgrpo.bench"],
    package_data={"boxgrpo.trainer": ["recipes/*.yaml"]},
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
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-benchmark>=5",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "trl>=1.16",
            "liger-kernel>=0.8",
        ],
        "gpu": ["liger-kernel>=0.8", "flash-attn>=2.7"],
        "deepspeed": ["deepspeed>=0.19"],
        "vllm": ["vllm>=0.22"],
    },
)
