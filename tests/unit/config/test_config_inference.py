# SPDX-License-Identifier: Apache-2.0
"""The configuration of init_inference and of the ragged engine, as data."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from pydantic import ValidationError

from deepspeed.inference.config import DeepSpeedInferenceConfig, DeepSpeedMoEConfig
from deepspeed.inference.v2.config_v2 import RaggedInferenceEngineConfig

DEFAULTS = {
    "replace_with_kernel_inject": False,
    "dtype": torch.float16,
    "enable_cuda_graph": False,
    "use_triton": False,
    "triton_autotune": False,
    "triangular_masking": True,
    "keep_module_on_host": False,
    "checkpoint": None,
    "base_dir": "",
    "set_empty_params": False,
    "save_mp_checkpoint_path": None,
    "return_tuple": True,
    "training_mp_size": 1,
    "injection_policy": None,
    "injection_policy_tuple": None,
    "config": None,
    "max_out_tokens": 1024,
    "min_out_tokens": 1,
    "transposed_mode": False,
}


@pytest.mark.parametrize("key", DEFAULTS)
def test_defaults(key):
    assert getattr(DeepSpeedInferenceConfig(), key) == DEFAULTS[key]


def test_defaults_of_sections():
    config = DeepSpeedInferenceConfig()
    tp = {"enabled": True, "tp_size": 1, "tp_grain_size": 64, "mpu": None, "tp_group": None}
    assert config.tensor_parallel.model_dump() == tp
    moe = config.moe
    assert (moe.enabled, moe.ep_size, moe.moe_experts, moe.type) == (True, 1, [1], "standard")
    quant = config.quant
    assert quant.enabled and quant.qkv.enabled
    assert quant.weight.num_bits == 8 and quant.activation.q_type == "symmetric"
    assert config.checkpoint_config.checkpoint_dir is None
    assert config.zero.stage == 0


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        *[(word, torch.float16) for word in ("fp16", "half", "float16", "torch.float16")],
        *[(word, torch.float32) for word in ("fp32", "float", "float32")],
        *[(word, torch.bfloat16) for word in ("bf16", "bfloat16", "bfloat")],
        ("int8", torch.int8),
        (torch.float32, torch.float32),
    ],
)
def test_dtypes(word, dtype):
    assert DeepSpeedInferenceConfig(dtype=word).dtype is dtype


@pytest.mark.parametrize(
    ("alias", "field", "value"),
    [
        ("kernel_inject", "replace_with_kernel_inject", True),
        ("tm", "triangular_masking", False),
        ("max_tokens", "max_out_tokens", 7),
        ("min_tokens", "min_out_tokens", 7),
        ("injection_dict", "injection_policy", {"a": ("b",)}),
        ("args", "config", {"a": 1}),
    ],
)
def test_aliases(alias, field, value):
    assert getattr(DeepSpeedInferenceConfig(**{alias: value}), field) == value
    assert getattr(DeepSpeedInferenceConfig(**{field: value}), field) == value


def test_aliases_of_sections():
    config = DeepSpeedInferenceConfig(tp={"tp_size": 2}, ckpt_config={"base_dir": "b"})
    assert config.tensor_parallel.tp_size == 2 and config.checkpoint_config.base_dir == "b"
    assert DeepSpeedInferenceConfig(moe={"num_experts": [4]}).moe.moe_experts == [4]


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("mp_size", 2, ("tensor_parallel", "tp_size")),
        ("mpu", "an mpu", ("tensor_parallel", "mpu")),
        ("ep_size", 2, ("moe", "ep_size")),
        ("expert_group", "a group", ("moe", "ep_group")),
        ("ep_mp_group", "a group", ("moe", "ep_mp_group")),
        ("moe_experts", [4], ("moe", "moe_experts")),
        ("moe_type", "residual", ("moe", "type")),
    ],
)
def test_deprecated_keys_reach_their_section(logged, old, value, new):
    config = DeepSpeedInferenceConfig(**{old: value})
    section, field = new
    assert getattr(getattr(config, section), field) == value
    assert len(logged) == 1 and "deprecated" in logged[0]


def test_old_and_new_together_are_refused():
    with pytest.raises(AssertionError, match="mp_size"):
        DeepSpeedInferenceConfig(mp_size=2, tensor_parallel={"tp_size": 2})


@pytest.mark.parametrize("switch", [True, False])
def test_moe_as_a_switch(switch):
    assert DeepSpeedInferenceConfig(moe=switch).moe == DeepSpeedMoEConfig(enabled=switch)


@pytest.mark.parametrize(
    "keys",
    [
        {"max_out_tokens": 0},
        {"min_tokens": 0},
        {"dtype": "fp12"},
        {"kernel_injekt": True},
        {"moe": {"type": "odd"}},
        {"quant": {"weight": {"q_type": "odd"}}},
    ],
)
def test_wrong_values_are_validation_errors(keys):
    with pytest.raises(ValueError):
        DeepSpeedInferenceConfig(**keys)


def test_misspelt_key_names_the_nearest():
    with pytest.raises(ValidationError, match="did you mean 'max_out_tokens'"):
        DeepSpeedInferenceConfig(max_out_token=5)


def test_triton_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton"):
        DeepSpeedInferenceConfig(use_triton=True)


def test_ragged_engine():
    config = RaggedInferenceEngineConfig(tp={"tp_size": 2}, manager={"max_context": 10})
    assert config.tensor_parallel.tp_size == 2
    manager = config.state_manager
    assert (manager.max_tracked_sequences, manager.max_ragged_batch_size) == (2048, 768)
    assert (manager.max_ragged_sequence_count, manager.max_context) == (512, 10)
    assert manager.offload is False and config.quantization.quantization_mode is None
    with pytest.raises(ValidationError):
        RaggedInferenceEngineConfig(managers={})
