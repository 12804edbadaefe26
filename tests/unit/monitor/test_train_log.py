# SPDX-License-Identifier: Apache-2.0
"""A run's CSV as a picture: what is read, where a column goes, and what is said where nothing can be drawn."""

from __future__ import annotations

import sys

import pytest
import torch

import deepspeed
from deepspeed import env_report
from deepspeed.monitor import train_log

PNG = b"\x89PNG\r\n\x1a\n"


def test_columns_go_to_their_panel():
    panels = {
        "Train_Samples_train_loss": "loss",
        "Train_Samples_lr": "learning rate",
        "Train/Samples/loss_scale": None,
        "grad_norm": "gradient norm",
        "samples_per_second": "throughput",
        "memory_gb": "memory",
        "color": None,
        "Train_Samples_elapsed_time_ms_forward": None,
    }
    assert {name: train_log.panel_of(name) for name in panels} == panels


def test_one_file_has_a_column_a_curve_and_holes_stay_out(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("\ufeffstep,loss,lr\n1,2.5,0.1\n2,,0.2\n3,nonsense\n4,1.5,0.4\n", "utf-8")
    loss, rate = train_log.read(path)
    assert (loss.name, loss.steps, loss.values) == ("loss", [1.0, 4.0], [2.5, 1.5])
    assert (rate.steps, rate.values) == ([1.0, 2.0, 4.0], [0.1, 0.2, 0.4])


def test_a_run_with_the_csv_monitor_becomes_one_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    engine, *_ = deepspeed.initialize(
        model=torch.nn.Linear(4, 1),
        config={
            "train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "Adam", "params": {"lr": 0.5}},
            "zero_optimization": {"stage": 1},
            "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "a run"},
        },
    )
    losses = []
    for _ in range(3):
        for _ in range(2):
            loss = engine(torch.ones(2, 4)).square().mean()
            losses.append(loss.item())
            engine.backward(loss)
            engine.step()
    found = {series.name: series for series in train_log.read(tmp_path)}
    loss = found["Train_Samples_train_loss"]
    assert loss.steps == [4.0, 8.0, 12.0]
    want = [(losses[i] + losses[i + 1]) / 2 for i in (0, 2, 4)]
    assert loss.values == pytest.approx(want, rel=1e-6)  # fp32 sums
    assert found["Train_Samples_lr"].values == [0.5] * 3
    assert all(value > 0 for value in found["Train_Samples_grad_norm"].values)
    assert len(found["Train_Samples_samples_per_second"].values) == 2  # from the second step on
    assert all(0.01 < value < 1000 for value in found["Train_Samples_memory_gb"].values)

    env_report.cli_main(["--train-log", str(tmp_path / "a run")])
    out = tmp_path / "a run" / "train_log.png"
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes().startswith(PNG)
    assert "matplotlib.pyplot" not in sys.modules  # which may look for a display


def test_the_picture_goes_where_it_is_told_to(tmp_path):
    pytest.importorskip("matplotlib")
    log = tmp_path / "run.csv"
    log.write_text("loss,color\n1,2\n2,3\n", "utf-8")
    out, left_out = train_log.draw(log, tmp_path / "new" / "a.png")
    assert out.read_bytes().startswith(PNG)
    assert left_out == ["color"]
    assert train_log.draw(log)[0] == tmp_path / "run.png"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "no column of numbers"),
        ("a,b\nx,y\n", "no column of numbers"),
        ("step,color\n1,2\n", "nothing to draw: got color, expected columns about loss"),
    ],
)
def test_what_cannot_be_drawn_is_said(text, message, tmp_path, capsys):
    log = tmp_path / "run.csv"
    if text is not None:
        log.write_text(text, "utf-8")
    with pytest.raises(SystemExit):
        env_report.cli_main(["--train-log", str(log)])
    assert message in capsys.readouterr().err


def test_an_empty_folder_names_the_section(tmp_path):
    with pytest.raises(FileNotFoundError, match="csv_monitor"):
        train_log.read(tmp_path)


def test_without_matplotlib_the_package_is_named(tmp_path, monkeypatch):
    log = tmp_path / "run.csv"
    log.write_text("loss\n1\n", "utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        train_log.draw(log)
