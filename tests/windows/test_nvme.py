# SPDX-License-Identifier: Apache-2.0
"""Parameters and optimizer states in files under Windows: the training of a run in memory."""

from __future__ import annotations

SCRIPT = """
import os, sys, pathlib, torch, deepspeed

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
disk = {"device": "nvme", "nvme_path": str(pathlib.Path("däta disk").resolve())}
files = {"offload_optimizer": disk, "offload_param": disk, "sub_group_size": 3000}


def train(where):
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, **where}
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": True},
        "zero_optimization": zero,
    }
    torch.manual_seed(3)
    with deepspeed.zero.Init(config_dict_or_path=config):
        net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
    engine, *_ = deepspeed.initialize(model=net, config=config)
    losses = []
    for step in range(6):
        x = torch.linspace(-1, 1, 4 * 64).view(4, 64).bfloat16() * (1 + step % 2)
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.save_checkpoint("saved") if where else None
    found = len(list(pathlib.Path("däta disk").rglob("*.swp"))) if where else 0
    engine.destroy()
    return losses, found


memory, _ = train({})
disk_, found = train(files)
print("losses", memory, disk_)
print("equal", memory == disk_, "falls", disk_[5] < disk_[1], "files", found > 5)
"""


def test_training_from_files_is_training_from_memory(windows, folder):
    (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
    done = windows.python("train.py", "29733", cwd=folder, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "equal True falls True files True" in done.stdout, done.stdout
