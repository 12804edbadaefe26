# SPDX-License-Identifier: Apache-2.0
"""Elastic training: a rank dies, all ranks start again and train on where the last checkpoint is."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest

from tests.helpers.launching import (
    all_gone,
    finish,
    launch,
    start,
    wait_for,
)

ELASTIC = """
import json, os, pathlib, sys, torch, deepspeed
here = pathlib.Path(__file__).parent
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
config = {"optimizer": {"type": "AdamW", "params": {"lr": 0.1}}, "zero_optimization": {"stage": 1},
          "elasticity": {"enabled": True, "max_train_batch_size": 8, "micro_batch_sizes": [1, 2, 4],
                         "min_gpus": 1, "max_gpus": 4, "version": 0.1}}
engine, *_ = deepspeed.initialize(model=model, config=config)
if (here / "save" / "latest").exists():
    engine.load_checkpoint(str(here / "save"))
begun = engine.global_steps
assert engine.train_batch_size() == 8
data = torch.arange(32.0).view(8, 4) / 32
share = 8 // world
while engine.global_steps < 4:
    for micro in data[rank * share : (rank + 1) * share].split(engine.train_micro_batch_size_per_gpu()):
        engine.backward(engine(micro).square().mean())
        engine.step()
    engine.save_checkpoint(str(here / "save"))
    if attempt == 0 and rank == world - 1 and engine.global_steps == 2 and "die" in sys.argv:
        os._exit(9)
told = {"attempt": attempt, "begun": begun, "world": world, "argv": sys.argv[1:],
        "numbers": [os.environ[n] for n in ("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "LOCAL_RANK")],
        "weights": [p.tolist() for p in engine.module.parameters()]}
(here / f"told_{rank}.json").write_text(json.dumps(told), encoding="utf-8")
deepspeed.comm.destroy_process_group()
"""


def reference():
    import torch

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    data = torch.arange(32.0).view(8, 4) / 32
    for _ in range(4):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def told(folder, rank):
    return json.loads((folder / f"told_{rank}.json").read_text(encoding="utf-8"))


def check_weights(found):
    import torch

    for ours, theirs in zip(found["weights"], reference(), strict=True):
        # fp32 sums in parts instead of at once, over four Adam steps
        torch.testing.assert_close(torch.tensor(ours), theirs, rtol=1e-4, atol=1e-5)


def test_after_a_death_all_ranks_start_again_and_train_on(tmp_path):
    flags = ["--num_gpus", "2", "--elastic_training", "--enable_each_rank_log", "None"]
    done = launch(tmp_path, *flags, args=["die", "${local_rank} $$"], body=ELASTIC)
    assert done.returncode == 0, done.stdout
    for rank in (0, 1):
        found = told(tmp_path, rank)
        assert (found["attempt"], found["begun"], found["world"]) == (1, 2, 2)
        assert found["argv"] == [f"--local_rank={rank}", "die", "${local_rank} $$"]
        assert found["numbers"] == ["0", "1", "2", str(rank)]
        check_weights(found)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_the_agent_ends_with_the_launcher(tmp_path):
    body = (
        "import os, pathlib, time\nhere = pathlib.Path(__file__).parent\n"
        "path = here / ('pid_' + os.environ['RANK'])\n"
        "path.with_suffix('.tmp').write_text(str(os.getpid()))\n"
        "os.replace(path.with_suffix('.tmp'), path)\ntime.sleep(120)\n"
    )
    launcher = start(tmp_path, "--num_gpus", "2", "--elastic_training", body=body)
    wait_for(tmp_path, "pid_0", "pid_1")
    pids = [int((tmp_path / f"pid_{rank}").read_text("utf-8")) for rank in (0, 1)]
    os.kill(launcher.pid, signal.SIGTERM)
    output = finish(launcher)
    assert launcher.returncode == 1, output
    assert all_gone(pids), output
