# SPDX-License-Identifier: Apache-2.0
"""What goes to other nodes and how: environment, quoting for real shells, the lifeline, ssh's complaints."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from deepspeed.launcher import fleet, launch, nodes, ssh
from deepspeed.launcher import multinode_runner as runners
from deepspeed.launcher.processes import Signals
from deepspeed.launcher.runner import encode_world_info, parse_args
from tests.helpers.launching import environment

WINDOWS = sys.platform == "win32"
SLOTS = {"a": [0], "b": [0, 1]}
WORLD = encode_world_info(SLOTS)
NASTY = [
    "plain",
    "a b",
    "x;touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "%n %h %%",
    "$HOME ~ * {a,b} !!",
    "&& touch pwned || touch pwned &",
    "> pwned",
    "# ä雪",
    "back\\slash\\",
    "new\nline",
    "",
]


def arguments(*words):
    args = parse_args([*words, "t.py", *NASTY])
    args.master_addr = "10.0.0.1"
    return args


# ------------------------------------------------------------------ what goes along


def test_only_named_variables_go_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nodes.Path, "home", lambda: tmp_path / "home")
    ours = {
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_HCA": "mlx5",
        "UCX_TLS": "tcp",
        "MLFLOW_RUN": "1",
        "MV2_X": "1",
        "DS_ACCELERATOR": "cpu",
        "DEEPSPEED_TIMEOUT": "3",
        "AZUREML_RUN_ID": "r",
        "PYTHONPATH": "old",
    }
    left = {"HOME": "/h", "SECRET": "s", "NCCL;touch pwned": "x", "DS_ENV_FILE": "none"}
    carried = nodes.carried_environment({**ours, **left})
    assert carried == {**ours, "PYTHONPATH": os.pathsep.join([str(tmp_path), "old"])}
    aisc = nodes.carried_environment({**ours, **left, "AISC_JOB_NAME": "j"})
    assert set(carried) - set(aisc) == {"NCCL_IB_HCA"}
    assert nodes.carried_environment({})["PYTHONPATH"] == str(tmp_path)


def test_env_files_of_home_and_here_in_this_order(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "A=1\nB=1\n"), (here, "# note\n\nB = x=y z \n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text, encoding="utf-8")
        (folder / "mine.env").write_text("C=3\n", encoding="utf-8")
    monkeypatch.chdir(here)
    monkeypatch.setattr(nodes.Path, "home", lambda: home)
    carried = nodes.carried_environment({})
    assert (carried["A"], carried["B"]) == ("1", "x=y z")
    assert nodes.carried_environment({"DS_ENV_FILE": "mine.env"})["C"] == "3"


def test_a_bad_line_of_an_env_file_is_named(tmp_path):
    path = tmp_path / "env"
    path.write_text("OK=1\nno equals sign\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: no equals sign") as caught:
        nodes.read_env_file(path)
    assert str(path) in str(caught.value)


def test_names_of_an_env_file_that_are_none_stay_here(tmp_path):
    path = tmp_path / "env"
    bad = ["=x", "A B=1", "1A=1", "A;touch pwned=1", "BASH_FUNC_x%%=(){:;}"]
    path.write_text("\n".join(["export OK=1", *bad, "LAST=2"]), encoding="utf-8")
    assert nodes.read_env_file(path) == {"OK": "1", "LAST": "2"}


@pytest.mark.parametrize("name", ["A;touch pwned", "A=B", "", "1A", "A B", "Ä"])
def test_no_export_has_a_name_that_a_shell_could_run(name):
    runner = runners.PDSHRunner(arguments(), WORLD)
    with pytest.raises(ValueError, match="not a name"):
        runner.add_export(name, "x")


@pytest.mark.parametrize(
    "host", ["-oProxyCommand=x", "a;b", "$(x)", "a,b", "^file", "a[0-3]", "/x/", "u@-o", "a b", ""]
)
def test_names_that_programs_would_misread_are_no_hosts(host):
    with pytest.raises(ValueError, match="whose name cannot be one"):
        ssh.check_hosts(["fine", host])


def test_ordinary_names_are_hosts():
    ssh.check_hosts(["worker-0", "user@10.0.0.1", "node_1.example.org", "fe80::1%eth0", "::1"])


# ------------------------------------------------------------------ real shells

SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))"


@pytest.mark.skipif(WINDOWS, reason="pdsh speaks to POSIX shells")
def test_pdsh_words_reach_the_program_through_a_shell_as_they_are(tmp_path, monkeypatch):
    folder = tmp_path / "it's $(touch pwned) 100%n"
    folder.mkdir()
    monkeypatch.chdir(folder)
    venv = tmp_path / "v;touch pwned '%h.sh"
    venv.write_text("export FROM_VENV=1\n", encoding="utf-8")
    program = tmp_path / "my python;%n"
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{SHOW}' \"$@\"\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    args = arguments("--venv_script", str(venv), "--bind_core_list", "0;touch pwned")
    args.master_addr = "10.0.0.1;touch pwned"
    runner = runners.PDSHRunner(args, WORLD)
    for number, value in enumerate(NASTY):
        runner.add_export(f"NASTY_{number}", value)
    command, kill, _ = runner.get_cmd({}, SLOTS)
    line = " ".join(command[6:])
    # as pdsh fills in its fields for the second host
    filled = line.replace("%%", "\0").replace("%n", "1").replace("%h", "b").replace("\0", "%")
    done = subprocess.run(
        ["bash", "-c", filled], capture_output=True, encoding="utf-8", cwd=tmp_path, timeout=60
    )
    words, env, there = json.loads(done.stdout)
    assert words[:4] == ["-u", "-m", "deepspeed.launcher.launch", f"--world_info={WORLD}"]
    assert "--node_rank=1" in words
    assert "--master_addr=10.0.0.1;touch pwned" in words
    assert words[-len(NASTY) :] == NASTY
    assert [env[f"NASTY_{n}"] for n in range(len(NASTY))] == NASTY
    assert (env["FROM_VENV"], there) == ("1", str(folder))
    assert not list(tmp_path.rglob("pwned"))
    assert shlex.split(" ".join(kill[6:]))[:2] == ["pkill", "-f"]


def hello_and_line(tmp_path, **exports):
    args = arguments("--launcher", "ssh", "--no_python", "--no_local_rank", "-q")
    args.log_level, args.user_script, args.user_args = "error", sys.executable, ["show.py", *NASTY]
    (tmp_path / "show.py").write_text(
        "import json, os, sys\n"
        "told = [sys.argv[1:], dict(os.environ), os.getcwd(), sys.stdin.read()]\n"
        "open('told.json', 'w', encoding='utf-8').write(json.dumps(told))\n",
        encoding="utf-8",
    )
    path = environment()["PYTHONPATH"]
    one = encode_world_info({"localhost": [0]})
    made = ssh.node_commands(args, one, ["localhost"], {**exports, "PYTHONPATH": path})
    ((_, command, hello),) = made
    assert command[0] == "ssh"
    assert command[-3:-1] == ["--", "localhost"]
    return hello, command[-1]


def test_the_line_for_a_nodes_shell_holds_nothing_of_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exports = {f"NASTY_{n}": value for n, value in enumerate(NASTY)}
    hello, line = hello_and_line(tmp_path, **exports)
    assert line == ssh.remote_command()
    assert hello.count(b"\n") == 1
    node = subprocess.Popen(
        line if WINDOWS else ["sh", "-c", line],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path.parent,
        env={k: v for k, v in environment().items() if k != "PYTHONPATH"},
    )
    node.stdin.write(hello)
    node.stdin.flush()  # the line stays open
    assert node.wait(timeout=60) == 0, node.stdout.read()
    node.stdin.close()
    node.stdout.close()
    words, env, there, read = json.loads((tmp_path / "told.json").read_text(encoding="utf-8"))
    assert (words, read) == (NASTY, "")
    expected = {n: v for n, v in exports.items() if v or not WINDOWS}
    assert {name: env.get(name) for name in expected} == expected
    assert os.path.samefile(there, tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(("key", "value"), [("folder", "/no such folder"), ("env", {})])
def test_a_node_that_lacks_something_says_what(tmp_path, monkeypatch, key, value):
    monkeypatch.chdir(tmp_path)
    hello, line = hello_and_line(tmp_path)
    told = {**json.loads(hello), key: value, "path": [str(tmp_path)]}
    if key == "env":  # a Python without the package
        line = line.replace(" -u -c ", " -S -E -u -c ")
    done = subprocess.run(
        line if WINDOWS else ["sh", "-c", line],
        input=json.dumps(told).encode() + b"\n",
        capture_output=True,
        cwd=tmp_path,
        env={k: v for k, v in environment().items() if k != "PYTHONPATH"},
        timeout=60,
    )
    assert done.returncode == 1
    wanted = b"lacks the launcher's current folder" if key == "folder" else b"has no deepspeed"
    assert wanted in done.stderr


def test_values_that_srun_would_split_go_by_its_environment():
    args = arguments()
    runner = runners.SlurmRunner(args, WORLD)
    values = {"PLAIN": "a b", "COMMA": "x,LD_PRELOAD=y", "QUOTE": "'a", "LINE": "a\nb"}
    for name, value in values.items():
        runner.add_export(name, value)
    environment = {}
    command = runner.get_cmd(environment, {"a": [0], "b": [0]})
    (export,) = [word for word in command if word.startswith("--export")]
    assert export == "--export=ALL,PLAIN=a b"
    assert environment == {name: value for name, value in values.items() if name != "PLAIN"}


# ------------------------------------------------------------------ which launcher


def chosen(monkeypatch, *words, installed=()):
    monkeypatch.setattr(nodes.shutil, "which", lambda name: name if name in installed else None)
    return nodes.choose_launcher(parse_args([*words, "t.py"]))


def test_without_pdsh_ssh_is_taken_unless_pdsh_was_asked_for(monkeypatch):
    assert chosen(monkeypatch, installed=["pdsh", "ssh"]) == "pdsh"
    assert chosen(monkeypatch, installed=["ssh"]) == "ssh"
    assert chosen(monkeypatch, "--launcher", "PDSH", installed=["ssh"]) == "pdsh"
    with pytest.raises(NotImplementedError, match="pigeon"):
        chosen(monkeypatch, "--launcher", "pigeon")


@pytest.mark.parametrize("name", ["pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich", "ssh"])
def test_a_launcher_that_is_not_installed_is_named(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nodes.shutil, "which", lambda name: None)
    args = parse_args(["--launcher", name, "t.py"])
    with Signals() as signals, pytest.raises(RuntimeError, match=f"'{name}' not installed"):
        nodes.run_on_nodes(args, {"a": [0], "b": [0]}, signals)


def test_unequal_slots_are_told_with_the_hosts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nodes.shutil, "which", lambda name: name)
    args = parse_args(["--launcher", "mpich", "--no_ssh_check", "--master_addr", "x", "t.py"])
    with Signals() as signals, pytest.raises(ValueError, match="same number of devices") as caught:
        nodes.run_on_nodes(args, {"a": [0], "b": [0, 1]}, signals)
    assert "'b': 2" in str(caught.value)


# ------------------------------------------------------------------ ssh's words


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("root@a: Permission denied (publickey).", "ssh-copy-id"),
        ("Host key verification failed.", "known_hosts"),
        ("ssh: Could not resolve hostname a: Name or service not known", "hostfile"),
        ("ssh: connect to host a port 22: Connection refused", "--ssh_port"),
        ("ssh: connect to host a port 22: Connection timed out", "network"),
        ("something else", "by hand"),
    ],
)
def test_each_complaint_of_ssh_has_a_mend(said, mend, monkeypatch):
    assert mend in ssh.mend(said)
    monkeypatch.setattr(
        ssh, "_try", lambda words, host, command: (255 * (host == "a"), "", f"banner\n{said}\n")
    )
    with pytest.raises(RuntimeError, match="cannot run commands on a:") as caught:
        ssh.probe(["a", "b"], ["ssh"])
    assert said in str(caught.value)
    assert mend in str(caught.value)


@pytest.mark.parametrize(
    ("told", "address"),
    [("10.1.2.3 fd00::2 \n", "10.1.2.3"), ("welcome\n", "a.example"), ("", "a.example")],
)
def test_the_master_address_is_the_nodes_own_or_its_name(told, address, monkeypatch):
    def answer(words, host, command):
        if words[1] == "-G":
            return 0, "user me\nhostname a.example\n", ""
        return (0 if told else 1), told, ""

    monkeypatch.setattr(ssh, "_try", answer)
    assert ssh.master_address("me@a", ["ssh", "-T"]) == address


# ------------------------------------------------------------------ the lifeline

WATCH = (
    "import sys, threading, time\n"
    "from deepspeed.launcher.lifeline import watch\n"
    "ended = threading.Event()\n"
    "def on_end(number, why):\n"
    "    print(int(number), why, flush=True)\n"
    "    ended.set()\n"
    "watch(float(sys.argv[1]), on_end)\n"
    "print('ready', repr(sys.stdin.read()), flush=True)\n"
    "ended.wait(20)\n"
)


@pytest.mark.parametrize(
    ("silence", "words", "close", "number", "why"),
    [
        (0, b"..", True, signal.SIGTERM, "closed the line"),
        (0, b".I", False, signal.SIGINT, "interrupted"),
        (0.3, b"", False, signal.SIGTERM, "nothing was heard"),
    ],
)
def test_the_end_of_the_line_is_noticed(silence, words, close, number, why):
    watcher = subprocess.Popen(
        [sys.executable, "-c", WATCH, str(silence)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert watcher.stdout.readline().split() == [b"ready", b"''"]
    watcher.stdin.write(words)
    watcher.stdin.flush()
    if close:
        watcher.stdin.close()
    told = watcher.stdout.readline().decode()
    assert told.startswith(f"{int(number)} ")
    assert why in told
    assert watcher.wait(timeout=20) == 0
    watcher.stdin.close()
    watcher.stdout.close()


def test_beats_keep_a_line_alive(monkeypatch):
    monkeypatch.setattr(fleet, "BEAT_S", 0.1)
    code = WATCH.replace("ended.wait(20)", "sys.exit(3 if ended.wait(1.5) else 0)")
    with Signals() as signals:
        group = fleet.Fleet(signals)
        group.start("a", [sys.executable, "-c", code, "0.8"])
        assert group.wait() == 0


# ------------------------------------------------------------------ a fleet


def sail(*codes, tolerated=0):
    with Signals() as signals:
        group = fleet.Fleet(signals, tolerated=tolerated)
        for number, code in enumerate(codes):
            group.start(f"h{number}", [sys.executable, "-c", code])
        begun = time.monotonic()
        return group.wait(), time.monotonic() - begun


UNTIL_THE_LINE_ENDS = "import sys; sys.stdin.read(); sys.exit(5)"


def test_the_first_failure_lets_the_others_go(capfd):
    status, seconds = sail("raise SystemExit(3)", UNTIL_THE_LINE_ENDS)
    assert status == 3
    assert seconds < fleet.PATIENCE_S / 2


def test_an_elastic_fleet_can_spare_some():
    assert sail("raise SystemExit(3)", "", tolerated=1)[0] == 0
    assert sail("raise SystemExit(3)", "raise SystemExit(4)", "", tolerated=1)[0] in (3, 4)
    assert sail("raise SystemExit(3)", "", tolerated=None)[0] == 3


def test_output_is_told_by_host(capfd):
    body = "import sys; print('one\\ntwo'); sys.stderr.write('bar\\rend')"
    assert sail(body)[0] == 0
    out, err = capfd.readouterr()
    assert out.splitlines() == ["h0: one", "h0: two"]
    assert err.replace("\r", "|").strip() == "h0: bar|h0: end"


def test_a_cut_off_node_takes_it_for_a_signal():
    with Signals() as signals:
        launch._cut_off(signals, signal.SIGTERM, "gone")
        assert signals.received == signal.SIGTERM
