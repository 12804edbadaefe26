# SPDX-License-Identifier: Apache-2.0
"""What the recorders write, where, and that only rank 0 does."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from deepspeed.monitor import base
from deepspeed.monitor.comet import EventsLogScheduler
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

EVENTS = [("Train/Samples/train_loss", 1.5, 10), ("Train/Samples/lr", torch.tensor(0.25), 10)]


def csv_master(folder, job="job"):
    section = {"enabled": True, "output_path": str(folder), "job_name": job}
    return MonitorMaster(get_monitor_config({"csv_monitor": section}))


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_csv_has_one_file_a_metric(tmp_path):
    master = csv_master(tmp_path, "my job")
    master.write_events(EVENTS)
    master.write_events([("Train/Samples/lr", 2, 20)])
    assert files(tmp_path / "my job") == {
        "Train_Samples_train_loss.csv": b"step,train_loss\r\n10,1.5\r\n",
        "Train_Samples_lr.csv": b"step,lr\r\n10,0.25\r\n20,2\r\n",
    }


def test_csv_of_a_resumed_run_goes_on_without_a_second_header(tmp_path):
    csv_master(tmp_path).write_events([("a", 1, 1)])
    csv_master(tmp_path).write_events([("a", 2, 2)])
    assert files(tmp_path / "job") == {"a.csv": b"step,a\r\n1,1\r\n2,2\r\n"}


def test_csv_names_are_good_on_windows_and_text_is_utf8(tmp_path):
    csv_master(tmp_path).write_events([('a b/c:d*?"<>|\\é', 1, 1)])
    assert files(tmp_path / "job") == {
        "a_b_c_d_______é.csv": 'step,"c:d*?""<>|\\é"\r\n1,1\r\n'.encode()
    }


def test_an_empty_output_path_is_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    master = MonitorMaster(get_monitor_config({"csv_monitor": {"enabled": True}}))
    master.write_events([("a", 1, 1)])
    assert (tmp_path / "DeepSpeedJobName" / "a.csv").is_file()


def test_nothing_enabled_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    master = MonitorMaster(get_monitor_config({}))
    assert not master.enabled
    master.write_events(EVENTS)
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    master = csv_master(tmp_path)
    assert master.enabled
    assert master.csv_monitor is None
    master.write_events(EVENTS)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_scalars_in_the_job_folder(tmp_path, monkeypatch):
    writers = []

    class Writer:
        def __init__(self, log_dir):
            self.log_dir, self.rows, self.flushes = log_dir, [], 0
            writers.append(self)

        def add_scalar(self, *row):
            self.rows.append(row)

        def flush(self):
            self.flushes += 1

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "tensorboard", ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    master = MonitorMaster(get_monitor_config({"tensorboard": section}))
    master.write_events(EVENTS)
    assert writers[0].log_dir == str(tmp_path / "job")
    assert (tmp_path / "job").is_dir()
    assert writers[0].rows == [(EVENTS[0][0], 1.5, 10), (EVENTS[1][0], 0.25, 10)]
    assert writers[0].flushes == 1
    master.tb_monitor.write_events(EVENTS, flush=False)
    assert writers[0].flushes == 1


def test_wandb_starts_a_run_and_logs(monkeypatch):
    calls = []
    module = ModuleType("wandb")
    module.init = lambda **kw: calls.append(("init", kw))
    module.log = lambda data, **kw: calls.append((data, kw))
    monkeypatch.setitem(sys.modules, "wandb", module)
    section = {"enabled": True, "group": "g", "team": "t", "project": "p"}
    MonitorMaster(get_monitor_config({"wandb": section})).write_events(EVENTS)
    assert calls == [
        ("init", {"project": "p", "group": "g", "entity": "t"}),
        ({EVENTS[0][0]: 1.5}, {"step": 10, "commit": None}),
        ({EVENTS[1][0]: 0.25}, {"step": 10, "commit": None}),
    ]


def test_comet_logs_one_event_in_an_interval(monkeypatch):
    calls = []
    experiment = SimpleNamespace(
        set_name=lambda name: calls.append(name),
        log_metric=lambda name, value, step: calls.append((name, value, step)),
    )
    module = ModuleType("comet_ml")
    module.start = lambda **kw: calls.append(kw) or experiment
    monkeypatch.setitem(sys.modules, "comet_ml", module)
    section = {
        "enabled": True,
        "samples_log_interval": 10,
        "project": "p",
        "experiment_name": "name",
        "mode": "create",
    }
    master = MonitorMaster(get_monitor_config({"comet": section}))
    for step in (0, 4, 10, 19, 20):
        master.write_events([("a", 0.5, step)])
    assert calls[0]["project"] == "p"
    assert calls[0]["mode"] == "create"
    assert calls[1:] == ["name", ("a", 0.5, 0), ("a", 0.5, 10), ("a", 0.5, 20)]
    assert master.comet_monitor.experiment is experiment


def test_thinning_counts_each_name_apart():
    scheduler = EventsLogScheduler(10)
    assert [scheduler.needs_logging("a", s) for s in (5, 14, 15)] == [True, False, True]
    assert scheduler.needs_logging("b", 16)


@pytest.mark.parametrize(
    ("section", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")],
)
def test_a_missing_package_is_named(section, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}") as caught:
        MonitorMaster(get_monitor_config({section: {"enabled": True}}))
    assert caught.value.name == package


def test_numbers_are_taken_out_of_tensors():
    assert base.plain(torch.tensor([3])) == 3
    assert base.plain("text") == "text"
