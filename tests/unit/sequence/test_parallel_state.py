# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a sequence say of themselves, and that norms count whole weights on each of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deepspeed.comm.mesh import Axis
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import groups


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_of_a_sequence_clips_by_the_norm_of_whole_weights(monkeypatch, rank):
    mesh = SimpleNamespace(tensor=Axis.alone(rank), sequence=Axis("group", 2, rank, (0, 1)))
    monkeypatch.setattr(groups, "current_mesh", lambda: mesh)
    said = parallel_state_sp.get_model_parallel_rank()
    assert (said, parallel_state_sp.get_model_parallel_world_size()) == (rank, 2)
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    norm = clip_grad_norm_([param], 1.0, mpu=parallel_state_sp)
    assert norm.item() == 5.0
    # the norm plus 1e-6 divides
    torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.8]), rtol=1e-6, atol=0)
