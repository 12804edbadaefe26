# SPDX-License-Identifier: Apache-2.0
"""Finds the attention modules of a multimodal model that must know of a split sequence, and wraps them."""

from __future__ import annotations

from typing import Any

from torch import nn

from deepspeed.utils.logging import logger
from deepspeed.utils.module_utils import recursive_setattr

from .autosp_vit import UlyssesSPViTAttention

# Class of a vision encoder's attention -> whether its first token is a class token.
_VISION = {
    "CLIPAttention": True,
    "CLIPSdpaAttention": True,
    "CLIPFlashAttention2": True,
    "InternVisionAttention": False,
    "Qwen2VLVisionAttention": False,
    "SiglipAttention": False,
    "SiglipSdpaAttention": False,
    "SiglipFlashAttention2": False,
}
# These serve text encoders, too; a vision encoder is told by its name.
_SHARED = ("CLIP", "Siglip")
_VISION_NAMES = ("vision", "visual", "image", "vit")
_LANGUAGE = (
    *("GemmaAttention", "InternLM2Attention", "LlamaAttention", "MistralAttention"),
    *("Phi3Attention", "Qwen2Attention", "Qwen2VLAttention", "Qwen3Attention"),
)


def auto_wrap_model_for_sp(model: nn.Module, process_group: Any) -> nn.Module:
    """Wrap the attention of a model's vision encoder for patches that are split over ranks.

    The language model's attention, of transformers' form, is left as it is, and a warning says what serves it.

    Args:
        model: changed in place.
        process_group: the ranks that share a sequence.

    Returns:
        The model.
    """
    found = [
        (name, module, type(module).__name__)
        for name, module in model.named_modules()
        if type(module).__name__ in _VISION or type(module).__name__ in _LANGUAGE
    ]
    wrapped = 0
    for name, module, kind in found:
        if kind not in _VISION or not _is_vision(name, kind) or not name:
            continue
        wrapper = UlyssesSPViTAttention(module, process_group, _VISION[kind])
        recursive_setattr(model, name, wrapper)
        wrapped += 1
    language = sorted({kind for _, _, kind in found if kind in _LANGUAGE})
    if language:
        logger.warning(
            f"auto_wrap_model_for_sp leaves {', '.join(language)} as it is: register "
            "UlyssesSPAttentionHF of deepspeed.runtime.sequence_parallel.ulysses_sp before the model is built"
        )
    if not wrapped:
        logger.warning(
            f"auto_wrap_model_for_sp found no attention of a vision encoder; it knows {', '.join(_VISION)}"
        )
    return model


def _is_vision(name: str, kind: str) -> bool:
    lowered = name.lower()
    return not kind.startswith(_SHARED) or any(part in lowered for part in _VISION_NAMES)
