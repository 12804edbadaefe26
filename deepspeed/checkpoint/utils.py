# SPDX-License-Identifier: Apache-2.0
"""Helpers around checkpoints that other libraries import."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

import torch

from .format import optim_file


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = "cpu") -> Any:
    """Copy tensors so that saving them does not write the large flat buffers that they are views of.

    Args:
        item: a tensor, or dicts, lists and tuples of them, nested.
        device: where the copies go.

    Returns:
        The same structure with detached copies; other objects are the same objects.

    Example:
        >>> torch.save(clone_tensors_for_torch_save(engine.module.state_dict()), "model.bin")
    """
    if isinstance(item, torch.Tensor):
        return item.detach().to(device, copy=True)
    if isinstance(item, (list, tuple)):
        copies = [clone_tensors_for_torch_save(value, device) for value in item]
        return type(item)(*copies) if hasattr(item, "_fields") else type(item)(copies)
    if isinstance(item, (dict, OrderedDict)):
        pairs = [(key, clone_tensors_for_torch_save(value, device)) for key, value in item.items()]
        made = OrderedDict(pairs) if isinstance(item, OrderedDict) else dict(pairs)
        if metadata := getattr(item, "_metadata", None):
            made._metadata = metadata  # type: ignore[attr-defined]
        return made
    return item


def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """Path of the model-states file of a model-parallel rank given as text (``"00"``)."""
    return os.path.join(base_folder, f"mp_rank_{mp_rank_str}_model_states.pt")


def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """Path of a rank's optimizer shard."""
    return os.path.join(base_folder, optim_file(dp_rank, mp_rank))


def get_layer_ckpt_name_for_rank(base_folder: str, layer_id: str, tp_rank: int) -> str:
    """Path of a pipeline layer's file."""
    return os.path.join(base_folder, f"{layer_id}-model_{tp_rank:02d}-model_states.pt")
