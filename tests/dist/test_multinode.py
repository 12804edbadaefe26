# SPDX-License-Identifier: Apache-2.0
"""Ranks on several nodes, through real sshd, pdsh, mpirun and srun: they train together, and end together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import nodes
from tests.helpers.launching import (
    TELL,
    all_gone,
    command,
    environment,
    finish,
    free_port,
    wait_for,
)

# three steps on one global batch, so that both nodes' data count; each rank writes its weights
TRAIN = """
import json, os, pathlib, sys, torch, deepspeed
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
          "zero_optimization": {"stage": 1}}
engine, *_ = deepspeed.initialize(model=model, config=config)
rank = torch.distributed.get_rank()
data = torch.arange(16.0).view(4, 4) / 16
for _ in range(3):
    loss = engine(data[2 * rank : 2 * rank + 2]).square().mean()
    engine.backward(loss)
    engine.step()
weights = [p.tolist() for p in engine.module.parameters()]
told = {"weights": weights, "argv": sys.argv[1:], "hostile": os.environ.get("DS_HOSTILE"),
        "numbers": [os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]}
path = pathlib.Path("told_%d.json" % rank)
path.write_text(json.dumps(told), encoding="utf-8")
"""
HOSTILE = (
    "a b,LD_PRELOAD=x;touch pwned $(touch pwned) `touch pwned` \"q\" 'q' %n %h %% $HOME ä\nnext \\"
)
ARGS = ["x; touch pwned", "$(touch pwned)", "a'b\"c", "%n%h", "--launcher"]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory):
    with nodes.serving(tmp_path_factory.mktemp("sshd")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def reference():
    """The weights that one process reaches on the whole batch, in plain torch."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    data = torch.arange(16.0).view(4, 4) / 16
    for _ in range(3):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def write_hosts(folder, hosts=nodes.HOSTS, slots=(1, 1)):
    lines = [f"{host} slots={count}\n" for host, count in zip(hosts, slots, strict=True)]
    (folder / "hosts").write_text("".join(lines), encoding="utf-8")


def begin(folder, flags, body, *, args=(), prefix=(), **env):
    """Start the deepspeed command on two nodes, in a process group of its own."""
    (folder / "script.py").write_text(body, encoding="utf-8")
    if not (folder / "hosts").exists():
        write_hosts(folder)
    return subprocess.Popen(
        [*prefix, *command(["--hostfile", "hosts", *flags], "script.py", args)],
        cwd=folder,
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def check_training(folder, flags, reference, *, prefix=(), **env):
    import torch

    job = begin(folder, flags, TRAIN, args=ARGS, prefix=prefix, DS_HOSTILE=HOSTILE, **env)
    output = finish(job, 120)
    assert job.returncode == 0, output
    for rank in (0, 1):
        told = json.loads((folder / f"told_{rank}.json").read_text(encoding="utf-8"))
        assert told["numbers"] == [str(rank), "0", "2"]
        assert [a for a in told["argv"] if not a.startswith("--local_rank")] == ARGS
        assert told["hostile"] == HOSTILE
        # fp32 sums of two halves instead of one whole; Adam's division keeps relative error
        for ours, theirs in zip(told["weights"], reference, strict=True):
            torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-4, atol=1e-5)
    assert not list(folder.rglob("pwned"))
    assert not (Path.home() / "pwned").exists()
    return output


@pytest.mark.parametrize("launcher", ["ssh", "pdsh"])
def test_two_nodes_train_together(tmp_path, sshd, reference, launcher):
    if launcher == "pdsh":
        nodes.program("pdsh")
    folder = tmp_path / "it's $(touch pwned) 100%n"
    folder.mkdir()
    output = check_training(folder, sshd.flags(launcher), reference, **sshd.environment())
    assert "127.0.0.2: " in output


def test_the_environment_file_and_the_venv_script_reach_every_node(tmp_path, sshd):
    (tmp_path / ".deepspeed_env").write_text("# ours\nFROM_FILE=a b=$(x)\n", encoding="utf-8")
    venv = tmp_path / "a; touch pwned 'x'.sh"
    venv.write_text("export FROM_VENV=$((40 + 2))\n", encoding="utf-8")
    flags = [*sshd.flags("ssh"), "--venv_script", venv.name, "--ssh_port", str(sshd.port)]
    job = begin(tmp_path, flags, TELL)
    output = finish(job)
    assert job.returncode == 0, output
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"seen_{rank}.json").read_text(encoding="utf-8"))["env"]
        assert (seen["FROM_FILE"], seen["FROM_VENV"]) == ("a b=$(x)", "42")
        assert (seen["CROSS_RANK"], seen["CROSS_SIZE"]) == (str(rank), "2")
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------ ends

