# SPDX-License-Identifier: Apache-2.0
"""The families of mixture-of-experts models whose experts can be spread without further words."""
