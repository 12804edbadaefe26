# SPDX-License-Identifier: Apache-2.0
"""ZenFlow: offloaded optimizer steps that never stall the accelerator."""
