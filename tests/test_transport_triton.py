"""The fused kernel in Triton's CPU interpreter: same answers as Newton, values and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = """
import torch
from problems import costs, ragged_masks
from peft_read.transport import partial_optimal_transport, triton as fused
from peft_read.transport.problem import Kernel

torch.set_num_threads(1)
solved = 0
def count(*arguments, solver=fused.solve_newton, **options):
    global solved
    solved += len(arguments[0].cost)
    return solver(*arguments, **options)
fused.solve_newton = count
problems = 0
for family, shape, form in (
    ("aligned", (2, 9, 4), {"mass": 0.5}), ("lowd", (1, 4, 7), {"mass": 0.8}), ("lowd", (1, 6, 4), {"mass": 1.0}),
    ("matched", (1, 6, 4), {"mass": 0.6, "marginals": "count"}), ("lowd", (1, 6, 4), {"penalty": 0.3}),
):
    cost = costs(family, *shape).float()
    row_mask, col_mask = ragged_masks(*shape)
    masks = {"row_mask": row_mask, "col_mask": col_mask} if len(cost) > 1 else {}
    gradients, plans = [], []
    for method in ("newton", "triton"):
        leaf = cost.clone().requires_grad_()
        plans.append(partial_optimal_transport(leaf, method=method, **form, **masks))
        gradients.append(torch.autograd.grad(plans[-1].cost.sum(), leaf)[0])
    newton, kernel = plans
    problems += len(cost)
    assert kernel.converged.all() and kernel.marginal_error.max() <= 1e-5, (family, form)
    torch.testing.assert_close(kernel.cost, newton.cost, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(kernel.mass, newton.mass, rtol=1e-3, atol=0)
    torch.testing.assert_close(*gradients, rtol=0, atol=2e-4)
    if masks:
        assert (kernel.plan[~(row_mask[:, :, None] & col_mask[:, None, :])] == 0).all()
print(problems, "problems,", solved, "left to Newton")
assert solved <= 1
"""


def test_the_fused_kernel_agrees_with_newton():
    # A process of its own: Triton reads TRITON_INTERPRET once, when it is imported.
    environment = {
        **os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
