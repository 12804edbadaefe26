# SPDX-License-Identifier: Apache-2.0
"""Page-locked host memory without a GPU."""
