# SPDX-License-Identifier: Apache-2.0
"""The dtypes of an engine's model, as its configuration gives them."""

from __future__ import annotations

from typing import Any

import torch

from deepspeed.utils.errors import explain

from . import module_prep
from .config_utils import DtypeEnum


class DtypeAccessors:
    """What the configuration makes of parameters, gradients and buffers."""

    _config: Any
    module: torch.nn.Module

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """`(dtype of the model, dtype in which gradients add up)`."""
        model = _mode_dtype(self) or torch.float32
        return model, self._config.grad_accum_dtype or model

    def _mixed_precision_dtypes(self) -> tuple[torch.dtype | None, torch.dtype | None]:
        """`(dtype of parameters, dtype of floating buffers)`; None leaves them as they are."""
        buffers = self._config.buffer_dtype
        if buffers is not None:
            buffers = DtypeEnum.parse(buffers, "data_types.buffer_dtype")
        return _mode_dtype(self), buffers

    def _assert_valid_mixed_precision_config(self) -> None:
        """Refuse a dtype of parameters that is not the mode's (a parsed configuration has been through this)."""
        wanted = self._config.param_dtype
        if wanted is None:
            return
        wanted = DtypeEnum.parse(wanted, "data_types.param_dtype")
        mode = _mode_dtype(self) or torch.float32
        if wanted != mode:
            raise AssertionError(
                explain(
                    "data_types.param_dtype contradicts the enabled precision",
                    got=str(wanted),
                    expected=str(mode),
                    fix="remove it, or enable the mode that it names",
                )
            )

    def _cast_module_mixed_precision(
        self,
        param_dtype: torch.dtype | None,
        buffer_dtype: torch.dtype | None,
        is_zero_init_model: bool,
    ) -> None:
        """Cast the module's parameters (unless `zero.Init` made them) and its floating buffers."""
        module_prep.cast_module(
            self.module, None if is_zero_init_model else param_dtype, buffer_dtype
        )


def _mode_dtype(engine: Any) -> torch.dtype | None:
    if engine.fp16_enabled():
        return torch.float16
    return torch.bfloat16 if engine.bfloat16_enabled() else None
