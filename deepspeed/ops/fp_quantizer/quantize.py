# SPDX-License-Identifier: Apache-2.0
"""`FP_Quantize`: one tensor to fp8 (e4m3), fp6 (e3m2), fp12 (e4m7) or fp4 (e2m1) and back.

The arithmetic and the packed form are those of the op (deepspeed/ops/cuda_fp_quant.py), which has a kernel for GPUs and
a torch reference for everything else; here are the shapes and dtypes around it.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from deepspeed.ops.cuda_fp_quant import FloatFormat, fp_dequantize, fp_quantize, scales
from deepspeed.utils.errors import explain

_SCALE_BYTES = 4
# bits of the mantissa that go with the bits of a value
_MANTISSA = {8: 3, 6: 2, 12: 7, 4: 1}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Quantizer(abc.ABC):
    """What `QuantizedParameter` needs of a quantizer.

    Args:
        quantization_config: with `group_size` and `q_dtype`.
    """

    def __init__(self, quantization_config: Any) -> None:
        self.config = quantization_config

    @abc.abstractmethod
    def quantize(
        self,
        input: Tensor,
        q_bits: int = 8,
        q_mantisa_bits: int = 3,
        stochastic_mode: bool = False,
        return_meta_tensor: bool = False,
    ) -> Any:
        """Return the packed values."""

    @abc.abstractmethod
    def dequantize(
        self,
        input_q: Tensor,
        fp_out: Tensor | None = None,
        q_bits: int = 8,
        q_mantisa_bits: int = 3,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Return the values of `input_q`."""


