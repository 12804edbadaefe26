# SPDX-License-Identifier: Apache-2.0
"""Multimodal models over split sequences: two ranks against one device that sees all of it, gradients included."""

from __future__ import annotations

import pytest
import torch

from deepspeed.sequence.auto_sp import auto_wrap_model_for_sp
from deepspeed.sequence.autosp_fusion import (
    InternVLFusionAdapter,
    LlavaFusionAdapter,
    Qwen2VLFusionAdapter,
)
from deepspeed.sequence.autosp_vit import UlyssesSPViTAttention

WIDTH, PATCHES, SHARES = 6, 7, (4, 3)


class InternVisionAttention(torch.nn.Module):
    """Attention of one head, which mixes all tokens."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH).double()

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (q @ k.mT / WIDTH**0.5).softmax(-1) @ v, "weights"


class LlamaAttention(torch.nn.Identity):
    """Stands for a language model's."""


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    make = lambda n: torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64)  # noqa: E731
    return make(PATCHES), make(1)


def attention() -> InternVisionAttention:
    torch.manual_seed(2)
    return InternVisionAttention()


def vision(rank: int) -> list:
    found = []
    for has_cls in (False, True):
        patches, cls = inputs()
        own = patches.split(SHARES, dim=1)[rank].requires_grad_()
        inner = attention()
        wrapper = UlyssesSPViTAttention(inner, None, has_cls)
        out, rest = wrapper(torch.cat([cls, own], dim=1) if has_cls else own)
        assert rest == "weights"
        mine = out[:, int(has_cls) :]
        mine.square().sum().backward()
        grad = inner.qkv.weight.grad
        torch.distributed.all_reduce(grad)
        found.append((mine.detach(), own.grad, grad))
    return found


def test_patches_on_two_ranks_attend_as_on_one(ranks2):
    results = ranks2.run(vision)
    for case, has_cls in enumerate((False, True)):
        patches, cls = inputs()
        patches.requires_grad_()
        inner = attention()
        out = inner(torch.cat([cls, patches], dim=1) if has_cls else patches)[0][:, int(has_cls) :]
        out.square().sum().backward()
        for rank in range(2):
            got, grad, weight_grad = results[rank][case]
            # float64 on both sides; sums in another order
            torch.testing.assert_close(got, out.detach().split(SHARES, 1)[rank], atol=1e-12, rtol=0)
            want = patches.grad.split(SHARES, 1)[rank]
            torch.testing.assert_close(grad, want, atol=1e-11, rtol=0)
            torch.testing.assert_close(weight_grad, inner.qkv.weight.grad, atol=1e-10, rtol=0)


IDS = {
    "llava": torch.tensor([[5, -200, 6, 7], [-200, 5, 6, 7]]),
    "internvl": torch.tensor([[5, *[9] * 7, 6], [*[9] * 3, 5, 6, *[9] * 4]]),
    "qwen2": torch.tensor([[1, *[0] * 7, 2, 5, 6], [5, 1, *[0] * 7, 2, 6]]),
}


def adapter(kind: str, projection: torch.nn.Module):
    if kind == "llava":
        return LlavaFusionAdapter(projection, None)
    if kind == "internvl":
        return InternVLFusionAdapter(projection, None, image_token_id=9)
    return Qwen2VLFusionAdapter(projection, None, vision_start_token_id=1, vision_end_token_id=2)


def expected(kind: str, text: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """Token by token."""
    rows = []
    for sample, ids in enumerate(IDS[kind].tolist()):
        row, images = [], iter(visual[sample])
        for at, token in enumerate(ids):
            if kind == "llava" and token == -200:
                row += list(images)
            elif (kind == "internvl" and token == 9) or (kind == "qwen2" and token == 0):
                row.append(next(images))
            else:
                row.append(text[sample, at])
        rows.append(torch.stack(row))
    return torch.stack(rows)


def text_of(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(*IDS[kind].shape, WIDTH, generator=generator, dtype=torch.float64)


def fused(rank: int) -> dict:
    found = {}
    for kind in IDS:
        torch.manual_seed(1)
        projection = torch.nn.Linear(WIDTH, WIDTH).double()
        own = inputs()[0].split(SHARES, dim=1)[rank].requires_grad_()
        out = adapter(kind, projection)(own, text_of(kind), IDS[kind])
        (out * (1 + rank)).square().sum().backward()
        found[kind] = (out.detach(), own.grad)
        none = adapter(kind, projection)(own, text_of(kind), torch.full_like(IDS[kind], 5))
        assert torch.equal(none[0, 0], text_of(kind)[0, rank * none.shape[1]])
        if kind != "llava":
            with pytest.raises(ValueError, match="visual tokens"):
                adapter(kind, projection)(own[:, :1], text_of(kind), IDS[kind])
    return found


def test_images_are_put_into_the_text_as_on_one_device(ranks2):
    results = ranks2.run(fused)
    for kind in IDS:
        torch.manual_seed(1)
        projection = torch.nn.Linear(WIDTH, WIDTH).double()
        patches = inputs()[0].requires_grad_()
        whole = expected(kind, text_of(kind), projection(patches))
        whole = torch.nn.functional.pad(whole, (0, 0, 0, whole.shape[1] % 2))
        halves = whole.chunk(2, dim=1)
        (halves[0].square().sum() + (2 * halves[1]).square().sum()).backward()
        for rank in range(2):
            got, grad = results[rank][kind]
            torch.testing.assert_close(got, halves[rank].detach(), atol=1e-12, rtol=0)
            want = patches.grad.split(SHARES, 1)[rank]
            torch.testing.assert_close(grad, want, atol=1e-11, rtol=0)


def test_only_vision_encoders_are_wrapped():
    clip = type("CLIPAttention", (torch.nn.Identity,), {})
    model = torch.nn.ModuleDict(
        {
            "vision_tower": torch.nn.ModuleList([InternVisionAttention(), clip()]),
            "text_model": torch.nn.ModuleList([clip(), LlamaAttention()]),
        }
    )
    assert auto_wrap_model_for_sp(model, None) is model
    first, second = model["vision_tower"]
    assert isinstance(first, UlyssesSPViTAttention) and not first.has_cls_token
    assert isinstance(second, UlyssesSPViTAttention) and second.has_cls_token
    assert [type(m).__name__ for m in model["text_model"]] == ["CLIPAttention", "LlamaAttention"]
