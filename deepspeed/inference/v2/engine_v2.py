# SPDX-License-Identifier: Apache-2.0
"""The engine of ragged batches: sequences of any age and length, a few new tokens of each at a time.

[Note: Ragged by equal lengths]
Sequences that bring equally many new tokens run together, each with its own past to its left: all that generate one token
at a time are one batch, and a prompt has tokens enough by itself. So nothing is computed for padding among new tokens, and
any model of transformers serves, by its own forward pass. Rotary embeddings that turn all of a batch by the angles of its
longest sequence (LongRoPE) divide it further, into those below and beyond their first range.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from deepspeed.accelerator import get_accelerator
from deepspeed.comm import flat
from deepspeed.utils.errors import DeepSpeedConfigError, explain

from ..config import DeepSpeedInferenceConfig
from ..engine import InferenceEngine
from .config_v2 import RaggedInferenceEngineConfig
from .hf_model import HFModel
from .ragged.kv_cache import BlockedKVCache
from .ragged.ragged_manager import DSStateManager
from .ragged.sequence_descriptor import DSSequenceDescriptor
from .scheduling_utils import SchedulingError, SchedulingResult

BLOCK_SIZE = 64
"""Tokens a block of the cache."""


class InferenceEngineV2:
    """Runs batches of sequences whose keys and values stay in a blocked cache between calls.

    Args:
        model: a causal model of transformers; it is moved, divided over ranks if that is asked for, and put into
            evaluation mode, in place.
        config: an object or a dict.

    Raises:
        DeepSpeedConfigError: something is asked for that is not built, or no block fits into memory.
        ValueError: the model keeps no keys and values of tokens.
    """

    n_kv_cache_groups = 1

    def __init__(
        self, model: nn.Module, config: RaggedInferenceEngineConfig | dict[str, Any] | None = None
    ) -> None:
        if not isinstance(config, RaggedInferenceEngineConfig):
            config = RaggedInferenceEngineConfig(**(config or {}))
        _refuse(config)
        self._config = config
        parallel = {"tp_size": config.tensor_parallel.tp_size}
        dtype = next(model.parameters()).dtype
        self._inner = InferenceEngine(
            model, DeepSpeedInferenceConfig(dtype=dtype, tensor_parallel=parallel)
        )
        self._model = HFModel(model, self._inner.device)
        cache = BlockedKVCache(
            self._model.shapes,
            self._block_count(),
            BLOCK_SIZE,
            self._model.dtype,
            self._inner.device,
        )
        self._state_manager = DSStateManager(config.state_manager, cache)
        # DeepSpeed-MII asks by this path how long a sequence may be.
        limits = SimpleNamespace(max_seq_length=self._longest)
        self._policy = SimpleNamespace(_checkpoint_engine=SimpleNamespace(model_config=limits))

    def _block_count(self) -> int:
        limits = self._config.state_manager
        each = BlockedKVCache.bytes_of_block(self._model.shapes, BLOCK_SIZE, self._model.dtype)
        wanted = limits.max_tracked_sequences * -(-self._longest // BLOCK_SIZE)
        memory = limits.memory_config
        if memory.mode == "allocate":
            return min(memory.size, wanted)
        device = self._inner.device
        # What is asked of the host counts at once where memory is not overcommitted: the half is enough.
        share = 2 if device.type == "cpu" else 1
        free = torch.tensor([get_accelerator().available_memory() // share], device=device)
        flat.all_reduce_(free, self._inner.tp_axis, "min")  # they schedule alike
        blocks = (int(free) - memory.size) // each
        if blocks < 1:
            raise DeepSpeedConfigError(
                explain(
                    "no block of the key-value cache fits into memory",
                    got=f"{int(free)} bytes free, {memory.size} of them kept free",
                    expected=f"at least {each} bytes for a block",
                    fix="Lower state_manager.memory_config.size.",
                )
            )
        return min(blocks, wanted)

    @property
    def _longest(self) -> int:
        most = self._model.max_positions
        context = self._config.state_manager.max_context
        return min(context, most) if most else context

    # - what callers schedule by

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._inner.module

    @property
    def free_blocks(self) -> torch.Tensor:
        """Free blocks of the cache: int32, one element."""
        return torch.tensor([self._state_manager.free_blocks], dtype=torch.int32, device="cpu")

    def query(
        self, uid: int, max_request_tokens: int, max_request_blocks: int | torch.Tensor
    ) -> tuple[int, torch.Tensor]:
        """How many tokens of a sequence, known or new, could be put next.

        Args:
            uid: the sequence.
            max_request_tokens: tokens that are wanted.
            max_request_blocks: blocks that may be taken for them.

        Returns:
            As many of the tokens as fit, and the blocks that they take, int32 of one element.
        """
        manager, room = self._state_manager, int(torch.as_tensor(max_request_blocks).min())
        known = manager.get_sequence(uid)
        if known is None and manager.n_tracked_sequences >= manager.config.max_tracked_sequences:
            return 0, torch.zeros(1, dtype=torch.int32, device="cpu")
        sequence = known or DSSequenceDescriptor(uid)
        tokens = max(0, min(max_request_tokens, self._longest - sequence.seen_tokens))
        blocks = sequence.blocks_for(tokens, BLOCK_SIZE)
        if blocks > room:
            blocks = max(0, room)
            places = (len(sequence.blocks) + blocks) * BLOCK_SIZE
            tokens = max(0, places - sequence.seen_tokens)
        return tokens, torch.tensor([blocks], dtype=torch.int32, device="cpu")

    def get_remaining_block_capacity(self, uid: int) -> int:
        """How many more tokens of a sequence fit into the blocks that it holds."""
        sequence = self._state_manager.get_sequence(uid)
        if sequence is None:
            return 0
        return len(sequence.blocks) * BLOCK_SIZE - sequence.seen_tokens

    def can_schedule(self, uids: Iterable[int], lengths: Iterable[int]) -> SchedulingResult:
        """Whether as many new tokens of these sequences can be put in one batch, and if not, why."""
        manager, wanted = self._state_manager, list(zip(uids, lengths, strict=True))
        limits = manager.config
        if len(wanted) > limits.max_ragged_sequence_count:
            return SchedulingResult.BatchSequenceLimitExceeded
        new = sum(manager.get_sequence(uid) is None for uid, _ in wanted)
        if manager.n_tracked_sequences + new > limits.max_tracked_sequences:
            return SchedulingResult.EngineSequenceLimitExceeded
        blocks = 0
        for uid, length in wanted:
            sequence = manager.get_sequence(uid) or DSSequenceDescriptor(uid)
            if sequence.seen_tokens + length > self._longest:
                return SchedulingResult.SequenceTokenLimitExceeded
            blocks += sequence.blocks_for(length, BLOCK_SIZE)
        if sum(length for _, length in wanted) > limits.max_ragged_batch_size:
            return SchedulingResult.BatchTokenLimitExceeded
        if blocks > manager.free_blocks:
            return SchedulingResult.KVCacheLimitExceeded
        return SchedulingResult.Success

    # - work

    def put(
        self,
        batch_uids: Iterable[int],
        batch_tokens: Iterable[torch.Tensor],
        do_checks: bool = True,
    ) -> torch.Tensor:
        """Run new tokens of some sequences; where layers are divided, a collective of those ranks.

        Args:
            batch_uids: sequences, each once; unknown ones begin.
            batch_tokens: the new tokens of each, 1-D, at least one.
            do_checks: ask `can_schedule` first.

        Returns:
            Logits after the last token of each, [sequences, vocabulary], on the device.

        Raises:
            SchedulingError: the batch cannot be run. Nothing has changed then, nor after any other error.
            ValueError: a sequence is named twice, or has no tokens; or, unchecked, the cache is full.
        """
        uids = [int(uid) for uid in batch_uids]
        tokens = [torch.as_tensor(each).reshape(-1).long().cpu() for each in batch_tokens]
        _check(uids, tokens)
        if do_checks:
            found = self.can_schedule(uids, [len(each) for each in tokens])
            if found is not SchedulingResult.Success:
                raise SchedulingError(found)
        manager, taken = self._state_manager, []
        try:
            for uid, new in zip(uids, tokens, strict=True):
                sequence = manager.get_or_create_sequence(uid)
                taken.append((sequence, 0))
                taken[-1] = (sequence, manager.allocate_blocks(sequence, len(new)))
            sequences = [sequence for sequence, _ in taken]
            logits = self._run(sequences, tokens)
        except BaseException:
            for sequence, blocks in taken:
                manager.take_back(sequence, blocks)
            raise
        for sequence, new in zip(sequences, tokens, strict=True):
            sequence.seen_tokens += len(new)
        return logits

    def _run(
        self, sequences: Sequence[DSSequenceDescriptor], tokens: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """See [Note: Ragged by equal lengths]."""
        found: dict[int, torch.Tensor] = {}
        pairs = zip(sequences, tokens, strict=True)
        kinds = [(len(new), self._model.is_far(old.seen_tokens + len(new))) for old, new in pairs]
        for kind in sorted(set(kinds)):
            rows = [i for i, other in enumerate(kinds) if other == kind]
            logits = self._run_equal(
                [sequences[i] for i in rows], torch.stack([tokens[i] for i in rows])
            )
            found.update(zip(rows, logits, strict=True))
        return torch.stack([found[i] for i in range(len(tokens))])

    def _run_equal(
        self, sequences: Sequence[DSSequenceDescriptor], tokens: torch.Tensor
    ) -> torch.Tensor:
        cache, new = self._state_manager.cache, tokens.shape[1]
        lengths = torch.tensor([sequence.seen_tokens for sequence in sequences], device="cpu")
        before = int(lengths.max())
        read = torch.full((len(sequences), before), cache.no_slot, device="cpu")
        write = torch.empty(len(sequences), new, dtype=torch.int64, device="cpu")
        for row, sequence in enumerate(sequences):
            seen = sequence.seen_tokens
            read[row, before - seen :] = cache.slots(sequence, 0, seen)
            write[row] = cache.slots(sequence, seen, seen + new)
        logits, made = self._model(tokens, lengths, cache.read(read) if before else [])
        cache.write(write, made)
        return logits

    def empty_run(self) -> None:
        """Do nothing: ranks that have no sequences need not take part."""

    def flush(self, uid: int) -> None:
        """Forget a sequence and free its blocks."""
        self._state_manager.flush_sequence(uid)

    def serialize(self, save_path: str | os.PathLike[str]) -> None:
        """Save the model in a folder that `build_engine_from_ds_checkpoint` and transformers read.

        Raises:
            NotImplementedError: its layers are divided over ranks, or it cannot save itself.
        """
        save: Any = getattr(self.model, "save_pretrained", None)
        if save is None or self._config.tensor_parallel.tp_size > 1:
            raise NotImplementedError(
                explain(
                    "serialize() saves whole models of transformers",
                    got=f"{type(self.model).__name__}, tp_size {self._config.tensor_parallel.tp_size}",
                    fix="Build an engine of one rank, and serialize that.",
                )
            )
        Path(save_path).mkdir(parents=True, exist_ok=True)
        save(os.fspath(save_path))


def _check(uids: Sequence[int], tokens: Sequence[torch.Tensor]) -> None:
    if len(uids) != len(tokens) or len(set(uids)) < len(uids) or not all(map(len, tokens)):
        raise ValueError(
            explain(
                "a batch is made of different sequences with new tokens",
                got=f"uids {uids}, lengths {[len(new) for new in tokens]}",
                expected="as many token vectors as uids, each uid once, each with at least one token",
            )
        )


def _refuse(config: RaggedInferenceEngineConfig) -> None:
    """Raise for what is not built."""
    for name, asked in (
        ("state_manager.offload", config.state_manager.offload),
        ("quantization.quantization_mode", config.quantization.quantization_mode),
    ):
        if asked:
            raise DeepSpeedConfigError(
                explain(
                    f"'{name}' is not supported",
                    got=asked,
                    expected="unset",
                    fix="Remove it; quantized weights are served by deepspeed.init_inference.",
                )
            )
