"""The other packages that run the same work, and those of them that cannot run here."""

import importlib
import importlib.util
import shutil
from collections.abc import Iterable

import torch

# What a peer must be able to import, and the distribution that has it. Others come with torch and transformers.
NEEDS = {
    "compile": ("triton", "triton"),  # torch.compile's code on a GPU
    "liger": ("liger_kernel.chunked_loss", "liger-kernel"),
    "trl": ("trl.trainer.utils", "trl"),
}
# Names in tables and plots; ours too.
NAMES = {"boxgrpo": "boxgrpo", "ours": "boxgrpo", "eager": "eager", "compile": "torch.compile", "liger": "Liger"}
NAMES |= {"trl": "TRL", "univg_r1": "UniVG-R1"}
COMPILERS = ("g++", "clang++")


def skipped(peers: Iterable[str]) -> dict[str, str]:
    """Those of `peers` that cannot take part, with the reason."""
    found = {}
    for peer in peers:
        if peer == "compile" and not torch.cuda.is_available():  # its code for a CPU is C++
            if not any(shutil.which(compiler) for compiler in COMPILERS):
                found[peer] = f"there is no C++ compiler, of {', '.join(COMPILERS)}"
            continue
        needed, distribution = NEEDS.get(peer, (None, None))
        if needed is None:
            continue
        try:
            importlib.import_module(needed)
        except ImportError as error:
            absent = importlib.util.find_spec(needed.partition(".")[0]) is None
            found[peer] = f"{distribution} is not installed" if absent else f"importing {needed} fails: {error}"
    return found
