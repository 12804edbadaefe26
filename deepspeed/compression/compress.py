# SPDX-License-Identifier: Apache-2.0
"""The two ends of compression: a model's layers are prepared before training, and cleaned of what went afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from deepspeed.runtime.config import load_config
from deepspeed.runtime.zero.own_slice import is_zero_param
from deepspeed.utils.errors import explain
from deepspeed.utils.logging import logger

from .config import get_compression_config
from .helper import module_replacement, recursive_getattr
from .layer_parts import Compressed, Pruned, whole
from .snip import prepare_snip
from .techniques import CLEANING, SNIP, Group, groups_of, shared


def _section(deepspeed_config: Any) -> dict[str, Any]:
    try:
        return get_compression_config(load_config(deepspeed_config))
    except TypeError as error:
        raise ValueError(
            f"Expected a string path to an existing deepspeed config, or a dictionary. Received: {deepspeed_config}"
        ) from error


def _inner(model: nn.Module) -> nn.Module:
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


def init_compression(
    model: nn.Module, deepspeed_config: Any, teacher_model: nn.Module | None = None, mpu: Any = None
) -> nn.Module:
    """Prepare a model for what ``compression_training`` asks for; call it before `deepspeed.initialize`.

    Args:
        model: changed in place: layers that are named become layers of `basic_layer`, with the same weights.
        deepspeed_config: the configuration that `deepspeed.initialize` gets: a dictionary or a file's path.
        teacher_model: gives its layers to the student, for ``layer_reduction``.
        mpu: Megatron's, for its layers.

    Returns:
        The model.

    Raises:
        AssertionError: layers are to be reduced and there is no teacher; an enabled technique lacks a setting.
        ValueError: a module is in two groups, or what is related does not match.
    """
    config, inner = _section(deepspeed_config), _inner(model)
    if config["layer_reduction"]["enabled"]:
        if teacher_model is None:
            raise AssertionError("Teacher model is required for layer reduction")
        student_initialization(inner, teacher_model, deepspeed_config)
    for group in groups_of(inner, config, mpu):
        for name in group.modules:
            module_replacement(inner, name, {group.technique: group.arguments}, mpu)
        for names in group.related:
            for name in names:
                module_replacement(inner, name, mpu=mpu)
    sparse = shared(config, "sparse_pruning")
    if sparse["enabled"] and sparse["method"] == SNIP:
        prepare_snip(inner, sparse)
    _tell_what_forward_ignores(config["weight_quantization"])
    return model


def _tell_what_forward_ignores(section: Mapping[str, Any]) -> None:
    weights, groups = section["shared_parameters"], section["different_groups"].values()
    if not (weights["enabled"] and weights["quantize_weight_in_forward"]):
        return
    ignored = {
        "rounding": weights["rounding"] != "nearest",
        "fp16_mixed_quantize": weights["fp16_mixed_quantize"]["enabled"],
        "start_bits": any(
            group["params"]["start_bits"] != group["params"]["target_bits"] for group in groups
        ),
    }
    if any(ignored.values()):
        logger.warning(
            f"weight_quantization: {', '.join(key for key in ignored if ignored[key])} is of quantization in the "
            "optimizer's step; the forward pass rounds to the nearest of target_bits from schedule_offset on"
        )


def redundancy_clean(model: nn.Module, deepspeed_config: Any, mpu: Any = None) -> nn.Module:
    """Make what training has chosen final: weights are rounded, and what was pruned is removed or set to zero.

    Rows, heads and channels go from the weights only where ``related_modules`` says who reads them; elsewhere they
    become zero. The quantization of activations stays.

    Args:
        model: what `init_compression` has prepared, or an engine of it; changed in place.
        deepspeed_config: the same configuration.
        mpu: Megatron's, for its layers.

    Returns:
        The model. An engine does not train it on: its optimizer knows the weights from before.

    Raises:
        ValueError: the weights are sharded by ZeRO stage 3.
    """
    config, inner = _section(deepspeed_config), _inner(model)
    groups = groups_of(inner, config, mpu)
    if any(is_zero_param(param) for param in inner.parameters()):
        raise ValueError(
            explain(
                "redundancy_clean needs whole weights",
                got="weights that ZeRO stage 3 has sharded",
                fix="Save them by engine.save_16bit_model, load them into a model that init_compression has "
                "prepared, and clean that.",
            )
        )
    with torch.no_grad():
        for group in groups:
            _clean(inner, group)
        for param in inner.parameters():
            # an engine's flat buffer would stay, and be saved, as a whole
            if param.untyped_storage().nbytes() > param.numel() * param.element_size():
                param.data = param.data.clone()
        sparse = shared(config, "sparse_pruning")
        if sparse["enabled"] and sparse["method"] == SNIP:
            for layer in inner.modules():
                if isinstance(layer, Pruned) and layer.sparse_pruning_method == SNIP:
                    layer.fix_sparse_pruning_helper()
    return model


def _clean(model: nn.Module, group: Group) -> None:
    if group.technique == "activation_quantization":
        return
    for number, name in enumerate(group.modules):
        layer: Any = recursive_getattr(model, name)
        prepared = isinstance(layer, Compressed)
        if not prepared:
            raise ValueError(
                f"{name} was not prepared: call init_compression with this configuration first"
            )
        if group.technique == "weight_quantization":
            layer.fix_weight_quantization()
        elif group.technique == "sparse_pruning":
            layer.fix_sparse_pruning_helper()
        else:
            _clean_with_related(model, layer, group, group.related[number] if group.related else [])


def _clean_with_related(model: nn.Module, layer: Any, group: Group, related: Iterable[str]) -> None:
    related = list(related)
    heads = {"num_heads": group.settings["num_heads"]} if group.technique == "head_pruning" else {}
    fix = CLEANING[group.technique]
    mask = getattr(layer, fix)(dim_reduction=bool(related), **heads)
    for other in related:
        getattr(recursive_getattr(model, other), fix)(mask=mask, dim_reduction=True, **heads)


def student_initialization(
    student_model: nn.Module, teacher_model: nn.Module, deepspeed_config: Any
) -> None:
    """Copy some of a teacher's layers, and other modules, into a student with fewer layers.

    Args:
        student_model: has the section's `keep_number_layer` layers.
        teacher_model: its layers `teacher_layer` become the student's, in that order.
        deepspeed_config: a dictionary or a file's path.

    Raises:
        AttributeError: a model has no such layer or module.
        ValueError: a teacher's and a student's layer differ in a shape.
    """
    section: Mapping[str, Any] = _section(deepspeed_config)["layer_reduction"]
    prefix, kept = section["module_name_prefix"], section["keep_number_layer"]
    chosen = list(section["teacher_layer"])
    if kept is not None and kept != len(chosen):
        logger.warning(
            f"layer_reduction keeps {kept} layers and names {len(chosen)} of the teacher's: {chosen}"
        )
    names = [(f"{prefix}.{number}", f"{prefix}.{taken}") for number, taken in enumerate(chosen)]
    names += [(name, name) for name in section["other_module_name"]]
    inner, teacher = _inner(student_model), _inner(teacher_model)
    for own, taken in names:
        _copy(recursive_getattr(inner, own), recursive_getattr(teacher, taken), own)


def _copy(student: nn.Module, teacher: nn.Module, name: str) -> None:
    values: dict[str, torch.Tensor] = {
        **dict(teacher.named_parameters()),
        **dict(teacher.named_buffers()),
    }
    with (
        torch.no_grad(),
        whole(teacher.parameters()),
        whole(student.parameters(), edited=True),
    ):
        for key, tensor in [*student.named_parameters(), *student.named_buffers()]:
            if key not in values or values[key].shape != tensor.shape:
                raise ValueError(
                    explain(
                        f"layer_reduction cannot copy {name}.{key} from the teacher",
                        got=f"shape {tuple(values[key].shape)}" if key in values else "nothing",
                        expected=f"shape {tuple(tensor.shape)}",
                    )
                )
            tensor.copy_(values[key])
