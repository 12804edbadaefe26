# SPDX-License-Identifier: Apache-2.0
"""Elastic training: batch sizes that fit many numbers of devices."""

from ..utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        ".config": [
            "ElasticityConfig",
            "ElasticityConfigError",
            "ElasticityError",
            "ElasticityIncompatibleWorldSize",
        ],
        ".elastic_agent": ["DSElasticAgent"],
        ".elasticity": [
            "compute_elastic_config",
            "elasticity_enabled",
            "ensure_immutable_elastic_config",
        ],
    },
)
