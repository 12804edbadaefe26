# SPDX-License-Identifier: Apache-2.0
"""`zero.Init` by a configuration alone, which is where quantization at construction is asked for."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.partition_parameters import Init


class QuantizationContext(Init):
    """Context in which modules are built with sharded parameters, quantized as the configuration says.

    Args:
        config_dict_or_path: the configuration; `weight_quantization.quantized_initialization` is read.
        param_swapper: not used.
    """

    def __init__(self, config_dict_or_path: Any, param_swapper: Any = None) -> None:
        super().__init__(config_dict_or_path=config_dict_or_path, param_swapper=param_swapper)
