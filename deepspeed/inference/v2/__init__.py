# SPDX-License-Identifier: Apache-2.0
"""Ragged batching with a blocked key-value cache."""
