# SPDX-License-Identifier: Apache-2.0
"""``checkpoint.writer.data_parallel``: ranks write one file together, and it is what the first would write alone."""

from __future__ import annotations

import itertools
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint import archive, atomic, joint, stream
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from tests.helpers.checkpointing import engine, same, state_of, train


class Told(atomic.Disk):
    """Notes where this rank writes."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[int, int]]] = {}

    def send(self, queue: Any, path: Path, offset: int, data: torch.Tensor) -> int:
        self.spans.setdefault(path.name, []).append((offset, offset + data.numel()))
        return super().send(queue, path, offset, data)


def save_both_ways(
    rank: int, ranks: int, root: Path, stage: int, writer: dict[str, Any], host: str
) -> dict[str, Any]:
    """Save alone and together; returns what this rank wrote of the common file, and what a load finds."""
    before = stream.BY_QUEUE, archive.LARGE, joint._PAGE, socket.gethostname
    stream.BY_QUEUE, archive.LARGE, joint._PAGE = 0, 64, 16
    socket.gethostname = lambda: host.format(rank=rank)
    together = engine(stage, "bf16", checkpoint={"writer": writer})
    train(together, 0, 2, rank, ranks)
    state = state_of(together)
    with torch.no_grad():
        together.module.scale.add_(rank)  # a buffer of this rank's own
    client = {"mine": torch.arange(64) + 100 * rank, "text": "x" * rank}
    keeper, together.checkpoint_engine = together.checkpoint_engine, TorchCheckpointEngine()
    try:
        together.save_checkpoint(root / "alone", tag="t", client_state=client)
        together.checkpoint_engine = keeper
        atomic.disk = disk = Told()
        together.save_checkpoint(root / "together", tag="t", client_state=client)
        keeper.finish()
    finally:
        atomic.disk = atomic.Disk()
        stream.BY_QUEUE, archive.LARGE, joint._PAGE, socket.gethostname = before
    fresh = engine(stage, "bf16", seed=7)
    _, loaded = fresh.load_checkpoint(root / "together")
    return {
        "spans": disk.spans.get("mp_rank_00_model_states.pt", []),
        "differ": same(state_of(fresh), state),
        "scale": fresh.module.scale,
        "client": loaded["mine"],
    }


@pytest.mark.parametrize(
    ("stage", "writer", "host", "writers"),
    [
        (0, {"data_parallel": "replica"}, "one", 2),
        (2, {"data_parallel": "replica", "decoupled": True}, "one", 2),
        (1, {"data_parallel": "machine"}, "host{rank}", 2),
        (1, {"data_parallel": "machine"}, "one", 1),
        (0, {"data_parallel": "replica", "io_multiplier": 2}, "host{rank}", 2),
    ],
    ids=["replicas", "beside", "machines", "one_machine", "twice"],
)
def test_two_ranks_write_the_file_that_one_would_write(
    stage: int, writer: dict[str, Any], host: str, writers: int, ranks2: Any, tmp_path: Path
) -> None:
    found = ranks2.run(save_both_ways, 2, tmp_path, stage, writer, host)
    files = {
        way: {p.name: p.read_bytes() for p in (tmp_path / way / "t").iterdir()}
        for way in ("alone", "together")
    }
    assert files["alone"].keys() == files["together"].keys()
    name = "mp_rank_00_model_states.pt"
    assert files["alone"][name] == files["together"][name]
    assert sum(bool(one["spans"]) for one in found) == writers
    spans = sorted(span for one in found for span in set(one["spans"]))
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert spans[0][0] == 0 and spans[-1][1] == len(files["alone"][name])
    for one in found:
        assert one["differ"] == []
        assert one["scale"].eq(1.5).all() and one["client"].eq(torch.arange(64)).all()
    content = torch.load(tmp_path / "together" / "t" / name, weights_only=True)
    assert content["global_steps"] == 2


def save_layers(rank: int, ranks: int, root: Path) -> dict[str, Any]:
    import deepspeed
    from deepspeed.pipe import PipelineModule

    net = PipelineModule([torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)], num_stages=1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "checkpoint": {"writer": {"data_parallel": "replica"}},
    }
    made = deepspeed.initialize(model=net, config=config)[0]
    keeper, made.checkpoint_engine = made.checkpoint_engine, TorchCheckpointEngine()
    before, stream.BY_QUEUE, archive.LARGE = (stream.BY_QUEUE, archive.LARGE), 0, 4096
    atomic.disk = disk = Told()
    try:
        made.save_checkpoint(root / "alone", tag="t")
        disk.spans.clear()
        made.checkpoint_engine = keeper
        made.save_checkpoint(root / "together", tag="t")
    finally:
        atomic.disk = atomic.Disk()
        stream.BY_QUEUE, archive.LARGE = before
    return disk.spans


def test_the_layers_of_a_pipeline_are_written_together_too(ranks2: Any, tmp_path: Path) -> None:
    found = ranks2.run(save_layers, 2, tmp_path)
    for path in (tmp_path / "alone" / "t").iterdir():
        assert path.read_bytes() == (tmp_path / "together" / "t" / path.name).read_bytes()
    for spans in found:
        assert {name for name in spans if name.startswith("layer_")} == {
            "layer_00-model_states.pt",
            "layer_01-model_states.pt",
        }


def save_old(rank: int, ranks: int, root: Path) -> None:
    options = {"checkpoint_serialization": False, "writer": {"data_parallel": "replica"}}
    made = engine(2, "fp32", checkpoint=options)
    made.save_checkpoint(root)
    assert engine(2, "fp32", seed=3).load_checkpoint(root)[0] is not None


def test_files_of_the_old_format_have_one_writer(ranks2: Any, tmp_path: Path) -> None:
    ranks2.run(save_old, 2, tmp_path)


def told(leads: bool, host: str, sockets: int = 2) -> joint._Told:
    return joint._Told(leads, host, sockets, {"f": joint._Offer(1, 10, 1000)})


@pytest.mark.parametrize(
    ("among", "expected"),
    [("REPLICA", [0, 1, 2, 3, 4, 5, 6]), ("SOCKET", [0, 2, 4, 6]), ("MACHINE", [0, 4])],
)
def test_writers_are_spread_over_machines_and_sockets(among: str, expected: list[int]) -> None:
    ranks = [told(i == 0, "a" if i < 4 else "b") for i in range(7)]
    (team,) = joint._teams(ranks, among, 0)
    assert team.writers == expected
    (team,) = joint._teams(ranks, among, 2000)
    assert team.writers == [0]


def test_machines_with_folders_of_their_own_have_teams_of_their_own() -> None:
    ranks = [told(i % 2 == 0, "ab"[i // 2]) for i in range(4)]
    assert [team.writers for team in joint._teams(ranks, "REPLICA", 0)] == [[0, 1], [2, 3]]
