# SPDX-License-Identifier: Apache-2.0
"""Where images enter a text whose sequence is split over ranks: visual tokens are gathered, put in place, and cut anew.

The families of models differ in what the text holds where an image belongs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deepspeed import comm as dist
from deepspeed.utils.errors import explain

from .gathering import gathered


class FusionAdapter(nn.Module):
    """Projects visual tokens, puts them into the text, and returns this rank's share of the whole.

    Args:
        projection: module from visual to text width, run on each rank's own visual tokens.
        process_group: the ranks that share a sequence.
    """

    def __init__(self, projection: nn.Module, process_group: Any) -> None:
        super().__init__()
        self.projection, self.process_group = projection, process_group

    def forward(self, visual_features: Tensor, text_embeds: Tensor, input_ids: Tensor) -> Tensor:
        """Fuse.

        Args:
            visual_features: `[batch, own visual tokens, width]`, a share of each sample's, in the order of the ranks.
            text_embeds: `[batch, text tokens, text width]`, alike on all ranks.
            input_ids: `[batch, text tokens]`, the ids that say where images belong.

        Returns:
            `[batch, tokens / ranks, text width]`; zeros fill the whole up to a multiple of the ranks.

        Raises:
            ValueError: places and visual tokens do not match.
        """
        visual, _ = gathered(self.projection(visual_features), 1, self.process_group)
        fused = self._splice_visual_into_text(text_embeds, visual, input_ids)
        ranks, rank = dist.get_world_size(self.process_group), dist.get_rank(self.process_group)
        fused = functional.pad(fused, (0, 0, 0, -fused.shape[1] % ranks))
        return fused.chunk(ranks, dim=1)[rank]

    def _splice_visual_into_text(self, text: Tensor, visual: Tensor, ids: Tensor) -> Tensor:
        raise NotImplementedError


class LlavaFusionAdapter(FusionAdapter):
    """LLaVA: one id stands for a whole image, and all its visual tokens take its place.

    Args:
        projection, process_group: as of `FusionAdapter`.
        image_token_id: the id.
    """

    def __init__(
        self, projection: nn.Module, process_group: Any, image_token_id: int = -200
    ) -> None:
        super().__init__(projection, process_group)
        self.image_token_id = image_token_id

    def _splice_visual_into_text(self, text: Tensor, visual: Tensor, ids: Tensor) -> Tensor:
        places = ids == self.image_token_id
        images = places.sum(dim=1)
        count = int(images[0])
        if bool((images != count).any()) or (count and visual.shape[1] % count):
            raise ValueError(
                explain(
                    "images and visual tokens do not match",
                    got=f"{images.tolist()} images a sample, {visual.shape[1]} visual tokens",
                    expected="as many images in each sample, of as many visual tokens",
                )
            )
        if not count:
            return text
        rows = []
        for sample, embeds in enumerate(text):
            parts, begin = [], 0
            pieces = visual[sample].chunk(count)
            for piece, at in zip(pieces, places[sample].nonzero().flatten().tolist(), strict=True):
                parts += [embeds[begin:at], piece]
                begin = at + 1
            rows.append(torch.cat([*parts, embeds[begin:]]))
        return torch.stack(rows)


class _PlacewiseFusionAdapter(FusionAdapter):
    """The text has a place for each visual token."""

    def _places(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def _splice_visual_into_text(self, text: Tensor, visual: Tensor, ids: Tensor) -> Tensor:
        places = self._places(ids)
        counts = places.sum(dim=1)
        if not bool(counts.any()):
            return text
        if bool((counts != visual.shape[1]).any()):
            raise ValueError(
                explain(
                    "places for images and visual tokens do not match",
                    got=f"{counts.tolist()} places a sample, {visual.shape[1]} visual tokens",
                    expected="as many",
                )
            )
        return text.masked_scatter(places.unsqueeze(-1), visual.to(text.dtype))


class InternVLFusionAdapter(_PlacewiseFusionAdapter):
    """InternVL: each visual token has an id of its own in the text.

    Args:
        projection, process_group: as of `FusionAdapter`.
        image_token_id: the id.
    """

    def __init__(self, projection: nn.Module, process_group: Any, image_token_id: int) -> None:
        super().__init__(projection, process_group)
        self.image_token_id = image_token_id

    def _places(self, ids: Tensor) -> Tensor:
        return ids == self.image_token_id


class Qwen2VLFusionAdapter(_PlacewiseFusionAdapter):
    """Qwen2-VL: visual tokens take the places between an id that begins an image and one that ends it.

    Args:
        projection, process_group: as of `FusionAdapter`.
        vision_start_token_id, vision_end_token_id: the two ids.
    """

    def __init__(
        self,
        projection: nn.Module,
        process_group: Any,
        vision_start_token_id: int = 151652,
        vision_end_token_id: int = 151653,
    ) -> None:
        super().__init__(projection, process_group)
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id

    def _places(self, ids: Tensor) -> Tensor:
        begins, ends = ids == self.vision_start_token_id, ids == self.vision_end_token_id
        opened = begins.long().cumsum(dim=1) - ends.long().cumsum(dim=1)
        if bool((opened < 0).any()) or bool((opened > 1).any()) or bool(opened[:, -1:].any()):
            raise ValueError(
                explain(
                    "the ids that begin and end images do not pair up",
                    got=f"{begins.sum(1).tolist()} beginnings and {ends.sum(1).tolist()} ends a sample",
                    expected="each beginning followed by its end",
                )
            )
        return opened.bool() & ~begins
