# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's public doors: every name is looked up on first use (PEP 562), so the import itself costs almost nothing."""
