# SPDX-License-Identifier: Apache-2.0
"""How much each rank sends and gets when heads are exchanged for positions, without the ranks."""

from __future__ import annotations

import pytest
import torch

from deepspeed.sequence import layer


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shares"),
    [
        (12, 6, [3, 3, 3, 3]),  # heads split evenly though key-value heads would not
        (8, 2, [2, 2, 2, 2]),
        (12, 4, [3, 3, 3, 3]),
        (18, 9, [6, 4, 4, 4]),
    ],
)
def test_heads_come_back_as_they_went(monkeypatch, heads, kv_heads, shares):
    asked = []
    monkeypatch.setattr(layer.dist, "get_world_size", lambda group: 4)
    monkeypatch.setattr(layer, "exchange", lambda *way: asked.append(way[1:5]))
    monkeypatch.setattr(layer, "lengths_of", lambda *_: shares)
    layer.single_all_to_all(torch.empty(1, 2, heads, 5), 2, 1, 0, None, num_kv_heads=kv_heads)
    own = torch.empty(1, 8, shares[3], 5)
    layer.single_all_to_all(own, 1, 2, 0, None, num_kv_heads=kv_heads)
    assert asked == [(2, 1, shares, [2] * 4), (1, 2, [2] * 4, shares)]
