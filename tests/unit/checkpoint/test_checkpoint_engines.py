# SPDX-License-Identifier: Apache-2.0
"""The section ``checkpoint.writer``: each writer saves what the plain engine saves, now or beside training."""

from __future__ import annotations

import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed.checkpoint import archive, atomic, pace, snapshot, stream
from deepspeed.checkpoint.archive import Archive
from deepspeed.checkpoint.reader import Folder, load_file
from deepspeed.checkpoint.snapshot import Snapshot, can_all_copy
from deepspeed.runtime.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
    DecoupledCheckpointEngine,
    FastCheckpointEngine,
    TorchCheckpointEngine,
    create_checkpoint_engine,
)
from tests.helpers.checkpointing import engine, same, state_of, train
from tests.helpers.launching import environment

DECOUPLED = {"writer": {"decoupled": True}}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix == ".pt"}


@pytest.mark.parametrize(
    ("writer", "kind"),
    [
        (None, TorchCheckpointEngine),
        ({"type": "FAST", "io_buffer_size": 1 << 20}, FastCheckpointEngine),
        ({"type": "PYTHON", "io_multiplier": 2, "show_statistics": True}, FastCheckpointEngine),
        ({"decoupled": True}, DecoupledCheckpointEngine),
        ({"data_parallel": "socket"}, FastCheckpointEngine),
    ],
    ids=["none", "fast", "python", "decoupled", "data_parallel"],
)
def test_every_writer_saves_the_same_state(
    writer: Any, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BY_QUEUE", 0)
    made = engine(2, "bf16", checkpoint=None if writer is None else {"writer": writer})
    assert type(made.checkpoint_engine) is kind
    assert made.checkpoint_engine.is_decoupled() == (kind is DecoupledCheckpointEngine)
    train(made, 0, 2)
    state = state_of(made)
    assert made.save_checkpoint(tmp_path)
    train(made, 2, 3)
    made.destroy()
    fresh = engine(2, "bf16", seed=5)
    assert fresh.load_checkpoint(tmp_path)[0] is not None
    assert same(state_of(fresh), state) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "global_step2",
        "latest",
        "zero_to_fp32.py",
    ]
    assert not list((tmp_path / "global_step2").glob(".deepspeed*"))


