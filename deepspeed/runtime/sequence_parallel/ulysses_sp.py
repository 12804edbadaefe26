# SPDX-License-Identifier: Apache-2.0
"""Ulysses for Hugging Face models: their attention over split sequences, and batches that are split (arXiv:2506.13996)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deepspeed import comm as dist
from deepspeed.sequence.layer import exchange, head_shares
from deepspeed.utils.errors import explain

from . import parallel_state_sp
from .tiled_compute import (
    AutogradComputeMLP,
    SequenceTiledCompute,
    TiledFusedLogitsLoss,
    TiledMLP,
    sequence_tiled_compute,
)

__all__ = [
    "AutogradComputeMLP",
    "SequenceTiledCompute",
    "TiledFusedLogitsLoss",
    "TiledMLP",
    "UlyssesSPAttentionHF",
    "UlyssesSPDataLoaderAdapter",
    "sequence_tiled_compute",
]

# `[batch, heads, sequence, head size]` on the way in, `[batch, sequence, heads, head size]` on the way out.
_HEADS_IN, _SEQUENCE_IN = 1, 2
_SEQUENCE_OUT, _HEADS_OUT = 1, 2
_IGNORED_LABEL = -100


class UlyssesSPAttentionHF(torch.nn.Module):
    """An attention function of transformers, over a sequence that is split over ranks.

    Args:
        attn: the attention function that sees the entire sequence and this rank's heads.
        batch_size: samples a micro-batch; for error messages.
        attn_head_count, attn_head_size, kv_head_count: of the whole model.
        num_hidden_layers: of the whole model; nothing depends on it.
        process_group: the ranks that share a sequence.
        seq_length_is_variable: whether batches differ in length.
        local_seq_length, global_seq_length: length on a rank and of the whole, where it is fixed.
        disable_in_eval: leave modules in eval mode to `attn` itself (evaluation on whole sequences).
    """

    def __init__(
        self,
        attn: Callable[..., Any],
        batch_size: int,
        attn_head_count: int,
        attn_head_size: int,
        kv_head_count: int,
        num_hidden_layers: int,
        process_group: Any,
        seq_length_is_variable: bool = False,
        local_seq_length: int | None = None,
        global_seq_length: int | None = None,
        disable_in_eval: bool = False,
    ) -> None:
        super().__init__()
        self.attn, self.process_group = attn, process_group
        self.world_size = dist.get_world_size(process_group)
        self.batch_size, self.num_hidden_layers = batch_size, num_hidden_layers
        self.attn_head_count, self.attn_head_size = attn_head_count, attn_head_size
        self.kv_head_count = kv_head_count
        self.seq_length_is_variable, self.disable_in_eval = seq_length_is_variable, disable_in_eval
        self.local_seq_length, self.global_seq_length = local_seq_length, global_seq_length
        # Key-value heads that are fewer than the ranks go to several ranks each.
        self.kv_copies = 1 if kv_head_count >= self.world_size else self.world_size // kv_head_count
        self.kv_parts = head_shares(kv_head_count * self.kv_copies, self.world_size)
        self.query_parts = head_shares(
            attn_head_count, self.world_size, kv_head_count * self.kv_copies
        )
        self._positions: tuple[Tensor, Tensor] | None = None
        self._masks: dict[int | None, Tensor | None] = {}  # of these positions, by window

    def forward(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Attend over the whole sequence.

        Args:
            module: the attention layer.
            query, key, value: `[batch, heads, sequence / ranks, head size]`.
            attention_mask: of this rank's positions, which says nothing about the whole; causal attention over
                sequences that are padded on the right needs none.
            *args, **kwargs: passed on, `position_ids` gathered.

        Returns:
            `[batch, sequence / ranks, heads, head size]`, and what else the function returns.

        Raises:
            ValueError: the layer is not causal and has a mask, or lengths differ from what was announced.
        """
        if self.disable_in_eval and not module.training:
            return self.attn(module, query, key, value, attention_mask, *args, **kwargs)
        self._check(module, query, attention_mask)
        positions = [query.shape[_SEQUENCE_IN]] * self.world_size
        if self.kv_copies > 1:
            key, value = (x.repeat_interleave(self.kv_copies, _HEADS_IN) for x in (key, value))
        query = self._whole(query, self.query_parts, positions)
        key, value = (self._whole(x, self.kv_parts, positions) for x in (key, value))
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = self._gather_positions(kwargs["position_ids"])
        mask = self._mask_of(query, kwargs.get("position_ids"), kwargs.get("sliding_window"))
        own_groups = getattr(module, "num_key_value_groups", None)
        if own_groups is not None:
            module.num_key_value_groups = query.shape[_HEADS_IN] // key.shape[_HEADS_IN]
        try:
            context, *rest = self.attn(module, query, key, value, mask, *args, **kwargs)
        finally:
            if own_groups is not None:
                module.num_key_value_groups = own_groups
        context = exchange(
            context,
            _SEQUENCE_OUT,
            _HEADS_OUT,
            positions,
            self.query_parts,
            self.process_group,
        )
        return (context, *rest)

    def _whole(self, values: Tensor, parts: list[int], positions: list[int]) -> Tensor:
        return exchange(values, _HEADS_IN, _SEQUENCE_IN, parts, positions, self.process_group)

    def _check(self, module: torch.nn.Module, query: Tensor, mask: Tensor | None) -> None:
        if mask is not None and not getattr(module, "is_causal", True):
            raise ValueError(
                explain(
                    "a layer that is not causal cannot have a padding mask on a split sequence",
                    got=f"{type(module).__name__} with a mask {tuple(mask.shape)}",
                    expected="causal attention, or no padding",
                    fix="train without padding, or with sequence_parallel_size 1",
                )
            )
        length = query.shape[_SEQUENCE_IN]
        fixed = None if self.seq_length_is_variable else self.local_seq_length
        if fixed is not None and length != fixed:
            raise ValueError(
                explain(
                    "a sequence is not as long as was announced",
                    got=f"{length} positions on this rank",
                    expected=f"{fixed}",
                    fix="pass seq_length_is_variable=True to register_with_transformers",
                )
            )

    def _gather_positions(self, own: Tensor) -> Tensor:
        """`[batch, sequence]` of the whole; every layer of a pass is given the same tensor."""
        if self._positions is None or self._positions[0] is not own:
            sent = own.contiguous()
            parts = [torch.empty_like(sent) for _ in range(self.world_size)]
            dist.all_gather(parts, sent, group=self.process_group)
            self._positions = (own, torch.cat(parts, -1))
            self._masks.clear()
        return self._positions[1]

    def _mask_of(
        self, query: Tensor, positions: Tensor | None, window: int | None
    ) -> Tensor | None:
        """`_mask`, once for all layers that are given the same positions."""
        if positions is None:
            return self._mask(query, positions, window)
        if window not in self._masks:
            self._masks[window] = self._mask(query, positions, window)
        return self._masks[window]

    def _mask(self, query: Tensor, positions: Tensor | None, window: int | None) -> Tensor | None:
        """What sdpa needs beside causality: other functions take windows and positions by themselves.

        Where several documents share a row, positions begin again: each keeps to itself.
        """
        if getattr(self.attn, "__name__", "") != "sdpa_attention_forward":
            return None
        length, allowed = query.shape[_SEQUENCE_IN], None
        if positions is not None:
            begins = positions.diff(dim=-1) != 1
            if begins.any():
                document = torch.nn.functional.pad(begins, (1, 0)).cumsum(-1)
                allowed = (document[:, :, None] == document[:, None, :])[:, None]
        if window is not None and window < length:
            near = torch.ones(length, length, dtype=torch.bool, device=query.device)
            near = near.triu(1 - window)
            allowed = near if allowed is None else allowed & near
        return None if allowed is None else allowed.tril()

    @classmethod
    def register_with_transformers(
        cls,
        model_name_or_path: Any,
        core_attn_implementation: str,
        sequence_parallel_size: int,
        micro_batch_size: int,
        seq_length: int | None = None,
        seq_length_is_variable: bool = True,
        disable_in_eval: bool = False,
        max_length: int | None = None,
    ) -> Any:
        """Put Ulysses in the place of one of transformers' attention functions. Collective of all ranks.

        Args:
            model_name_or_path: a model, or a path or name whose configuration is loaded.
            core_attn_implementation: the function to wrap: "sdpa", "flash_attention_2", a kernel of the hub
                ("owner/repository"), …; the model must use it.
            sequence_parallel_size: ranks that share a sequence.
            micro_batch_size: samples a micro-batch.
            seq_length: whole length of each sequence, where it is fixed.
            seq_length_is_variable: whether batches differ in length.
            disable_in_eval: leave models in eval mode alone.
            max_length: another name of `seq_length`.

        Returns:
            What `deepspeed.initialize` takes as `mpu`; None for a size of 1.

        Raises:
            ImportError: transformers is missing or too old to have exchangeable attention functions.
            ValueError: heads, lengths or the attention function do not allow it.
        """
        if sequence_parallel_size == 1:
            return None
        functions = _attention_functions()
        config = _config_of(model_name_or_path, core_attn_implementation, functions)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        _check_heads(heads, kv_heads, sequence_parallel_size)
        length = seq_length or max_length
        if not seq_length_is_variable:
            _check_length(length, sequence_parallel_size)
        parallel_state_sp.initialize_sequence_parallel(sequence_parallel_size)
        core = functions[core_attn_implementation]
        core = getattr(core, "ulysses_core", core)  # registered before
        attention = cls(
            attn=core,
            batch_size=micro_batch_size,
            attn_head_count=heads,
            attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            kv_head_count=kv_heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=parallel_state_sp.get_sequence_parallel_group(),
            seq_length_is_variable=seq_length_is_variable,
            local_seq_length=None if length is None else length // sequence_parallel_size,
            global_seq_length=length,
            disable_in_eval=disable_in_eval,
        )
        functions[core_attn_implementation] = _split(attention)
        return parallel_state_sp


