# SPDX-License-Identifier: Apache-2.0
"""Quantization in the optimizer's step (MoQ): weights of 16 bits take fewer and fewer levels; their fp32 masters do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepspeed.compression.utils import fewer_bits, three_levels, two_levels
from deepspeed.utils.logging import log_dist


class Quantizer:
    """Rounds parameters that have the attributes `start_bits`, `target_bits` and `q_period`.

    The bits begin at `start_bits`. They become one fewer after `q_period` steps, and then each time that the number of
    steps has doubled, until they are `target_bits`.

    Args:
        q_groups: runs of a parameter's values with a scale of their own.
        q_mixed_fp16: fade from the values to the rounded ones, anew at each change of bits.
        q_change_ratio: how much less the values themselves weigh with each step of fading.
        q_type: ``symmetric`` or ``asymmetric``.
        q_rounding: ``nearest`` or ``stochastic``.
        q_verbose: log changes of bits.
        q_eigenvalue: kept for callers; see `quantize`.
        use_quantizer_kernel: kept for callers: the same arithmetic either way.
        layer_num: kept for callers.
    """

    def __init__(
        self,
        q_groups: int = 1,
        q_mixed_fp16: bool = False,
        q_change_ratio: float = 0.01,
        q_type: Any = 0,
        q_rounding: Any = 0,
        q_verbose: bool = False,
        q_eigenvalue: bool = False,
        use_quantizer_kernel: bool = False,
        layer_num: int = 0,
    ) -> None:
        self.q_groups, self.q_mixed_fp16, self.q_change_ratio = (
            q_groups,
            q_mixed_fp16,
            q_change_ratio,
        )
        self.q_type = q_type if isinstance(q_type, str) else ("symmetric", "asymmetric")[q_type]
        self.q_rounding = (
            q_rounding if isinstance(q_rounding, str) else ("nearest", "stochastic")[q_rounding]
        )
        self.q_verbose, self.q_eigenvalue = q_verbose, q_eigenvalue
        self.use_quantizer_kernel, self.layer_num = use_quantizer_kernel, layer_num
        self.qsteps, self.quantize_real_ratio = 0, 1.0
        self._beginnings: list[tuple[Any, int, int]] = []

    def any_precision_switch(self) -> bool:
        """Whether bits may still change: never known of here, since parameters hold their own."""
        return False

    def step(self) -> None:
        """Count a step."""
        self.qsteps += 1

    def quantize(
        self,
        parameter_group: Iterable[Iterable[Any]],
        overflow: bool,
        eigenvalue_enabled: bool = False,
        block_eigenvalue: Mapping[int, tuple[float, int]] | None = None,
    ) -> None:
        """Count a step, and round the parameters in place.

        Args:
            parameter_group: groups of parameters; those of one dimension, or without the attributes, are left alone.
            overflow: the step was skipped; then nothing happens, unless `eigenvalue_enabled`.
            eigenvalue_enabled: as `overflow` says.
            block_eigenvalue: ``id(parameter)`` -> (share of the greatest eigenvalue, number of the block). The period
                of a block is longer in proportion, up to five times.
        """
        if overflow and not eigenvalue_enabled:
            return
        self.step()
        self.update_fp16_ratio()
        for group in parameter_group:
            for param in group:
                if param.dim() > 1 and getattr(param, "start_bits", None):
                    share = (block_eigenvalue or {}).get(id(param), (0.0, 0))[0]
                    self._switch(param, 1 + int(share * 4))
                    param.data.copy_(self.compute_quantization(param.data, param.start_bits))

    def resume(self, params: Iterable[Any], qsteps: int) -> None:
        """Take up the bits, the periods and the fading of after `qsteps` calls; nothing is rounded.

        Args:
            params: with the attributes as they were when this was called first.
            qsteps: calls so far.
        """
        if not self._beginnings:
            chosen = [p for p in params if p.dim() > 1 and getattr(p, "start_bits", None)]
            self._beginnings = [(p, p.start_bits, p.q_period) for p in chosen]
        for param, bits, period in self._beginnings:
            param.start_bits, param.q_period = bits, period
        self.qsteps, self.quantize_real_ratio = 0, 1.0
        moving = [param for param, *_ in self._beginnings]
        while self.qsteps < qsteps and moving:
            self.step()
            self.update_fp16_ratio()
            for param in moving:
                self._switch(param, 1)
            moving = [param for param in moving if param.start_bits != param.target_bits]
        if self.q_mixed_fp16:
            faded = self.q_change_ratio * (qsteps - self.qsteps)
            self.quantize_real_ratio = max(self.quantize_real_ratio - faded, 0.0)
        self.qsteps = qsteps

    def _switch(self, param: Any, factor: int) -> None:
        if param.start_bits == param.target_bits or self.qsteps < param.q_period:
            return
        self.quantize_real_ratio = 1.0
        param.q_period = param.q_period * 2 * factor
        param.start_bits -= 1
        if self.q_verbose:
            log_dist(f"quantization: {param.start_bits} bits from step {self.qsteps}", ranks=[0])

    def update_fp16_ratio(self) -> None:
        """Fade a step further, where that is asked for."""
        if self.q_mixed_fp16:
            self.quantize_real_ratio = max(self.quantize_real_ratio - self.q_change_ratio, 0.0)

    def compute_quantization(self, input: Tensor, bits: int) -> Tensor:
        """A tensor rounded to `bits` bits, mixed with itself as far as the fading is.

        Raises:
            AssertionError: 1 or 2 bits that are not symmetric, or not rounded to the nearest.
        """
        if bits >= 3:
            rounded = self.quantize_highbit(input, bits)
        else:
            rounded = self.quantize_tenary(input) if bits == 2 else self.quantize_binary(input)
        return self.mixed_fp16_quantize(input, rounded)

    def quantize_highbit(self, inputs: Tensor, num_bits: int) -> Tensor:
        """See `deepspeed.compression.utils.fewer_bits`."""
        return fewer_bits(
            inputs,
            num_bits,
            self.q_groups,
            symmetric=self.q_type == "symmetric",
            stochastic=self.q_rounding == "stochastic",
        )

    def _check_few(self) -> None:
        if self.q_type != "symmetric":
            raise AssertionError("Quantization type is not symmetric!")
        if self.q_rounding != "nearest":
            raise AssertionError("Quantization rounding is not nearest_neighbor!")

    def quantize_tenary(self, inputs: Tensor) -> Tensor:
        """See `deepspeed.compression.utils.three_levels`."""
        self._check_few()
        return three_levels(inputs, self.q_groups)

    def quantize_binary(self, inputs: Tensor) -> Tensor:
        """See `deepspeed.compression.utils.two_levels`."""
        self._check_few()
        return two_levels(inputs, self.q_groups)

    def mixed_fp16_quantize(self, input: Tensor, input_q: Tensor) -> Tensor:
        """The mixture of a tensor and its rounded values."""
        if not self.q_mixed_fp16:
            return input_q
        return torch.lerp(input_q.float(), input.float(), self.quantize_real_ratio).to(input.dtype)