class FP_Quantize(Quantizer):
    """Quantizes one tensor; the object remembers the tensor's shape and dtype for the way back.

    Args:
        quantization_config: `QuantizationConfig`; its `group_size` values share a scale (max|x| over the greatest
            value of the format).

    Example:
        >>> from deepspeed.linear import QuantizationConfig
        >>> q = FP_Quantize(QuantizationConfig(group_size=128))
        >>> packed = q.quantize(torch.randn(4, 128), q_bits=8)
        >>> q.dequantize(packed, q_bits=8).shape
        torch.Size([4, 128])
    """

    def __init__(self, quantization_config: Any) -> None:
        super().__init__(quantization_config)
        self.orig_dtype: torch.dtype | None = None
        self.orig_shape: torch.Size | None = None
        self.num_groups: int | None = None
        self.input_q: Tensor | None = None
        self.scale: Tensor | None = None

    def quantize(
        self,
        input: Tensor,
        q_bits: int = 8,
        q_mantisa_bits: int = 3,
        stochastic_mode: bool = False,
        return_meta_tensor: bool = False,
    ) -> Any:
        """Pack a tensor.

        Args:
            input: bf16, fp16 or fp32. Its last group is filled up with zeros.
            q_bits: 8, 6, 12 or 4.
            q_mantisa_bits: follows from `q_bits`; kept for callers that give it.
            stochastic_mode: round up with the probability of the fraction.
            return_meta_tensor: give `(values, scales)` apart, the values in the input's shape where they are bytes.

        Returns:
            uint8 `[groups, group_size * q_bits / 8 + 4]`: each group's values, then its fp32 scale; or the pair.

        Raises:
            ValueError: there is no such format, or the input is of another dtype.
        """
        form = _format(q_bits)
        if input.dtype not in _FLOATS:
            raise ValueError(
                explain(
                    "only floating tensors are quantized",
                    got=input.dtype,
                    expected=", ".join(map(str, _FLOATS)),
                )
            )
        self.orig_dtype, self.orig_shape = input.dtype, input.shape
        size = self.config.group_size
        self.num_groups = -(-input.numel() // size)
        flat = input.detach().reshape(-1)
        missing = self.num_groups * size - flat.numel()
        if missing:
            flat = torch.cat([flat, flat.new_zeros(missing)])
        packed = fp_quantize(flat, size, form, stochastic_mode)
        if not return_meta_tensor:
            return packed
        values = packed[:, :-_SCALE_BYTES].contiguous()
        self.scale = packed[:, -_SCALE_BYTES:].contiguous()
        if values.numel() == self.orig_shape.numel():
            values = values.view(self.orig_shape)
        return values, self.scale

    def dequantize(
        self,
        input_q: Tensor,
        fp_out: Tensor | None = None,
        q_bits: int = 8,
        q_mantisa_bits: int = 3,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Give back the tensor that `quantize` packed, in its shape and dtype.

        Args:
            input_q: what `quantize` gave, or its values alone.
            fp_out: where the result is written; None for fresh memory.
            q_bits: as at `quantize`.
            q_mantisa_bits: follows from `q_bits`.
            scale: the scales, where `input_q` holds the values alone.

        Raises:
            RuntimeError: nothing has been quantized by this object.
        """
        shape, dtype = self._origin()
        whole = self._joined(input_q, scale, q_bits)
        groups = fp_dequantize(whole, self.config.group_size, _format(q_bits), _reachable(dtype))
        values = groups.reshape(-1)[: shape.numel()].view(shape).to(dtype)
        return values if fp_out is None else fp_out.copy_(values)

    def selective_dequantize(
        self,
        input_q: Tensor,
        indexes: Tensor,
        fp_out: Tensor | None = None,
        q_bits: int = 8,
        q_mantisa_bits: int = 3,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Give back some rows (of the first dimension) of the tensor that `quantize` packed.

        Args:
            input_q, q_bits, q_mantisa_bits, scale: as in `dequantize`.
            indexes: int64, the rows wanted.
            fp_out: where the result is written; None for fresh memory.

        Raises:
            RuntimeError: nothing has been quantized by this object.
            IndexError: a row is out of range.
        """
        shape, dtype = self._origin()
        row = shape[1:].numel()
        size = self.config.group_size
        if row % size:
            values = self.dequantize(input_q, None, q_bits, q_mantisa_bits, scale)[indexes]
        else:
            whole = self._joined(input_q, scale, q_bits)
            rows = (indexes, row // size)
            groups = fp_dequantize(whole, size, _format(q_bits), _reachable(dtype), rows)
            values = groups.reshape(len(indexes), *shape[1:]).to(dtype)
        return values if fp_out is None else fp_out.copy_(values)

    def get_scales(self) -> Tensor:
        """The fp32 scales, `[groups, 1]`, of the last `quantize(..., return_meta_tensor=True)`.

        Raises:
            RuntimeError: there was none.
        """
        if self.scale is None or self.num_groups is None:
            raise RuntimeError(
                explain(
                    "no scales are kept", fix="Call quantize with return_meta_tensor=True first."
                )
            )
        return scales(self.scale, self.num_groups)

    def to(self, *args: Any, **kwargs: Any) -> FP_Quantize:
        """Move what is kept between calls."""
        if self.scale is not None:
            self.scale = self.scale.to(*args, **kwargs)
        return self

    def _origin(self) -> tuple[torch.Size, torch.dtype]:
        if self.orig_shape is None or self.orig_dtype is None:
            raise RuntimeError(
                explain("nothing has been quantized by this object", fix="Call quantize first.")
            )
        return self.orig_shape, self.orig_dtype

    def _joined(self, input_q: Tensor, scale: Tensor | None, q_bits: int) -> Tensor:
        """Values and scales side by side."""
        if scale is None:
            return input_q
        payload = input_q.reshape(-1, self.config.group_size * q_bits // 8)
        return torch.cat([payload, scale.reshape(-1, _SCALE_BYTES)], dim=1)


def _format(q_bits: int) -> FloatFormat:
    if q_bits not in _MANTISSA:
        raise ValueError(
            explain(
                "no such quantization",
                got=f"q_bits={q_bits}",
                expected="8 (e4m3), 6 (e3m2), 12 (e4m7) or 4 (e2m1)",
            )
        )
    return FloatFormat.of(q_bits, _MANTISSA[q_bits])


def _reachable(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in _FLOATS else torch.float32
