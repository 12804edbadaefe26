# SPDX-License-Identifier: Apache-2.0
"""``deepspeed --autotuning run``: real runs of a script, one of which cannot, and then the best one."""

from __future__ import annotations

import json

from tests.helpers.launching import launch

TRAIN = """
import argparse, json, os, pathlib, time
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser.add_argument("--deepspeed_config")
args = parser.parse_args()
if json.loads(pathlib.Path(args.deepspeed_config).read_text())["train_micro_batch_size_per_gpu"] == 4:
    raise MemoryError("too large")
import torch, deepspeed
model = torch.nn.Linear(4, 4)
engine, *_ = deepspeed.initialize(model=model, config=args.deepspeed_config)
micro = engine.train_micro_batch_size_per_gpu()
for step in range(6):
    time.sleep(0.05)  # a step costs the same whatever its size: the larger is the faster
    engine.backward(engine(torch.ones(micro, 4)).square().mean())
    engine.step()
pathlib.Path("trained.json").write_text(json.dumps([micro, engine.global_steps]), encoding="utf-8")
"""


def test_the_best_of_real_runs_trains_to_its_end(tmp_path):
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": 1},
        "autotuning": {
            "start_profile_step": 1,
            "end_profile_step": 3,
            "min_train_micro_batch_size_per_gpu": 2,
        },
    }
    (tmp_path / "ds.json").write_text(json.dumps(config), encoding="utf-8")
    flags = ["--num_gpus", "1", "--autotuning", "run"]
    done = launch(tmp_path, *flags, args=["--deepspeed_config", "ds.json"], body=TRAIN)
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "trained.json").read_text(encoding="utf-8")) == [2, 6]
    results = tmp_path / "autotuning_results"
    assert "best throughput: z1_mbs2" in (results / "summary.txt").read_text(encoding="utf-8")
    told = json.loads((results / "z1_mbs2" / "autotuning_metric.json").read_text(encoding="utf-8"))
    assert 0.05 <= told["latency"] < 5
    assert "too large" in (results / "z1_mbs4" / "stderr.log").read_text(encoding="utf-8")
    names = sorted(path.stem for path in (tmp_path / "autotuning_exps").iterdir())
    assert names == ["z1_mbs2", "z1_mbs4"]
