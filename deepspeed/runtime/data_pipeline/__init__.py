# SPDX-License-Identifier: Apache-2.0
"""What the model is shown, and when: curriculum, sampling, token dropping."""
