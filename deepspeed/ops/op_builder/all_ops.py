# SPDX-License-Identifier: Apache-2.0
"""The table of legacy builders: one row an op, one class and one `ALL_OPS` entry a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from deepspeed.accelerator import get_accelerator
from deepspeed.ops import cuda_namespaces
from deepspeed.ops.op_builder import namespaces
from deepspeed.ops.op_builder.builder import OpBuilder, probe_is_compatible

_NOT_BUILT = "it is not built yet in this version"


class Row(NamedTuple):
    """One op: class name without "Builder", NAME, import path below "deepspeed.", and its functions."""

    title: str
    name: str
    path: str
    namespace: Callable[[], Any] | None = None
    missing: str = ""

    def builder(self) -> type[OpBuilder]:
        """Return the builder class of the row."""
        make = self.namespace
        return type(
            f"{self.title}Builder",
            (OpBuilder,),
            {
                "__doc__": f"Loads the op {self.name}.",
                "__module__": "deepspeed.ops.op_builder",
                "NAME": self.name,
                "BUILD_VAR": f"DS_BUILD_{_VARIABLES.get(self.title, self.name.upper())}",
                "ABSOLUTE_NAME": f"deepspeed.{self.path}",
                "NAMESPACE": None if make is None else staticmethod(make),
                "MISSING": "" if make is not None else self.missing or _NOT_BUILT,
            },
        )


_VARIABLES = {
    "AsyncIO": "AIO",
    "DeepCompile": "DEEP_COMPILE",
    "RaggedUtils": "RAGGED_OPS",
    "RaggedOps": "RAGGED_DEVICE_OPS",
    "RandomLTD": "RANDOM_LTD",
    "ShareMemComm": "SHM_COMM",
    "CCLComm": "CCL_COMM",
}
_NO_GDS = (
    "GPUDirect Storage is not supported; AsyncIOBuilder's handle takes GPU tensors too, "
    "by way of page-locked memory"
)
_NO_TRITON_1 = "it served Triton 1.0; deepspeed.ops.sparse_attention runs on torch's operations and needs no op"
_V2 = "inference.v2.kernels"

ROWS = (
    Row("AsyncIO", "async_io", "ops.aio.async_io_op", namespaces.async_io),
    Row("CCLComm", "deepspeed_ccl_comm", "ops.comm.deepspeed_ccl_comm_op"),
    Row("CPUAdagrad", "cpu_adagrad", "ops.adagrad.cpu_adagrad_op", namespaces.cpu_adagrad),
    Row("CPUAdam", "cpu_adam", "ops.adam.cpu_adam_op", namespaces.cpu_adam),
    Row("CPULion", "cpu_lion", "ops.lion.cpu_lion_op", namespaces.cpu_lion),
    Row("DeepCompile", "dc", "ops.dc_op"),
    Row("EvoformerAttn", "evoformer_attn", "ops.evoformer_attn_op", namespaces.evoformer_attn),
    Row(
        "FPQuantizer",
        "fp_quantizer",
        "ops.fp_quantizer.fp_quantizer_op",
        cuda_namespaces.fp_quantizer,
    ),
    Row("FusedAdam", "fused_adam", "ops.adam.fused_adam_op", namespaces.fused_adam),
    Row("FusedLamb", "fused_lamb", "ops.lamb.fused_lamb_op", namespaces.fused_lamb),
    Row("FusedLion", "fused_lion", "ops.lion.fused_lion_op", namespaces.fused_lion),
    Row("GDS", "gds", "ops.gds.gds_op", missing=_NO_GDS),
    # no dot before the last name: so it is upstream
    Row("InferenceCore", "inference_core_ops", f"{_V2}inference_core_ops"),
    Row("InferenceCutlass", "cutlass_ops", f"{_V2}.cutlass_ops.cutlass_ops"),
    Row("Inference", "transformer_inference", "ops.transformer.inference.transformer_inference_op"),
    Row("PinMemory", "pin_memory", "ops.pin_memory.pin_memory_op", namespaces.pin_memory),
    Row("Quantizer", "quantizer", "ops.quantizer.quantizer_op", cuda_namespaces.quantizer),
    Row("RaggedOps", "ragged_device_ops", f"{_V2}.ragged_ops.ragged_device_ops"),
    Row("RaggedUtils", "ragged_ops", "inference.v2.ragged_ops"),
    Row("RandomLTD", "random_ltd", "ops.random_ltd_op", cuda_namespaces.random_ltd),
    Row("ShareMemComm", "deepspeed_shm_comm", "ops.comm.deepspeed_shm_comm_op"),
    Row("SparseAttn", "sparse_attn", "ops.sparse_attention.sparse_attn_op", missing=_NO_TRITON_1),
    Row(
        "SpatialInference",
        "spatial_inference",
        "ops.spatial.spatial_inference_op",
        cuda_namespaces.spatial_inference,
    ),
    Row(
        "StochasticTransformer",
        "stochastic_transformer",
        "ops.transformer.stochastic_transformer_op",
    ),
    Row("Transformer", "transformer", "ops.transformer.transformer_op"),
    Row("Utils", "utils", "ops.utils_op", namespaces.utils),
    Row(
        "NotImplemented",
        "deepspeed_not_implemented",
        "ops.comm.deepspeed_not_implemented_op",
        missing="it stands for every op that this device has not",
    ),
)

BUILDERS: dict[str, type[OpBuilder]] = {f"{row.title}Builder": row.builder() for row in ROWS}
# what programs ask this builder for: the dtype of packed values
BUILDERS["FPQuantizerBuilder"].get_default_quant_dtype = staticmethod(lambda: torch.uint8)  # type: ignore[attr-defined]
ALL_OPS: dict[str, OpBuilder] = {builder.NAME: builder() for builder in BUILDERS.values()}


def compatible_ops() -> dict[str, bool]:
    """Return for each op's NAME whether it can be loaded here."""
    return {name: probe_is_compatible(builder) for name, builder in ALL_OPS.items()}


def __getattr__(name: str) -> str:
    if name == "accelerator_name":
        return get_accelerator()._name
    raise AttributeError(f"module {__name__} has no attribute {name}")
