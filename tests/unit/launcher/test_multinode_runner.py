# SPDX-License-Identifier: Apache-2.0
"""The command lines of the backends that start ranks on several nodes."""

from __future__ import annotations

import shlex
import sys

import pytest

from deepspeed.launcher import launcher_helper
from deepspeed.launcher import multinode_runner as runners
from deepspeed.launcher.runner import encode_world_info, parse_args

SLOTS = {"worker-0": [0, 1, 2, 3], "worker-1": [0, 1, 2, 3]}
POOL = {host: len(slots) for host, slots in SLOTS.items()}
WORLD = encode_world_info(SLOTS)
PYTHON = [sys.executable, "-u"]


def make(kind, *words, pool=POOL):
    args = parse_args([*words, "t.py", "--a", "b c"])
    args.master_addr = "10.0.0.1"
    made = kind(args, WORLD) if kind is runners.PDSHRunner else kind(args, WORLD, pool)
    made.add_export("NAME", "x y")
    return made


def holds(command, *words):
    size = len(words)
    return any(command[i : i + size] == list(words) for i in range(len(command)))


def test_pdsh_runs_launch_on_every_node(tmp_path, monkeypatch):
    folder = tmp_path / "a b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = ["--ssh_port", "22", "--module", "--venv_script", "v.sh", "--launcher_args", "-t 5"]
    command, kill, env = make(runners.PDSHRunner, *words).get_cmd({"K": "1"}, SLOTS)
    assert command[:8] == ["pdsh", "-S", "-f", "1024", "-w", "worker-0,worker-1", "-t", "5"]
    assert command[8:11] == [
        "source v.sh;",
        "export NAME='x y';",
        f"cd {shlex.quote(str(folder))};",
    ]
    assert holds(command, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={WORLD}")
    assert holds(
        command, "--node_rank=%n", "--master_addr=10.0.0.1", "--master_port=29500", "--module"
    )
    assert command[-3:] == ["t.py", "--a", "'b c'"]
    assert kill[:8] == command[:8]
    assert "pkill" in kill
    assert env == {"K": "1", "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": "-p 22"}


def test_openmpi():
    command = make(runners.OpenMPIRunner).get_cmd({}, SLOTS)
    assert command[:5] == ["mpirun", "-n", "8", "-hostfile", "/job/hostfile"]
    assert holds(command, "--mca", "btl_tcp_if_include", "eth0")
    assert holds(command, "-x", "UCX_TLS=tcp", "-x", "NAME=x y", *PYTHON, "t.py", "--a", "b c")


@pytest.mark.parametrize("given", ["-mca btl_tcp_if_include eth1", "--mca btl_tcp_if_include eth1"])
def test_openmpi_leaves_a_chosen_interface_alone(given):
    command = make(runners.OpenMPIRunner, "--launcher_arg", given).get_cmd({}, SLOTS)
    assert "eth0" not in command
    assert holds(command, *given.split())


def test_mpich_goes_by_the_helper():
    command = make(runners.MPICHRunner, "--module").get_cmd({}, SLOTS)
    assert command[:5] == ["mpirun", "-n", "8", "-ppn", "4"]
    for pair in (
        ("NAME=x y",),
        ("MASTER_ADDR", "10.0.0.1"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_SIZE", "4"),
    ):
        assert holds(command, "-genv", *pair)
    assert holds(command, "-hosts", "worker-0,worker-1", *PYTHON)
    tail = command[command.index("--launcher") :]
    assert tail == ["--launcher", "mpich", "--module", "t.py", "--a", "b c"]


def test_intel_mpi_numbers_each_rank():
    command = make(runners.IMPIRunner).get_cmd({}, SLOTS)
    assert holds(command, "-genv", "I_MPI_PIN", "0", "-hosts", "worker-0,worker-1")
    for rank in range(8):
        numbers = ["-env", "RANK", str(rank), "-env", "LOCAL_RANK", str(rank % 4)]
        assert holds(command, "-n", "1", *numbers, *PYTHON, "t.py", "--a", "b c")
    assert command.count(":") == 7


def test_intel_mpi_binds_cores(monkeypatch):
    monkeypatch.delenv("KMP_AFFINITY", raising=False)
    words = ["--bind_cores_to_rank", "--bind_core_list", "0-7"]
    command = make(runners.IMPIRunner, *words).get_cmd({}, SLOTS)
    assert holds(command, "-genv", "OMP_NUM_THREADS", "2")
    assert command.count("numactl") == 8
    assert command.count("6-7") == 2


def test_slurm():
    command = make(runners.SlurmRunner, "-i", "worker-0@worker-1").get_cmd({}, SLOTS)
    assert command[:3] == ["srun", "-n", "8"]
    assert holds(command, "--nodelist", "worker-0,worker-1", "--nodes", "2")
    assert command[-6:] == ["--export=ALL,NAME=x y", *PYTHON, "t.py", "--a", "b c"]
    assert make(runners.SlurmRunner).get_cmd({}, POOL)[:3] == ["srun", "-n", "8"]


def test_mvapich(monkeypatch, tmp_path):
    monkeypatch.setattr(runners, "MVAPICH_TMP_HOSTFILE", str(tmp_path / "hosts"))
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    command = make(runners.MVAPICHRunner).get_cmd({}, SLOTS)
    assert command[:7] == ["mpirun", "-np", "8", "-ppn", "4", "--hostfile", str(tmp_path / "hosts")]
    assert (tmp_path / "hosts").read_text(encoding="utf-8") == "worker-0\nworker-1\n"
    for export in ("MV2_SMP_USE_CMA=0", "MV2_USE_CUDA=1", "MV2_SUPPORT_DL=1", "NAME=x y"):
        assert holds(command, "-env", export)


MPI = [runners.OpenMPIRunner, runners.MPICHRunner, runners.IMPIRunner, runners.MVAPICHRunner]


@pytest.mark.parametrize("kind", MPI)
@pytest.mark.parametrize(
    "words", [["-i", "worker-0"], ["-e", "worker-0"], ["--num_gpus", "1"], ["--num_nodes", "1"]]
)
def test_mpi_refuses_filters(kind, words):
    with pytest.raises(ValueError, match="does not support"):
        make(kind, *words)


@pytest.mark.parametrize("kind", [*MPI[1:], runners.SlurmRunner])
def test_uneven_nodes_are_refused(kind):
    made = make(kind, pool={"a": 1, "b": 2})
    with pytest.raises(ValueError, match="same number of devices per node"):
        made.get_cmd({}, {"a": [0], "b": [0, 1]})


def test_a_backend_of_ones_own():
    class Mine(runners.MultiNodeRunner):
        def backend_exists(self):
            return True

        def get_cmd(self, environment, active_resources):
            return ["mine", self.user_script, *self.user_arguments]

    made = Mine(parse_args(["t.py", "x"]), WORLD)
    assert (made.name, made.get_cmd({}, SLOTS)) == ("Mine", ["mine", "t.py", "x"])


@pytest.mark.parametrize("kind", [runners.PDSHRunner, *MPI, runners.SlurmRunner])
def test_a_missing_backend_is_noticed(kind, monkeypatch):
    monkeypatch.setattr(runners.shutil, "which", lambda name: None)
    assert not make(kind).backend_exists()


@pytest.mark.parametrize(
    "told",
    [{"PMIX_RANK": "5", "PALS_LOCAL_RANKID": "1"}, {"PMI_RANK": "5", "MPI_LOCALRANKID": "1"}],
)
def test_the_helper_names_ranks(told, monkeypatch):
    for name in ("PMIX_RANK", "PMI_RANK", "PALS_LOCAL_RANKID", "MPI_LOCALRANKID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(KeyError, match="mpirun"):
        launcher_helper.rank_environment()
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    env = launcher_helper.rank_environment()
    assert (env["RANK"], env["LOCAL_RANK"]) == ("5", "1")


def test_the_helper_returns_the_status_of_the_script(tmp_path, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("MPI_LOCALRANKID", "0")
    (tmp_path / "t.py").write_text("import sys; sys.exit(int(sys.argv[1]))", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        launcher_helper.main(["--launcher", "mpich", str(tmp_path / "t.py"), "7"])
    assert ended.value.code == 7


def test_other_backends_find_exports_as_words_of_a_shell():
    runner = make(runners.MPICHRunner)
    for name, value in {"PLAIN": "/a/b", "PARENS": "64(x2)", "QUOTES": 'a"$b'}.items():
        runner.add_export(name, value)
    words = {name: runner.exports[name] for name in ("PLAIN", "PARENS", "QUOTES")}
    assert words == {"PLAIN": "/a/b", "PARENS": '"64(x2)"', "QUOTES": '"a\\"\\$b"'}
    assert holds(runner.get_cmd({}, SLOTS), "-genv", 'QUOTES=a"$b')
