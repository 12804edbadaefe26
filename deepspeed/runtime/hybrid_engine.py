# SPDX-License-Identifier: Apache-2.0
"""The engine of a model that trains and generates in turn, as reinforcement learning from feedback has it.

Generation wants whole weights with adapters folded in; training wants them sharded and apart. `generate` sets the one up,
runs the model's own `generate`, and takes it down again, so that between calls the engine is in no other state than an
ordinary one: checkpoints, evaluation and log-probabilities need no care.

[Note: Fused weights]
    A LoRA layer's weight is fused into a new tensor that takes the parameter's place; the old one is kept and put back.
    Nothing is added and subtracted again, so no rounding error piles up over thousands of turns. The price is a second copy
    of the adapted weights while they are fused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from deepspeed.utils.errors import explain

from .engine import DeepSpeedEngine
from .zero import offload_states
from .zero.gathered import GatheredParameters
from .zero.own_slice import ZeroParamStatus, is_zero_param

_LORA_NAMES = ("weight", "lora_right_weight", "lora_left_weight", "lora_scaling", "fuse_lora")


class DeepSpeedHybridEngine(DeepSpeedEngine):
    """`DeepSpeedEngine` with `generate`; the model's own `generate` is answered by it, too.

    At stage 3 a call gathers all parameters first, or, with `hybrid_engine.pin_parameters` false, leaves each layer to be
    gathered as it runs, token for token (all ranks must then generate as many: `synced_gpus=True`).

    LoRA layers are known by their attributes: `weight`, `lora_right_weight` [in, r], `lora_left_weight` [r, out],
    `lora_scaling`, and the flag `fuse_lora`, which tells their forward that the weight is all there is.

    Args:
        args, model, **engine_arguments: as of `DeepSpeedEngine`.
    """

    def __init__(self, args: Any, model: torch.nn.Module, **engine_arguments: Any) -> None:
        super().__init__(args, model, **engine_arguments)
        self._originals: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        self._generate = getattr(self.module, "generate", None)
        if self._generate is not None:
            self.module.generate = self.generate

    # - generation

    @torch.no_grad()
    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """Call the model's `generate` with whole, fused weights; returns what it returns.

        Raises:
            AttributeError: the model cannot generate.
            RuntimeError: states are offloaded.
        """
        if self._generate is None:
            raise AttributeError(
                explain(
                    "the model cannot generate",
                    got=f"class {type(self.module).__name__} without a method generate",
                    expected="a model of transformers, or another with such a method",
                )
            )
        if getattr(self.optimizer, "offloaded_states", None):
            offload_states.refuse_use(self.optimizer)
        with (
            self._whole_weights(),
            self._fused_weights(),
            self._products,
            self.precision.forward_context(self.device),
        ):
            return self._generate(*inputs, **kwargs)

    def _whole_weights(self) -> contextlib.AbstractContextManager[None]:
        at_once = self._config.hybrid_engine.pin_parameters
        return GatheredParameters(self.module.parameters(), enabled=at_once)

    @contextlib.contextmanager
    def _fused_weights(self) -> Iterator[None]:
        """Fuse what can be fused and is not yet, for the duration."""
        before = set(self._originals)
        try:
            for layer in self._lora_layers():
                if _is_whole(layer):
                    self._fuse(layer)
            yield
        finally:
            for layer in [m for m in self._originals if m not in before]:
                self._unfuse(layer)

    # - adapters

    def fuse_lora_weight(self) -> None:
        """Fold all adapters into the weights, until `unfuse_lora_weight`. `generate` does so by itself.

        Raises:
            RuntimeError: sharded parameters are not gathered.
        """
        layers = self._lora_layers()
        for layer in layers:
            if not _is_whole(layer):
                raise RuntimeError(
                    explain(
                        "the weights of a LoRA layer are not gathered",
                        got=f"a weight of shape {tuple(layer.weight.ds_shape)} that is sharded",
                        fix="call fuse_lora_weight inside deepspeed.zero.GatheredParameters(model.parameters())",
                    )
                )
        for layer in layers:
            self._fuse(layer)

    def unfuse_lora_weight(self) -> None:
        """Put the weights of `fuse_lora_weight` back, bit for bit."""
        for layer in list(self._originals):
            self._unfuse(layer)

    def _lora_layers(self) -> list[torch.nn.Module]:
        return [m for m in self.module.modules() if all(hasattr(m, name) for name in _LORA_NAMES)]

    def _fuse(self, layer: Any) -> None:
        if layer in self._originals or layer.fuse_lora:
            return
        original = layer.weight.data
        left, right = layer.lora_left_weight.data, layer.lora_right_weight.data
        wide = torch.promote_types(original.dtype, torch.float32)
        fused = torch.addmm(
            original.to(wide),
            left.t().to(wide),
            right.t().to(wide),
            alpha=float(layer.lora_scaling),
        ).to(original.dtype)
        layer.weight.data = fused
        layer.fuse_lora = True
        self._originals[layer] = (original, fused)

    def _unfuse(self, layer: Any) -> None:
        original, fused = self._originals.pop(layer)
        # A gather that ended in between has taken the fused weight away already.
        if layer.weight.data_ptr() == fused.data_ptr():
            layer.weight.data = original
        layer.fuse_lora = False

    @property
    def layer_params(self) -> list[list[torch.nn.Parameter]]:
        """The parameters of each block of the model, without those of adapters."""
        lists = [m for m in self.module.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
        blocks = max(lists, key=lambda found: sum(1 for _ in found.parameters()), default=[])
        return [
            [param for name, param in block.named_parameters() if "lora_" not in name]
            for block in blocks
        ]

    # - lifetime

    def destroy(self) -> None:
        """Give the model its own `generate` back, and free what the engine holds."""
        self.unfuse_lora_weight()
        if self._generate is not None and "generate" in self.module.__dict__:
            del self.module.generate
        super().destroy()


def _is_whole(layer: Any) -> bool:
    params = (layer.weight, layer.lora_right_weight, layer.lora_left_weight)
    return all(not is_zero_param(p) or p.ds_status is ZeroParamStatus.AVAILABLE for p in params)
