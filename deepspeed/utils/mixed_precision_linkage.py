# SPDX-License-Identifier: Apache-2.0
"""Older place of the links from parameters to their full-precision state; see `tensor_fragment`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .tensor_fragment import link_hp_params as _link


def link_hp_params(lp_param_list: Iterable[torch.nn.Parameter], *_: Any, **__: Any) -> None:
    """Give parameters of a sharded optimizer `_hp_mapping` and the methods `get_full_hp_param`, `get_full_hp_grad`, …

    Args:
        lp_param_list: the parameters. Everything else that older callers pass is known already.
    """
    _link(lp_param_list)


def lazy_init_hp_params_optimizer_state(
    lp_param_list: Iterable[torch.nn.Parameter], *_: Any, **__: Any
) -> None:
    """Renew the links; optimizer states are looked up when they are asked for, so nothing else is due."""
    _link(lp_param_list)
