# SPDX-License-Identifier: Apache-2.0
"""The optimizers and the op registry reach the kernels where there are some, and torch where there are none."""

from __future__ import annotations

import pytest
import torch

from deepspeed.ops import cuda, registry
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import FusedLion


def trained(make, steps=3):
    """Return the params after some steps on fixed gradients; the second param joins later."""
    torch.manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(n)) for n in (7, 300, 0, 2, 9001)]
    optimizer = make(params)
    for step in range(steps):
        for index, param in enumerate(params):
            param.grad = None if index == 1 and step == 0 else torch.randn(param.shape)
        versions = [param._version for param in params]
        optimizer.step()
        moved = [p._version > v for p, v in zip(params, versions, strict=True)]
        assert moved == [p.grad is not None for p in params]
    return params, optimizer


@pytest.mark.parametrize(
    ("make", "launches"),
    (
        # one launch for the params of one step count: 1 + 2 + 2
        (lambda p: FusedAdam(p, lr=0.1, weight_decay=0.1), 5),
        (lambda p: FusedAdam(p, lr=0.1, adam_w_mode=False, bias_correction=False), 5),
        (lambda p: FusedLion(p, lr=0.01, weight_decay=0.1), 5),
        # three launches where all counts are equal, else the reference
        (lambda p: FusedLamb(p, lr=0.1, weight_decay=0.1, max_grad_norm=1.0), 3),
    ),
)
def test_optimizers_step_groups_by_kernel_as_by_torch(kernels, make, launches):
    served, optimizer = trained(make)
    assert len(kernels.calls("cuLaunchKernel")) == launches
    before = cuda.use(cuda.Loader())
    try:
        expected, other = trained(make)
    finally:
        cuda.use(before)
    for got, wanted in zip(served, expected, strict=True):
        # fp32 rules in one order of operations; the sums of LAMB's norms in another
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    steps = [optimizer.state[p]["step"] for p in served]
    assert steps == [other.state[p]["step"] for p in expected] == [3, 2, 3, 3, 3]


def test_lamb_reports_its_ratios_from_the_kernels(kernels):
    params = [torch.nn.Parameter(torch.full((4,), float(n))) for n in (1, 2)]
    for param in params:
        param.grad = torch.ones(4)
    optimizer = FusedLamb(params, lr=0.1)
    optimizer.step()
    # after the first step the update is 1 everywhere (bias correction is part of the step size): m / sqrt(v)
    update = 0.1 / 0.001**0.5
    wanted = [max(0.01, n / update) for n in (1.0, 2.0)]
    assert optimizer.get_lamb_coeffs() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ("adam_step", "adagrad_step", "lion_step", "squared_norm"))
def test_ops_with_a_kernel_name_one_that_serves(kernels, name):
    op = registry.ops()[name]
    x = [torch.rand(10) for _ in range(4)]
    arguments = {
        "adam_step": (*x, None, 0.1, 0.9, 0.99, 1e-8, 0.0, 1, True, True, 1.0),
        "adagrad_step": (*x[:3], None, 0.1, 1e-8, 0.0, 1.0),
        "lion_step": (*x[:3], None, 0.1, 0.9, 0.99, 0.0, 1.0),
        "squared_norm": (x[0],),
    }[name]
    assert op.on_cuda(*arguments) is not NotImplemented
    assert kernels.calls("cuLaunchKernel")
    cuda.use(cuda.Loader())
    assert op.on_cuda(*arguments) is NotImplemented
