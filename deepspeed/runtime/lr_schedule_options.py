# SPDX-License-Identifier: Apache-2.0
"""How a schedule is asked for: config keys, command-line options, `scheduler` sections."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

LR_SCHEDULE = "lr_schedule"
LR_RANGE_TEST = "LRRangeTest"
ONE_CYCLE = "OneCycle"
WARMUP_LR = "WarmupLR"
WARMUP_DECAY_LR = "WarmupDecayLR"
WARMUP_COSINE_LR = "WarmupCosineLR"
VALID_LR_SCHEDULES = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]

LR_RANGE_TEST_MIN_LR = "lr_range_test_min_lr"
LR_RANGE_TEST_STEP_RATE = "lr_range_test_step_rate"
LR_RANGE_TEST_STEP_SIZE = "lr_range_test_step_size"
LR_RANGE_TEST_STAIRCASE = "lr_range_test_staircase"

CYCLE_FIRST_STEP_SIZE = "cycle_first_step_size"
CYCLE_FIRST_STAIR_COUNT = "cycle_first_stair_count"
CYCLE_SECOND_STEP_SIZE = "cycle_second_step_size"
CYCLE_SECOND_STAIR_COUNT = "cycle_second_stair_count"
CYCLE_MIN_LR = "cycle_min_lr"
CYCLE_MAX_LR = "cycle_max_lr"
CYCLE_MIN_MOM = "cycle_min_mom"
CYCLE_MAX_MOM = "cycle_max_mom"
DECAY_STEP_SIZE = "decay_step_size"
DECAY_LR_RATE = "decay_lr_rate"
DECAY_MOM_RATE = "decay_mom_rate"
EDGE_VALUE = "edge_value"
MID_VALUE = "mid_value"

WARMUP_MIN_LR = "warmup_min_lr"
WARMUP_MAX_LR = "warmup_max_lr"
WARMUP_NUM_STEPS = "warmup_num_steps"
WARMUP_TYPE = "warmup_type"
WARMUP_LOG_RATE = "log"
WARMUP_LINEAR_RATE = "linear"
WARMUP_MIN_RATIO = "warmup_min_ratio"
COS_MIN_RATIO = "cos_min_ratio"
TOTAL_NUM_STEPS = "total_num_steps"

# Command-line option -> (type, default, help); the same table answers get_config_from_args.
_Option = tuple[type, Any, str]
_RANGE_TEST_OPTIONS: dict[str, _Option] = {
    LR_RANGE_TEST_MIN_LR: (float, 0.001, "first learning rate of the range test"),
    LR_RANGE_TEST_STEP_RATE: (float, 1.0, "growth of the rate per interval of the range test"),
    LR_RANGE_TEST_STEP_SIZE: (int, 1000, "steps in one interval of the range test"),
    LR_RANGE_TEST_STAIRCASE: (bool, False, "keep the rate constant inside an interval"),
}
_ONE_CYCLE_OPTIONS: dict[str, _Option] = {
    CYCLE_FIRST_STEP_SIZE: (int, 1000, "steps of the rising half of the cycle"),
    CYCLE_FIRST_STAIR_COUNT: (int, -1, "stairs of the rising half (none by default)"),
    CYCLE_SECOND_STEP_SIZE: (int, -1, "steps of the falling half (as the rising one by default)"),
    CYCLE_SECOND_STAIR_COUNT: (int, -1, "stairs of the falling half (as the rising one)"),
    DECAY_STEP_SIZE: (int, 1000, "steps in one interval of the decay after the cycle"),
    CYCLE_MIN_LR: (float, 0.01, "lowest learning rate of the cycle"),
    CYCLE_MAX_LR: (float, 0.1, "highest learning rate of the cycle"),
    DECAY_LR_RATE: (float, 0.0, "decay of the learning rate per interval after the cycle"),
    CYCLE_MIN_MOM: (float, 0.8, "lowest momentum of the cycle"),
    CYCLE_MAX_MOM: (float, 0.9, "highest momentum of the cycle"),
    DECAY_MOM_RATE: (float, 0.0, "growth of the momentum per interval after the cycle"),
}
_WARMUP_OPTIONS: dict[str, _Option] = {
    WARMUP_MIN_LR: (float, 0, "learning rate at the start of the warm-up"),
    WARMUP_MAX_LR: (float, 0.001, "learning rate at the end of the warm-up"),
    WARMUP_NUM_STEPS: (int, 1000, "steps of the warm-up"),
    WARMUP_TYPE: (str, WARMUP_LOG_RATE, "shape of the warm-up: log or linear"),
}
_WARMUP_COSINE_OPTIONS: dict[str, _Option] = {
    WARMUP_NUM_STEPS: _WARMUP_OPTIONS[WARMUP_NUM_STEPS],
    WARMUP_TYPE: _WARMUP_OPTIONS[WARMUP_TYPE],
    WARMUP_MIN_RATIO: (float, 0.01, "share of the optimizer's rate at the start of the warm-up"),
    COS_MIN_RATIO: (float, 0.01, "share of the optimizer's rate at the end of the cosine"),
}


# - Command line and config


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of the schedules (`--lr_schedule`, `--warmup_num_steps`, ...) to `parser`."""
    group = parser.add_argument_group("Learning-rate schedule", "choice and shape of the schedule")
    group.add_argument("--lr_schedule", type=str, default=None, help="name of the schedule")
    group.add_argument(
        "--cycle_momentum", action="store_true", default=False, help="cycle the momentum as well"
    )
    options = _RANGE_TEST_OPTIONS | _ONE_CYCLE_OPTIONS | _WARMUP_OPTIONS | _WARMUP_COSINE_OPTIONS
    for name, (kind, default, text) in options.items():
        if kind is bool:
            group.add_argument(f"--{name}", action="store_true", default=default, help=text)
        else:
            group.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Parse the schedule options off `sys.argv`; also returns the arguments it does not know."""
    return add_tuning_arguments(argparse.ArgumentParser()).parse_known_args()


def _override(args: argparse.Namespace, params: dict, options: Iterable[str]) -> None:
    for name in options:
        value = getattr(args, name, None)
        if value is not None:
            params[name] = value


def override_lr_range_test_params(args: argparse.Namespace, params: dict) -> None:
    """Write the options of LRRangeTest that `args` has into `params`."""
    _override(args, params, _RANGE_TEST_OPTIONS)


def override_1cycle_params(args: argparse.Namespace, params: dict) -> None:
    """Write the options of OneCycle that `args` has into `params`."""
    _override(args, params, _ONE_CYCLE_OPTIONS)
    if params.get(CYCLE_SECOND_STEP_SIZE) == -1:  # how the command line says "not given"
        params[CYCLE_SECOND_STEP_SIZE] = None


def override_warmupLR_params(args: argparse.Namespace, params: dict) -> None:
    """Write the options of WarmupLR and WarmupDecayLR that `args` has into `params`."""
    _override(args, params, _WARMUP_OPTIONS)


def override_warmupCosineLR_params(args: argparse.Namespace, params: dict) -> None:
    """Write the options of WarmupCosineLR that `args` has into `params`."""
    _override(args, params, _WARMUP_COSINE_OPTIONS)


def override_params(args: argparse.Namespace, params: dict) -> None:
    """Write every schedule option that `args` has into `params`."""
    override_lr_range_test_params(args, params)
    override_1cycle_params(args, params)
    override_warmupLR_params(args, params)
    override_warmupCosineLR_params(args, params)


def get_config_from_args(args: argparse.Namespace) -> tuple[dict | None, str | None]:
    """Build the `scheduler` section of a config from parsed options.

    Returns:
        `(section, None)`, or `(None, reason)` when no usable schedule was asked for.
    """
    name = getattr(args, LR_SCHEDULE, None)
    if name is None:
        return None, f"--{LR_SCHEDULE} not specified on command line"
    if name not in VALID_LR_SCHEDULES:
        return None, f"{name} is not supported LR schedule"
    override = {
        LR_RANGE_TEST: override_lr_range_test_params,
        ONE_CYCLE: override_1cycle_params,
        WARMUP_LR: override_warmupLR_params,
        WARMUP_DECAY_LR: override_warmupLR_params,
        WARMUP_COSINE_LR: override_warmupCosineLR_params,
    }[name]
    section: dict[str, Any] = {"type": name, "params": {}}
    override(args, section["params"])
    return section, None


def get_lr_from_config(config: Mapping[str, Any]) -> tuple[float | None, str]:
    """The learning rate that a `scheduler` section stands for (its highest; LRRangeTest: first).

    Returns:
        `(rate, "")`, or `(None, reason)` when the section does not say.
    """
    if "type" not in config:
        return None, "LR schedule type not defined in config"
    if "params" not in config:
        return None, "LR schedule params not defined in config"
    name, params = config["type"], config["params"]
    if name not in VALID_LR_SCHEDULES:
        return None, f"{name} is not a valid LR schedule"
    if name == WARMUP_COSINE_LR:
        return None, f"{name} multiplies the optimizer's learning rate; it has none of its own"
    key = {LR_RANGE_TEST: LR_RANGE_TEST_MIN_LR, ONE_CYCLE: CYCLE_MAX_LR}.get(name, WARMUP_MAX_LR)
    if key not in params:
        return None, f"{key} not defined in the params of {name}"
    return params[key], ""
