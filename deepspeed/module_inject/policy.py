# SPDX-License-Identifier: Apache-2.0
"""Where the weights of a block are, as classes that programs derive from; and small layers by their public names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from deepspeed.utils.errors import explain


class DSPolicy(ABC):
    """What a class of blocks is made of."""

    _orig_layer_class: Any = None

    def __init__(self) -> None:
        self.cuda_graph_supported = False

    @abstractmethod
    def attention(self) -> Any:
        """The weights of the attention."""


class TransformerPolicy(DSPolicy):
    """What a class of transformer blocks is made of; derived classes say where it is found.

    Args:
        inference: for inference, not for training.
        linear_layer: weights are `[out, in]`.
        scale_attention: scores are divided by the root of the head's size.
        pre_attn_norm: norms come before attention and MLP.
        options: further facts, kept as attributes.
    """

    def __init__(
        self,
        inference: bool = True,
        linear_layer: bool = True,
        scale_attention: bool = True,
        pre_attn_norm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.inference, self.linear_layer = inference, linear_layer
        self.scale_attention, self.pre_attn_norm = scale_attention, pre_attn_norm
        for name, value in options.items():
            setattr(self, name, value)

    @abstractmethod
    def get_hidden_heads(self) -> tuple[Any, ...]:
        """Hidden size, heads, epsilon of the norms, size of the MLP."""

    @abstractmethod
    def mlp(self) -> Any:
        """Weight and bias of the MLP's first layer, then of its second."""

    @abstractmethod
    def layernorm(self) -> Any:
        """Weight and bias of the norm after attention, then of the other."""


class HFBertLayerPolicy(TransformerPolicy):
    """`BertLayer` (and `RobertaLayer`) of transformers.

    Args:
        client_module: the block.
        inference: for inference, not for training.
    """

    def __init__(self, client_module: Any, inference: bool = False) -> None:
        super().__init__(inference, pre_attn_norm=False)
        self.client_module = client_module

    def get_hidden_heads(self) -> tuple[int, int, float, int]:
        """Hidden size, heads, epsilon of the norms, size of the MLP."""
        block = self.client_module
        attention = block.attention.self
        norm = block.attention.output.LayerNorm
        heads, width = attention.num_attention_heads, attention.query.weight.shape[1]
        return width, heads, norm.eps, block.intermediate.dense.weight.shape[0]

    def attention(self, enable_training: bool = False) -> tuple[Tensor, ...]:
        """Weight and bias of queries, keys and values together, then of the output; parameters of their own."""
        attention, output = self.client_module.attention.self, self.client_module.attention.output
        layers = (attention.query, attention.key, attention.value)
        joint = [
            nn.Parameter(torch.cat([part.detach() for part in parts]), enable_training)
            for parts in ([layer.weight for layer in layers], [layer.bias for layer in layers])
        ]
        return (*joint, output.dense.weight, output.dense.bias)

    def mlp(self, enable_training: bool = False) -> tuple[Tensor, ...]:
        """Weight and bias of the MLP's first layer, then of its second."""
        first, second = self.client_module.intermediate.dense, self.client_module.output.dense
        return first.weight, first.bias, second.weight, second.bias

    def layernorm(self) -> tuple[Tensor, ...]:
        """Weight and bias of the norm after attention, then of the one after the MLP."""
        block = self.client_module
        first, second = block.attention.output.LayerNorm, block.output.LayerNorm
        return first.weight, first.bias, second.weight, second.bias


