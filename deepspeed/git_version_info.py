# SPDX-License-Identifier: Apache-2.0
"""Which DeepSpeed this is."""

from __future__ import annotations

version = "0.20.0"
git_hash = "[none]"
git_branch = "[none]"
