# SPDX-License-Identifier: Apache-2.0
"""SuperOffload: host steps that begin during the backward pass."""
