# SPDX-License-Identifier: Apache-2.0
"""Public path of ZenFlow's section, which stands beside the other offload sections."""

from ..zero.offload_config import ZenFlowConfig

__all__ = ["ZenFlowConfig"]
