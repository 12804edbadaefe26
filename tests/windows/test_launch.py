# SPDX-License-Identifier: Apache-2.0
"""`deepspeed.exe`: what ranks see, whose exit code comes back, and that paths may hold any letter."""

from __future__ import annotations

import json
import textwrap

import pytest


def script(folder, body):
    path = folder / "trän script.py"
    path.write_text("# -*- coding: utf-8 -*-\n" + textwrap.dedent(body), encoding="utf-8")
    return path


def launch(windows, folder, path, *words, flags=()):
    return windows.run("deepspeed", *flags, path.name, *words, cwd=folder, timeout=300)


def test_a_rank_sees_its_environment_and_arguments(windows, folder):
    path = script(
        folder,
        """
        import json, os, sys
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
        with open("seen.json", "w", encoding="utf-8") as file:
            json.dump([sys.argv[1:], {name: os.environ[name] for name in names}], file)
        """,
    )
    done = launch(
        windows, folder, path, "--text", "größe 5 µm", "a b", flags=["--master_port", "29731"]
    )
    assert done.returncode == 0, done.stdout
    words, environment = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
    assert words == ["--local_rank=0", "--text", "größe 5 µm", "a b"]
    assert environment == {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29731",
    }


@pytest.mark.parametrize("code", [3, 1])
def test_the_exit_code_of_a_rank_comes_back(windows, folder, code):
    done = launch(windows, folder, script(folder, f"import sys; sys.exit({code})"))
    assert done.returncode == code, done.stdout


def test_one_failing_rank_ends_its_sibling(windows, folder):
    body = """
        import os, sys, time
        if os.environ["RANK"] == "1":
            sys.exit(7)
        time.sleep(240)
        """
    done = launch(windows, folder, script(folder, body), flags=["--num_gpus", "2"])
    assert done.returncode == 7, done.stdout


def test_a_missing_script_is_named(windows, folder):
    done = windows.run("deepspeed", "nicht dä.py", cwd=folder)
    assert done.returncode != 0
    assert "nicht dä.py" in done.stdout, done.stdout


@pytest.mark.parametrize("program", ["ds", "deepspeed.pt"])
def test_the_other_names_are_the_same_launcher(windows, folder, program):
    path = script(folder, "print('hello from', 'a rank')")
    done = windows.run(program, path.name, cwd=folder)
    assert done.returncode == 0 and "hello from a rank" in done.stdout, done.stdout


def test_ranks_print_any_letter(windows, folder):
    path = script(folder, "print('Größe 5 µm, 損失 ▁▂▃')")
    done = windows.run(
        "deepspeed", path.name, cwd=folder, PYTHONUTF8="1"
    )  # as quickstart.py sets it
    assert done.returncode == 0, done.stdout
    assert "Größe 5 µm, 損失 ▁▂▃" in done.stdout


def test_two_ranks_reduce(windows, folder):
    body = """
        import torch, deepspeed
        from deepspeed import comm
        deepspeed.init_distributed()
        x = torch.ones(4)
        comm.all_reduce(x)
        assert x.tolist() == [2.0] * 4
        comm.barrier()
        """
    done = launch(windows, folder, script(folder, body), flags=["--num_gpus", "2"])
    assert done.returncode == 0, done.stdout
