# SPDX-License-Identifier: Apache-2.0
"""What the attention of split vision encoders refuses before any rank waits for another."""

from __future__ import annotations

import pytest
import torch

from deepspeed.sequence.autosp_vit import UlyssesSPViTAttention


def test_packed_patches_are_refused_by_name():
    attention = UlyssesSPViTAttention(torch.nn.Identity(), None)
    with pytest.raises(ValueError, match=r"packed patches .*Identity given shape \(4, 6\)"):
        attention(torch.ones(4, 6))
