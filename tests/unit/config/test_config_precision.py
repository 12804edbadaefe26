# SPDX-License-Identifier: Apache-2.0
"""The precision sections: fp16, bf16 (and bfloat16), torch_autocast, amp, data_types."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_utils import DtypeEnum


def parse(**sections):
    return DeepSpeedConfig({"train_batch_size": 1, **sections})


def test_defaults_of_fp16():
    assert parse().float16_config.model_dump() == {
        "enabled": False,
        "auto_cast": False,
        "loss_scale": 0.0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "consecutive_hysteresis": False,
        "min_loss_scale": 1,
        "fp16_master_weights_and_grads": False,
    }


def test_defaults_of_bf16():
    assert parse().bfloat16_config.model_dump() == {
        "enabled": False,
        "immediate_grad_update": False,
        "check_grad_overflow": True,
        "bf16_master_weights_and_grads": False,
        "bf16_optimizer_states": False,
    }


@pytest.mark.parametrize("scale", [0, 1, 128.5, "128"])
def test_loss_scales_that_are_taken(scale):
    config = parse(fp16={"enabled": True, "loss_scale": scale})
    assert config.float16_config.loss_scale == float(scale)


@pytest.mark.parametrize("scale", [True, False, -1, float("inf"), float("nan"), "big", None])
def test_loss_scales_that_are_refused(scale):
    with pytest.raises(ValidationError, match="loss_scale"):
        parse(fp16={"enabled": True, "loss_scale": scale})


@pytest.mark.parametrize("key", ["loss_scale_window", "min_loss_scale"])
@pytest.mark.parametrize(
    ("more", "refused"),
    [
        ({"enabled": True}, True),
        ({"enabled": True, "loss_scale": 0}, True),
        ({"enabled": True, "loss_scale": 8}, False),
        ({"enabled": False}, False),
    ],
)
def test_dynamic_scaling_needs_a_window_and_a_floor(key, more, refused):
    section = {key: 0, **more}
    if refused:
        with pytest.raises(ValidationError, match=key):
            parse(fp16=section)
    else:
        assert getattr(parse(fp16=section).float16_config, key) == 0


def test_auto_in_a_precision_section_means_off():
    config = parse(fp16={"enabled": "auto"}, bf16={"enabled": "auto"})
    assert not config.float16_config.enabled and not config.bfloat16_config.enabled
    assert not config.fp16_enabled and not config.bfloat16_enabled
    assert parse(fp16={"enabled": True}).fp16_enabled
    assert parse(bfloat16={"enabled": True}).bfloat16_enabled


def test_old_spelling_of_bf16_counts_where_the_new_is_absent():
    assert parse(bfloat16={"enabled": True}).bfloat16_config.enabled
    assert not parse(bfloat16={"enabled": True}, bf16={"enabled": False}).bfloat16_config.enabled


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_fp16_and_bf16_together_are_an_assertion_error(name):
    with pytest.raises(AssertionError, match="fp16") as caught:
        parse(fp16={"enabled": True}, **{name: {"enabled": True}})
    assert isinstance(caught.value, DeepSpeedConfigError)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        (
            {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}},
            "fp16_master_weights_and_grads",
        ),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16_master_weights_and_grads",
        ),
    ],
)
def test_low_precision_masters_need_zero(sections, key):
    with pytest.raises(AssertionError, match=f"{key}.*ZeRO stage 1, 2 or 3"):
        parse(**sections)
    for stage in (1, 2, 3):
        assert parse(zero_optimization={"stage": stage}, **sections)


def test_low_precision_states_need_low_precision_masters():
    both = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    states = {"enabled": True, "bf16_optimizer_states": True}
    with pytest.raises(AssertionError, match="bf16_master_weights_and_grads"):
        parse(bf16=states, zero_optimization={"stage": 2})
    assert parse(bf16={"enabled": True, **both}, zero_optimization={"stage": 2})


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        *[(word, torch.float16) for word in ("fp16", "float16", "half", "torch.float16")],
        *[(word, torch.float32) for word in ("fp32", "float32", "float", "torch.float32")],
        *[(word, torch.bfloat16) for word in ("bf16", "bfloat16", "torch.bfloat16")],
        *[(word, torch.int8) for word in ("int8", "torch.int8")],
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_words_for_dtypes(word, dtype):
    assert DtypeEnum(word).value is dtype
    assert parse(data_types={"grad_accum_dtype": word}).grad_accum_dtype is dtype


@pytest.mark.parametrize("word", ["fp8", "", 16, "Float16"])
def test_words_for_no_dtype(word):
    with pytest.raises(ValueError):
        DtypeEnum(word)
    with pytest.raises(ValueError, match="torch_autocast"):
        parse(torch_autocast={"enabled": True, "dtype": word})
    with pytest.raises(ValueError, match="grad_accum_dtype"):
        parse(data_types={"grad_accum_dtype": word})


def test_autocast():
    safe = ["torch.nn.Linear"]
    section = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": safe}
    config = parse(torch_autocast=section)
    assert config.torch_autocast_enabled and config.torch_autocast_dtype is torch.bfloat16
    assert config.torch_autocast_lower_precision_safe_modules == safe
    assert parse(torch_autocast={"enabled": True}).torch_autocast_dtype is None


@pytest.mark.parametrize("value", [None, "fp32", "bf16"])
def test_grad_accum_dtype_may_be_null_or_a_word(value):
    found = parse(data_types={"grad_accum_dtype": value}).grad_accum_dtype
    assert found is (None if value is None else DtypeEnum(value).value)


@pytest.mark.parametrize(
    ("mode", "word", "fits"),
    [
        ("fp16", "fp16", True),
        ("fp16", "half", True),
        ("fp16", "bf16", False),
        ("bf16", "bfloat16", True),
        ("bf16", "fp32", False),
    ],
)
def test_param_dtype_has_to_be_the_modes_own(mode, word, fits):
    sections = {mode: {"enabled": True}, "data_types": {"param_dtype": word}}
    if fits:
        assert parse(**sections).param_dtype is DtypeEnum(word).value
    else:
        with pytest.raises(AssertionError, match="param_dtype"):
            parse(**sections)


def test_amp_passes_its_other_keys_on():
    config = parse(amp={"enabled": True, "opt_level": "O2"})
    assert config.amp_enabled and config.amp_params == {"opt_level": "O2"}


def test_amp_without_its_switch_is_a_key_error():
    with pytest.raises(KeyError, match="'amp' lacks 'enabled'") as caught:
        parse(amp={"opt_level": "O2"})
    assert isinstance(caught.value, DeepSpeedConfigError)
    assert not str(caught.value).startswith('"')


@pytest.mark.parametrize("section", [{"loss_scale": []}, {"loss_scale": {}}])
def test_a_loss_scale_of_another_type(section):
    with pytest.raises(ValidationError, match="must be a number"):
        parse(fp16=section)


@pytest.mark.parametrize("key", ["loss_scale_window", "min_loss_scale"])
def test_true_is_no_number_of_steps_or_scale(key):
    with pytest.raises(ValidationError, match=f"fp16.{key} must be a whole number"):
        parse(fp16={"enabled": True, key: True})
