# SPDX-License-Identifier: Apache-2.0
"""Which layers tensor parallelism divides, and how: rules by name, ready-made for known models or written by the user."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from deepspeed.utils.errors import explain


class PartitionType(Enum):
    """What happens to a layer's weight."""

    COLUMN = "column"
    """Each rank computes some of the outputs."""
    ROW = "row"
    """Each rank takes some of the inputs; the results are added up."""
    SKIP = "skip"
    """Every rank has all of it."""


@dataclass
class TPLayerSpec:
    """One rule.

    Attributes:
        patterns: regular expressions, matched from the start of `<module name>.weight`.
        partition_type: what happens to the layers that match.
        shape: for several weights in one: the view that tells them apart, as a number of equal ones at the divided
            dimension or the tuple of their sizes there; other dimensions may be -1.
        partition_dim: the divided dimension of `shape`; None is 0 for columns and 1 for rows.
        model_types: only for models whose `config.model_type` is among these.
        gather_output: give every rank all outputs of a column layer.
        grad_allreduce: sum the gradient over the ranks (for weights that each rank uses on its own heads).
        split_input: a row layer that is given all inputs, and takes its own of them.
    """

    patterns: list[str]
    partition_type: PartitionType = PartitionType.COLUMN
    shape: tuple[Any, ...] | None = None
    partition_dim: int | None = None
    model_types: list[str] | None = None
    gather_output: bool = False
    grad_allreduce: bool = False
    split_input: bool = False

    def __post_init__(self) -> None:
        self.partition_type = PartitionType(self.partition_type)
        if self.shape is not None:
            self.shape = _as_shape(self.shape)
            dim = self.get_effective_partition_dim()
            if any(isinstance(n, tuple) for at, n in enumerate(self.shape) if at != dim):
                raise ValueError(
                    explain(
                        "nested tuple only allowed at partition_dim",
                        got=f"shape {self.shape} with partition_dim {dim}",
                        expected=f"plain numbers everywhere but at {dim}",
                    )
                )

    def matches(self, param_name: str, model_type: str | None = None) -> bool:
        """Say whether the rule is about a weight."""
        if self.model_types and (model_type or "").lower() not in map(str.lower, self.model_types):
            return False
        return any(re.match(pattern, param_name) for pattern in self.patterns)

    def get_effective_partition_dim(self) -> int:
        """Return the divided dimension of the shape."""
        if self.partition_dim is not None:
            return self.partition_dim
        return 1 if self.partition_type is PartitionType.ROW else 0


@dataclass
class AutoTPConfig:
    """All rules of a model; the first that matches decides.

    Attributes:
        layer_specs: the rules.
        tp_size: ranks that share a layer.
        use_default_specs: what no rule matches is divided as it would be without the rules.
        strict_mode: a linear layer that no rule matches is an error.
    """

    layer_specs: list[TPLayerSpec] = field(default_factory=list)
    tp_size: int = 1
    use_default_specs: bool = True
    strict_mode: bool = False

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> AutoTPConfig:
        """Read `tensor_parallel.partition_config`.

        Raises:
            ValueError: an unknown key or partition type, or a shape that cannot be.
        """
        known = {"layer_specs", "tp_size", "use_default_specs", "strict_mode"}
        _refuse_unknown("partition_config", config, known)
        return AutoTPConfig(
            layer_specs=[_read_spec(spec) for spec in config.get("layer_specs") or ()],
            tp_size=int(config.get("tp_size", 1)),
            use_default_specs=bool(config.get("use_default_specs", True)),
            strict_mode=bool(config.get("strict_mode", False)),
        )

    def find_matching_spec(
        self, param_name: str, model_type: str | None = None
    ) -> TPLayerSpec | None:
        """Return the first rule for a weight, None where there is none."""
        return next((s for s in self.layer_specs if s.matches(param_name, model_type)), None)


def merge_autotp_configs(base: AutoTPConfig, override: AutoTPConfig) -> AutoTPConfig:
    """Put rules before others: `override`'s decide where both match, and its switches hold."""
    return AutoTPConfig(
        layer_specs=[*override.layer_specs, *base.layer_specs],
        tp_size=override.tp_size if override.tp_size > 1 else base.tp_size,
        use_default_specs=override.use_default_specs,
        strict_mode=override.strict_mode,
    )


def _read_spec(spec: Mapping[str, Any] | TPLayerSpec) -> TPLayerSpec:
    if isinstance(spec, TPLayerSpec):
        return spec
    fields = dict(spec)
    _refuse_unknown("layer_specs", fields, set(TPLayerSpec.__dataclass_fields__))
    if not fields.get("patterns"):
        raise ValueError(explain("a rule of layer_specs matches nothing", got=spec))
    kind = str(fields.get("partition_type", "column")).lower()
    kinds = [member.value for member in PartitionType]
    if kind not in kinds:
        raise ValueError(explain("unknown partition_type", got=kind, expected=", ".join(kinds)))
    patterns = fields.pop("patterns")
    fields["patterns"] = [patterns] if isinstance(patterns, str) else list(patterns)
    return TPLayerSpec(**{**fields, "partition_type": PartitionType(kind)})


def _refuse_unknown(section: str, given: Iterable[str], known: set[str]) -> None:
    if unknown := sorted(set(given) - known):
        raise ValueError(
            explain(
                f"unknown keys in {section}",
                got=", ".join(unknown),
                expected=", ".join(sorted(known)),
            )
        )


