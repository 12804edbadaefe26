# SPDX-License-Identifier: Apache-2.0
"""How launches end badly: codes reach the caller, nobody is left behind, mistakes get one clear line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from deepspeed.launcher import launch as door
from deepspeed.launcher.processes import Family, Signals
from tests.helpers.launching import (
    UNDER_WINE,
    WINDOWS,
    all_gone,
    command,
    environment,
    finish,
    free_port,
    interrupt,
    launch,
    start,
    wait_for,
)

# a rank with a child of its own that has left the rank's session, and a grandchild whose parent is gone
FAMILY = """
import os, pathlib, subprocess, sys, time
here = pathlib.Path(__file__).parent
rank = os.environ["RANK"]
sleep = [sys.executable, "-c", "import time; time.sleep(120)"]
quiet = "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"
make_orphan = f"import subprocess; print(subprocess.Popen({sleep!r}, {quiet}).pid)"
silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
child = subprocess.Popen(sleep, start_new_session=sys.platform != "win32", **silent)
orphan = int(subprocess.check_output([sys.executable, "-c", make_orphan]))
(here / f"pids_{rank}.tmp").write_text(f"{os.getpid()} {child.pid} {orphan}")
os.replace(here / f"pids_{rank}.tmp", here / f"pids_{rank}")
def wait_for_all():
    while not all((here / f"pids_{r}").exists() for r in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.02)
