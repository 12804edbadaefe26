# SPDX-License-Identifier: Apache-2.0
"""The list of all keys, which documentation and suggestions are made of."""

from __future__ import annotations

import ast
import inspect

import pytest
from pydantic import BaseModel

from deepspeed.runtime import config_schema
from deepspeed.runtime.config import DeepSpeedConfig, describe

KEYS = {info.path: info for info in describe()}


def test_each_key_stands_once_and_is_described():
    paths = [info.path for info in describe()]
    assert len(paths) == len(set(paths))
    assert [info.path for info in describe() if not info.description.strip()] == []
    assert [info.path for info in describe() if not info.description.rstrip().endswith(".")] == []


@pytest.mark.parametrize(
    "path",
    [
        "train_batch_size",
        "zero_optimization",
        "zero_optimization.stage",
        "zero_optimization.offload_optimizer.device",
        "zero_optimization.zenflow.topk_ratio",
        "zero_optimization.leaf_module.classes",
        "fp16.loss_scale",
        "bfloat16.enabled",
        "optimizer.type",
        "scheduler.params",
        "checkpoint.writer.io_buffer_size",
        "timers.throughput.enabled",
        "elasticity.micro_batch_sizes",
        "compression_training.head_pruning.shared_parameters.num_heads",
        "data_efficiency.data_sampling.dynamic_batching.enabled",
        "quantize_training.eigenvalue.tol",
        "amp.enabled",
        "tensor_parallel.tensor_parallel.tp_size",
    ],
)
def test_keys_of_every_depth_are_listed(path):
    assert path in KEYS


def test_alias_default_and_deprecation_are_told():
    prefetch = KEYS["zero_optimization.prefetch_bucket_size"]
    assert (prefetch.alias, prefetch.default) == ("stage3_prefetch_bucket_size", 50_000_000)
    assert KEYS["zero_optimization.cpu_offload"].deprecated
    assert not KEYS["zero_optimization.stage"].deprecated
    assert KEYS["zero_optimization"].type == "section"
    assert KEYS["train_batch_size"].type == "int | null"


def nested(path, value):
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


# keys whose default, written out, changes something else
WRITTEN_OUT = {
    "train_batch_size": "null is no batch size",
    "amp": "its switch has to be in it",
    "weight_quantization": "it is there or not",
    "curriculum_learning": "its switch has to be in it",
    "datastates_ckpt": "it is there or not",
    "elasticity": "its own keys are read when it is enabled",
}


@pytest.mark.parametrize(
    "path",
    [
        info.path
        for info in describe()
        if info.type != "section"
        and not info.deprecated
        and info.path.split(".")[0] not in WRITTEN_OUT
        and repr(info.default) != "UNSET"
    ],
)
def test_default_written_out_is_the_same_as_left_out(path):
    given = nested(path, KEYS[path].default)
    written = DeepSpeedConfig({"train_batch_size": 1, **given})
    absent = DeepSpeedConfig({"train_batch_size": 1})
    for attribute, value in vars(absent).items():
        if attribute in ("_param_dict", "comms_config", "zero_config", "checkpoint_config"):
            continue  # objects, or sections that are None until they are given
        found = getattr(written, attribute)
        assert found == value, attribute


def test_each_key_is_spelled_in_one_field_only():
    """No module of the schema reads a key of a pydantic section by a string of its own."""
    source = ast.parse(inspect.getsource(config_schema))
    classes = [node for node in source.body if isinstance(node, ast.ClassDef)]
    top = next(node for node in classes if node.name == "TopLevel")
    names = [n.target.id for n in top.body if isinstance(n, ast.AnnAssign)]
    assert names == list(config_schema.TopLevel.model_fields)


def test_description_of_one_model_alone():
    class Small(BaseModel):
        a: int = 1

    assert [info.path for info in describe(Small, "x.")] == ["x.a"]
