"""Who else runs the same work, and who is not here to do it."""

import importlib
import importlib.util
from collections.abc import Iterable

# What a peer must be able to import, and the distribution that has it. Others come with torch and transformers.
NEEDS = {
    "compile": ("triton", "triton"),  # torch.compile's code on a GPU; a CPU's is C++
    "liger": ("liger_kernel.chunked_loss", "liger-kernel"),
    "trl": ("trl.trainer.utils", "trl"),
}


def skipped(peers: Iterable[str]) -> dict[str, str]:
    """Those of `peers` that cannot take part, with the reason."""
    found = {}
    for peer in peers:
        needed, distribution = NEEDS.get(peer, (None, None))
        if needed is None:
            continue
        try:
            importlib.import_module(needed)
        except ImportError as error:
            absent = importlib.util.find_spec(needed.partition(".")[0]) is None
            found[peer] = f"{distribution} is not installed" if absent else f"importing {needed} fails: {error}"
    return found
