# SPDX-License-Identifier: Apache-2.0
"""What a configuration can ask for and this version cannot do: one table, one check at the engine's door.

Parsing accepts every key, because other libraries parse configurations without training. Training does not: a request
that is silently ignored is a bug that shows only in the results. A request that is harmless at the given
ZeRO stage, such as ``offload_param`` at stage 2, is no request and passes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..utils.errors import DeepSpeedConfigError, explain
from .config_errors import ConfigTypeError
from .config_schema import TopLevel, section_type
from .config_utils import PlainSection, is_auto

if TYPE_CHECKING:
    from .config import DeepSpeedConfig


@dataclass(frozen=True)
class Unbuilt:
    """One feature that is not there yet."""

    key: str
    """Dotted key by which a configuration asks for it."""
    feature: str
    """What it is, in words."""
    asked: Callable[[DeepSpeedConfig], bool]
    """Whether a parsed configuration asks for it."""
    instead: str
    """What the user can do, as a sentence."""


def _zero3(config: DeepSpeedConfig) -> bool:
    return config.zero_optimization_stage == 3


def _device(section: Any) -> str:
    return "none" if section is None else str(section.device)


def _deepcompile_key(key: str, feature: str, instead: str) -> Unbuilt:
    """Make a row for a key of ``compile`` that only DeepCompile reads."""
    return Unbuilt(
        f"compile.{key}",
        feature,
        lambda config: config.compile_config.deepcompile and getattr(config.compile_config, key),
        instead,
    )


def _quantized(section: Any) -> bool:
    return (
        section is not None
        and section.enabled
        and bool(section.quantized_initialization or section.post_init_quant)
    )


def _divided(config: DeepSpeedConfig) -> bool:
    return config.tensor_parallel_config.autotp_size > 1


_OFF = "Set it to false or remove the section."
_REMOVE = "Remove the key."

UNBUILT: tuple[Unbuilt, ...] = (
    # ------------------------------------------------------------------ ZeRO
    Unbuilt(
        "zero_optimization.legacy_stage1",
        "the first implementation of stage 1",
        lambda config: config.zero_optimization_stage == 1 and config.zero_config.legacy_stage1,
        "Set it to false: the present stage 1 replaces it.",
    ),
    # ------------------------------------------------------------------ precision and gradients
    Unbuilt(
        "amp.enabled",
        "NVIDIA Apex mixed precision",
        lambda config: config.amp_enabled,
        "Use 'bf16', 'fp16' or 'torch_autocast'.",
    ),
    Unbuilt("graph_harvesting", "CUDA graphs in the step", lambda c: c.graph_harvesting, _OFF),
    Unbuilt(
        "data_types.keep_in_fp32_modules",
        "modules kept in fp32",
        lambda config: config.keep_in_fp32_modules not in ("auto", None, []),
        _REMOVE,
    ),
    # ------------------------------------------------------------------ parallelism
    Unbuilt(
        "sequence_parallel_size",
        "sequence parallelism together with tensor parallelism",
        lambda config: _divided(config) and (config.sequence_parallel_size or 1) > 1,
        "Set 'tensor_parallel.autotp_size' to 0, or remove the key.",
    ),
    *(
        Unbuilt(
            f"tensor_parallel.{key}",
            feature,
            lambda config, key=key: (  # type: ignore[misc]
                _divided(config) and bool(getattr(config.tensor_parallel_config, key))
            ),
            _REMOVE,
        )
        for key, feature in (
            ("vocab_parallel_lm_head", "a loss of a language-model head that is split by words"),
            ("injection_policy_tuple", "layers named by a tuple ('partition_config' names them)"),
            ("keep_module_on_host", "a divided model in host memory"),
            ("replace_with_kernel_inject", "fused layers in a divided model"),
        )
    ),
    Unbuilt(
        "tensor_parallel.tensor_parallel.tp_size",
        "divided layers without 'autotp_size'",
        lambda c: not _divided(c) and c.tensor_parallel_config.tensor_parallel.tp_size > 1,
        "Set 'tensor_parallel.autotp_size' to the number of ranks.",
    ),
    *(
        Unbuilt(
            f"tensor_parallel.tensor_parallel.{key}",
            feature,
            lambda config, key=key: (  # type: ignore[misc]
                _divided(config)
                and getattr(config.tensor_parallel_config.tensor_parallel, key) is not None
            ),
            instead,
        )
        for key, feature, instead in (
            ("mpu", "an mpu in the configuration", "Pass mpu= to deepspeed.initialize."),
            ("tp_group", "a group in the configuration", "Pass tp_group= to tp_model_init."),
        )
    ),
    Unbuilt(
        "expert_parallel.comm_backend",
        "another way for tokens to travel between the ranks of experts",
        lambda config: (
            config.expert_parallel_config.enabled
            and config.expert_parallel_config.comm_backend != "comm"
        ),
        _REMOVE,
    ),
    Unbuilt(
        "hybrid_engine.inference_tp_size",
        "tensor parallelism while the hybrid engine generates",
        lambda config: config.hybrid_engine.enabled and config.hybrid_engine.inference_tp_size > 1,
        "Set it to 1; ZeRO-3 gathers the weights for each call of generate.",
    ),
    Unbuilt(
        "hybrid_engine.enable_cuda_graph",
        "CUDA graphs while the hybrid engine generates",
        lambda config: config.hybrid_engine.enabled and config.hybrid_engine.enable_cuda_graph,
        "Set it to false; generate(cache_implementation='static') lets transformers capture the step.",
    ),
    _deepcompile_key(
        "offload_activation",
        "offloading of activations by graphs",
        "Set it to false; activation_checkpointing.cpu_checkpointing keeps checkpoints in host memory.",
    ),
    _deepcompile_key(
        "offload_opt_states",
        "offloading of optimizer states by graphs",
        "Set it to false, and zero_optimization.offload_optimizer.device to 'cpu'.",
    ),
    _deepcompile_key(
        "offload_parameters",
        "offloading of parameters by graphs",
        "Set it to false, and zero_optimization.offload_param.device to 'cpu'.",
    ),
    _deepcompile_key(
        "autoep_non_moe",
        "graphs of the parts outside of experts alone",
        "Set it to false; what a graph cannot hold runs as it is.",
    ),
    _deepcompile_key("symmetric_memory", "torch's symmetric memory", "Set it to false."),
    Unbuilt(
        "compile.passes",
        "the pass autosp",
        lambda c: c.compile_config.deepcompile and "autosp" in (c.compile_config.passes or []),
        "Remove 'autosp'; sequence_parallel_size with DistributedAttention divides sequences.",
    ),
    # ------------------------------------------------------------------ techniques
    Unbuilt(
        "weight_quantization",
        "quantised weights below ZeRO stage 3",
        lambda config: not _zero3(config) and _quantized(config.weight_quantization_config),
        "Set zero_optimization.stage to 3, or remove the section.",
    ),
    Unbuilt(
        "quantize_training.eigenvalue.enabled",
        "eigenvalues for quantisation",
        lambda config: config.eigenvalue_enabled,
        _OFF,
    ),
    # ------------------------------------------------------------------ checkpoints
    Unbuilt(
        "aio.use_gds",
        "GPUDirect Storage",
        lambda config: config.aio_config["use_gds"],
        "Set it to false.",
    ),
    Unbuilt("nebula.enabled", "the Nebula service", lambda c: c.nebula_config.enabled, _OFF),
    Unbuilt(
        "datastates_ckpt",
        "the DataStates engine",
        lambda config: config.datastates_config.enabled,
        "Remove the section: torch's format is written.",
    ),
)

# optimizer.type -> the other package that holds it
UNBUILT_OPTIMIZERS: dict[str, str] = {
    "muadam": "mup",
    "muadamw": "mup",
    "musgd": "mup",
}


def _missing_optimizer(name: str) -> bool:
    module = UNBUILT_OPTIMIZERS.get(name)
    if module is None:
        return False
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # a package on the way is missing too
        return True


def find_unbuilt(config: DeepSpeedConfig, client_optimizer: bool = False) -> list[str]:
    """Return one message for each thing that ``config`` asks for and this version cannot do."""
    messages = [
        f"'{row.key}' asks for {row.feature}, which is not available in this version. {row.instead}"
        for row in UNBUILT
        if row.asked(config)
    ]
    name = config.optimizer_name
    if not client_optimizer and name is not None and _missing_optimizer(name):
        messages.append(
            f"'optimizer.type' asks for {name}, which the package {UNBUILT_OPTIMIZERS[name]} holds, and that is not "
            "installed. Install it, or use Adam, AdamW, Lion, Adagrad, LAMB, Muon or the name of a torch.optim class."
        )
    return messages


def find_unresolved_auto(param_dict: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys whose value is an ``"auto"`` that has no meaning of its own."""
    return list(_unresolved(TopLevel, param_dict, ""))


