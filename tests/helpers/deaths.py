# SPDX-License-Identifier: Apache-2.0
"""Kills ranks at every change that a save makes to the disk, and looks at what a load finds; a program for POSIX.

`python -m tests.helpers.deaths FOLDER RANKS-MODE-TAG...` prints one line of JSON: for each case how many points each rank
has, and what went wrong. MODE: `now` writes small files, `queue` sends every file through the file queue, `joint` has
all ranks write the common file so, `beside` saves while it trains. TAG: `new`, or `same` to replace the tag that is there. Each trial is made of forked processes, because
starting torch anew would cost seconds; what they import lazily is imported before them for the same reason.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepspeed.checkpoint import archive, atomic, joint, stream
from tests.helpers.checkpointing import engine, same, state_of, train

CHANGES = (
    "create",
    "write",
    "send",
    "settle",
    "sync",
    "sync_folder",
    "replace",
    "make_folder",
    "remove",
    "remove_tree",
)
SECTIONS: dict[str, Any] = {
    "beside": {"writer": {"decoupled": True}},
    "joint": {"writer": {"data_parallel": "replica"}},
}
"""What a mode says in the section `checkpoint`."""
LIMIT = 30.0
"""Seconds after which a rank counts as hanging."""
FINISHED, REFUSED = 0, 3


def send_everything(mode: str) -> None:
    """Have small files sent as large ones are, in modes that are about those."""
    if mode in ("queue", "joint"):
        stream.BY_QUEUE, archive.LARGE, joint._PAGE = 0, 256, 64


class Watched(atomic.Disk):
    """Counts changes; ends the process at number `at`, in the middle of it where it is one of bytes."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def _meet(self, name: str, arguments: tuple[Any, ...]) -> None:
        if self.count == self.at:
            if name == "write":
                file, data = arguments
                file.write(bytes(data)[: len(data) // 2])
            if name == "send":
                queue, path, offset, data = arguments
                queue.wait(queue.submit_write(path, offset, data[: data.numel() // 2]))
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


def _watch(name: str) -> Callable[..., Any]:
    def method(self: Watched, *arguments: Any) -> Any:
        self._meet(name, arguments)
        return getattr(atomic.Disk, name)(self, *arguments)

    return method


for _name in CHANGES:
    setattr(Watched, _name, _watch(_name))


def forked(action: Callable[[], int | None]) -> int:
    """Run `action` in a child; returns the child's process id. Its result is the exit status."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)
        status = action() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(children: list[int]) -> list[int]:
    """How each child ended (minus the signal where one ended it); hanging ones are killed and raise."""
    deadline = time.monotonic() + LIMIT
    found: dict[int, int] = {}
    while len(found) < len(children):
        for child in children:
            if child not in found:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    found[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in children:
                if child not in found:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
            raise TimeoutError(f"ranks {[children.index(c) for c in children if c not in found]}")
        time.sleep(0.002)
    return [found[child] for child in children]


class Trials:
    """Saves of `ranks` ranks in folders below `root`."""

    def __init__(self, root: Path, ranks: int, mode: str, tag: str) -> None:
        self.root, self.ranks, self.mode = root, ranks, mode
        self.tag = "global_step2" if tag == "same" else "second"
        self.template = root / "template"

    def join(self, rank: int, store: Path) -> Any:
        """This process's engine among the others."""
        if self.ranks > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.ranks), LOCAL_SIZE="2"
            )
            torch.distributed.init_process_group(
                "gloo",
                store=torch.distributed.FileStore(str(store), self.ranks),
                rank=rank,
                world_size=self.ranks,
            )
        send_everything(self.mode)
        return engine(2, "bf16", checkpoint=SECTIONS.get(self.mode))

    def prepare(self, rank: int) -> None:
        """Make what each trial begins with: a complete save after two steps, and both states."""
        made = self.join(rank, self.root / "store_template")
        for step in (2, 4):
            train(made, step - 2, step, rank, self.ranks)
            state = state_of(made)
            if rank == 0:
                torch.save(state, self.root / f"state{step}.pt")
            if step == 2:
                made.save_checkpoint(self.template)
                made.checkpoint_engine.finish()
        if rank == 0:
            (self.root / "modules").write_text("\n".join(sorted(sys.modules)), encoding="utf-8")

    def save(self, rank: int, folder: Path, dying: int, at: int) -> int:
        """Train to the second save, and make it, dying at change `at` if this is the rank to die."""
        made = self.join(rank, folder.with_suffix(".store"))
        train(made, 0, 4, rank, self.ranks)
        atomic.disk = watched = Watched(at if rank == dying else -1)
        try:
            made.save_checkpoint(folder, tag=self.tag)
            for step in range(4, 100):
                if getattr(made.checkpoint_engine, "_pending", None) is None:
                    break
                train(made, step, step + 1, rank, self.ranks)
                time.sleep(0.005)
        except Exception:
            return REFUSED
        folder.with_suffix(f".count{rank}").write_text(str(watched.count), encoding="utf-8")
        return FINISHED

    def look(self, folder: Path, whole: bool) -> int:
        """What one rank loads is one of the two states, and the next save leaves nothing of the dead one."""
        send_everything(self.mode)
        made = engine(2, "bf16", seed=9)
        made.load_checkpoint(folder)
        expected = torch.load(self.root / f"state{made.global_steps}.pt", weights_only=True)
        if made.global_steps not in (2, 4) or (whole and made.global_steps != 4):
            raise AssertionError(f"step {made.global_steps} was found")
        if names := same(state_of(made), expected):
            raise AssertionError(f"{names} differ")
        made.save_checkpoint(folder, tag="third")
        left = {path.name for path in folder.iterdir() if path.is_dir()}
        if not left <= {"global_step2", "second", "third"}:
            raise AssertionError(f"{left} is left")
        return FINISHED

    def trial(self, dying: int, at: int) -> str | None:
        """One save with a death in it; returns what went wrong."""
        folder = self.root / f"rank{dying}_at{at}"
        shutil.copytree(self.template, folder)
        try:
            ends = ended(
                [forked(lambda r=r: self.save(r, folder, dying, at)) for r in range(self.ranks)]  # type: ignore[misc]
            )
            if at >= 0 and ends[dying] != -signal.SIGKILL:
                return f"rank {dying} ended with {ends[dying]} and not by the signal at {at}"
            alive = {end for rank, end in enumerate(ends) if rank != dying}
            if not alive <= {FINISHED, REFUSED}:
                return f"ranks ended with {ends}"
            if ended([forked(lambda: self.look(folder, whole=at < 0))]) != [FINISHED]:
                return "what is left cannot be loaded, or differs"
        except TimeoutError as error:
            return f"hangs: {error}"
        shutil.rmtree(folder)
        return None

    def run(self) -> dict[str, Any]:
        """All trials."""
        if (
            ended([forked(lambda r=r: self.prepare(r)) for r in range(self.ranks)])
            != [  # type: ignore[misc]
                0
            ]
            * self.ranks
        ):
            return {"points": [], "wrong": ["the first save failed"]}
        for name in (self.root / "modules").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        wrong = [self.trial(-1, -1)]
        counts = [
            int((self.root / f"rank-1_at-1.count{rank}").read_text(encoding="utf-8"))
            for rank in range(self.ranks)
        ]
        for rank, count in enumerate(counts):
            for at in range(count):
                text = self.trial(rank, at)
                wrong.append(text and f"rank {rank}, change {at}: {text}")
        return {"points": counts, "wrong": [text for text in wrong if text]}


def main(root: Path, cases: list[str]) -> dict[str, Any]:
    """Run each case in a folder of its own."""
    found = {}
    for case in cases:
        ranks, mode, tag = case.split("-")
        folder = root / case
        folder.mkdir()
        found[case] = Trials(folder, int(ranks), mode, tag).run()
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
