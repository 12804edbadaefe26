# SPDX-License-Identifier: Apache-2.0
"""The keep probability falls from 1 to theta."""

import math

import pytest

from deepspeed.runtime.progressive_layer_drop import ProgressiveLayerDrop


def test_keep_probability_falls_to_theta():
    drop = ProgressiveLayerDrop(theta=0.3, gamma=0.01)
    assert drop.get_theta() == 1.0
    drop.update_state(0)
    assert drop.get_theta() == 1.0
    drop.update_state(100)
    assert drop.get_theta() == pytest.approx(0.3 + 0.7 / math.e)
    assert drop.get_state() == {"progressive_layer_drop": True, "pld_theta": drop.get_theta()}
    drop.update_state(10**6)
    assert drop.get_theta() == 0.3
