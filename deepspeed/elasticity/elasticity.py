# SPDX-License-Identifier: Apache-2.0
"""A batch size that divides evenly over many numbers of devices, and those numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from ..runtime.config_utils import section_of
from ..utils import env
from ..utils.errors import explain
from ..utils.logging import logger
from .config import (
    ELASTICITY,
    LATEST_ELASTICITY_VERSION,
    ElasticityConfig,
    ElasticityConfigError,
    ElasticityError,
    ElasticityIncompatibleWorldSize,
)

# The first release with elastic training.
MINIMUM_DEEPSPEED_VERSION = "0.3.8"

# Each has more divisors than any smaller number, so a batch of a base times one of them divides over
# the most numbers of devices.
HIGHLY_COMPOSITE = (
    *(1, 2, 4, 6, 12, 24, 36, 48, 60, 120, 180, 240, 360, 720, 840, 1260, 1680, 2520, 5040, 7560),
    *(10080, 15120, 20160, 25200, 27720, 45360, 50400, 55440, 83160, 110880, 166320, 221760),
    *(277200, 332640, 498960, 554400, 665280, 720720),
)


def _grown(base: int, limit: int) -> int:
    """Return ``base`` times the largest highly composite factor that stays within ``limit``."""
    return base * max(factor for factor in HIGHLY_COMPOSITE if base * factor <= limit)


def candidate_batch_sizes(bases: list[int], limit: int) -> list[int]:
    """Return the distinct batch sizes to consider, in increasing order; none is above ``limit``."""
    return sorted({_grown(base, limit) for base in bases if base <= limit})


def valid_device_counts(
    batch_size: int, micro_batches: list[int], low: int, high: int
) -> list[int]:
    """Return every number of devices in [low, high] that splits ``batch_size`` into whole micro batches."""
    counts: set[int] = set()
    for micro in micro_batches:
        if batch_size % micro == 0:
            shares = batch_size // micro
            counts.update(n for n in range(low, min(high, shares) + 1) if shares % n == 0)
    return sorted(counts)


def _best_batch(
    candidates: list[int], micro_batches: list[int], low: int, high: int, prefer_larger: bool
) -> tuple[int, list[int]]:
    """Return the candidate with the most device counts; ties go by ``prefer_larger``."""
    best, best_counts = min(micro_batches), list[int]()
    for batch in candidates:
        counts = valid_device_counts(batch, micro_batches, low, high)
        better = batch > best if prefer_larger else batch < best
        if len(counts) > len(best_counts) or (len(counts) == len(best_counts) and better):
            best, best_counts = batch, counts
    return best, best_counts


def compatible_by_device(
    micro_batches: list[int], limit: int, low: int = 1, high: int | None = None, larger: bool = True
) -> tuple[int, list[int]]:
    """Version 0.1: choose the batch size with the most possible numbers of devices.

    Args:
        micro_batches: micro-batch sizes that may be used.
        limit: largest batch size.
        low: fewest devices.
        high: most devices; None is as many as the smallest micro batch leaves work for.
        larger: of equally good batch sizes take the largest.

    Returns:
        The batch size, and its valid numbers of devices in increasing order.

    Raises:
        ElasticityConfigError: every micro-batch size is above the limit.
    """
    high = high or limit // min(micro_batches)
    if any(micro > limit for micro in micro_batches):
        raise ElasticityConfigError(
            explain(
                "a micro-batch size is above the largest batch size",
                got=f"micro_batch_sizes {micro_batches}",
                expected=f"at most {limit}",
                fix="Lower them or raise 'elasticity.max_train_batch_size'.",
            )
        )
    bases = [*micro_batches, math.lcm(*micro_batches)]
    return _best_batch(candidate_batch_sizes(bases, limit), micro_batches, low, high, larger)


def _largest_micro(batch: int, devices: int, micro_batches: list[int], larger: bool) -> int | None:
    """Return the micro batch that divides each device's share: the largest, or the first that fits."""
    fitting = [micro for micro in micro_batches if batch // devices % micro == 0]
    if not fitting:
        return None
    return max(fitting) if larger else fitting[0]


def compatible_by_node(config: ElasticityConfig, devices: int) -> tuple[int, list[int], int | None]:
    """Version 0.2: whole nodes come and go, and model parallelism takes its part of each.

    Args:
        config: the section.
        devices: devices there are now.

    Returns:
        The batch size, the valid data-parallel sizes, and the micro-batch size for ``devices``.

    Raises:
        ElasticityError: model-parallel groups do not fit evenly into a node.
    """
    per_node, model = config.num_gpus_per_node, config.model_parallel_size
    if per_node % model != 0:
        raise ElasticityError(
            explain(
                "model parallelism does not divide a node's devices",
                got=f"num_gpus_per_node {per_node} and model_parallel_size {model}",
                fix="Make 'elasticity.num_gpus_per_node' a multiple of the model-parallel size.",
            )
        )
    dp_per_node = per_node // model
    micro_batches, larger = config.micro_batch_sizes, config.prefer_larger_batch
    batch, nodes = compatible_by_device(
        micro_batches,
        config.max_train_batch_size // dp_per_node,
        max(1, config.min_gpus // per_node),
        max(1, config.max_gpus // per_node),
        larger,
    )
    batch *= dp_per_node
    dp_sizes = [count * dp_per_node for count in nodes]
    if devices // model in dp_sizes:
        return batch, dp_sizes, _largest_micro(batch, devices // model, micro_batches, larger)
    dp_size = int(devices / per_node * dp_per_node)
    if dp_size < 1:
        raise ElasticityIncompatibleWorldSize(
            explain("too few devices for one model-parallel group", got=devices, expected=model)
        )
    sizes = [
        micro * dp_size * (config.max_train_batch_size // (micro * dp_size))
        for micro in micro_batches
    ]
    sizes = [size for size in sizes if size > 0]
    if not sizes:
        raise ElasticityIncompatibleWorldSize(
            explain(
                "the smallest micro batches on all devices exceed the largest batch size",
                got=f"{dp_size} data-parallel ranks",
                expected=f"a batch of at most {config.max_train_batch_size}",
            )
        )
    batch = max(sizes) if larger else min(sizes)
    return batch, [dp_size], _largest_micro(batch, dp_size, micro_batches, larger)


def elasticity_enabled(ds_config: Mapping[str, Any]) -> bool:
    """Tell whether a whole configuration asks for elastic training."""
    return bool(section_of(ds_config, ELASTICITY).get("enabled", False))


def ensure_immutable_elastic_config(runtime_elastic_config_dict: Mapping[str, Any]) -> None:
    """Compare the elastic section with the one that a scheduler chose the devices by.

    The scheduler's is in ``DEEPSPEED_ELASTICITY_CONFIG``; without it a warning is logged.

    Raises:
        ElasticityConfigError: the two disagree.
    """
    text = env.DEEPSPEED_ELASTICITY_CONFIG.get()
    if text is None:
        logger.warning(
            "DEEPSPEED_ELASTICITY_CONFIG is not set, so nobody checks that the scheduler scales "
            "this job to compatible numbers of devices."
        )
        return
    chosen = ElasticityConfig(json.loads(text))
    ours = ElasticityConfig(runtime_elastic_config_dict)
    for key in ("max_train_batch_size", "micro_batch_sizes", "version"):
        if getattr(chosen, key) != getattr(ours, key):
            raise ElasticityConfigError(
                explain(
                    f"'elasticity.{key}' differs from the scheduler's",
                    got=repr(getattr(ours, key)),
                    expected=repr(getattr(chosen, key)),
                    fix="Use the values of DEEPSPEED_ELASTICITY_CONFIG.",
                )
            )


def _checked_config(ds_config: Mapping[str, Any]) -> ElasticityConfig:
    """Return the section after the checks that do not depend on the devices."""
    if not isinstance(ds_config, Mapping):
        raise ValueError(
            explain("an elastic config is needed as a dictionary", got=type(ds_config).__name__)
        )
    if ELASTICITY not in ds_config:
        raise ElasticityConfigError(
            explain("the configuration has no section 'elasticity'", fix="Add it, or do not ask.")
        )
    section = section_of(ds_config, ELASTICITY)
    if not section.get("enabled", False):
        raise ElasticityConfigError(
            explain("elasticity is disabled", fix='Set "elasticity": {"enabled": true, ...}.')
        )
    config = ElasticityConfig(section)
    if config.model_parallel_size > 1 and config.version != 0.2:
        raise ElasticityConfigError(
            explain(
                "elasticity with model parallelism needs version 0.2",
                got=f"version {config.version}, model_parallel_size {config.model_parallel_size}",
                fix="Set 'elasticity.version' to 0.2.",
            )
        )
    if config.version > LATEST_ELASTICITY_VERSION:
        raise ElasticityConfigError(
            explain(
                "elasticity version is newer than this package knows",
                got=config.version,
                expected=f"at most {LATEST_ELASTICITY_VERSION}",
            )
        )
    if config.version not in (0.1, 0.2):
        raise NotImplementedError(
            explain("no such elasticity version", got=config.version, expected="0.1 or 0.2")
        )
    return config


def _check_version(target: str) -> None:
    """Refuse a release that knows nothing of elastic training."""
    wanted, oldest = (
        tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        for version in (target, MINIMUM_DEEPSPEED_VERSION)
    )
    if wanted and wanted < oldest:
        raise ElasticityError(
            explain(
                "that version of DeepSpeed has no elastic training",
                got=target,
                expected=f"at least {MINIMUM_DEEPSPEED_VERSION}",
            )
        )


def compute_elastic_config(
    ds_config: Mapping[str, Any],
    target_deepspeed_version: str = "",
    world_size: int = 0,
    return_microbatch: bool = False,
) -> tuple[int, list[int]] | tuple[int, list[int], int | None]:
    """Compute the batch size of an elastic job and the numbers of devices that it fits.

    Args:
        ds_config: a whole configuration with an enabled section ``elasticity``.
        target_deepspeed_version: version that will run the job; "" for the one that reads this.
        world_size: devices there are; 0 asks for the batch size and counts only (version 0.2 then
            reads WORLD_SIZE).
        return_microbatch: return the micro-batch size as well, also when ``world_size`` is 0.

    Returns:
        ``(train_batch_size, valid_counts)``, and the micro-batch size as a third value when
        ``world_size`` is given or ``return_microbatch`` is set.

    Raises:
        ElasticityConfigError: the section is missing, disabled or not usable.
        ElasticityError: the version that will run the job is older than elastic training.
        ElasticityIncompatibleWorldSize: ``world_size`` is not among the valid counts.
    """
    config = _checked_config(ds_config)
    _check_version(target_deepspeed_version)
    micro: int | None
    if config.version == 0.1:
        batch, counts = compatible_by_device(
            config.micro_batch_sizes,
            config.max_train_batch_size,
            config.min_gpus,
            config.max_gpus,
            config.prefer_larger_batch,
        )
        if world_size > 0 and world_size not in counts:
            raise ElasticityIncompatibleWorldSize(
                explain(f"World size ({world_size}) is not valid", expected=f"one of {counts}")
            )
        micro = _largest_micro(batch, world_size or 1, config.micro_batch_sizes, True)
    else:
        devices = world_size or env.WORLD_SIZE.get() or 0
        if devices < 1:
            raise ElasticityConfigError(
                explain(
                    "elasticity version 0.2 needs the number of devices",
                    fix="Pass world_size, or set the environment variable WORLD_SIZE.",
                )
            )
        batch, counts, micro = compatible_by_node(config, devices)
    if world_size > 0 or return_microbatch:
        return batch, counts, micro
    return batch, counts
