# SPDX-License-Identifier: Apache-2.0
"""The public path of `module_utils`."""

from .module_utils import recursive_getattr as recursive_getattr
from .module_utils import recursive_setattr as recursive_setattr