"""


def family_pids(folder, ranks=2):
    names = [f"pids_{rank}" for rank in range(ranks)]
    wait_for(folder, *names)
    return [int(pid) for name in names for pid in (folder / name).read_text("utf-8").split()]


@pytest.mark.parametrize("code", [1, 3, 255])
def test_exit_code_of_the_failing_rank_reaches_the_caller(tmp_path, code):
    body = f"import os, sys; sys.exit({code} if os.environ['RANK'] == '1' else 0)"
    done = launch(tmp_path, "--num_gpus", "2", body=body)
    assert done.returncode == code, done.stdout
    assert f"exits with return code = {code}" in done.stdout
    assert "Killing subprocess" in done.stdout


@pytest.mark.skipif(WINDOWS, reason="signals are POSIX's")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGTERM"])
def test_death_by_signal_becomes_128_plus_its_number(tmp_path, name):
    body = f"import os, signal; os.kill(os.getpid(), signal.{name})"
    done = launch(tmp_path, body=body)
    number = getattr(signal, name)
    assert done.returncode == 128 + number, done.stdout
    assert f"exits with return code = {-number} ({name})" in done.stdout


@pytest.mark.skipif(not WINDOWS, reason="exception codes are Windows's")
def test_a_windows_exception_code_reaches_the_caller(tmp_path):
    body = "import ctypes; ctypes.windll.kernel32.ExitProcess(0xC0000005)"
    assert launch(tmp_path, body=body).returncode == 0xC0000005


@pytest.mark.skipif(WINDOWS, reason="signals are POSIX's")
def test_of_several_deaths_at_once_the_signal_is_reported():
    family = Family()
    for code in ("raise SystemExit(1)", "import os; os.kill(os.getpid(), 9)", ""):
        family.start([sys.executable, "-c", code], environment())
    for child in family.children:
        child.wait()
    with Signals() as signals:
        assert door._supervise(family, signals) == 128 + signal.SIGKILL


def test_a_failing_rank_ends_the_others_with_all_they_started(tmp_path):
    body = FAMILY + "wait_for_all()\nif rank == '1': os._exit(5)\ntime.sleep(120)\n"
    begun = time.monotonic()
    done = launch(tmp_path, "--num_gpus", "2", body=body)
    assert done.returncode == 5, done.stdout
    assert time.monotonic() - begun < 30
    assert all_gone(family_pids(tmp_path))


@pytest.mark.skipif(WINDOWS, reason="there is no SIGTERM to ignore")
def test_a_rank_that_ignores_sigterm_is_killed(tmp_path):
    family = Family()
    stubborn = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(120)"
    )
    with (tmp_path / "out").open("wb") as out:
        child = family.start(
            [sys.executable, "-c", stubborn], environment(), log=out, own_session=True
        )
        while not (tmp_path / "out").stat().st_size:
            time.sleep(0.02)
        family.end(((signal.SIGTERM, 0.3),))
    assert child.returncode == -signal.SIGKILL


@pytest.mark.skipif(UNDER_WINE, reason="Wine sends no console events")
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    body = FAMILY + "wait_for_all()\ntime.sleep(120)\n"
    launcher = start(tmp_path, "--num_gpus", "2", body=body)
    pids = family_pids(tmp_path)
    interrupt(launcher)
    output = finish(launcher)
    assert launcher.returncode != 0, output
    assert all_gone(pids), output


@pytest.mark.parametrize("name", ["SIGINT", "SIGBREAK" if WINDOWS else "SIGTERM"])
def test_a_noted_signal_ends_the_family(name):
    with Signals() as signals:
        family = Family()
        child = family.start([sys.executable, "-c", "import time; time.sleep(120)"], environment())
        signal.raise_signal(getattr(signal, name))
        assert door._supervise(family, signals) == 1
    assert child.poll() is not None
    assert not family.members()


@pytest.mark.skipif(WINDOWS, reason="Windows has no signal for a single process")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_launcher_alone_ends_the_ranks(tmp_path, name):
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        pytest.skip(
            f"{name} is ignored here (nohup, or a shell's background job), and so by the launcher"
        )
    body = FAMILY + "wait_for_all()\ntime.sleep(120)\n"
    launcher = start(tmp_path, "--num_gpus", "2", body=body)
    pids = family_pids(tmp_path)
    os.kill(launcher.pid, getattr(signal, name))
    output = finish(launcher)
    assert launcher.returncode == 1, output
    assert all_gone(pids), output


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS tells no child of its parent's death")
@pytest.mark.parametrize("who", ["runner", "launch"])
def test_killing_the_launcher_outright_leaves_nothing_behind(tmp_path, who):
    body = FAMILY + "wait_for_all()\ntime.sleep(120)\n"
    launcher = start(tmp_path, "--num_gpus", "2", body=body)
    pids = family_pids(tmp_path)
    runner = psutil.Process(launcher.pid)
    launches = [
        p for p in runner.children(recursive=True) if p.pid == psutil.Process(pids[0]).ppid()
    ]
    (runner if who == "runner" else launches[0]).kill()
    launcher.wait(timeout=60)
    assert launcher.returncode != 0
    assert all_gone(pids)
    launcher.stdout.close()


def test_a_daemon_of_a_successful_rank_may_live_on(tmp_path):
    done = launch(tmp_path, body=FAMILY)
    assert done.returncode == 0, done.stdout
    _, child, orphan = family_pids(tmp_path, ranks=1)
    assert not all_gone([child, orphan], timeout=0.5)
    for pid in (child, orphan):
        psutil.Process(pid).kill()


# ------------------------------------------------------------------ the user's mistakes


def assert_one_clear_line(done, *parts):
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stdout
    for part in parts:
        assert part in lines[0]
    assert "spawned" not in done.stdout


def test_missing_script(tmp_path):
    done = launch(tmp_path, script="nowhere.py", body=None)
    assert_one_clear_line(done, "no script 'nowhere.py'", str(tmp_path))


def test_missing_module_and_program(tmp_path):
    done = launch(tmp_path, "--module", script="no_such_package.x", body=None)
    assert_one_clear_line(done, "no module 'no_such_package.x'")
    done = launch(tmp_path, "--no_python", script="no-such-program", body=None)
    assert_one_clear_line(done, "no program 'no-such-program'")


def test_missing_hostfile(tmp_path):
    assert_one_clear_line(launch(tmp_path, "--hostfile", "nowhere"), "no hostfile 'nowhere'")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--include", "elsewhere"), "Hostname 'elsewhere' not found"),
        (("--include", "localhost:4096"), "No slot '4096'"),
        (("--exclude", "localhost:x"), "bad slot of host 'localhost'"),
        (("--exclude", "localhost"), "no slot is left"),
        (("--include", "localhost", "--exclude", "localhost"), "mutually exclusive"),
        (("--include", "localhost", "--num_gpus", "1"), "--num_gpus cannot be combined"),
        (("--num_nodes", "2"), "--num_nodes 2"),
        (("--module", "--no_python"), "exclude each other"),
        (("--autotuning", "run"), "--deepspeed_config FILE"),
        (("--venv_script", "env.sh"), "--venv_script concerns several nodes"),
        (("--elastic_training", "--min_elastic_nodes", "2"), "impossible numbers of elastic nodes"),
        (("--launcher", "pigeon"), "unknown launcher"),
        (("--log_level", "loud"), "unknown log level"),
        (("--master_port", "70000"), "--master_port=70000"),
        (("--no_ssh",), "--no_ssh needs"),
    ],
)
def test_bad_flags(tmp_path, flags, part):
    assert_one_clear_line(launch(tmp_path, *flags), part)


def test_port_in_use_is_named(tmp_path):
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        done = launch(tmp_path, "--master_port", port)
    assert_one_clear_line(done, f"port {port}", "--master_port")


def test_no_script_at_all(tmp_path):
    words = command([], "", [])[:-1]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True)
    assert done.returncode == 2
    assert b"user_script" in done.stderr


def test_launch_needs_world_info(tmp_path):
    (tmp_path / "script.py").write_text("", encoding="utf-8")
    words = [sys.executable, "-m", "deepspeed.launcher.launch", f"--master_port={free_port()}"]
    done = subprocess.run(
        [*words, "script.py"], cwd=tmp_path, env=environment(), capture_output=True
    )
    assert done.returncode == 1
    assert b"--world_info is required" in done.stderr
