# SPDX-License-Identifier: Apache-2.0
"""State in files: the same training, little memory, clear errors."""

from __future__ import annotations

import pytest
import torch

import deepspeed
from deepspeed.ops.registry import use_isa
from deepspeed.runtime.zero import plan
from deepspeed.runtime.zero.spill import SpilledSlice, SpillFolder
from tests.helpers.parity import SLABS_ROUND_ALIKE, Cell, batch, compare, engine_run, loss_of, model


@pytest.fixture
def reference_rule(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("DS_LOWP_PRODUCTS", "0")
    use_isa("reference")
    yield
    use_isa("auto")


def zero(stage, folder, states="nvme", params=None, **extra):
    section = {"stage": stage, "sub_group_size": 300, **extra}
    if states:
        section["offload_optimizer"] = {"device": states, "nvme_path": str(folder)}
    if params:
        section["offload_param"] = {"device": params, "nvme_path": str(folder)}
        section["stage3_param_persistence_threshold"] = 0
    return {"zero_optimization": section}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("stage", "states", "params"),
    [
        (1, "nvme", None),
        (2, "nvme", None),
        (3, "nvme", None),
        (3, "nvme", "nvme"),
        (3, "cpu", "nvme"),
        (3, None, "nvme"),
        (3, "nvme", "cpu"),
    ],
)
def test_training_from_files_is_training_from_memory(
    stage, states, params, dtype, tmp_path, reference_rule
):
    folder = tmp_path / "mit Leerzeichen und ä"
    plain = Cell(stage, dtype, accumulate=3, clip=True)
    spilled = Cell(stage, dtype, accumulate=3, clip=True, extra=zero(stage, folder, states, params))
    compare(engine_run(spilled), engine_run(plain), spilled, exact=True)


@pytest.mark.parametrize(("wanted", "small", "parts"), [(1, 1000, 4), (100, 1000, 2), (1, 12, 12)])
def test_tiny_sub_groups_are_not_a_file_each(wanted, small, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MOST_SMALL_PARTS", 4)
    monkeypatch.setattr(plan, "SMALL_PART", small)
    cell = {"train_micro_batch_size_per_gpu": 1, **zero(1, tmp_path, sub_group_size=wanted)}
    cell["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2}}
    engine = deepspeed.initialize(model=torch.nn.Linear(16, 9, bias=False), config=cell)[0]
    assert len(engine.optimizer.groups[0].parts) == parts


def start(folder, **extra):
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": True},
        **zero(3, folder, "nvme", "nvme"),
        **extra,
    }
    return deepspeed.initialize(model=model(), config=config)[0]


def step(engine):
    loss = loss_of(engine, *batch(0, 0, 0, torch.bfloat16))
    engine.backward(loss)
    engine.step()
    return loss.item()


def test_between_steps_nothing_but_gradients_is_in_memory(tmp_path):
    engine = start(tmp_path)
    for _ in range(2):
        step(engine)
    for group in engine.optimizer.groups:
        assert group.own is None and len(group.parts) > 1
        for part in group.parts:
            assert part.master.numel() == 0 and part.low is None
            state = engine.optimizer.state[part.master]
            assert all(v.numel() <= 1 for v in state.values() if isinstance(v, torch.Tensor))
    assert all(p.numel() == 0 and p.ds_tensor.numel() == 0 for p in engine.module.parameters())


def test_another_optimizer_of_torch_steps_from_files_too(tmp_path):
    runs = []
    for section in (zero(2, tmp_path), {"zero_optimization": {"stage": 2}}):
        net = model()
        config = {
            "train_micro_batch_size_per_gpu": 3,
            "zero_allow_untested_optimizer": True,
            **section,
        }
        config["zero_force_ds_cpu_optimizer"] = False
        client = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        engine, *_ = deepspeed.initialize(model=net, optimizer=client, config=config)
        for micro in range(3):
            engine.backward(loss_of(engine, *batch(0, micro, 0, torch.float32)))
            engine.step()
        runs.append([p.detach().clone() for p in net.parameters()])
    tolerance = 0.0 if SLABS_ROUND_ALIKE else 4e-7  # an ulp of fp32 at 1 for each of the steps
    torch.testing.assert_close(runs[0], runs[1], rtol=0.0, atol=tolerance)


def test_files_go_when_the_engine_does(tmp_path):
    engine = start(tmp_path)
    step(engine)
    assert list((tmp_path / "optimizer").rglob("*.swp"))
    engine.destroy()
    assert not list((tmp_path / "optimizer").rglob("*.swp"))


def test_a_folder_is_needed():
    config = {
        "train_batch_size": 3,
        "optimizer": {"type": "Adam"},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}},
    }
    with pytest.raises(deepspeed.DeepSpeedConfigError, match="nvme_path"):
        deepspeed.initialize(model=model(), config=config)


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(OSError, match="nvme_path"):
        start(tmp_path / "file")


def test_a_file_that_vanishes_in_mid_run_is_named(tmp_path):
    engine = start(tmp_path)
    step(engine)
    for file in (tmp_path / "optimizer").rglob("*.swp"):
        file.unlink()
    with pytest.raises(OSError, match=r"swp"):
        step(engine)


def test_a_slice_is_read_as_it_was_written(tmp_path):
    folder = SpillFolder(tmp_path / "slices")
    slice_ = SpilledSlice(folder, "a.swp", torch.arange(10.0))
    slice_.start()
    slice_.write(3, torch.tensor([-1.0, -2.0]))
    assert slice_.take().tolist() == [0, 1, 2, -1, -2, 5, 6, 7, 8, 9]
    assert SpilledSlice(folder, "b.swp", torch.empty(0)).take().numel() == 0
    folder.close()


def test_an_edit_reaches_the_master_in_its_file(tmp_path):
    for section in (zero(3, tmp_path), zero(3, tmp_path, "nvme", "nvme")):
        engine = start(tmp_path, **section)
        step(engine)
        param = next(engine.module.parameters())
        with deepspeed.zero.GatheredParameters(param, modifier_rank=0), torch.no_grad():
            param.fill_(3.0)
        assert (deepspeed.utils.safe_get_full_fp32_param(param) == 3.0).all()
        step(engine)
        engine.destroy()


@pytest.mark.parametrize("files", [False, True])
def test_adagrad_of_torch_goes_on_from_the_states_of_its_constructor(files, tmp_path, caplog):
    net, plain = model(), model()
    options = {"lr": 0.1, "initial_accumulator_value": 0.5}
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **(zero(2, tmp_path) if files else {"zero_optimization": {"stage": 2}}),
    }
    by_hand = torch.optim.Adagrad(plain.parameters(), **options)
    with caplog.at_level("WARNING", "DeepSpeed"):
        client = torch.optim.Adagrad(net.parameters(), **options)
        engine, *_ = deepspeed.initialize(model=net, optimizer=client, config=config)
    assert "has taken steps" not in caplog.text
    for micro in range(3):
        engine.backward(loss_of(engine, *batch(0, micro, 0, torch.float32)))
        engine.step()
        loss_of(plain, *batch(0, micro, 0, torch.float32)).backward()
        by_hand.step()
        by_hand.zero_grad()
    got, want = ([p.detach() for p in m.parameters()] for m in (net, plain))
    torch.testing.assert_close(got, want, rtol=0.0, atol=4e-7)  # as above
