# SPDX-License-Identifier: Apache-2.0
"""The command line of ``deepspeed``: parsing, choice of slots, and the command that it becomes."""

from __future__ import annotations

import sys

import pytest

from deepspeed.launcher import launch, runner, world
from deepspeed.launcher.hostfile import decode_world_info
from deepspeed.launcher.processes import exit_status


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch, tmp_path):
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("", encoding="utf-8")


def on_gpus(monkeypatch, count):
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(runner, "_torch_is_cpu_only", lambda: False)
    monkeypatch.setattr(runner, "_local_slots", lambda: ("cuda", count))


def selected(*words):
    return runner.select_resources(runner.parse_args([*words, "train.py"]))


def test_defaults():
    args = runner.parse_args(["train.py"])
    assert (args.hostfile, args.launcher, args.master_port) == ("/job/hostfile", "pdsh", 29500)
    assert (args.num_gpus, args.num_nodes, args.node_rank) == (-1, -1, -1)
    assert (args.enable_each_rank_log, args.log_level, args.autotuning) == ("None", "info", "")
    assert (args.master_addr, args.include, args.exclude, args.venv_script) == ("", "", "", None)
    assert (args.user_script, args.user_args) == ("train.py", [])


@pytest.mark.parametrize(
    ("words", "script", "rest"),
    [
        (["-q", "a.py"], "a.py", []),
        (["--num_gpus", "2", "a.py", "--num_gpus", "3"], "a.py", ["--num_gpus", "3"]),
        (["--num_gpus=2", "a.py", "-h"], "a.py", ["-h"]),
        (["-H", "hosts", "a.py", "--master", "x"], "a.py", ["--master", "x"]),
        (["-Hhosts", "a.py", "--", "b"], "a.py", ["--", "b"]),
        (["--", "-odd.py", "--"], "-odd.py", ["--"]),
        (["--launcher_arg", "-mca btl eth1", "a.py"], "a.py", []),
        (["--num_acc", "2", "a.py", ""], "a.py", [""]),
        (["--module", "pkg.mod", "a b"], "pkg.mod", ["a b"]),
    ],
)
def test_the_line_is_cut_at_the_script(words, script, rest):
    args = runner.parse_args(words)
    assert (args.user_script, args.user_args) == (script, rest)


@pytest.mark.parametrize(
    "words", [[], ["--num_gpus", "2"], ["--wrong", "a.py"], ["--num_gpus", "x", "a.py"]]
)
def test_wrong_lines_end_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        runner.parse_args(words)
    assert ended.value.code == 2
    assert "usage: deepspeed" in capsys.readouterr().err


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        runner.parse_args(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--include",
        "--num_accelerators",
        "--bind_cores_to_rank",
        "--save_pid",
        "--module",
    ):
        assert flag in text


def test_num_gpus_sets_the_ranks_of_a_cpu_node():
    assert selected("--num_gpus", "5") == {"localhost": [0, 1, 2, 3, 4]}
    assert selected("--num_accelerators", "2") == {"localhost": [0, 1]}


def test_slots_of_a_cpu_node_are_local_size_or_its_sockets(monkeypatch):
    monkeypatch.setattr(runner.numa, "get_numa_cores", lambda: [[0, 1], [2, 3]])
    assert selected() == {"localhost": [0, 1]}
    monkeypatch.setenv("LOCAL_SIZE", "3")
    assert selected() == {"localhost": [0, 1, 2]}


def test_slots_of_a_cpu_node_may_be_named_up_to_its_cores(monkeypatch):
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(runner.numa, "get_numa_cores", lambda: [[0, 1]])
    assert selected("--include", "localhost:0,1") == {"localhost": [0, 1]}
    with pytest.raises(ValueError, match="No slot '2'"):
        selected("--include", "localhost:2")


