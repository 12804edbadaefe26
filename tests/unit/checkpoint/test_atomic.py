# SPDX-License-Identifier: Apache-2.0
"""A save that dies or fails at any of its steps loses nothing that was saved before."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepspeed.checkpoint import atomic
from deepspeed.checkpoint.atomic import Crew, Disk, publish, resolve, write_small
from deepspeed.checkpoint.format import LATEST, MANIFEST, PARTIAL_MARK, REPLACED_MARK
from deepspeed.checkpoint.reader import Folder, read_tag
from deepspeed.utils.errors import DeepSpeedCheckpointError

FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")


class Killed(BaseException):
    """The process ends here: no handler of errors may run."""


class Failing(Disk):
    """Does what a disk does until operation number `at`, and there what `fail` says; half a write is done first."""

    def __init__(self, at: int, fail: Callable[[], BaseException]) -> None:
        self.at, self.fail, self.count = at, fail, -1

    def _next(self, file: Any = None, data: Any = None) -> None:
        self.count += 1
        if self.count == self.at:
            if file is not None:
                file.write(bytes(data)[: len(data) // 2])
            raise self.fail()


def _guard(name: str) -> Callable[..., Any]:
    def method(self: Failing, *arguments: Any) -> Any:
        self._next(*(arguments if name == "write" else ()))
        return getattr(Disk, name)(self, *arguments)

    return method


for _name in (
    "create",
    "write",
    "sync",
    "sync_folder",
    "replace",
    "make_folder",
    "remove",
    "remove_tree",
):
    setattr(Failing, _name, _guard(_name))


def save(root: Path, tag: str, text: str, crew: Crew | None = None) -> None:
    def write(folder: Path) -> list[atomic.Entry]:
        return [write_small(folder / name, f"{text} {name}".encode() * 100) for name in FILES]

    publish(root, tag, crew or Crew(), write)


def content(root: Path) -> str:
    """What a reader makes of the folder: the text that the latest tag was saved with, all files checked."""
    tag = read_tag(root, LATEST)
    assert tag is not None
    folder = Folder(resolve(root, tag))
    texts = set()
    for name in FILES:
        folder.check(name)
        texts.add((folder.path / name).read_bytes().split()[0].decode())
    (text,) = texts
    return text


def operations(monkeypatch: pytest.MonkeyPatch, root: Path, tag: str) -> int:
    """How many operations a save of `tag` takes in a folder like `root`."""
    counting = Failing(-1, Killed)
    monkeypatch.setattr(atomic, "disk", counting)
    save(root, tag, "counted")
    monkeypatch.setattr(atomic, "disk", Disk())
    return counting.count + 1


@pytest.mark.parametrize("tag", ["second", "first"], ids=["new_tag", "same_tag_again"])
def test_killed_at_any_operation_the_last_complete_state_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str
) -> None:
    save(tmp_path / "count", "first", "old")
    total = operations(monkeypatch, tmp_path / "count", tag)
    assert total > 15
    for at in range(total):
        root = tmp_path / str(at)
        save(root, "first", "old")
        monkeypatch.setattr(atomic, "disk", Failing(at, Killed))
        with pytest.raises(Killed):
            save(root, tag, "new")
        monkeypatch.setattr(atomic, "disk", Disk())
        assert content(root) in ("old", "new"), at
        save(root, "third", "newest")
        assert content(root) == "newest"
        left = {p.name for p in root.iterdir()}
        assert left - {"latest.tmp"} <= {"first", "second", "third", LATEST}, at


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_operation_is_raised_and_the_last_complete_state_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    save(tmp_path / "count", "first", "old")
    total = operations(monkeypatch, tmp_path / "count", "second")
    for at in range(total):
        root = tmp_path / str(at)
        save(root, "first", "old")
        monkeypatch.setattr(atomic, "disk", Failing(at, lambda: OSError(code, "injected")))
        with pytest.raises(OSError, match="injected"):
            save(root, "second", "new")
        monkeypatch.setattr(atomic, "disk", Disk())
        assert content(root) in ("old", "new"), at


def test_a_failed_write_leaves_no_partial_folder(tmp_path: Path) -> None:
    def write(folder: Path) -> list[atomic.Entry]:
        write_small(folder / FILES[0], b"some")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        publish(tmp_path, "step", Crew(), write)
    assert list(tmp_path.iterdir()) == []


def crews(size: int) -> list[Crew]:
    """Ranks that are threads."""
    barrier, told = threading.Barrier(size, timeout=30), [None] * size

    def exchange(rank: int) -> Callable[[Any], list[Any]]:
        def give(item: Any) -> list[Any]:
            told[rank] = item
            barrier.wait()
            everything = list(told)
            barrier.wait()
            return everything

        return give

    return [Crew(rank, size, rank == 0, exchange(rank)) for rank in range(size)]


def on_threads(size: int, action: Callable[[Crew], Any]) -> list[Any]:
    results: list[Any] = [None] * size

    def run(crew: Crew) -> None:
        try:
            results[crew.rank] = action(crew)
        except Exception as error:
            results[crew.rank] = error

    threads = [threading.Thread(target=run, args=(crew,)) for crew in crews(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_one_failing_rank_raises_on_all(tmp_path: Path, bad: int) -> None:
    def action(crew: Crew) -> Any:
        def write(folder: Path) -> list[atomic.Entry]:
            if crew.rank == bad:
                raise OSError(errno.ENOSPC, "disk full")
            return [write_small(folder / f"file{crew.rank}", b"x")]

        return publish(tmp_path, "step", crew, write)

    results = on_threads(3, action)
    for rank, result in enumerate(results):
        assert isinstance(result, OSError if rank == bad else DeepSpeedCheckpointError)
        assert "disk full" in str(result)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_lists_the_files_of_all_ranks(tmp_path: Path) -> None:
    def action(crew: Crew) -> Any:
        return publish(
            tmp_path,
            "step",
            crew,
            lambda folder: [write_small(folder / f"file{crew.rank}", b"abc")],
        )

    assert on_threads(3, action) == [tmp_path / "step"] * 3
    folder = Folder(tmp_path / "step")
    assert sorted(folder._expected) == ["file0", "file1", "file2"]
    assert folder._expected["file1"] == {
        "size": 3,
        "crc32": "352441c2",
    }


def test_files_of_others_in_a_replaced_tag_are_kept(tmp_path: Path) -> None:
    save(tmp_path, "step", "old")
    (tmp_path / "step" / "scheduler.pt").write_bytes(b"theirs")
    (tmp_path / "step" / "notes").mkdir()
    save(tmp_path, "step", "new")
    assert content(tmp_path) == "new"
    assert (tmp_path / "step" / "scheduler.pt").read_bytes() == b"theirs"
    assert (tmp_path / "step" / "notes").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == [LATEST, "step"]


def test_a_folder_of_the_users_that_ends_like_a_partial_one_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.tmp").mkdir()
    (tmp_path / "mine.tmp" / "data").write_bytes(b"x")
    (tmp_path / "mine.old").mkdir()
    save(tmp_path, "step", "new")
    assert (tmp_path / "mine.tmp" / "data").exists()
    assert (tmp_path / "mine.old").exists()


def test_a_partial_folder_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / "other.tmp"
    partial.mkdir()
    (partial / PARTIAL_MARK).write_text(
        f"{socket.gethostname()} {os.getppid()}\n", encoding="utf-8"
    )
    save(tmp_path, "step", "new")
    assert partial.exists()


def test_saves_beside_each_other_in_one_process_leave_each_other_alone(tmp_path: Path) -> None:
    first, second = (atomic.Publication(tmp_path, tag, Crew()) for tag in ("a", "b"))
    first.begin(0)
    second.begin(0)
    for publication in (second, first):
        folder = publication.partial
        publication.finish(lambda folder=folder: [write_small(folder / FILES[0], b"x")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", LATEST]
    third = atomic.Publication(tmp_path, "c", Crew())
    third.begin(0)
    third.abandon()
    (tmp_path / "c.tmp").mkdir()
    write_small(
        tmp_path / "c.tmp" / PARTIAL_MARK, f"{socket.gethostname()} {os.getpid()}\n".encode()
    )
    save(tmp_path, "a", "new")
    assert not (tmp_path / "c.tmp").exists()


@pytest.mark.parametrize("tag", ["step", "other"])
def test_a_users_copy_of_a_tag_is_neither_removed_nor_renamed(tag: str, tmp_path: Path) -> None:
    save(tmp_path, "step", "old")
    shutil.copytree(tmp_path / "step", tmp_path / "step.old")
    shutil.copytree(tmp_path / "step", tmp_path / "alone.old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "step.old").iterdir()}
    for text in ("new", "newer"):
        save(tmp_path, tag, text)
        assert content(tmp_path) == text
    for name in ("step.old", "alone.old"):
        assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} == before
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"step", tag, "step.old", "alone.old", LATEST}


def test_beside_a_users_copy_too_a_killed_save_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "first", "step", "old")
    total = operations(monkeypatch, tmp_path / "first", "step")
    for at in range(total):
        root = tmp_path / str(at)
        save(root, "step", "copied")
        shutil.copytree(root / "step", root / "step.old")
        save(root, "step", "old")
        monkeypatch.setattr(atomic, "disk", Failing(at, Killed))
        with pytest.raises(Killed):
            save(root, "step", "new")
        monkeypatch.setattr(atomic, "disk", Disk())
        assert content(root) in ("old", "new"), at
        save(root, "third", "newest")
        left = {p.name for p in root.iterdir()}
        assert left - {"latest.tmp"} == {"step", "step.old", "third", LATEST}, at
        assert not (root / "step" / REPLACED_MARK).exists()


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    save(tmp_path, "first", "old")
    with pytest.raises(OSError, match="not enough space") as caught:
        publish(tmp_path, "second", Crew(), lambda folder: [], needed=1 << 62)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", LATEST]


def test_latest_is_left_alone_if_so_asked(tmp_path: Path) -> None:
    publish(
        tmp_path, "step", Crew(), lambda folder: [write_small(folder / "file", b"x")], latest=None
    )
    assert [p.name for p in tmp_path.iterdir()] == ["step"]
    assert sorted(p.name for p in (tmp_path / "step").iterdir()) == ["file", MANIFEST]


def test_a_nested_tag_is_published(tmp_path: Path) -> None:
    save(tmp_path, "run/step", "new")
    assert content(tmp_path) == "new"


def test_windows_sharing_violations_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(OSError):
        winerror = 32

    failures = [Busy(), Busy()]

    def action() -> None:
        if failures:
            raise failures.pop()

    atomic._persist(action)
    assert not failures
    monkeypatch.setattr(atomic, "_RETRY_SECONDS", 0.05)
    with pytest.raises(Busy):
        atomic._persist(lambda: (_ for _ in ()).throw(Busy()))
    with pytest.raises(PermissionError):  # no Windows code: not a matter of waiting
        atomic._persist(lambda: (_ for _ in ()).throw(PermissionError()))


def test_a_file_that_another_program_holds_is_flushed_when_it_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [PermissionError(errno.EACCES, "held")]

    class Held(Disk):
        def sync(self, file: Any) -> None:
            if held:
                error = held.pop()
                error.winerror = 32
                raise error
            super().sync(file)

    monkeypatch.setattr(atomic, "disk", Held())
    (tmp_path / "file").write_bytes(b"content")
    atomic.flush_files([tmp_path / "file"])
    assert not held
    refused = PermissionError(errno.EACCES, "no code of Windows, as open raises it")
    assert atomic._may_pass(refused, windows=True) and not atomic._may_pass(refused, windows=False)
