# SPDX-License-Identifier: Apache-2.0
"""Running a trained model."""
