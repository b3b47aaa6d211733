"""boxgrpo.kernels knows tensors only."""

import subprocess
import sys

SCRIPT = """
import sys
import torch
before = torch.initial_seed(), torch.get_num_threads(), torch.get_rng_state()
import boxgrpo.kernels
foreign = {"transformers", "boxgrpo.model", "boxgrpo.trainer", "boxgrpo.bench"} & set(sys.modules)
assert not foreign, foreign
assert before[:2] == (torch.initial_seed(), torch.get_num_threads()) and torch.equal(before[2], torch.get_rng_state())
assert all(hasattr(boxgrpo.kernels, name) for name in boxgrpo.kernels.__all__)
"""


def test_importing_the_kernels_imports_nothing_above_them_and_changes_no_state():
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