def test_mock_publishes_nothing(tmp_path: Path) -> None:
    made = engine(1, "fp32", checkpoint={"writer": {"type": "MOCK"}})
    made.save_checkpoint(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    made.checkpoint_engine.save({"a": torch.ones(2)}, str(tmp_path / "f.pt"))
    assert not list(tmp_path.iterdir())


class Slow(atomic.Disk):
    """Creates no file before it may, and fails then if so asked."""

    def __init__(self, fail: bool = False) -> None:
        self.fail, self.go = fail, threading.Event()

    def create(self, path: Path) -> Any:
        if path.suffix == ".pt":
            assert self.go.wait(30)
            if self.fail:
                raise OSError(28, "no space at all")
        return super().create(path)


def test_a_save_beside_training_is_published_at_the_boundary_after_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(2, "fp32", checkpoint=DECOUPLED)
    train(made, 0, 1)
    disk = Slow()
    monkeypatch.setattr(atomic, "disk", disk)
    before = state_of(made)
    made.save_checkpoint(tmp_path)
    train(made, 1, 3)  # changes the state while nothing of it is written yet
    assert not (tmp_path / "global_step1").exists() and not (tmp_path / "latest").exists()
    disk.go.set()
    made.checkpoint_engine._pending.writing._thread.join()
    assert not (tmp_path / "global_step1").exists()
    train(made, 3, 4)
    made.checkpoint_engine._pending.publishing.result()
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "global_step1"
    fresh = engine(2, "fp32", seed=4)
    fresh.load_checkpoint(tmp_path)
    assert same(state_of(fresh), before) == []
    train(made, 4, 5)
    assert made.checkpoint_engine._pending is None
    made.destroy()


@pytest.mark.parametrize("how", ["finish", "save", "destroy"])
def test_a_save_beside_training_takes_its_time_until_somebody_waits(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BY_QUEUE", 0)
    monkeypatch.setattr(archive, "LARGE", 64)
    monkeypatch.setattr(pace, "RATE", 1e-9)  # minutes, if nobody waits
    made = engine(2, "fp32", checkpoint=DECOUPLED)
    made.save_checkpoint(tmp_path)
    train(made, 0, 2)
    assert not made.checkpoint_engine._pending.is_ready
    if how == "finish":
        made.checkpoint_engine.finish()
    elif how == "save":
        made.save_checkpoint(tmp_path, tag="more")
    else:
        made.destroy()
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "global_step0"
    made.destroy()


@pytest.mark.parametrize("where", ["step", "save", "load", "destroy"])
def test_an_error_beside_training_is_raised_at_the_next_occasion(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(1, "fp32", checkpoint=DECOUPLED)
    made.save_checkpoint(tmp_path)
    made.checkpoint_engine.finish()
    disk = Slow(fail=True)
    disk.go.set()
    monkeypatch.setattr(atomic, "disk", disk)
    made.save_checkpoint(tmp_path, tag="lost")
    made.checkpoint_engine._pending.writing._thread.join()
    with pytest.raises(OSError, match="no space at all"):
        if where == "step":
            train(made, 0, 1)
        elif where == "save":
            made.save_checkpoint(tmp_path, tag="more")
        elif where == "load":
            made.load_checkpoint(tmp_path)
        else:
            made.destroy()
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "global_step0",
        "latest",
        "zero_to_fp32.py",
    ]
    made.save_checkpoint(tmp_path, tag="again")
    made.checkpoint_engine.finish()
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "again"


def test_without_memory_for_a_copy_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(snapshot, "_SHARE", 0.0)
    made = engine(1, "fp32", checkpoint=DECOUPLED)
    made.save_checkpoint(tmp_path)
    assert (tmp_path / "latest").exists() and made.checkpoint_engine._snapshot.nbytes == 0
    assert "too little free memory" in capsys.readouterr().out


def test_the_old_format_is_written_at_once(tmp_path: Path) -> None:
    options = {"checkpoint_serialization": False, **DECOUPLED}
    made = engine(1, "fp32", checkpoint=options)
    made.save_checkpoint(tmp_path)
    assert (tmp_path / "latest").exists()
    (path,) = (tmp_path / "global_step0").glob("mp_rank*")
    assert path.read_bytes()[:2] != b"PK"


def test_a_copy_uses_its_memory_again_and_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_PIECE", 150_000)
    held = Snapshot()
    source = torch.arange(100_000.0)
    for value in (1.0, 2.0):
        source.fill_(value)
        made = Archive.of({"a": source, "b": source[:10], "c": torch.ones(3)})
        held.take([made])
        source.zero_()
        (record,) = [r for r in made.storages if r.size == 400_000]
        copy = record.source
        assert record.crc == zlib.crc32(copy.numpy())
        assert copy.view(torch.float32).eq(value).all() and copy.data_ptr() % 4096 == 0
        size = held.nbytes
        assert size == 400_000 // 4096 * 4096 + 4096 + 4096 and held.wants([made]) == 0
    held.release()
    assert held.nbytes == 0 and held.wants([made]) == size


def test_machines_are_asked_for_all_their_ranks_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(given: Any) -> list[Any]:
        return [("one", 30, 100), ("one", 15, 110), ("two", 50, 100)]

    assert can_all_copy(exchange, 0)
    assert not can_all_copy(lambda given: [*exchange(given), ("one", 6, 100)], 0)


PROGRAM = """
import sys
from tests.helpers.checkpointing import engine, train
made = engine(2, "bf16", checkpoint={"writer": {"decoupled": True}})
train(made, 0, 2)
made.save_checkpoint(sys.argv[1])
"""


def test_a_program_that_ends_after_a_save_has_saved(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=environment(KMP_AFFINITY="disabled"),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "latest").read_text(encoding="utf-8") == "global_step2"
    assert engine(2, "bf16").load_checkpoint(tmp_path)[0] is not None


class Own(CheckpointEngine):
    """Somebody's engine that knows single files."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        self.calls.append(f"create {info.tag}")

    def save(self, state_dict: Any, path: str) -> None:
        self.calls.append(f"save {Path(path).name}")
        torch.save(state_dict, path)

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_file(path)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        self.calls.append("commit")
        return True


def test_an_engine_of_the_users_is_called_and_its_files_are_published(tmp_path: Path) -> None:
    made = engine(1, "fp32")
    made.checkpoint_engine = own = Own()
    made.save_checkpoint(tmp_path)
    shard = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    assert own.calls == [
        "create global_step0",
        "save mp_rank_00_model_states.pt",
        f"save {shard}",
        "commit",
    ]
    folder = Folder(tmp_path / "global_step0")
    folder.check(shard)
    assert shard in folder._expected
    assert engine(1, "fp32", seed=3).load_checkpoint(tmp_path)[0] is not None


@pytest.mark.parametrize("writer", [None, {}, {"decoupled": True}])
def test_single_files_come_back(writer: Any, tmp_path: Path) -> None:
    made = create_checkpoint_engine({"writer": writer})
    info = CheckpointCommitInfo("t", str(tmp_path), True)
    made.create(info)
    made.save({"a": torch.ones(2)}, str(tmp_path / "f.pt"))
    assert made.get_commit_info() is info
    assert made.commit(info)
    assert torch.equal(made.load(str(tmp_path / "f.pt"))["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["f.pt"]
    made.cleanup()
