# SPDX-License-Identifier: Apache-2.0
"""Profilers of a training step."""
