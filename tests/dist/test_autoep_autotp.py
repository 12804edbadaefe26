# SPDX-License-Identifier: Apache-2.0
"""Experts spread over ranks that share layers as well train as on one process, and come back from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint.ds_to_universal import convert
from tests.dist.test_autoep import batches, engine, export_faults, plain, train

COLUMNS = {"patterns": [r".*dense\.weight$"], "partition_type": "column", "gather_output": True}


def folded(stage: int, tensor: int, ep_size: int, kind: str = "stacked", seed: int = 3) -> Any:
    divided = {
        "autotp_size": tensor,
        "partition_config": {"use_default_specs": False, "layer_specs": [COLUMNS]},
    }
    return engine(stage, ep_size, kind, seed, tensor_parallel=divided)


def walk(rank: int, ranks: int, cases: list[tuple[int, int, int]], folder: Path) -> list[str]:
    wrong, data = [], batches(5)
    for stage, tensor, ep_size in cases:
        case = f"stage {stage} tp {tensor} ep {ep_size}"
        kind = "listed" if stage == 1 else "stacked"
        place = (rank // tensor, ranks // tensor)
        losses, weights = plain(kind, data)
        made = folded(stage, tensor, ep_size, kind)
        found = train(made, data[:3], *place)
        made.save_checkpoint(folder / case, tag="t")
        found = [loss / tensor for loss in found + train(made, data[3:], *place)]
        # the sum of all ranks' losses counts each batch once a tensor-parallel rank; fp32 in another order
        if not torch.allclose(torch.tensor(found), torch.tensor(losses), rtol=1e-5):
            wrong.append(f"{case}: losses {found} {losses}")
        wrong += [f"{case}: {what}" for what in export_faults(made, folder / case, weights)]
        other = folded(stage, tensor, ep_size, kind, seed=9)
        other.load_checkpoint(folder / case)
        train(other, data[3:], *place)
        pairs = zip(made.module.parameters(), other.module.parameters(), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            wrong.append(f"{case}: not as before after a load")
        if rank == 0 and stage:
            with pytest.raises(NotImplementedError, match="folded"):
                convert(folder / case / "t", folder / case / "u")
        with pytest.raises(AssertionError, match="another model-parallel size"):
            engine(stage, ep_size, kind).load_checkpoint(folder / case)
    return wrong


def test_two_ranks_that_share_layers_share_experts(ranks2: Any, tmp_path: Path) -> None:
    assert ranks2.run(walk, 2, [(0, 2, 2), (2, 2, 2)], tmp_path) == [[], []]


def test_experts_go_round_over_ranks_of_both_kinds(ranks4: Any, tmp_path: Path) -> None:
    cases = [(0, 2, 4), (1, 2, 2), (2, 4, 2)]
    assert ranks4.run(walk, 4, cases, tmp_path) == [[], [], [], []]
