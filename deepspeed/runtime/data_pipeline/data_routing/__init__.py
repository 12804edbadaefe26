# SPDX-License-Identifier: Apache-2.0
"""Which tokens pass which layers: random layer-wise token dropping."""