def _unresolved(model: type[BaseModel], data: Mapping[str, Any], prefix: str) -> Iterator[str]:
    if not issubclass(model, PlainSection):
        return  # there, "auto" means the default
    fields = model.model_fields
    for key, value in data.items():
        field = fields.get(key)
        if field is None:
            continue
        if is_auto(value):
            if field.default != value:
                yield f"{prefix}{key}"
        elif isinstance(value, Mapping):
            section = section_type(field)
            if section is not None:
                yield from _unresolved(section, value, f"{prefix}{key}.")
            elif key == "params":
                yield from (f"{prefix}{key}.{name}" for name in value if is_auto(value[name]))


def refuse_unbuilt(
    config: DeepSpeedConfig, *, client_optimizer: bool = False, client_scheduler: bool = False
) -> None:
    """Raise if training by ``config`` would ignore one of its requests.

    Args:
        config: the parsed configuration.
        client_optimizer: the caller brings an optimizer, so section ``optimizer`` is not used.
        client_scheduler: the caller brings a scheduler, so section ``scheduler`` is not used.

    Raises:
        DeepSpeedConfigError: a feature is asked for that is not built; every such key is named.
        TypeError: (as ``ConfigTypeError``) an ``"auto"`` is left that nobody filled in.
    """
    messages = find_unbuilt(config, client_optimizer)
    if messages:
        raise DeepSpeedConfigError("\n".join(messages))
    unused = ["optimizer."] * client_optimizer + ["scheduler."] * client_scheduler
    open_keys = [
        key for key in find_unresolved_auto(config._param_dict) if not key.startswith(tuple(unused))
    ]
    if open_keys:
        raise ConfigTypeError(
            explain(
                '"auto" is left in the config and nobody filled it in',
                got=", ".join(open_keys),
                expected="values",
                fix="Write them, or let a program fill them in before deepspeed.initialize: "
                "transformers' Trainer and accelerate do.",
            )
        )
