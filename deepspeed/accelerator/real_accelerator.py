# SPDX-License-Identifier: Apache-2.0
"""Which accelerator this process uses: chosen at the first call, never at import."""

from __future__ import annotations

from deepspeed.utils import env
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .abstract_accelerator import DeepSpeedAccelerator

SUPPORTED_ACCELERATOR_LIST = ["cuda", "cpu"]

_current: DeepSpeedAccelerator | None = None


def _choose() -> str:
    named = env.DS_ACCELERATOR.get()
    if named:
        if named not in SUPPORTED_ACCELERATOR_LIST:
            raise ValueError(
                explain(
                    f"accelerator {named!r} is not supported yet",
                    got=f"DS_ACCELERATOR={named}",
                    expected=" or ".join(SUPPORTED_ACCELERATOR_LIST),
                    fix="Correct DS_ACCELERATOR, or unset it to have one chosen.",
                )
            )
        return named
    if not env.PYTORCH_NVML_BASED_CUDA_CHECK.is_set():
        # asks the driver library only: no CUDA context, so later children still start clean
        env.PYTORCH_NVML_BASED_CUDA_CHECK.set(1)
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def get_accelerator() -> DeepSpeedAccelerator:
    """Return the accelerator of this process; the first call chooses it.

    ``DS_ACCELERATOR`` (cpu or cuda) decides when set; otherwise cuda if torch sees a device.

    Raises:
        ValueError: ``DS_ACCELERATOR`` names something else.
    """
    global _current
    if _current is None:
        if _choose() == "cuda":
            from .cuda_accelerator import CUDA_Accelerator

            set_accelerator(CUDA_Accelerator())
        else:
            from .cpu_accelerator import CPU_Accelerator

            set_accelerator(CPU_Accelerator())
    assert _current is not None
    return _current


def set_accelerator(accel_obj: DeepSpeedAccelerator) -> None:
    """Make ``accel_obj`` the accelerator of this process.

    Raises:
        TypeError: it is no DeepSpeedAccelerator.
    """
    global _current
    if not isinstance(accel_obj, DeepSpeedAccelerator):
        raise TypeError(
            explain(
                "not an accelerator",
                got=type(accel_obj).__name__,
                expected="an instance of deepspeed.accelerator.DeepSpeedAccelerator",
            )
        )
    _current = accel_obj
    logger.info("accelerator: %s", accel_obj._name)


def is_current_accelerator_supported() -> bool:
    """Say whether the accelerator in use is one of those that the package knows."""
    return get_accelerator()._name in SUPPORTED_ACCELERATOR_LIST