def _split(attention: UlyssesSPAttentionHF) -> Callable[..., Any]:
    def split_attention(*args: Any, **kwargs: Any) -> Any:
        return attention(*args, **kwargs)

    split_attention.ulysses_core = attention.attn  # type: ignore[attr-defined]
    return split_attention


def _check_length(length: int | None, ranks: int) -> None:
    if length is None or length % ranks:
        raise ValueError(
            explain(
                "the length of the sequences does not split over the ranks",
                got=f"seq_length={length}, sequence_parallel_size={ranks}",
                expected="a multiple",
                fix="give seq_length, or pass seq_length_is_variable=True",
            )
        )


def _attention_functions() -> Any:
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            explain(
                "sequence parallelism needs transformers with exchangeable attention functions",
                got=str(error),
                expected="transformers 4.48 or newer",
                fix="pip install -U transformers",
            )
        ) from error
    return ALL_ATTENTION_FUNCTIONS


def _register_hub_kernel(implementation: str) -> None:
    """Have transformers load a kernel named "owner/repository", as it does when a model first uses it."""
    try:
        from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
    except ImportError:  # a version that knows no such names
        return
    lazy_import_flash_attention(implementation)


def _config_of(model: Any, implementation: str, functions: Any) -> Any:
    if "/" in implementation and implementation not in functions.valid_keys():
        _register_hub_kernel(implementation)
    if implementation not in functions.valid_keys():
        raise ValueError(
            explain(
                "unknown attention function",
                got=repr(implementation),
                expected=f"one of {sorted(functions.valid_keys())}",
            )
        )
    if not hasattr(model, "config"):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(model).get_text_config()
    config = model.config.get_text_config()
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            explain(
                "attention in chunks does not go over split sequences",
                got="'chunked_attention' in the model's layer_types",
                expected="full or sliding-window attention",
            )
        )
    used = getattr(config, "_attn_implementation", None)
    if (
        used is not None and used != implementation
    ):  # None: of a configuration that no model has yet
        raise ValueError(
            explain(
                "core_attn_implementation does not match model config attn_implementation",
                got=f"attn_implementation={used!r} in the model",
                expected=repr(implementation),
                fix=f"load the model with attn_implementation={implementation!r}",
            )
        )
    return config


