# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a frozen base and LoRA adapters (arXiv:2106.09685).

The base may be cut over all ranks, kept in CPU memory, quantized, or several of these. What is not at hand as it is
gets made for the forward pass, thrown away, and made again for the backward pass: a base weight is whole only while
its own layer runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import flat
from deepspeed.comm.mesh import Axis
from deepspeed.runtime.torch_autocast import autocast_of
from deepspeed.utils import groups
from deepspeed.utils.errors import explain

from .config import LoRAConfig, QuantizationConfig
from .frozen_product import FrozenProduct
from .quantization import QuantizedLinear, QuantizedParameter, requantize

_ADAPTERS = ("lora_weight_1", "lora_weight_2")


class OptimizedLinear(nn.Module):
    """`OptimizedLinear(...)` gives the layer that the two configurations ask for.

    Neither: `linear_cls`. Quantization alone: `QuantizedLinear`. LoRA, quantized or not: `LoRAOptimizedLinear`.

    Args:
        input_dim, output_dim, bias: of the layer.
        lora_config: `LoRAConfig`, or None for no adapters.
        quantization_config: `QuantizationConfig`, or None for the weight as it is.
        device: where it is made; None for the accelerator.
        dtype: of the weights.
        linear_cls: the plain layer.

    Raises:
        ValueError: a configuration of another type.
    """

    def __new__(
        cls,
        input_dim: int,
        output_dim: int,
        bias: bool = False,
        lora_config: LoRAConfig | None = None,
        quantization_config: QuantizationConfig | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.bfloat16,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
    ) -> Any:
        """Choose the class and build it."""
        _check_type(lora_config, LoRAConfig)
        _check_type(quantization_config, QuantizationConfig)
        device = get_accelerator().current_device_name() if device is None else device
        if lora_config is not None:
            shape = (input_dim, output_dim, bias)
            return LoRAOptimizedLinear(
                *shape, lora_config, quantization_config, device, dtype, linear_cls
            )
        if quantization_config is not None:
            return QuantizedLinear(input_dim, output_dim, bias, quantization_config, dtype, device)
        return linear_cls(input_dim, output_dim, bias=bias, device=device, dtype=dtype)


