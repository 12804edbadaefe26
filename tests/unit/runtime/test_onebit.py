# SPDX-License-Identifier: Apache-2.0
"""What the optimizers with compressed communication refuse."""

from __future__ import annotations

import pytest
import torch

from deepspeed.runtime.fp16.onebit import OnebitAdam, OnebitLamb, ZeroOneAdam

PARAMS = [torch.nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize("name", ["var_update_scaler", "local_step_scaler", "local_step_clipper"])
def test_numbers_of_steps_that_no_schedule_can_have(name):
    with pytest.raises(ValueError, match=name):
        ZeroOneAdam(PARAMS, **{name: 0})


@pytest.mark.parametrize("kind", [OnebitAdam, OnebitLamb, ZeroOneAdam])
def test_options_that_others_stand_for(kind):
    with pytest.raises(ValueError, match="gradient_clipping"):
        kind(PARAMS, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="AMSGrad"):
        kind(PARAMS, amsgrad=True)
