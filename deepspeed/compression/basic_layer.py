# SPDX-License-Identifier: Apache-2.0
"""Layers that can be quantized and pruned while they train, and cleaned of what was pruned afterwards."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from deepspeed.comm.mesh import Axis
from deepspeed.module_inject.tp_collectives import gather_columns, sum_of_grads, sum_over_ranks
from deepspeed.module_inject.tp_cut import Cut
from deepspeed.runtime.zero.own_slice import shape_of
from deepspeed.utils.errors import explain

from .layer_parts import Compressed, Pruned, QuantAct, QuantizedInput, QuantizedWeight

__all__ = [
    "BNLayer_Compress",
    "ColumnParallelLinear_Compress",
    "Conv2dLayer_Compress",
    "Embedding_Compress",
    "LinearLayer_Compress",
    "QuantAct",
    "RowParallelLinear_Compress",
]


class Embedding_Compress(QuantizedWeight, nn.Embedding):
    """An embedding whose weight may have fewer bits; each token's row has a scale of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def extra_repr(self) -> str:
        """The sizes and what is done to the layer."""
        return (
            f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, "
            f"weight_quantization={self._bits_of_weight()}"
        )

    def enable_weight_quantization(self, *args: Any) -> None:
        """See `QuantizedWeight`; the number of groups is that of the rows."""
        start, target, period, in_forward, kind, _ = args
        super().enable_weight_quantization(
            start, target, period, in_forward, kind, self.num_embeddings
        )

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Embedding`."""
        return F.embedding(
            input,
            self._weight_now(),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class LinearLayer_Compress(Pruned, QuantizedWeight, QuantizedInput, nn.Linear):
    """A linear layer that may be quantized, and pruned of single weights, rows, or the columns of attention heads.

    Rows are outputs, with their bias. Heads are of the layer that follows attention: each has as many columns.
    """

    masks: ClassVar[dict[str, tuple[str, str]]] = {
        "sparse": ("sparse_mask_scores", "sparse_pruning_mask"),
        "row": ("row_mask_scores", "row_pruning_mask"),
        "head": ("head_pruning_scores", "head_pruning_mask"),
    }

    def __init__(self, *args: Any, bias: bool = True, **kwargs: Any) -> None:
        kwargs["bias"] = bias
        super().__init__(*args, **kwargs)
        self._prepare()

    def extra_repr(self) -> str:
        """The sizes and what is done to the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparse pruning={self.sparse_pruning_method is not None}, "
            f"row pruning={self.row_pruning_method is not None}, "
            f"head pruning={self.head_pruning_method is not None}, "
            f"activation quantization={self.activation_quantization_method is not None}, "
            f"weight_quantization={self._bits_of_weight()}"
        )

    def enable_row_pruning(self, ratio: float, method: str) -> None:
        """Prepare to keep a share `ratio` of the rows."""
        rows = shape_of(self.weight)[0]
        self._enable_pruning("row", ratio, method, (rows, 1), lambda w: w.sum(1, True))

    def enable_head_pruning(self, ratio: float, method: str, num_heads: int) -> None:
        """Prepare to keep a share `ratio` of the heads; only by `topk`."""
        if shape_of(self.weight)[1] % num_heads:
            raise ValueError(
                explain(
                    "num_heads does not divide the inputs of a layer with head_pruning",
                    got=f"{num_heads} for {shape_of(self.weight)[1]} inputs",
                    fix="Name the layers that follow attention in 'modules', and the model's number of heads.",
                )
            )
        self._enable_pruning("head", ratio, method, (1, num_heads), None)
        self.num_heads = num_heads

    def get_mask(self, pruning_type: str = "row") -> Tensor:
        """The mask of ones and zeros of a kind: ``sparse`` `[out, in]`, ``row`` `[out, 1]`, ``head`` `[1, heads]`.

        Raises:
            NotImplementedError: that kind was not enabled.
        """
        return self._mask_of(pruning_type)

    def fix_row_col_pruning_helper(
        self, mask: Tensor | None = None, dim_reduction: bool = False
    ) -> Tensor | None:
        """Prune the rows for good, or, given another layer's mask of rows, the columns that read them.

        Args:
            mask: of the layer before; None for this layer's own rows.
            dim_reduction: make the weight smaller; else what goes becomes zero.

        Returns:
            This layer's own mask, as bools; None for columns.
        """
        if mask is not None:
            self._cut(1, mask.flatten().bool(), dim_reduction)
            self.in_features = self.weight.shape[1]
            return None
        own = self._mask_of("row").bool()
        self._cut(0, own.flatten(), dim_reduction)
        self.out_features = self.weight.shape[0]
        self._end_pruning("row")
        return own

    def fix_head_pruning_helper(
        self, mask: Tensor | None = None, num_heads: int | None = None, dim_reduction: bool = False
    ) -> Tensor:
        """Prune heads for good: this layer's columns, or, given the mask of another, the rows that make those heads.

        Args:
            mask: of the layer after attention; None for this layer's own.
            num_heads: heads of the model; None for those that were enabled.
            dim_reduction: make the weight smaller; else what goes becomes zero.

        Returns:
            The mask, as bools.
        """
        own = self._mask_of("head").bool() if mask is None else mask.bool()
        heads = num_heads or own.numel()
        dim = 1 if mask is None else 0
        width, rest = divmod(self.weight.shape[dim], heads)
        if rest or own.numel() != heads:
            raise ValueError(
                explain(
                    "the heads of head_pruning do not fit a layer",
                    got=f"{own.numel()} heads for a weight of shape {tuple(self.weight.shape)}",
                    expected="as many heads as in 'num_heads', of equal width",
                )
            )
        self._cut(dim, own.flatten().repeat_interleave(width), dim_reduction)
        self.out_features, self.in_features = self.weight.shape
        if mask is None:
            self._end_pruning("head")
        return own

    def head_pruning_reshape(self, w: Tensor, mask: Tensor) -> Tensor:
        """A weight whose columns of pruned heads are zero."""
        return w * mask.to(w.dtype).flatten().repeat_interleave(w.shape[1] // mask.numel())

    def _parameters_now(self) -> tuple[Tensor, Tensor | None]:
        # bits first: what is removed later has then had its part in the scales, before cleaning and after
        weight: Tensor = self._weight_now()
        bias: Tensor | None = self.bias
        if self.sparse_pruning_enabled and self.sparse_pruning_method:
            weight = weight * self.get_mask("sparse").to(weight.dtype)
        if self.row_pruning_enabled and self.row_pruning_method:
            mask = self.get_mask("row").to(weight.dtype)
            weight = weight * mask
            bias = None if bias is None else bias * mask.flatten()
        if self.head_pruning_enabled and self.head_pruning_method:
            weight = self.head_pruning_reshape(weight, self.get_mask("head"))
        return weight, bias

    def forward(self, input: Tensor, skip_bias_add: bool = False) -> Any:
        """See `torch.nn.Linear`; with `skip_bias_add`, the output without the bias, and the bias."""
        weight, bias = self._parameters_now()
        tokens = input.numel() // max(input.shape[-1], 1)
        input = self._input_now(input, tokens)
        return (F.linear(input, weight), bias) if skip_bias_add else F.linear(input, weight, bias)


class Conv2dLayer_Compress(Pruned, QuantizedWeight, QuantizedInput, nn.Conv2d):
    """A convolution that may be quantized, and pruned of single weights or output channels."""

    masks: ClassVar[dict[str, tuple[str, str]]] = {
        "sparse": ("sparse_mask_scores", "sparse_pruning_mask"),
        "channel": ("channel_mask_scores", "channel_pruning_mask"),
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def extra_repr(self) -> str:
        """The sizes and what is done to the layer."""
        return (
            f"{super().extra_repr()}, sparse pruning={self.sparse_pruning_method is not None}, "
            f"channel pruning={self.channel_pruning_method is not None}, "
            f"activation quantization={self.activation_quantization_method is not None}, "
            f"weight_quantization={self._bits_of_weight()}"
        )

    def enable_channel_pruning(self, ratio: float, method: str) -> None:
        """Prepare to keep a share `ratio` of the output channels."""
        shape = (shape_of(self.weight)[0], 1, 1, 1)
        self._enable_pruning("channel", ratio, method, shape, lambda w: w.sum((1, 2, 3), True))

    def get_mask(self, pruning_type: str = "sparse") -> Tensor:
        """The mask of ones and zeros of a kind: ``sparse`` like the weight, ``channel`` `[out, 1, 1, 1]`.

        Raises:
            NotImplementedError: that kind was not enabled.
        """
        return self._mask_of(pruning_type)

    def fix_channel_pruning_helper(
        self, mask: Tensor | None = None, dim_reduction: bool = False
    ) -> Tensor | None:
        """Prune output channels for good, or, given another layer's mask, the input channels that read them.

        Args:
            mask: of the layer before; None for this layer's own channels.
            dim_reduction: make the weight smaller; else what goes becomes zero.

        Returns:
            This layer's own mask, as bools; None for input channels.

        Raises:
            NotImplementedError: channels of a convolution in groups.
        """
        if self.groups != 1:
            raise NotImplementedError(
                "channels of a convolution in groups cannot be pruned: leave it out of channel_pruning"
            )
        own = None if mask is not None else self._mask_of("channel").bool()
        kept = mask if mask is not None else own
        assert kept is not None
        self._cut(0 if mask is None else 1, kept.flatten().bool(), dim_reduction)
        self.out_channels, self.in_channels = self.weight.shape[:2]
        if mask is None:
            self._end_pruning("channel")
        return own

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Conv2d`."""
        weight, bias = self._weight_now(), self.bias
        if self.sparse_pruning_enabled and self.sparse_pruning_method:
            weight = weight * self.get_mask("sparse").to(weight.dtype)
        if self.channel_pruning_enabled and self.channel_pruning_method:
            mask = self.get_mask("channel").to(weight.dtype)
            weight = weight * mask
            bias = None if bias is None else bias * mask.flatten()
        return self._conv_forward(self._input_now(input, input.shape[0]), weight, bias)


class BNLayer_Compress(Compressed, nn.BatchNorm2d):
    """A batch norm that can lose the channels that the convolution before it has lost."""

    def fix_channel_pruning_helper(self, mask: Tensor, dim_reduction: bool = True) -> None:
        """Remove channels, or, without `dim_reduction`, let them give zero.

        Args:
            mask: of the convolution before, as many values as there are channels.
            dim_reduction: make the layer smaller.
        """
        kept = mask.flatten().bool()
        if not dim_reduction:
            for param in (self.weight, self.bias):
                if param is not None:
                    param.data.mul_(kept.to(param.dtype))
            return
        for name in ("weight", "bias"):
            param = getattr(self, name)
            if param is not None:
                rest = nn.Parameter(param.data[kept], requires_grad=param.requires_grad)
                setattr(self, name, rest)
        for name in ("running_mean", "running_var"):
            buffer = getattr(self, name)
            if buffer is not None:
                setattr(self, name, buffer[kept].clone())
        self.num_features = int(kept.sum())


class _Parallel(LinearLayer_Compress):
    """One tensor-parallel rank's part of a linear layer of Megatron's.

    Args:
        mpu: knows the ranks that share the layer.
        sizes: of this rank's part: inputs and outputs.
        bias: whether there is one.
        skip_bias_add: return the bias beside the output.
    """

    def __init__(self, mpu: Any, sizes: tuple[int, int], bias: bool, skip_bias_add: bool) -> None:
        super().__init__(*sizes, bias=bias)
        self.axis, self.skip_bias_add = _axis_of(mpu), skip_bias_add

    @classmethod
    def adopt_parallel(cls, module: nn.Module, mpu: Any, flag: str) -> Any:
        """Make a layer of Megatron's one of this class, in place.

        Args:
            module: with the attributes that Megatron's layers have.
            mpu: knows the ranks that share the layer.
            flag: the attribute that says how its input or output is divided.
        """
        skip, divided = getattr(module, "skip_bias_add", False), getattr(module, flag)
        out_features, in_features = module.weight.shape  # type: ignore[misc]
        made = cls.adopt(module)
        made.in_features, made.out_features = in_features, out_features
        made.axis, made.skip_bias_add = _axis_of(mpu), skip
        setattr(made, flag, divided)
        return made

    def enable_head_pruning(self, ratio: float, method: str, num_heads: int) -> None:
        """Prepare to prune; this rank has its part of the heads."""
        super().enable_head_pruning(ratio, method, num_heads // self.axis.size)

    def _cut_of(self, width: int) -> Cut:
        return Cut(-1, ((width,) * self.axis.size,))


def _axis_of(mpu: Any) -> Axis:
    return Axis.of_group(mpu.get_model_parallel_group())


class ColumnParallelLinear_Compress(_Parallel):
    """Outputs divided over the ranks.

    Args:
        mpu: knows the ranks that share the layer.
        input_size: inputs.
        output_size: outputs of all ranks.
        bias: whether there is one.
        gather_output: return all ranks' outputs; else this rank's.
        skip_bias_add: return the bias beside the output.
    """

    def __init__(
        self,
        mpu: Any,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = True,
        skip_bias_add: bool = False,
    ) -> None:
        own = output_size // _axis_of(mpu).size
        super().__init__(mpu, (input_size, own), bias, skip_bias_add)
        self.gather_output = gather_output

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """The output, and the bias if it was to be left out."""
        output, bias = super().forward(sum_of_grads(input_, self.axis), True)
        if bias is not None and not self.skip_bias_add:
            output = output + bias
        if self.gather_output:
            output = gather_columns(output, self.axis, self._cut_of(output.shape[-1]))
        return output, bias if self.skip_bias_add else None


class RowParallelLinear_Compress(_Parallel):
    """Inputs divided over the ranks, outputs summed.

    Args:
        mpu: knows the ranks that share the layer.
        input_size: inputs of all ranks.
        output_size: outputs.
        bias: whether there is one.
        input_is_parallel: the input is this rank's part; else all of it.
        skip_bias_add: return the bias beside the output.
    """

    def __init__(
        self,
        mpu: Any,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        skip_bias_add: bool = False,
    ) -> None:
        own = input_size // _axis_of(mpu).size
        super().__init__(mpu, (own, output_size), bias, skip_bias_add)
        self.input_is_parallel = input_is_parallel

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """The output, and the bias if it was to be left out."""
        if not self.input_is_parallel:
            input_ = sum_of_grads(input_, self.axis)
            input_ = input_.chunk(self.axis.size, -1)[self.axis.rank]
        output, bias = super().forward(input_, True)
        output = sum_over_ranks(output, self.axis)
        if bias is not None and not self.skip_bias_add:
            output = output + bias
        return output, bias if self.skip_bias_add else None