class EmbeddingLayer(nn.Module):
    """A table of embeddings.

    Args:
        weight_shape: `[rows, size]` of a new table.
        dtype: of a new table.
        weight: the table; None for a new one.
        bias: unused.
    """

    def __init__(
        self,
        weight_shape: Any = None,
        dtype: torch.dtype = torch.half,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        if weight is None:
            weight = nn.Parameter(torch.empty(weight_shape, dtype=dtype))
            nn.init.normal_(weight)
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        """The rows of some ids."""
        return nn.functional.embedding(input, self.weight)


class Normalize(nn.Module):
    """A layer norm, in the dtype of its input.

    Args:
        dim: its size, for new weights.
        dtype: of new weights.
        eps: keeps the variance from zero.
        weight, bias: None for new ones.
    """

    def __init__(
        self,
        dim: int | None = None,
        dtype: torch.dtype = torch.float,
        eps: float = 1e-5,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim if weight is None else len(weight), eps=eps, dtype=dtype)
        if weight is not None:
            self.norm.weight = weight
        if bias is not None:
            self.norm.bias = bias
        self.weight, self.bias, self.eps = self.norm.weight, self.norm.bias, eps

    def forward(self, input: Tensor) -> Tensor:
        """Normalize."""
        return self.norm(input.to(self.weight.dtype)).to(input.dtype)


class ReplaceWithTensorSlicing:
    """Copies of weights of which a rank keeps a part.

    Args:
        mp_group: the ranks; None for all.
        mp_size: how many they are.
        out_dim, in_dim: dimensions of outputs and inputs, by which joined weights are told apart.
    """

    def __init__(
        self, mp_group: Any = None, mp_size: int = 1, out_dim: int = 1, in_dim: int = 0
    ) -> None:
        from deepspeed import comm as dist

        self.gpu_index = dist.get_rank(mp_group) if dist.is_initialized() and mp_size > 1 else 0
        self.mp_size, self.out_dim, self.in_dim = mp_size, out_dim, in_dim

    def merge_assert(self, dim1: int, dim2: int) -> None:
        """Raise AssertionError unless the first is larger."""
        if dim1 <= dim2:
            raise AssertionError(
                explain(
                    "a weight cannot be joined from parts that are as large as the whole",
                    got=f"{dim1} and {dim2}",
                )
            )

    def copy(
        self,
        dst: Tensor | None,
        src: Tensor | None,
        int8: bool = False,
        allocate_tensor: bool = False,
    ) -> Any:
        """The rank's part of `src`, in `dst`'s shape, as a parameter; see `strided_copy`."""
        return self.strided_copy(dst, src, 1, int8, allocate_tensor)

    def strided_copy(
        self,
        dst: Tensor | None,
        src: Tensor | None,
        num_splits: int,
        int8: bool = False,
        allocate_tensor: bool = False,
    ) -> Any:
        """The rank's part of each of several joined weights.

        Args:
            dst: the place, of the part's shape; overwritten unless `allocate_tensor`.
            src: the whole; None gives back what `dst` is.
            num_splits: weights that are joined in `src`, along the dimension that is cut.
            int8: unused: whole numbers are cut alike.
            allocate_tensor: give a new tensor.

        Raises:
            ValueError: more than one dimension differs, or parts do not fit.
        """
        if src is None or dst is None:
            return dst if src is None else src
        differ = [dim for dim in range(src.dim()) if src.shape[dim] != dst.shape[dim]]
        part = src.detach()
        if len(differ) == 1 and dst.dim() == src.dim():
            (dim,) = differ
            width, rest = divmod(dst.shape[dim], num_splits)
            first = self.gpu_index * width
            if not rest and width * num_splits * self.mp_size == src.shape[dim]:
                pieces = part.chunk(num_splits, dim)
                part = torch.cat([piece.narrow(dim, first, width) for piece in pieces], dim)
        if part.shape != dst.shape:
            raise ValueError(
                explain(
                    "a rank's part cannot be taken from this weight",
                    got=f"{tuple(src.shape)} for {tuple(dst.shape)}, {num_splits} joined",
                    expected="one dimension that differs, and whole parts",
                )
            )
        values = torch.empty_like(dst) if allocate_tensor else dst.detach()
        return nn.Parameter(values.copy_(part), requires_grad=False)


class GroupQuantizer:
    """Refuses to quantize by groups, which other doors do; without `q_int8` it gives weights back.

    Args:
        q_int8: whether to quantize.
        group_size, num_bits, num_groups: kept.
    """

    def __init__(
        self, q_int8: bool = True, group_size: int = 1, num_bits: int = 8, num_groups: int = 0
    ) -> None:
        self.q_int8, self.group_size = q_int8, group_size
        self.num_bits, self.num_groups = num_bits, num_groups

    def quantize(
        self, inputs: Any, qkv: bool = True, count: int = 1, parallel_dim: int = 0
    ) -> nn.Parameter:
        """`inputs` as a parameter, with an empty `scale`.

        Raises:
            NotImplementedError: `q_int8` is set.
        """
        if self.q_int8 and qkv:
            _refuse("GroupQuantizer", "Use weight_quantization of deepspeed.initialize at stage 3.")
        found = nn.Parameter(inputs, requires_grad=False)
        found.scale = torch.empty(1)  # type: ignore[attr-defined]
        return found


def generic_injection(
    module: Any, dtype: torch.dtype | None = None, enable_cuda_graph: bool = True
) -> NoReturn:
    """Refuse: there are no fused programs for diffusion models.

    Raises:
        NotImplementedError: always.
    """
    _refuse("generic_injection (fused layers of diffusion models)", "The model runs as it is.")


def quantize_transformer_layer(*args: Any, **kwargs: Any) -> NoReturn:
    """Refuse: other doors quantize the layers of a model.

    Raises:
        NotImplementedError: always.
    """
    _refuse(
        "quantize_transformer_layer",
        "Use weight_quantization of deepspeed.initialize at stage 3, or deepspeed.compression.",
    )


def _refuse(what: str, instead: str) -> NoReturn:
    raise NotImplementedError(explain(f"{what} is not available in this version", fix=instead))
