# SPDX-License-Identifier: Apache-2.0
"""The older place of `deepspeed.utils.module_utils`, which programs still import."""

from deepspeed.utils.module_utils import recursive_getattr, recursive_setattr

__all__ = ["recursive_getattr", "recursive_setattr"]
