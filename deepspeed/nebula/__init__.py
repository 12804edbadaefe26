# SPDX-License-Identifier: Apache-2.0
"""Azure's asynchronous checkpoint service."""
