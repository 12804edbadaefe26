# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel layers by their public names."""

from __future__ import annotations

from .tp_cut import shard_widths as _subparam_shard_widths  # noqa: F401  (its public name)
from .tp_fused_layers import GateUpPack_LinearLayer as GateUpPack_LinearLayer
from .tp_fused_layers import SubParamLinearAllreduce as SubParamLinearAllreduce
from .tp_fused_layers import SubParamLinearLayer as SubParamLinearLayer
from .tp_fused_layers import Yuan_LinearAllreduce as Yuan_LinearAllreduce
from .tp_fused_layers import Yuan_LinearLayer as Yuan_LinearLayer
from .tp_fused_layers import fused_LinearLayer as fused_LinearLayer
from .tp_layer import GatherReplacedLayerParams as GatherReplacedLayerParams
from .tp_layer import LinearAllreduce as LinearAllreduce
from .tp_layer import LinearLayer as LinearLayer
from .tp_layer import LmHeadLinearAllreduce as LmHeadLinearAllreduce
from .tp_layer import TensorParallelLayer as TensorParallelLayer
from .tp_layer import is_autotp_training_mode as is_autotp_training_mode
from .tp_layer import set_autotp_mode as set_autotp_mode
from .tp_metadata import DS_AUTOTP_UC_META as DS_AUTOTP_UC_META
from .tp_metadata import _build_param_uc_restore_meta as _build_param_uc_restore_meta
from .tp_metadata import _get_param_uc_conversion_meta as _get_param_uc_conversion_meta
from .tp_metadata import (
    collect_autotp_universal_checkpoint_info as collect_autotp_universal_checkpoint_info,
)