class LoRAOptimizedLinear(nn.Module):
    """`input @ base.T + bias + lora_alpha / lora_r * adapters(input)`; only the adapters train.

    Args:
        input_dim, output_dim, bias: of the layer; a bias is frozen, too.
        lora_config: adapters, sharding, offload; None for the defaults.
        quantization_config: of the base; None keeps it as it is.
        device: where it is made; None for the accelerator.
        dtype: of base and adapters.
        linear_cls: what the adapters are made of.

    Raises:
        ValueError: a configuration of another type.
        AssertionError: sharding over some ranks but not all.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        bias: bool = False,
        lora_config: LoRAConfig | None = None,
        quantization_config: QuantizationConfig | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.bfloat16,
        linear_cls: Callable[..., nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        device = get_accelerator().current_device_name() if device is None else device
        base = nn.Linear(input_dim, output_dim, bias=bias, device=device, dtype=dtype)
        self._adopt(base, lora_config or LoRAConfig(), quantization_config, linear_cls)
        if not self.lora_config.delay_lora_init:
            self.init_lora()

    @classmethod
    def of(
        cls, linear: nn.Linear, lora_config: LoRAConfig, quantization_config: Any = None
    ) -> LoRAOptimizedLinear:
        """Take over a layer; its adapters come with `init_lora`, after its weights have been loaded."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        later = dataclasses.replace(lora_config, delay_lora_init=True)
        layer._adopt(linear, later, quantization_config, nn.Linear)
        return layer

    def _adopt(
        self, base: nn.Linear, lora: LoRAConfig, quant: Any, linear_cls: Callable[..., nn.Module]
    ) -> None:
        _check_type(lora, LoRAConfig)
        _check_type(quant, QuantizationConfig)
        self.input_dim, self.output_dim = base.in_features, base.out_features
        self.lora_config, self.quantization_config = lora, quant
        self.linear_cls = linear_cls
        self.weight, self.bias = base.weight, base.bias
        self.dtype = base.weight.dtype
        self.zero_shards = lora.base_weight_sharding
        self.lora_scaling_factor = lora.lora_alpha / lora.lora_r
        self.disabled = self._initialized = False
        self._axis = Axis.alone()
        if self.zero_shards > 1:
            self._axis = groups.current_mesh().world
            if self._axis.size != self.zero_shards:
                raise AssertionError(
                    explain(
                        "base weights are cut over all ranks or not at all",
                        got=f"base_weight_sharding={self.zero_shards} on {self._axis.size} ranks",
                        expected=f"1 or {self._axis.size}",
                    )
                )
        self._freeze_base()

    # - life

    def init_lora(self) -> None:
        """Freeze, cut and quantize the base, and make the adapters; a second call does nothing.

        Raises:
            RuntimeError: the base has no values yet.
        """
        if self._initialized or self.disabled:
            return
        if self.weight.is_meta:
            raise RuntimeError(
                explain(
                    "the base weight has no values yet", fix="Load the model before init_lora()."
                )
            )
        self._initialized = True
        device, dtype = self.weight.device, self.weight.dtype
        self.dtype = dtype
        values = self.weight.data
        if self.zero_shards > 1:
            values = self._own_rows(values)
        if self.quantization_config is not None:
            config = self.quantization_config
            self.weight = QuantizedParameter(values, quantization_config=config)
        else:
            self.weight = nn.Parameter(values, requires_grad=False)
        self._freeze_base()
        self.weight.ds_optim_param = True
        self.weight.ds_base_shard = self.zero_shards > 1  # it differs from rank to rank
        self.weight.ds_offload = self.lora_config.offload
        rank = self.lora_config.lora_r
        options = {"bias": False, "device": device, "dtype": dtype}
        self.lora_weight_1 = self.linear_cls(self.input_dim, rank, **options)
        self.lora_weight_2 = self.linear_cls(rank, self.output_dim, **options)
        nn.init.zeros_(self.lora_weight_2.weight)

    def disable(self) -> None:
        """Be a plain frozen layer: no adapters, nothing cut or quantized. Call it before `init_lora`."""
        self.disabled = True

    def full_weight(self) -> Tensor:
        """The base weight `[output_dim, input_dim]` as the layer uses it. Collective where it is cut."""
        weight = self.weight
        quantized = isinstance(weight, QuantizedParameter)
        values = weight.dequantized() if quantized else weight.detach()
        if not self._is_cut:
            return values
        whole = values.new_empty(self.zero_shards * values.numel())
        flat.all_gather_into(whole, values.reshape(-1), self._axis)
        return whole.view(-1, self.input_dim)[: self.output_dim]

    # - use

    def forward(self, input_tensor: Tensor) -> Tensor:
        """`[..., input_dim]` to `[..., output_dim]`, in the input's dtype, or in autocast's."""
        trained = self.lora_weight_1.weight if self._initialized else self.weight
        given = input_tensor.dtype
        if given == trained.dtype or autocast_of(input_tensor.device.type)[0]:
            return self._products(input_tensor)
        return self._products(input_tensor.to(trained.dtype)).to(given)

    def _products(self, input_tensor: Tensor) -> Tensor:
        if self._is_cut or self._away or isinstance(self.weight, QuantizedParameter):
            output = FrozenProduct.apply(input_tensor, self._present_weight)
            if self.bias is not None:
                output = output + self.bias.to(output.dtype)
        else:
            output = nn.functional.linear(input_tensor, self.weight, self.bias)
        if not self._initialized:
            return output
        adapted = self.lora_weight_2(self.lora_weight_1(input_tensor))
        return output + self.lora_scaling_factor * adapted

    @property
    def _is_cut(self) -> bool:
        return getattr(self.weight, "ds_base_shard", False)

    @property
    def _away(self) -> bool:
        return getattr(self.weight, "ds_offload", False)

    def _present_weight(self) -> Tensor:
        """The whole weight on the device that computes; what is kept in CPU memory goes back there by being dropped."""
        if not self._away:
            return self.full_weight()
        stored = self.weight.data
        if stored.device.type != "cpu":  # moved along with the model
            stored = get_accelerator().pin_memory(stored.cpu())
            self.weight.data = stored
        device = self.lora_weight_1.weight.device
        try:
            self.weight.data = stored.to(device, non_blocking=True)
            return self.full_weight()
        finally:
            self.weight.data = stored

    def _own_rows(self, values: Tensor) -> Tensor:
        rows = -(-self.output_dim // self.zero_shards)
        own = values.new_zeros(rows, self.input_dim)
        mine = values[self._axis.rank * rows : (self._axis.rank + 1) * rows]
        own[: len(mine)].copy_(mine)
        return own

    def _freeze_base(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    # - state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """A whole floating base weight is cut and quantized like ours on its way in."""
        key = prefix + "weight"
        given = state_dict.get(key)
        whole = (self.output_dim, self.input_dim)
        if given is not None and self._is_cut and tuple(given.shape) == whole:
            state_dict[key] = self._own_rows(given)
        requantize(self.weight, state_dict, key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes and how the base is kept."""
        return (
            f"{self.input_dim}, {self.output_dim}, rank={self.lora_config.lora_r}, "
            f"shards={self.zero_shards}, quantized={self.quantization_config is not None}"
        )


def offload_base_weights(model: nn.Module) -> int:
    """Keep base weights of `model` in CPU memory, as far as their `offload` and `offload_ratio` ask; returns how many.

    With a ratio, layers come in the model's order until that share of all base elements is reached.
    """
    layers = [m for m in model.modules() if isinstance(m, LoRAOptimizedLinear) and m._initialized]
    total = sum(layer.weight.numel() for layer in layers)
    count = done = 0
    for layer in layers:
        config = layer.lora_config
        away = config.offload or done < total * config.offload_ratio
        layer.weight.ds_offload = away
        done += layer.weight.numel() * away
        count += away
    return count


def lora_state_dict(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The adapters of a model, by name, detached.

    Raises:
        RuntimeError: an adapter is empty on this rank (sharded by ZeRO-3), or there is none.
    """
    found = {
        prefix + name: param.detach()
        for name, param in model.named_parameters()
        if any(f"{adapter}.weight" in name for adapter in _ADAPTERS)
    }
    empty = [name for name, values in found.items() if values.numel() == 0]
    if empty or not found:
        raise RuntimeError(
            explain(
                "there are no adapter weights to save",
                got=f"{len(empty)} empty tensors, the first {empty[0]}" if empty else "no adapters",
                expected="whole tensors",
                fix="Under ZeRO-3 call it inside deepspeed.zero.GatheredParameters(model.parameters()).",
            )
        )
    return found


def _check_type(config: Any, kind: type) -> None:
    if config is not None and not isinstance(config, kind):
        raise ValueError(f"Expecting {kind.__name__} but received {type(config)}")