def _check_heads(heads: int, kv_heads: int, ranks: int) -> None:
    fits = heads % ranks == 0 if kv_heads >= ranks else ranks % kv_heads == 0 == heads % ranks
    if not fits or (kv_heads >= ranks and kv_heads % ranks):
        raise ValueError(
            explain(
                "the attention heads do not split over the ranks of a sequence",
                got=f"{heads} heads, {kv_heads} key-value heads, sequence_parallel_size {ranks}",
                expected="a size that divides the heads, and divides or is a multiple of the key-value heads",
                fix="choose another sequence-parallel size",
            )
        )


class UlyssesSPDataLoaderAdapter:
    """Batches of a loader, each split along its sequence over the ranks that share one.

    Each rank's loader gives batches of its own. The ranks of a sequence take one of each in turn, so there are as many
    times more of them.

    Args:
        dl: yields dicts of tensors `[batch, sequence, ...]`, or a list that begins with such a dict.
        sp_rank, sp_group, sp_world_size: this rank's place among those that share a sequence.
        device: where the batches go.
    """

    def __init__(
        self, dl: Any, sp_rank: int, sp_group: Any, sp_world_size: int, device: Any
    ) -> None:
        self.dl, self.device = dl, device
        self.sp_rank, self.sp_group, self.sp_world_size = sp_rank, sp_group, sp_world_size
        self.micro_batches: deque[dict[str, Any]] = deque()
        self.iter: Iterator[Any] = iter(())

    def __getattr__(self, name: str) -> Any:
        if name == "dl":  # not there yet: copying and unpickling ask before __init__
            raise AttributeError(name)
        return getattr(self.dl, name)

    def __len__(self) -> int:
        return len(self.dl) * self.sp_world_size

    def __iter__(self) -> UlyssesSPDataLoaderAdapter:
        self.iter = iter(self.dl)
        self.micro_batches.clear()
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch's share of this rank, with `position_ids`, and `shift_labels` in the place of `labels`."""
        if not self.micro_batches:
            self.refill()
        return self.micro_batches.popleft()

    def refill(self) -> None:
        """Take a batch from every rank's loader. Collective of the ranks that share a sequence.

        Raises:
            StopIteration: any of the loaders is at its end.
            ValueError: a batch does not split.
        """
        own = next(self.iter, None)
        batches: list[Any] = [None] * self.sp_world_size
        own = None if own is None else {k: _to_cpu(v) for k, v in dict(own).items()}
        dist.all_gather_object(batches, own, group=self.sp_group)
        if any(batch is None for batch in batches):
            raise StopIteration
        self.micro_batches.extend(self._share(batch) for batch in batches)

    def _share(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch = dict(batch)
        rows, length = batch["input_ids"].shape[:2]
        if length % self.sp_world_size:
            raise ValueError(
                explain(
                    "a batch does not split over the ranks of a sequence",
                    got=f"a length of {length} on {self.sp_world_size} ranks",
                    expected="a multiple",
                    fix=f"pad batches to a multiple of {self.sp_world_size} (pad_to_multiple_of of the collator)",
                )
            )
        _refuse_left_padding(batch.get("attention_mask"))
        if "position_ids" not in batch:
            batch["position_ids"] = torch.arange(length, device="cpu").expand(rows, length)
        if "labels" in batch:
            labels = batch.pop("labels")
            if "shift_labels" not in batch:
                ended = torch.nn.functional.pad(labels, (0, 1), value=_IGNORED_LABEL)
                batch["shift_labels"] = ended[:, 1:]
        own = length // self.sp_world_size
        start = self.sp_rank * own
        return {name: self._piece(value, length, start, own) for name, value in batch.items()}

    def _piece(self, value: Any, length: int, start: int, own: int) -> Any:
        if not torch.is_tensor(value):
            return value
        if value.dim() >= 2 and value.shape[1] == length:
            value = value.narrow(1, start, own).contiguous()
        return value.to(self.device)


def _to_cpu(value: Any) -> Any:
    return value.cpu() if torch.is_tensor(value) else value


def _refuse_left_padding(mask: Tensor | None) -> None:
    if mask is None or mask.dim() != 2 or mask.shape[1] < 2:
        return
    if (mask.bool().int().diff(dim=1) > 0).any():
        raise ValueError(
            explain(
                "a batch is padded on the left, which a split sequence cannot mask",
                got="attention_mask rows that begin with 0",
                expected="padding on the right",
                fix="set tokenizer.padding_side = 'right'",
            )
        )
