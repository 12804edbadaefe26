# SPDX-License-Identifier: Apache-2.0
"""What ranks started by the launcher see: environment, arguments, cores, logs; real processes, no torch."""

from __future__ import annotations

import os
import sys

import pytest

from tests.helpers.launching import TELL, UNDER_WINE, WINDOWS, free_port, launch, seen


@pytest.mark.parametrize(("flags", "size"), [((), None), (("--num_gpus", "3"), 3)])
def test_each_rank_gets_its_environment(tmp_path, flags, size):
    port = str(free_port())
    done = launch(tmp_path, *flags, "--master_port", port)
    assert done.returncode == 0, done.stdout
    ranks = seen(tmp_path)
    size = size or len(ranks)
    assert len(ranks) == size > 0
    for index, rank in enumerate(ranks):
        expected = {
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(size),
            "LOCAL_SIZE": str(size),
            "CROSS_RANK": "0",
            "CROSS_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(size))),
        }
        assert {name: rank["env"].get(name) for name in expected} == expected
        assert "OMP_NUM_THREADS" not in rank["env"]
        assert rank["env"].get("USE_LIBUV") == ("0" if WINDOWS else None)


def test_local_size_sets_the_slots_of_a_cpu_node(tmp_path):
    launch(tmp_path, LOCAL_SIZE="2")
    assert len(seen(tmp_path)) == 2


def test_included_slots_are_visible_to_every_rank(tmp_path):
    done = launch(tmp_path, "--include", "localhost:1", LOCAL_SIZE="2")
    assert done.returncode == 0, done.stdout
    (rank,) = seen(tmp_path)
    assert (rank["env"]["CUDA_VISIBLE_DEVICES"], rank["env"]["LOCAL_RANK"]) == ("1", "0")


def test_the_rest_of_the_environment_passes_through(tmp_path):
    launch(tmp_path, HF_HOME="somewhere else", USE_LIBUV="1")
    (rank,) = seen(tmp_path)
    assert rank["env"]["HF_HOME"] == "somewhere else"
    assert rank["env"]["USE_LIBUV"] == "1"


ODD = [
    "--",
    "a b",
    "",
    '"quoted"',
    "c\\",
    'd\\"e',
    "*.py",
    "$HOME %PATH%",
    "--num",
    "-q",
    "ä雪",
    "x;y|z&",
]


def test_arguments_arrive_as_they_were_given_after_local_rank(tmp_path):
    done = launch(tmp_path, "--num_gpus", "2", args=ODD)
    assert done.returncode == 0, done.stdout
    assert [rank["argv"] for rank in seen(tmp_path)] == [
        [f"--local_rank={i}", *ODD] for i in (0, 1)
    ]


def test_no_local_rank_leaves_the_flag_out(tmp_path):
    launch(tmp_path, "--no_local_rank", args=["x"])
    assert seen(tmp_path)[0]["argv"] == ["x"]


@pytest.mark.parametrize("name", ["with space.py", "größe.py"])
def test_script_names_with_spaces_and_letters(tmp_path, name):
    folder = tmp_path / "some folder ä"
    folder.mkdir()
    done = launch(folder, script=name)
    assert done.returncode == 0, done.stdout
    assert len(seen(folder)) == 1


def test_module_runs_as_python_m(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "tool.py").write_text(
        TELL + "assert __package__ == 'pkg'", encoding="utf-8"
    )
    done = launch(tmp_path, "--module", script="pkg.tool", args=["x"], body=None)
    assert done.returncode == 0, done.stdout
    assert seen(tmp_path / "pkg")[0]["argv"] == ["--local_rank=0", "x"]


def test_no_python_runs_any_program(tmp_path):
    (tmp_path / "script.py").write_text(TELL, encoding="utf-8")
    done = launch(
        tmp_path,
        "--no_python",
        "--no_local_rank",
        script=sys.executable,
        args=["script.py", "x"],
        body=None,
    )
    assert done.returncode == 0, done.stdout
    assert seen(tmp_path)[0]["argv"] == ["x"]


