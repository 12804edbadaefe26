# SPDX-License-Identifier: Apache-2.0
"""Greedy and sampled generation with a decoder program, for the requests that it can answer as transformers would."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decoder import Decoder

# settings of transformers' GenerationConfig that the loop below reads, or that change nothing here
_READ = {
    *("do_sample", "temperature", "top_k", "top_p", "use_cache"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    *("max_length", "max_new_tokens", "num_beams", "num_beam_groups", "num_return_sequences"),
    *("transformers_version", "is_assistant"),
}
# values that change nothing, of settings that the loop does not read
_NEUTRAL = {
    **dict.fromkeys(("typical_p", "repetition_penalty", "encoder_repetition_penalty"), 1.0),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty"), 0.0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0),
    "length_penalty": 1.0,
    "top_h": 1.0,
}
# what newer releases take for settings that nobody made
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
# generation options that are objects, not settings
_INPUTS = frozenset({"input_ids", "inputs", "attention_mask", "generation_config"})


@dataclass(frozen=True)
class Request:
    """A generation that the decoder program can do."""

    ids: Tensor
    """Prompt, `[batch, tokens]`."""
    mask: Tensor | None
    """0 for padding, which comes first; None for no padding."""
    total: int
    """Tokens of prompt and answer together."""
    ends: tuple[int, ...]
    """Ids that end a sequence."""
    pad: int
    """Id that fills up sequences that have ended."""
    warpers: tuple[Any, ...] | None
    """What shapes the distribution that is sampled; None takes the likeliest token."""


def understand(
    model: Any, limit: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Request | None:
    """Read a call of `generate`.

    Args:
        model: the model of transformers.
        limit: longest sequence that its positions allow.
        args, kwargs: of the call.

    Returns:
        The request, or None where it asks for something that only the model's own `generate` does.
    """
    if len(args) > 1 or (args and not torch.is_tensor(args[0])):
        return None
    own = model.generation_config
    config = copy.deepcopy(kwargs.get("generation_config") or own)
    if kwargs.get("generation_config") is not None and _inherits(config, own):
        return None
    left = config.update(**{k: v for k, v in kwargs.items() if k != "generation_config"})
    if set(left) - _INPUTS or _other_settings(config):
        return None
    ids = args[0] if args else left.get("input_ids", left.get("inputs"))
    if not torch.is_tensor(ids) or ids.dim() != 2 or ids.shape[1] == 0:
        return None
    if config.max_new_tokens is not None:
        total = ids.shape[1] + config.max_new_tokens
    elif "max_length" in kwargs and kwargs["max_length"] is not None:
        total = config.max_length
    else:
        return None
    if not ids.shape[1] < total <= limit or config.use_cache is False:
        return None
    ends = config.eos_token_id
    ends = () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)
    padding = config.pad_token_id
    if padding is None and ends:
        padding = ends[0]
    mask = _mask(left.get("attention_mask"), ids, config.pad_token_id, ends)
    if mask is _UNKNOWN:
        return None
    return Request(
        ids, mask, total, ends, 0 if padding is None else int(padding), _warpers(config, kwargs)
    )


def _inherits(config: Any, own: Any) -> bool:
    """Whether releases of transformers differ in what a given configuration takes over from the model's own."""
    names = ("eos_token_id", "pad_token_id")
    taken = any(getattr(config, n) is None and getattr(own, n) is not None for n in names)
    return taken or bool(own.do_sample)


def _other_settings(config: Any) -> bool:
    """Whether a configuration sets something that the loop does not read."""
    usual = type(config)().to_dict()
    for key, value in config.to_dict().items():
        neutral = value is None or value is False or value in (usual.get(key), _NEUTRAL.get(key))
        if not (neutral or key in _READ or key.startswith("_")):
            return True
    beams = [getattr(config, key, None) for key in ("num_beams", "num_return_sequences")]
    return any(value not in (None, 1) for value in beams)


_UNKNOWN: Any = object()


def _mask(given: Any, ids: Tensor, pad: int | None, ends: tuple[int, ...]) -> Any:
    """The mask of a prompt; None where nothing is masked."""
    mask = given
    if mask is None and pad is not None and pad not in ends:
        mask = ids.ne(pad)
    if mask is None or bool(mask.all()):
        return None
    # padding at the end, or in between, is for the model itself
    prefix = mask.dim() == 2 and mask.shape == ids.shape
    prefix = prefix and bool((mask[:, 1:].bool() >= mask[:, :-1].bool()).all())
    return mask.bool() if prefix and bool(mask[:, -1].all()) else _UNKNOWN


def _warpers(config: Any, kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    if not config.do_sample:
        return None
    if type(config)().top_k is None:
        for name, value in _SAMPLING.items():
            if getattr(config, name) is None and name not in kwargs:
                setattr(config, name, value)
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    found: list[Any] = []
    if config.temperature not in (None, 1.0):
        found.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        found.append(TopKLogitsWarper(top_k=config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        found.append(TopPLogitsWarper(top_p=config.top_p))
    return tuple(found)


@torch.no_grad()
def generate(decoder: Decoder, request: Request) -> Tensor:
    """Run a request; returns prompt and answer, `[batch, tokens]`, filled up with the pad id."""
    batch, length = request.ids.shape
    decoder.prepare(batch, request.total)
    out = request.ids.new_full((batch, request.total), request.pad)
    out[:, :length] = request.ids
    logits = decoder.prefill(request.ids, request.mask)
    if request.mask is None:
        positions = torch.full((batch,), length, dtype=torch.long, device=out.device)
    else:
        positions = request.mask.long().sum(-1)
    ends = torch.tensor(request.ends, device=out.device) if request.ends else None
    going = torch.ones(batch, dtype=torch.bool, device=out.device)
    while True:
        token = _choose(logits, out[:, :length], request.warpers)
        if ends is not None:
            token = torch.where(going, token, request.pad)
            going = going & torch.isin(token, ends, invert=True)
        out[:, length] = token
        length += 1
        if length == request.total or (ends is not None and not bool(going.any())):
            return out[:, :length]
        logits = decoder.step(token, positions)
        positions = positions + 1


def _choose(logits: Tensor, so_far: Tensor, warpers: tuple[Any, ...] | None) -> Tensor:
    scores = logits.float()
    if warpers is None:
        return scores.argmax(-1)
    for warper in warpers:
        scores = warper(so_far, scores)
    return torch.multinomial(torch.softmax(scores, -1), num_samples=1).squeeze(1)