def test_visible_devices_mean_nothing_to_a_cpu_node(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert len(selected()["localhost"]) >= 1


def test_visible_devices_become_the_include_filter(monkeypatch):
    on_gpus(monkeypatch, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1")
    assert selected() == {"localhost": [1, 3]}
    assert "CUDA_VISIBLE_DEVICES" not in runner.os.environ


def test_flags_win_over_visible_devices(monkeypatch):
    on_gpus(monkeypatch, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert selected("--include", "localhost:0") == {"localhost": [0]}
    assert selected("--num_gpus", "2") == {"localhost": [0, 1]}


def test_visible_devices_by_identifier_are_refused(monkeypatch):
    on_gpus(monkeypatch, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    with pytest.raises(ValueError, match="GPU-8932f937"):
        selected()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_devices_stay_hidden_from_the_ranks(monkeypatch, hidden):
    on_gpus(monkeypatch, 0)
    monkeypatch.setattr(runner, "_local_slots", lambda: ("cpu", 1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert selected() == {"localhost": [0]}
    assert runner.os.environ["DS_ACCELERATOR"] == "cpu"


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    on_gpus(monkeypatch, 2)
    with pytest.raises(ValueError, match="at most 2"):
        selected("--num_gpus", "3")


def test_a_machine_without_devices_is_refused(monkeypatch):
    on_gpus(monkeypatch, 0)
    with pytest.raises(RuntimeError, match="no device"):
        selected()


@pytest.mark.parametrize(
    "words",
    [
        ["--num_nodes", "1", "-i", "localhost"],
        ["--num_nodes", "1", "--num_gpus", "1", "-e", "localhost"],
        ["--num_gpus", "1", "-i", "localhost"],
        ["--num_gpus", "1", "-e", "localhost"],
        ["--num_gpus", "-3"],
        ["--num_nodes", "2"],
    ],
)
def test_contradicting_counts_and_filters_are_refused(words):
    with pytest.raises(ValueError, match="--num_"):
        runner.main([*words, "train.py"])


def test_hostfile_slots_nodes_and_filters(tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=3\n", encoding="utf-8")
    assert selected("-H", "hosts") == {"a": [0, 1], "b": [0, 1, 2]}
    assert selected("-H", "hosts", "--num_nodes", "1") == {"a": [0, 1]}
    assert selected("-H", "hosts", "--num_gpus", "1") == {"a": [0], "b": [0]}
    assert selected("-H", "hosts", "-e", "a@b:1") == {"b": [0, 2]}
    with pytest.raises(ValueError, match="at most 2"):
        selected("-H", "hosts", "--num_nodes", "3")


@pytest.mark.parametrize("words", [["-H", "hosts"], ["--force_multi"]])
def test_several_nodes_are_handed_on(words, tmp_path, monkeypatch):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=3\n", encoding="utf-8")
    seen = []
    monkeypatch.setattr(runner, "run_on_nodes", lambda args, active, signals: seen.append(active))
    runner.main([*words, "train.py"])
    (active,) = seen
    assert list(active) == (["a", "b"] if words[0] == "-H" else ["localhost"])


@pytest.mark.parametrize("limits", [("0", "1"), ("2", "1"), ("3", "3"), ("1", "0")])
def test_impossible_elastic_limits_are_refused(limits, tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=3\n", encoding="utf-8")
    words = ["--min_elastic_nodes", limits[0], "--max_elastic_nodes", limits[1]]
    with pytest.raises(ValueError, match="impossible numbers of elastic nodes"):
        runner.main(["-H", "hosts", "--elastic_training", *words, "train.py"])


def test_elastic_limits_travel_to_the_nodes():
    args = runner.parse_args(["--elastic_training", "--max_elastic_nodes", "4", "t.py"])
    runner._check_elastic(args, 2)
    command = runner.launch_command(args, {"localhost": [0]})
    at = command.index("--enable_elastic_training")
    assert command[at + 1 : at + 3] == ["--max_elastic_nodes=4", "--min_elastic_nodes=1"]


def test_the_command_carries_every_flag_in_order():
    words = "--module --no_local_rank --save_pid --enable_each_rank_log logs --bind_cores_to_rank"
    args = runner.parse_args(
        [*words.split(), "--bind_core_list", "0-3", "--quiet", "pkg.mod", "--x", "a b", "--", ""]
    )
    args.log_level = "error"
    command = runner.launch_command(args, {"localhost": [0, 2]})
    assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
    assert decode_world_info(command[4].removeprefix("--world_info=")) == {"localhost": [0, 2]}
    assert command[5:] == [
        "--master_addr=127.0.0.1",
        "--master_port=29500",
        "--module",
        "--no_local_rank",
        f"--save_pid={runner.os.getpid()}",
        "--enable_each_rank_log=logs",
        "--bind_cores_to_rank",
        "--bind_core_list=0-3",
        "--quiet",
        "--log_level=error",
        "pkg.mod",
        *("--x", "a b", "--", ""),
    ]


def test_launch_reads_the_command_that_the_runner_writes():
    args = runner.parse_args(["--no_python", "--master_port", "1234", "prog", "--module", "-q"])
    read = launch.parse_args(runner.launch_command(args, {"localhost": [0]})[4:])
    assert (read.training_script, read.training_script_args) == ("prog", ["--module", "-q"])
    assert (read.no_python, read.module, read.quiet, read.master_port) == (True, False, False, 1234)


def test_ranks_are_numbered_over_all_hosts():
    info = {"a": [0, 1], "b": [5], "c": [2, 7]}
    ranks = launch.World.build(info, 2)
    assert (ranks.size, ranks.host, ranks.slots) == (5, "c", [2, 7])
    envs = ranks.environment({"KEEP": "1"}, "10.0.0.1", 4321)
    assert [(e["RANK"], e["LOCAL_RANK"]) for e in envs] == [("3", "0"), ("4", "1")]
    for env in envs:
        assert (env["CROSS_RANK"], env["CROSS_SIZE"], env["LOCAL_SIZE"]) == ("2", "3", "2")
        assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["KEEP"]) == ("10.0.0.1", "4321", "1")
        assert env["CUDA_VISIBLE_DEVICES"] == "2,7"
        assert ("USE_LIBUV" in env) == (sys.platform == "win32")


@pytest.mark.parametrize("node_rank", [-1, 2])
def test_a_node_outside_the_world_is_refused(node_rank):
    with pytest.raises(ValueError, match="no such node"):
        launch.World.build({"a": [0], "b": [0]}, node_rank)


def test_pod_environment_reaches_the_ranks(monkeypatch, tmp_path):
    pod = tmp_path / "pod.env"
    pod.write_text("export POD_NAME=x=y\n# note\nOTHER=1\n", encoding="utf-8")
    monkeypatch.setattr(world, "POD_ENV", pod)
    (env,) = launch.World.build({"a": [0]}, 0).environment({"OTHER": "0"}, "h", 1)
    assert (env["POD_NAME"], env["OTHER"]) == ("x=y", "1")


def test_pid_file_is_refused_while_its_owner_lives(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "PID_FILE_BASEPATH", str(tmp_path))
    with launch.pid_file(7):
        assert (tmp_path / "7.deepspeed").read_text(encoding="utf-8") == str(runner.os.getpid())
        with pytest.raises(AssertionError, match="pid file exists"), launch.pid_file(7):
            pass
    assert not (tmp_path / "7.deepspeed").exists()
    (tmp_path / "7.deepspeed").write_text(
        str(2**22 + 7), encoding="utf-8"
    )  # above Linux's pid limit
    with launch.pid_file(7):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize(("code", "status"), [(0, 0), (1, 1), (255, 255), (-9, 137), (-11, 139)])
def test_no_failure_becomes_success(code, status):
    assert exit_status(code) == status


def test_the_environment_file_has_the_name_that_others_import():
    assert runner.DEEPSPEED_ENVIRONMENT_NAME == ".deepspeed_env"
