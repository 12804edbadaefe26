# SPDX-License-Identifier: Apache-2.0
"""Another name of `deepspeed.utils.module_utils`."""

from .module_utils import recursive_getattr, recursive_setattr

__all__ = ["recursive_getattr", "recursive_setattr"]