SLEEP = TELL + "import time\ntime.sleep(120)\n"


def ranks_of(folder, count=2):
    wait_for(folder, *(f"seen_{rank}.json" for rank in range(count)))
    return [
        json.loads((folder / f"seen_{rank}.json").read_text(encoding="utf-8"))["pid"]
        for rank in range(count)
    ]


@pytest.mark.parametrize("launcher", ["ssh", "pdsh"])
def test_a_rank_that_fails_ends_the_job_on_every_node(tmp_path, sshd, launcher):
    if launcher == "pdsh":
        nodes.program("pdsh")
    write_hosts(tmp_path, slots=(2, 1))
    wait = "while not all((here / f'seen_{r}.json').exists() for r in range(3)): pass\n"
    body = SLEEP.replace("time.sleep", wait + "if rank == '2': sys.exit(7)\ntime.sleep")
    begun = time.monotonic()
    job = begin(tmp_path, sshd.flags(launcher), body, **sshd.environment())
    output = finish(job)
    assert job.returncode == 7, output
    assert "node 127.0.0.2 ended with status 7" in output
    assert time.monotonic() - begun < 30
    assert all_gone(ranks_of(tmp_path, 3))


def on_the_node_of(pid, sshd):
    """The processes between the daemon, which serves both nodes, and a rank."""
    rank = psutil.Process(pid)
    daemons = sshd.pids()
    line = [rank, *rank.parents()]
    return line[: next(i for i, process in enumerate(line) if process.pid in daemons)]


