# SPDX-License-Identifier: Apache-2.0
"""How many tokens the layers of random-LTD keep at each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed.utils.errors import explain

from ...config_errors import ConfigKeyError

_NEEDED = ("total_layer_num", "random_ltd_layer_num", "random_ltd_schedule", "global_batch_size")
_SCHEDULE = ("min_value", "max_value", "schedule_type", "schedule_config")
_SAVED = ("consumed_layer_tokens", "current_steps", "current_value", "min_value", "max_value")


class BaseScheduler:
    """A number of tokens that grows from ``min_value`` to ``max_value``, in `state`."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def get_value(self, global_steps: int) -> int:
        """The number at a step: linear, rounded down to whole ``seq_per_step``, and never above the greatest.

        Raises:
            RuntimeError: the schedule is not "fixed_linear".
        """
        if self.state["schedule_type"] != "fixed_linear":
            raise RuntimeError(
                explain(
                    "Unsupported random LTD schedule type",
                    got=self.state["schedule_type"],
                    expected="fixed_linear",
                )
            )
        schedule = self.state["schedule_config"]
        low, high = self.state["min_value"], self.state["max_value"]
        grown = int(low + (high - low) * global_steps / schedule["require_steps"])
        return min(grown - grown % schedule["seq_per_step"], high)


class RandomLTDScheduler(BaseScheduler):
    """The number of tokens that layers keep, and a count of the tokens that all layers have seen.

    Args:
        config: the section ``random_ltd``, with ``global_batch_size``.

    Raises:
        KeyError: (as ``ConfigKeyError``) a key is missing.
        NotImplementedError: ``layer_token_lr_schedule`` is enabled.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        for section, keys in ((config, _NEEDED), (config.get(_NEEDED[2]) or {}, _SCHEDULE)):
            for key in keys:
                if key not in section:
                    raise ConfigKeyError(explain(f"random_ltd needs {key!r}"))
        if (config.get("layer_token_lr_schedule") or {}).get("enabled"):
            raise NotImplementedError(
                explain(
                    "learning rates by kept tokens (layer_token_lr_schedule) are not available",
                    fix="set random_ltd.layer_token_lr_schedule.enabled to false",
                )
            )
        self.model_layer_num: int = config["total_layer_num"]
        self.random_ltd_layer_num: int = config["random_ltd_layer_num"]
        self.config_schedule: Mapping[str, Any] = config["random_ltd_schedule"]
        self.global_batch_size: int = config["global_batch_size"]
        self.reset_to_init()

    def reset_to_init(self) -> None:
        """Start again at the least number, with no tokens seen."""
        self.state = {
            **{key: self.config_schedule[key] for key in _SCHEDULE},
            "current_value": self.config_schedule["min_value"],
            "consumed_layer_tokens": 0,
            "current_steps": -1,
        }

    def get_total_layer_tokens(self, train_iters: int) -> int:
        """Start again, go through this many steps and return the tokens that all layers see in them."""
        self.reset_to_init()
        for step in range(train_iters):
            self.update_seq(step)
        return self.state["consumed_layer_tokens"]

    def get_current_seq(self) -> int:
        """Tokens that a layer keeps."""
        return self.state["current_value"]

    def set_current_seq(self, seq_length: int) -> None:
        """Keep this many tokens until the next update."""
        self.state["current_value"] = seq_length

    def get_random_ltd_layer_num(self) -> int:
        """Layers that drop tokens."""
        return self.random_ltd_layer_num

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes."""
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where another scheduler was."""
        self.state = state

    def update_seq(self, global_steps: int) -> None:
        """Set the number of a step, of which the first is 0, and count its tokens; once for each step."""
        state = self.state
        if state["current_value"] < state["max_value"]:
            state["current_value"] = self.get_value(global_steps)
        if global_steps != state["current_steps"]:
            full = self.model_layer_num - self.random_ltd_layer_num
            tokens = state["current_value"] * self.random_ltd_layer_num + state["max_value"] * full
            state["consumed_layer_tokens"] += self.global_batch_size * tokens
            state["current_steps"] = global_steps

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {key: self.state[key] for key in _SAVED}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where another scheduler was."""
        self.state.update({key: state_dict[key] for key in _SAVED})
