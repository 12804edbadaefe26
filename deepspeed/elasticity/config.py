# SPDX-License-Identifier: Apache-2.0
"""The section ``elasticity``, and the errors of elastic training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..runtime.config_utils import PlainSection
from ..utils.errors import DeepSpeedConfigError, explain

ELASTICITY = "elasticity"
LATEST_ELASTICITY_VERSION = 0.2


class ElasticityError(DeepSpeedConfigError):
    """Base of the errors of elastic training."""


class ElasticityConfigError(ElasticityError):
    """The section ``elasticity`` is missing, incomplete or contradicts the rest."""


class ElasticityIncompatibleWorldSize(ElasticityError):
    """The number of devices is not one that the elastic batch size allows."""


class ElasticityConfig(PlainSection):
    """``elasticity``: a batch size that fits many numbers of devices."""

    section: ClassVar[str] = ELASTICITY

    enabled: bool = Field(default=False, description="Derive the batch sizes from this section.")
    max_train_batch_size: int = Field(
        default=2000, description="Largest train_batch_size; required when enabled."
    )
    micro_batch_sizes: list[int] = Field(
        default_factory=lambda: [2, 4, 6],
        description="Micro-batch sizes that may be used; required when enabled.",
    )
    min_gpus: int = Field(default=1, description="Fewest devices.")
    max_gpus: int = Field(default=10000, description="Most devices.")
    min_time: int = Field(default=0, description="Minutes a job should run between two rescalings.")
    prefer_larger_batch: bool = Field(
        default=True, description="Of batch sizes with as many device counts, take the largest."
    )
    ignore_non_elastic_batch_info: bool = Field(
        default=False, description="Ignore the three batch-size keys instead of refusing them."
    )
    version: float = Field(
        default=LATEST_ELASTICITY_VERSION, description="0.1, or 0.2: whole nodes."
    )
    model_parallel_size: int = Field(
        default=1, description="Model-parallel ranks; above 1 needs 0.2."
    )
    num_gpus_per_node: int = Field(default=1, description="Devices of a node (version 0.2).")

    def __init__(self, param_dict: Mapping[str, Any] | None = None, /, **data: Any) -> None:
        """Build from the section's own keys (``param_dict`` is the section, not the whole).

        Raises:
            ElasticityConfigError: a required key is missing, or a value cannot be.
        """
        data = {**(param_dict or {}), **data}
        if data.get("enabled"):
            for key in ("max_train_batch_size", "micro_batch_sizes"):
                if key not in data:
                    raise ElasticityConfigError(
                        explain(f"elasticity lacks '{key}'", fix=f"Set 'elasticity.{key}'.")
                    )
        sizes = data.get("micro_batch_sizes", [1])
        if not isinstance(sizes, (list, tuple)):
            _refuse("micro_batch_sizes", sizes, "a list of whole numbers above 0")
        if not sizes or not all(type(size) is int and size > 0 for size in sizes):
            _refuse("micro_batch_sizes", list(sizes), "whole numbers above 0")
        super().__init__(**data)
        self._check_ranges()

    def _check_ranges(self) -> None:
        for key in ("min_gpus", "max_gpus", "model_parallel_size", "num_gpus_per_node"):
            if getattr(self, key) < 1:
                _refuse(key, getattr(self, key), "1 or more")
        if self.max_gpus < self.min_gpus:
            _refuse("max_gpus", self.max_gpus, f"at least min_gpus, which is {self.min_gpus}")
        if self.min_time < 0:
            _refuse("min_time", self.min_time, "0 or more")

    # the names under which this module's algorithms and others read the values
    @property
    def max_acceptable_batch_size(self) -> int:
        """Largest train_batch_size."""
        return self.max_train_batch_size

    @property
    def micro_batches(self) -> list[int]:
        """Micro-batch sizes that may be used."""
        return self.micro_batch_sizes

    @property
    def prefer_larger_batch_size(self) -> bool:
        """Whether the larger of two equally good batch sizes wins."""
        return self.prefer_larger_batch


def _refuse(key: str, got: object, expected: str) -> None:
    raise ElasticityConfigError(
        explain(f"'elasticity.{key}' is not usable", got=repr(got), expected=expected)
    )
