"""boxgrpo.kernels and its drop-ins need torch and triton only, and importing them changes no state."""

import subprocess
import sys

# What is set to None in sys.modules cannot be imported by anyone, as if it were not installed.
SCRIPT = """
import sys
absent = ("trl liger_kernel verl transformers tokenizers datasets accelerate safetensors PIL yaml rich tqdm matplotlib "
          "boxgrpo.model boxgrpo.trainer boxgrpo.bench").split()
sys.modules.update(dict.fromkeys(absent))
import torch
before = torch.initial_seed(), torch.get_num_threads(), torch.get_rng_state()
import boxgrpo.kernels
assert "boxgrpo.kernels.dropin" not in sys.modules
assert all(hasattr(boxgrpo.kernels, name) for name in boxgrpo.kernels.__all__)
from boxgrpo.kernels import dropin
assert before[:2] == (torch.initial_seed(), torch.get_num_threads()) and torch.equal(before[2], torch.get_rng_state())
assert all(hasattr(dropin, name) for name in dropin.__all__)

hidden, weight, ids = torch.randn(2, 3, 4), torch.randn(9, 4), torch.zeros(2, 3, dtype=torch.int64)
logits, ones, signs = torch.randn(2, 4, 9), torch.ones(2, 3), torch.tensor([1.0, -1.0])
dropin.ChunkedLogProbFunction.apply(hidden.flatten(0, 1), weight, None, ids.flatten(), 1.0, 8)
dropin.selective_log_softmax(logits[:, 1:], ids)
dropin.selective_log_softmax_and_entropy(logits[:, 1:], ids)
dropin.triton_grpo_loss(logits, None, -ones, ids, signs)
dropin.LigerFusedLinearGRPOLoss()(hidden, weight, ids, ones, signs, ref_per_token_logps=-ones)
dropin.linear_cross_entropy(hidden, weight, ids)
dropin.logprobs_from_logits(logits[:, 1:], ids)
dropin.compute_grpo_outcome_advantage(ones, ones, [0, 0])
assert dropin.iou_reward([[{"content": "<answer>[0, 0, 5, 5]</answer>"}]], [[0, 0, 5, 5]]) == [1.0]
assert dropin.univg_r1.iou_reward([[{"content": "<answer>(0, 0), (5, 5)</answer>"}]], [[0, 0, 5, 5]]) == [1.0]
"""


def test_another_repository_needs_torch_and_triton_only():
    done = subprocess.run([sys.executable, "-P", "-c", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
