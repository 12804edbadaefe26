# SPDX-License-Identifier: Apache-2.0
"""Tests that drive a Windows Python: the one they run under, or one under Wine beside a Linux checkout."""