def _as_shape(shape: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(
        tuple(int(i) for i in n) if isinstance(n, (list, tuple)) else int(n) for n in shape
    )


# - ready-made rules


def _rules(
    column: Sequence[str] = (), row: Sequence[str] = (), skip: Sequence[str] = ()
) -> list[TPLayerSpec]:
    kinds = (
        (PartitionType.SKIP, skip),
        (PartitionType.COLUMN, column),
        (PartitionType.ROW, row),
    )
    return [
        TPLayerSpec(patterns=[rf".*\.{name}\.weight$" for name in names], partition_type=kind)
        for kind, names in kinds
        if names
    ]


_ATTENTION = [r"self_attn\.[qkv]_proj"]
_LLAMA_MLP = [r"mlp\.(up|gate)_proj"]


class AutoTPPresets:
    """Rules for models by their `config.model_type`."""

    @staticmethod
    def get_preset(name: str) -> AutoTPConfig | None:
        """Return the rules of a model family, None where it has none."""
        make = _PRESETS.get(_ALIASES.get(name.lower(), name.lower()))
        return None if make is None else make()

    @staticmethod
    def llama() -> AutoTPConfig:
        """Llama, Mistral and those alike: attention with four projections, a gated MLP."""
        return AutoTPConfig(
            _rules([*_ATTENTION, *_LLAMA_MLP], [r"self_attn\.o_proj", r"mlp\.down_proj"])
        )

    qwen2 = llama

    @staticmethod
    def bloom() -> AutoTPConfig:
        """BLOOM: each head's query, key and value lie side by side, so heads divide as they are."""
        return AutoTPConfig(
            _rules(
                [r"self_attention\.query_key_value", r"mlp\.dense_h_to_4h"],
                [r"self_attention\.dense", r"mlp\.dense_4h_to_h"],
            )
        )

    @staticmethod
    def chatglm() -> AutoTPConfig:
        """ChatGLM: the MLP's gate and its partner are one weight; so are query, key and value, by their sizes."""
        gate = TPLayerSpec([r".*\.mlp\.dense_h_to_4h\.weight$"], shape=(2, -1), partition_dim=0)
        rows = _rules(row=[r"self_attention\.dense", r"mlp\.dense_4h_to_h"])
        return AutoTPConfig([gate, *rows])

    @staticmethod
    def mixtral() -> AutoTPConfig:
        """Mixtral: attention as Llama's, and every expert's MLP."""
        return AutoTPConfig(
            _rules(
                [*_ATTENTION, r"experts\.\d+\.w[13]"],
                [r"self_attn\.o_proj", r"experts\.\d+\.w2"],
                [r"block_sparse_moe\.gate", r"mlp\.gate"],
            )
        )

    @staticmethod
    def deepseek_v2() -> AutoTPConfig:
        """DeepSeek V2: the low-rank projections stay whole, what comes out of them is divided."""
        experts = r"mlp\.(experts\.\d+\.|shared_experts\.)?"
        return AutoTPConfig(
            _rules(
                [r"self_attn\.(q|q_b|kv_b)_proj", experts + r"(up|gate)_proj"],
                [r"self_attn\.o_proj", experts + r"down_proj"],
                [r"self_attn\.(q_a|kv_a)_proj\w*", r"mlp\.gate"],
            )
        )

    @staticmethod
    def phi3() -> AutoTPConfig:
        """Phi 3: the MLP's gate and its partner are one weight; so are query, key and value, by their sizes."""
        gate = TPLayerSpec([r".*\.mlp\.gate_up_proj\.weight$"], shape=(2, -1), partition_dim=0)
        return AutoTPConfig([gate, *_rules(row=[r"self_attn\.o_proj", r"mlp\.down_proj"])])


_PRESETS = {
    "llama": AutoTPPresets.llama,
    "qwen2": AutoTPPresets.qwen2,
    "bloom": AutoTPPresets.bloom,
    "chatglm": AutoTPPresets.chatglm,
    "mixtral": AutoTPPresets.mixtral,
    "deepseek_v2": AutoTPPresets.deepseek_v2,
    "phi3": AutoTPPresets.phi3,
}
_ALIASES = {"mistral": "llama", "glm": "chatglm"}


def packed_attention(model_type: str | None, config: Any) -> TPLayerSpec | None:
    """The rule for query, key and value in one weight, whose sizes only the model's configuration tells.

    Args:
        model_type: family.
        config: the model's own configuration.

    Raises:
        ValueError: it does not tell.
    """
    try:
        return _packed_attention(model_type, config)
    except AttributeError as error:
        raise ValueError(
            explain(
                f"how a {model_type} model's attention is divided depends on its configuration",
                got=error,
                expected="model.config with the numbers of heads",
                fix="write tensor_parallel.partition_config instead",
            )
        ) from None


def _packed_attention(model_type: str | None, config: Any) -> TPLayerSpec | None:
    if model_type == "phi3":
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        sizes = (heads * size, shared * size, shared * size)
        return TPLayerSpec([r".*\.self_attn\.qkv_proj\.weight$"], shape=(sizes, -1))
    if model_type == "chatglm":
        size = config.kv_channels
        shared = config.num_attention_heads
        if getattr(config, "multi_query_attention", False):
            shared = config.multi_query_group_num
        sizes = (config.num_attention_heads * size, shared * size, shared * size)
        return TPLayerSpec([r".*\.self_attention\.query_key_value\.weight$"], shape=(sizes, -1))
    return None
