# SPDX-License-Identifier: Apache-2.0
"""Single operations of inference."""
