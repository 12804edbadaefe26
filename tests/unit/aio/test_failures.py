# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with files: each failure is an OSError that names file, place and cause, and the queue lives on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

from deepspeed.ops.aio import FileQueue, Options

POSIX = sys.platform != "win32"
LIMITED = """
import resource, signal, sys, torch
from deepspeed.ops.aio import FileQueue, Options
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
queue = FileQueue(Options(block_size=4096, queue_depth=4), sys.argv[1])
try:
    queue.wait(queue.submit_write(sys.argv[2], 0, torch.zeros(1_000_000, dtype=torch.uint8)))
except OSError as error:
    print(error.errno, error.filename, error.strerror)
queue.wait(queue.submit_write(sys.argv[2] + ".small", 0, torch.zeros(10)))
print("small one written")
"""
FORKED = """
import os, sys, torch
from deepspeed.ops.aio import FileQueue
queue = FileQueue(backend=sys.argv[1])
queue.wait(queue.submit_write(sys.argv[2], 0, torch.zeros(10)))
child = os.fork()
if child == 0:
    try:
        queue.submit_write(sys.argv[2], 0, torch.zeros(10))
    except RuntimeError as error:
        print(error, flush=True)
    queue.close()
    other = FileQueue(backend=sys.argv[1])
    other.wait(other.submit_write(sys.argv[2], 0, torch.ones(10)))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def still_works(queue, folder):
    path = folder / "after.bin"
    queue.wait(queue.submit_write(path, 0, torch.arange(1000)))
    return path.read_bytes() == torch.arange(1000).numpy().tobytes()


def test_a_missing_file(queue, folder):
    path = folder / "gone.bin"
    with pytest.raises(FileNotFoundError, match="reading 40 bytes at offset 8") as caught:
        queue.wait(queue.submit_read(path, 8, torch.zeros(10)))
    assert caught.value.filename == str(path)
    assert not path.exists() and still_works(queue, folder)


def test_a_folder_that_is_not_there(queue, folder):
    with pytest.raises(FileNotFoundError, match="writing 40 bytes at offset 0"):
        queue.wait(queue.submit_write(folder / "no" / "file.bin", 0, torch.zeros(10)))


def test_a_folder_is_no_file(queue, folder):
    for submit in (queue.submit_read, queue.submit_write):
        with pytest.raises(OSError, match="at offset 0"):
            queue.wait(submit(folder, 0, torch.zeros(10)))


@pytest.mark.parametrize("size", [0, 5, 4096, 9999, 12287])
def test_a_file_that_ends_too_early(queue, folder, size):
    path = folder / "short.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(OSError, match=f"the file ends at byte {size}"):
        queue.wait(queue.submit_read(path, 0, torch.zeros(12288, dtype=torch.uint8)))
    assert still_works(queue, folder)


def test_a_file_removed_while_it_is_read(queue, folder):
    path = folder / "removed.bin"
    path.write_bytes(bytes(1 << 20))
    tickets = [queue.submit_read(path, 0, torch.ones(1 << 18)) for _ in range(20)]
    try:
        path.unlink()
    except PermissionError:
        pass  # Windows keeps a file that is open
    for ticket in tickets:
        try:
            assert queue.wait(ticket) == 1 << 20
        except FileNotFoundError:
            pass  # opened after it was gone
    assert still_works(queue, folder)


def test_the_first_failure_of_several_is_told_and_counted(queue, folder):
    good = torch.zeros(100)
    queue.submit_write(folder / "good.bin", 0, good)
    queue.submit_read(folder / "bad1.bin", 0, torch.zeros(1))
    queue.submit_read(folder / "bad2.bin", 0, torch.zeros(1))
    queue.submit_write(folder / "good2.bin", 0, good)
    with pytest.raises(FileNotFoundError, match=r"and 1 more failed.*bad1"):
        queue.wait_all()
    assert queue.pending == () and (folder / "good2.bin").stat().st_size == 400


def test_a_ticket_is_good_once(queue, folder):
    ticket = queue.submit_write(folder / "once.bin", 0, torch.zeros(1))
    queue.wait(ticket)
    with pytest.raises(ValueError, match="no request has this ticket"):
        queue.wait(ticket)


@pytest.mark.parametrize("path", ["null\0byte", 3.5, None, b"bytes", True])
def test_what_is_no_path_is_refused(queue, path):
    with pytest.raises((TypeError, ValueError)):
        queue.wait(queue.submit_write(path, 0, torch.zeros(1)))


def test_a_negative_place_is_refused(queue, folder):
    with pytest.raises(ValueError, match="negative"):
        queue.submit_read(folder / "x", -1, torch.zeros(1))


def test_a_closed_descriptor_is_refused(queue, folder):
    descriptor = os.open(folder / "x", os.O_CREAT | os.O_RDWR)
    os.close(descriptor)
    with pytest.raises(OSError):
        queue.wait(queue.submit_write(descriptor, 0, torch.zeros(1)))


@pytest.mark.skipif(not POSIX, reason="/dev/full is of Linux")
@pytest.mark.parametrize("nbytes", [1, 4096, 100_000])
def test_a_full_disk(queue, nbytes):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match=f"writing {nbytes} bytes at offset 0") as caught:
        queue.wait(queue.submit_write("/dev/full", 0, torch.zeros(nbytes, dtype=torch.uint8)))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(not POSIX, reason="a POSIX limit")
def test_a_file_over_the_size_limit(backend, folder):
    path = folder / "limited.bin"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, backend, str(path)],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first.startswith(f"{errno.EFBIG} {path} writing 1000000 bytes at offset 0")
    assert second == "small one written"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_and_can_make_its_own(backend, folder):
    path = folder / "forked.bin"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, backend, str(path)],
        capture_output=True,
        encoding="utf-8",
        check=True,
        timeout=60,
    )
    assert "does not survive a fork" in done.stdout
    assert path.read_bytes() == torch.ones(10).numpy().tobytes()


@pytest.mark.skipif(not POSIX or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(queue, folder):
    folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="writing"):
            queue.wait(queue.submit_write(folder / "x", 0, torch.zeros(1)))
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("numel", [1, 5000])
def test_a_descriptor_gives_no_more_rights_than_it_has(queue, folder, numel):
    path = folder / "read only.bin"
    path.write_bytes(bytes(20_000))
    ones = torch.ones(numel)
    with open(path, "rb") as file, pytest.raises(OSError, match=f"writing {numel * 4} bytes"):
        queue.wait(queue.submit_write(file.fileno(), 0, ones))
    assert path.read_bytes() == bytes(20_000)
    with open(path, "ab") as file, pytest.raises(OSError, match=f"reading {numel * 4} bytes"):
        queue.wait(queue.submit_read(file.fileno(), 0, ones))


def test_cancelled_requests_raise_where_somebody_waits(backend, folder):
    import threading

    queue = FileQueue(Options(4096, 1), backend)
    path = folder / "slow.bin"
    path.write_bytes(bytes(1 << 20))
    for _ in range(50):
        queue.submit_read(path, 0, torch.zeros(1 << 18))
    caught = []

    def wait():
        try:
            queue.wait_all()
        except (OSError, ValueError) as error:
            caught.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    queue.close()
    waiter.join(60)
    assert not waiter.is_alive()
    for error in caught:
        assert "cancelled" in str(error) or "closed" in str(error)