@pytest.mark.skipif(UNDER_WINE, reason="Wine lets no child write straight to a file")
def test_each_rank_log_holds_output_and_errors_of_that_rank(tmp_path):
    body = "import os, sys; print('out', os.environ['RANK']); print('err ä', file=sys.stderr)"
    done = launch(tmp_path, "--num_gpus", "2", "--enable_each_rank_log", "logs/deep", body=body)
    assert done.returncode == 0, done.stdout
    assert "out 0" not in done.stdout
    for rank in (0, 1):
        (log,) = (tmp_path / "logs" / "deep").glob(f"*_rank{rank}.log")
        assert log.name[:14].isdigit()
        text = log.read_text(encoding="utf-8", errors="replace")
        assert f"out {rank}" in text
        assert "err" in text


def test_save_pid_holds_the_launching_process_and_goes_away(tmp_path):
    body = TELL + (
        "import tempfile; files = list(pathlib.Path(tempfile.gettempdir()).glob('*.deepspeed'))\n"
        "(here / 'files.json').write_text(json.dumps({f.stem: f.read_text() for f in files}))\n"
        "(here / 'parent').write_text(str(os.getppid()))\n"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    places = {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    done = launch(tmp_path, "--save_pid", body=body, **places)
    assert done.returncode == 0, done.stdout
    recorded = (tmp_path / "files.json").read_text(encoding="utf-8")
    parent = (tmp_path / "parent").read_text(encoding="utf-8")
    assert recorded.endswith(f': "{parent}"}}')
    assert not list(scratch.glob("*.deepspeed"))


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.skipif(UNDER_WINE, reason="Wine does not tell affinities")
def test_bound_ranks_share_the_cores_out(tmp_path):
    done = launch(tmp_path, "--num_gpus", "2", "--bind_cores_to_rank", "--bind_core_list", "0,1")
    assert done.returncode == 0, done.stdout
    ranks = seen(tmp_path)
    assert [rank["env"]["OMP_NUM_THREADS"] for rank in ranks] == ["1", "1"]
    if ranks[0]["cores"] is not None:
        assert [rank["cores"] for rank in ranks] == [[0], [1]]


def test_quiet_says_nothing(tmp_path):
    done = launch(tmp_path, "-q")
    assert (done.returncode, done.stdout) == (0, "")


def test_the_launcher_tells_what_it_does(tmp_path):
    done = launch(tmp_path, "--num_gpus", "2", "--master_port", str(free_port()))
    for line in (
        "Unable to find hostfile, will proceed with training with local resources only.",
        "cmd = ",
        "-u -m deepspeed.launcher.launch --world_info=eyJsb2NhbGhvc3QiOiBbMCwgMV19 ",
        "--enable_each_rank_log=None --log_level=info script.py",
        "WORLD INFO DICT: {'localhost': [0, 1]}",
        "nnodes=1, num_local_procs=2, node_rank=0",
        "global_rank_mapping=defaultdict(<class 'list'>, {'localhost': [0, 1]})",
        "dist_world_size=2",
        "Setting CUDA_VISIBLE_DEVICES=0,1",
        "spawned with command: [",
        "exits successfully.",
    ):
        assert line in done.stdout


def test_hostfile_of_one_host_starts_its_slots_here(tmp_path):
    (tmp_path / "hosts").write_text("# ours\nworker-0 slots=2\n", encoding="utf-8")
    done = launch(tmp_path, "--hostfile", "hosts", "--include", "worker-0:1")
    assert done.returncode == 0, done.stdout
    assert [rank["env"]["CUDA_VISIBLE_DEVICES"] for rank in seen(tmp_path)] == ["1"]


def test_no_ssh_starts_one_node_of_several(tmp_path):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=1\n", encoding="utf-8")
    done = launch(
        tmp_path,
        *("--hostfile", "hosts", "--no_ssh", "--node_rank", "1", "--master_addr", "10.0.0.1"),
    )
    assert done.returncode == 0, done.stdout
    (rank,) = seen(tmp_path)
    env = rank["env"]
    assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == ("2", "0", "3")
    assert (env["CROSS_RANK"], env["CROSS_SIZE"], env["MASTER_ADDR"]) == ("1", "2", "10.0.0.1")


def test_the_launcher_imports_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')", encoding="utf-8")
    done = launch(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert done.returncode == 0, done.stdout
