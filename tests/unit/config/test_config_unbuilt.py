# SPDX-License-Identifier: Apache-2.0
"""Requests that this version cannot fulfil are refused by key; harmless ones pass in silence."""

from __future__ import annotations

import pytest

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_unbuilt import (
    UNBUILT,
    UNBUILT_OPTIMIZERS,
    find_unbuilt,
    find_unresolved_auto,
    refuse_unbuilt,
)


def parse(**sections):
    return DeepSpeedConfig({"train_batch_size": 1, **sections})


def zero(stage, **keys):
    return {"zero_optimization": {"stage": stage, **keys}}


def divided(**section):
    return {"tensor_parallel": {"autotp_size": 2, **section}}


QUANTIZED = {"weight_quantization": {"quantized_initialization": {"num_bits": 4, "group_size": 64}}}
# key -> a configuration that asks for it
ASKING = {
    "zero_optimization.legacy_stage1": zero(1, legacy_stage1=True),
    "amp.enabled": {"amp": {"enabled": True}},
    "graph_harvesting": {"graph_harvesting": True},
    "data_types.keep_in_fp32_modules": {"data_types": {"keep_in_fp32_modules": ["norm"]}},
    "expert_parallel.comm_backend": {"expert_parallel": {"enabled": True, "comm_backend": "other"}},
    "sequence_parallel_size": {
        "sequence_parallel_size": 2,
        "tensor_parallel": {"autotp_size": 2},
    },
    "tensor_parallel.vocab_parallel_lm_head": divided(vocab_parallel_lm_head=True),
    "tensor_parallel.injection_policy_tuple": divided(injection_policy_tuple=("out_proj",)),
    "tensor_parallel.keep_module_on_host": divided(keep_module_on_host=True),
    "tensor_parallel.replace_with_kernel_inject": divided(replace_with_kernel_inject=True),
    "tensor_parallel.tensor_parallel.tp_size": {"tensor_parallel": {"tp": {"tp_size": 2}}},
    "tensor_parallel.tensor_parallel.mpu": divided(tp={"mpu": object()}),
    "tensor_parallel.tensor_parallel.tp_group": divided(tp={"tp_group": object()}),
    "hybrid_engine.inference_tp_size": {"hybrid_engine": {"enabled": True, "inference_tp_size": 2}},
    "hybrid_engine.enable_cuda_graph": {
        "hybrid_engine": {"enabled": True, "enable_cuda_graph": True}
    },
    **{
        f"compile.{key}": {"compile": {"deepcompile": True, key: True}}
        for key in (
            "offload_activation",
            "offload_opt_states",
            "offload_parameters",
            "autoep_non_moe",
            "symmetric_memory",
        )
    },
    "compile.passes": {"compile": {"deepcompile": True, "passes": ["autosp"]}},
    "weight_quantization": {**zero(2), **QUANTIZED},
    "quantize_training.eigenvalue.enabled": {
        "quantize_training": {"eigenvalue": {"enabled": True}}
    },
    "aio.use_gds": {"aio": {"use_gds": True}},
    "nebula.enabled": {"nebula": {"enabled": True}},
    "datastates_ckpt": {"datastates_ckpt": {}},
}


@pytest.mark.parametrize("row", UNBUILT, ids=lambda row: row.key)
def test_each_row_is_asked_for_by_its_key_and_refused_by_name(row):
    config = parse(**ASKING[row.key])  # parsing never refuses
    with pytest.raises(DeepSpeedConfigError) as caught:
        refuse_unbuilt(config)
    line = next(text for text in str(caught.value).splitlines() if text.startswith(f"'{row.key}'"))
    assert row.feature in line and "not available in this version" in line and row.instead in line


def test_every_row_has_its_request_here_and_no_key_stands_twice():
    keys = [row.key for row in UNBUILT]
    assert len(keys) == len(set(keys))
    assert set(keys) <= set(ASKING)


def test_keys_of_the_table_exist():
    from deepspeed.runtime.config import describe

    known = {info.path for info in describe()}
    assert {row.key for row in UNBUILT} <= known


