# SPDX-License-Identifier: Apache-2.0
"""Graph passes behind engine.compile()."""
