# SPDX-License-Identifier: Apache-2.0
"""Which samples a step sees: their difficulty, batches of about as many tokens each, files of many small arrays."""
