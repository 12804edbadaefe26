# SPDX-License-Identifier: Apache-2.0
"""Collectives of gradients, for callers that reduce by themselves."""