HARMLESS = {
    "nothing": {},
    "offload_param at stage 2": zero(2, offload_param={"device": "cpu"}),
    "nvme params at stage 2": zero(2, offload_param={"device": "nvme", "nvme_path": None}),
    "optimizer offload": zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
    "device none": zero(2, offload_optimizer={"device": "none"}),
    "offload without zero": zero(0, offload_optimizer={"device": "nvme"}),
    "stage 3 sizes at stage 2": zero(
        2,
        stage3_param_persistence_threshold=1e4,
        stage3_max_live_parameters=3e7,
        stage3_prefetch_bucket_size=3e7,
        stage3_gather_16bit_weights_on_model_save=True,
        memory_efficient_linear=False,
        sub_group_size=1e9,
        zero_hpz_partition_size=4,
        zero_quantized_weights=True,
        mics_shard_size=2,
    ),
    "old switches, off": zero(2, cpu_offload=False),
    "old spelling of bf16": {"bfloat16": {"enabled": True}},
    "hybrid engine, off": {"hybrid_engine": {"enabled": False, "inference_tp_size": 2}},
    "monitors": {
        "tensorboard": {"enabled": True},
        "csv_monitor": {"enabled": True},
        "wandb": {"enabled": True},
        "comet": {"enabled": True},
    },
    "layers over ranks": divided(tp_overlap_comm=True, preset_model="llama"),
    "sizes of one": {"tensor_parallel": {"autotp_size": 1}, "sequence_parallel_size": 1},
    "techniques, off": {
        "amp": {"enabled": False},
        "comms_logger": {"enabled": False, "prof_all": True},
        "progressive_layer_drop": {"enabled": False},
        "curriculum_learning": {"enabled": False},
        "data_efficiency": {"enabled": False, "data_sampling": {"enabled": True}},
        "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}},
        "autotuning": {"enabled": False},
        "datastates_ckpt": False,
        "nebula": {"enabled": False},
    },
    "stage 3 in smaller groups": zero(3, mics_shard_size=2),
    "stage 3 with a second copy": zero(3, zero_hpz_partition_size=2, zero_quantized_weights=True),
    "stage 3 with codes": zero(3, zero_quantized_gradients=True, zeropp_loco_param={"reset_T": 9}),
    "stage 3, its params on the host": zero(3, offload_param={"device": "cpu"}),
    "quantized weights at stage 3": {**zero(3), **QUANTIZED},
    "quantized weights, nothing said of how": {"weight_quantization": {}},
    "states on a disk": zero(2, offload_optimizer={"device": "nvme", "nvme_path": "x"}),
    "recomputation": {"activation_checkpointing": {"partition_activations": True}},
    "pipeline settings": {"pipeline": {"stages": "auto"}},
    "aio": {"aio": {"block_size": 1, "thread_count": 4}},
    "sparse attention, never consumed": {"sparse_attention": {"mode": "fixed"}},
    "checkpoint": {"checkpoint": {"tag_validation": "Fail", "use_node_local_storage": True}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_requests_pass(name):
    refuse_unbuilt(parse(**HARMLESS[name]))


def test_all_refused_keys_are_told_at_once():
    config = parse(**zero(1, legacy_stage1=True), amp={"enabled": True}, nebula={"enabled": True})
    lines = find_unbuilt(config)
    assert [line.split("'")[1] for line in lines] == [
        "zero_optimization.legacy_stage1",
        "amp.enabled",
        "nebula.enabled",
    ]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Lion", "Adagrad", "SGD", None])
def test_optimizers_that_are_there(name):
    refuse_unbuilt(parse(optimizer={"type": name} if name else {}))


@pytest.mark.parametrize("name", ["MuAdam", "MuAdamW", "MuSGD"])
def test_optimizers_that_are_not_there_unless_the_caller_brings_one(monkeypatch, name):
    monkeypatch.setitem(UNBUILT_OPTIMIZERS, name.lower(), "deepspeed.no.such.module")
    config = parse(optimizer={"type": name})
    says = rf"optimizer\.type.*{name.lower()}.*no\.such\.module.*Install"
    with pytest.raises(DeepSpeedConfigError, match=says):
        refuse_unbuilt(config)
    refuse_unbuilt(config, client_optimizer=True)


def test_row_of_an_optimizer_goes_when_its_module_comes(monkeypatch):
    monkeypatch.setitem(UNBUILT_OPTIMIZERS, "muadam", "deepspeed.runtime.config")
    refuse_unbuilt(parse(optimizer={"type": "MuAdam"}))


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"gradient_clipping": "auto"}, ["gradient_clipping"]),
        (
            {"steps_per_print": "auto", "prescale_gradients": "auto"},
            ["steps_per_print", "prescale_gradients"],
        ),
        ({"checkpoint": {"use_node_local_storage": "auto"}}, ["checkpoint.use_node_local_storage"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.99]}}},
            ["optimizer.params.lr"],
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}},
            ["scheduler.params.warmup_num_steps"],
        ),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, []),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}, []),
        ({"pipeline": {"stages": "auto"}}, []),
        ({"expert_parallel": {"score_func": "auto", "top_k": "auto"}}, []),
        ({"unknown": "auto"}, []),
    ],
)
def test_auto_that_nobody_filled_in_is_found_where_it_has_no_meaning(sections, keys):
    config = parse(**sections)  # parsing lets it pass: other programs fill it in later
    assert find_unresolved_auto(config._param_dict) == keys
    if keys:
        with pytest.raises(TypeError, match="auto") as caught:
            refuse_unbuilt(config)
        assert all(key in str(caught.value) for key in keys)
        assert isinstance(caught.value, DeepSpeedConfigError)
    else:
        refuse_unbuilt(config)


def test_auto_in_sections_that_the_caller_replaces_is_no_matter():
    config = parse(
        optimizer={"type": "AdamW", "params": {"lr": "auto"}},
        scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    )
    refuse_unbuilt(config, client_optimizer=True, client_scheduler=True)
    with pytest.raises(TypeError, match=r"scheduler\.params"):
        refuse_unbuilt(config, client_optimizer=True)


def test_unresolved_auto_leaves_the_default_in_place():
    assert parse(gradient_clipping="auto").gradient_clipping == 1.0
