# SPDX-License-Identifier: Apache-2.0
"""The search for a fast ZeRO stage and batch size."""
