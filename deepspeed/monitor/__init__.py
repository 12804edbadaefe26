# SPDX-License-Identifier: Apache-2.0
"""Recording a run: numbers go from rank 0 to TensorBoard, CSV files, Weights & Biases or Comet."""

from deepspeed.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".base": ["*"],
        ".comet": ["*"],
        ".config": ["*"],
        ".csv_monitor": ["*"],
        ".monitor": ["*"],
        ".tensorboard": ["*"],
        ".wandb": ["*"],
    },
)
