# SPDX-License-Identifier: Apache-2.0
"""How model checkpoints are written."""
