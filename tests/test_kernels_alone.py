"""The kernel library needs torch and nothing else: no triton, nothing of rewardmap."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib.abc, importlib.util, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers", "trl", "verl", "rewardmap"):
            raise ModuleNotFoundError(name)

real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "triton" else real(name, package)
sys.meta_path.insert(0, Absent())

import torch
import rewardmap_kernels as rk

assert not {"triton", "transformers", "rewardmap"} & {name.split(".")[0] for name in sys.modules}
assert "torch._dynamo" not in sys.modules, "it costs as much as torch itself"
hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
out = rk.linear_policy_loss(hidden, weight, torch.arange(5), advantages=torch.ones(5), normalizer=5.0,
                            objective=rk.PolicyObjective())
out.loss.backward()
assert weight.grad.isfinite().all() and rk.last_path("linear_policy_loss")[0] in ("native", "torch")
with rk.use_implementation("torch"):
    rk.selective_log_softmax(hidden.detach(), torch.zeros(5, dtype=torch.long))
assert rk.last_path("selective_log_softmax") == ("torch", ())
try:
    with rk.use_implementation("triton"):
        rk.selective_log_softmax(hidden.detach(), torch.zeros(5, dtype=torch.long))
except ValueError as error:
    print(error)
"""


def test_torch_is_enough() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "selective_log_softmax cannot run by triton: triton is not installed" in done.stdout