@pytest.mark.parametrize("launcher", ["ssh", "pdsh"])
@pytest.mark.parametrize("how", ["node dies", "Ctrl-C", "SIGTERM", "launcher dies"])
def test_whatever_ends_a_part_ends_the_whole(tmp_path, sshd, launcher, how):
    if launcher == "pdsh":
        nodes.program("pdsh")
    job = begin(tmp_path, sshd.flags(launcher), SLEEP, **sshd.environment())
    pids = ranks_of(tmp_path)
    begun = time.monotonic()
    if how == "node dies":  # with all that sshd started there for us
        for process in reversed(on_the_node_of(pids[1], sshd)):
            process.kill()
    elif how == "launcher dies":
        job.kill()
    else:
        os.kill(job.pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
    output = finish(job)
    assert job.returncode != 0, output
    assert all_gone(pids)
    assert time.monotonic() - begun < 30
    if how == "node dies":
        assert "node 127.0.0.2 ended" in output


def test_a_cut_cable_ends_the_job_and_gloo_finds_the_network(tmp_path, reference):
    (tmp_path / "sshd").mkdir()
    (tmp_path / "job").mkdir()
    folder, daemon = tmp_path / "job", nodes.Sshd(tmp_path / "sshd")
    try:
        with nodes.namespaces(daemon) as (hosts, inside, cable):
            write_hosts(folder, hosts)
            check_training(folder, daemon.flags("ssh"), reference, prefix=inside)
            flags = [*daemon.flags("ssh")]
            flags[-1] += " -o ServerAliveInterval=1 -o ServerAliveCountMax=2"
            job = begin(folder, flags, SLEEP, prefix=inside)
            pids = ranks_of(folder)
            begun = time.monotonic()
            subprocess.run([*inside[:1], "-n", inside[3], "link", "set", cable, "down"], check=True)
            output = finish(job)
            assert job.returncode == 255, output
            assert time.monotonic() - begun < 10
            assert f"node {hosts[1]} ended with status 255" in output
            assert all_gone(pids, timeout=30 - (time.monotonic() - begun))  # the far one by itself
    finally:
        daemon.close()


# ------------------------------------------------------------------ MPI and Slurm


def mpi_environment(folder, kind):
    """mpirun of one MPI first in PATH, whatever the system's alternatives say."""
    program = nodes.program(f"mpirun.{kind}")
    (folder / "bin").mkdir()
    path = folder / "bin" / "mpirun"
    path.write_text(f'#!/bin/sh\nexec {program} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return {
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ["PATH"]]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def backend_flags(folder, sshd, launcher):
    agent = folder / "rsh"
    agent.write_text(f'#!/bin/sh\nexec ssh -F {sshd.config} "$@"\n', encoding="utf-8")
    agent.chmod(0o755)
    words = {
        "openmpi": f"--mca plm_rsh_agent {agent} --mca btl_tcp_if_include lo --mca oob_tcp_if_include lo",
        "mpich": f"-launcher ssh -launcher-exec {agent}",
    }[launcher]
    return [
        *("--launcher", launcher, "--launcher_args", words),
        *("--no_ssh_check", "--master_addr", "127.0.0.1"),
    ]


@pytest.mark.parametrize("launcher", ["openmpi", "mpich"])
def test_mpirun_trains_on_two_nodes_and_ends_them(tmp_path, sshd, reference, launcher):
    env = mpi_environment(tmp_path, launcher)
    flags = backend_flags(tmp_path, sshd, launcher)
    check_training(tmp_path, flags, reference, **env)
    body = (
        "import os, sys, time\n"
        "rank = os.environ.get('RANK') or os.environ['OMPI_COMM_WORLD_RANK']\n"
        "time.sleep(1)\n"
        "sys.exit(7) if rank == '1' else time.sleep(120)\n"
    )
    begun = time.monotonic()
    job = begin(tmp_path, flags, body, **env)
    output = finish(job)
    assert job.returncode == 7, output
    assert time.monotonic() - begun < 30


def test_srun_trains_on_two_nodes_and_ends_them(tmp_path, reference):
    (tmp_path / "slurm").mkdir()
    with nodes.slurm(tmp_path / "slurm") as config:
        write_hosts(tmp_path, ("node1", "node2"))
        flags = [
            "--launcher",
            "slurm",
            "--master_addr",
            "127.0.0.1",
            "--launcher_args",
            "--nodes 2",
        ]
        check_training(tmp_path, flags, reference, SLURM_CONF=str(config))
        body = (
            "import os, sys, time\ntime.sleep(1)\n"
            "sys.exit(7) if os.environ['SLURM_PROCID'] == '1' else time.sleep(120)\n"
        )
        begun = time.monotonic()
        job = begin(tmp_path, flags, body, SLURM_CONF=str(config))
        output = finish(job)
        assert job.returncode in (7, 143), output  # srun: the largest, and SIGTERM's is larger
        assert time.monotonic() - begun < 30


# ------------------------------------------------------------------ mistakes


def refused(folder, flags, **env):
    job = begin(folder, flags, TELL, **env)
    output = finish(job)
    assert job.returncode == 1, output
    assert "Traceback" not in output
    assert not list(folder.glob("seen_*"))
    (line,) = [line for line in output.splitlines() if "error:" in line]
    return line


def test_a_wrong_key_names_the_host_and_the_mend(tmp_path, sshd):
    config = sshd.config.read_text(encoding="utf-8").replace(
        str(sshd.key), str(sshd.folder / "stranger")
    )
    (tmp_path / "config").write_text(config, encoding="utf-8")
    flags = ["--launcher", "ssh", "--launcher_args", f"-F {tmp_path}/config"]
    line = refused(tmp_path, flags)
    assert "ssh cannot run commands on 127.0.0.1, 127.0.0.2" in line
    assert "Permission denied" in line
    assert "ssh-copy-id" in line


def test_an_unreachable_host_is_the_only_one_named(tmp_path, sshd):
    write_hosts(tmp_path, (nodes.HOSTS[0], "no-such-host.invalid"))
    line = refused(tmp_path, sshd.flags("ssh"))
    assert "ssh cannot run commands on no-such-host.invalid:" in line
    assert re.search("hostfile", line)


def test_a_closed_port_asks_for_the_right_one(tmp_path, sshd):
    config = sshd.config.read_text(encoding="utf-8").replace(f"Port {sshd.port}\n", "\n")
    (tmp_path / "config").write_text(config, encoding="utf-8")
    flags = ["--launcher", "ssh", "--launcher_args", f"-F {tmp_path}/config"]
    line = refused(tmp_path, [*flags, "--ssh_port", str(free_port())])
    assert "Connection refused" in line
    assert "--ssh_port" in line
