# SPDX-License-Identifier: Apache-2.0
"""Schedules against numbers recorded from DeepSpeed 0.19.8, and what is ours: no warm-up, tensors.

golden.json: per case the rates (and OneCycle's first beta) of each group when built, then at some t.
Groups have rates 0.01, 0.02, ... before the schedule is built.
"""

import argparse
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deepspeed.runtime import lr_schedules
from deepspeed.runtime.lr_schedules import (
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
)

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))

# The recorded numbers and ours come from different orders of a few float64 operations on values of
# at most 20: some ulp, 1e-15 each.
TOLERANCE = 1e-12


def adam(groups=1):
    params = [
        {"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.01 * (i + 1)}
        for i in range(groups)
    ]
    return torch.optim.Adam(params)


def lrs(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def rows(optimizer, with_beta):
    return [
        [group["lr"], group["betas"][0]] if with_beta else [group["lr"]]
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['schedule']}-{c['params']}")
def test_rates_match_the_recorded_ones(case):
    optimizer = adam(case["groups"])
    with_beta = case["schedule"] == "OneCycle"
    schedule = getattr(lr_schedules, case["schedule"])(optimizer, **case["params"])
    for got, wanted in zip(rows(optimizer, with_beta), case["first"], strict=True):
        assert got == pytest.approx(wanted, abs=TOLERANCE)
    t = -1
    for wanted_t, wanted in case["points"]:
        while t < wanted_t:
            schedule.step()
            t += 1
        for got, want in zip(rows(optimizer, with_beta), wanted, strict=True):
            assert got == pytest.approx(want, abs=TOLERANCE), f"t={t}"
        assert schedule.get_last_lr() == lrs(optimizer)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['schedule']}-{c['params']}")
def test_a_loaded_state_continues_where_it_was_saved(case):
    build = getattr(lr_schedules, case["schedule"])
    first, second = adam(case["groups"]), adam(case["groups"])
    schedule, resumed = build(first, **case["params"]), build(second, **case["params"])
    for _ in range(7):
        schedule.step()
    state = schedule.state_dict()
    assert list(state) == ["last_batch_iteration"]
    untouched = lrs(second)
    resumed.load_state_dict(state)
    assert lrs(second) == untouched  # the optimizer's own checkpoint restores the rates
    assert resumed.get_last_lr() == schedule.get_last_lr()
    schedule.step()
    resumed.step()
    assert lrs(first) == lrs(second)


@pytest.mark.parametrize("kind", ["log", "linear"])
@pytest.mark.parametrize(
    ("build", "peak"),
    [
        (lambda o, kind: WarmupLR(o, warmup_num_steps=0, warmup_type=kind), 0.01),
        (lambda o, kind: WarmupDecayLR(o, 10, 0.0, 0.5, 0, kind), 0.5),
        (lambda o, kind: WarmupCosineLR(o, 10, warmup_num_steps=0, warmup_type=kind), 0.01),
    ],
)
def test_no_warmup_starts_at_the_peak(build, peak, kind):
    optimizer = adam()
    schedule = build(optimizer, kind)
    assert lrs(optimizer) == [peak]
    schedule.step()
    # cosine: already one tenth down the half wave
    wanted = peak
    if isinstance(schedule, WarmupCosineLR):
        wanted = peak * (1e-4 + (1 - 1e-4) * (1 + math.cos(math.pi / 10)) / 2)
    assert lrs(optimizer) == pytest.approx([wanted], abs=TOLERANCE)


@pytest.mark.parametrize("steps", [-1, 2.5, "auto", True, None])
@pytest.mark.parametrize("build", [WarmupLR, lambda o, **kw: WarmupDecayLR(o, 9, **kw)])
def test_warmup_steps_must_be_whole(build, steps):
    with pytest.raises(ValueError, match="warmup_num_steps must be a non-negative integer"):
        build(adam(), warmup_num_steps=steps)


@pytest.mark.parametrize("size", [0, -5, 2.0, "x"])
def test_range_test_step_size_must_be_a_positive_integer(size):
    with pytest.raises(ValueError, match="lr_range_test_step_size must be a positive integer"):
        LRRangeTest(adam(), lr_range_test_step_size=size)


def test_a_list_needs_one_value_for_each_group():
    with pytest.raises(ValueError, match="expected 2 warmup_min_lr"):
        WarmupLR(adam(2), warmup_min_lr=[0.1, 0.2, 0.3])


@pytest.mark.parametrize(("first", "second"), [(0, None), (-1, 4), (4, -1), (0, 4)])
def test_a_cycle_needs_steps(first, second):
    with pytest.raises(ValueError, match="too few steps"):
        OneCycle(adam(), 0.1, 0.2, cycle_first_step_size=first, cycle_second_step_size=second)


def test_a_cycle_may_lack_its_falling_half():
    schedule = OneCycle(adam(), 0.1, 0.4, cycle_first_step_size=3, cycle_second_step_size=0)
    rates = [schedule.get_lr()[0]]
    for _ in range(3):
        schedule.step()
        rates += schedule.get_lr()
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.1])


def test_each_group_has_its_momentum():
    optimizer = adam(2)
    schedule = OneCycle(
        optimizer,
        0.1,
        1.0,
        cycle_first_step_size=2,
        cycle_min_mom=[0.5, 0.6],
        cycle_max_mom=[0.7, 1.0],
    )
    seen = []
    for _ in range(2):
        schedule.step()
        seen.append([group["betas"][0] for group in optimizer.param_groups])
    assert seen == [pytest.approx([0.6, 0.8]), pytest.approx([0.5, 0.6])]
    with pytest.raises(ValueError, match="expected 2 cycle_max_mom"):
        OneCycle(optimizer, 0.1, 1.0, cycle_max_mom=[0.9])


def test_minus_one_of_the_command_line_means_the_default():
    plain, optioned = adam(), adam()
    one = OneCycle(plain, 0.1, 1.0, cycle_first_step_size=4)
    words = ["--lr_schedule", "OneCycle", "--cycle_first_step_size", "4"]
    words += ["--cycle_min_lr", "0.1", "--cycle_max_lr", "1.0", "--cycle_momentum"]
    section, _ = lr_schedules.get_config_from_args(parse(*words))
    two = OneCycle(optioned, **section["params"])
    for _ in range(10):
        one.step()
        two.step()
        assert lrs(plain) == lrs(optioned)


def test_last_lr_is_not_known_before_it_is_set():
    for schedule in (
        OneCycle(adam(), 0.1, 1.0),
        WarmupLR(adam(), last_batch_iteration=3),
        LRRangeTest(adam(), last_batch_iteration=3),
        WarmupCosineLR(adam(), 2000, last_batch_iteration=3),
    ):
        with pytest.raises(AssertionError, match="need to call step"):
            schedule.get_last_lr()
        schedule.step()
        assert schedule.get_last_lr() == lrs(schedule.optimizer)


def test_a_resumed_schedule_leaves_the_rates_alone_until_it_steps():
    optimizer = adam()
    schedule = WarmupLR(optimizer, warmup_num_steps=10, last_batch_iteration=4)
    assert lrs(optimizer) == [0.01]
    schedule.step()
    assert lrs(optimizer) == pytest.approx([0.01 * math.log(6) / math.log(10)], abs=TOLERANCE)


def test_step_can_be_told_where_it_is():
    optimizer = adam()
    schedule = WarmupLR(optimizer, warmup_num_steps=10, warmup_type="linear")
    schedule.step(last_batch_iteration=5)
    assert schedule.state_dict() == {"last_batch_iteration": 5}
    assert lrs(optimizer) == pytest.approx([0.005], abs=TOLERANCE)
    schedule.step()
    assert schedule.last_batch_iteration == 6


def test_tensor_rates_are_written_in_place_and_read_once():
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([param], lr=torch.tensor(0.5, dtype=torch.float64))
    held = optimizer.param_groups[0]["lr"]
    schedule = WarmupLR(optimizer, warmup_num_steps=4, warmup_type="linear")
    assert held.item() == 0.0
    for _ in range(6):
        schedule.step()
    # the peak is the rate at construction, not what the shared tensor holds by now
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == 0.5
    assert schedule.get_last_lr() == [0.5]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_cycle_without_betas_only_drives_the_rate(momentum):
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=1.0, momentum=momentum)
    schedule = OneCycle(optimizer, 0.1, 0.5, cycle_first_step_size=2)
    seen = []
    for _ in range(4):
        schedule.step()
        seen += lrs(optimizer)
    assert seen == pytest.approx([0.3, 0.5, 0.3, 0.1], abs=TOLERANCE)
    assert optimizer.param_groups[0]["momentum"] == momentum
    assert schedule.get_mom() is None


def test_one_cycle_sets_both_betas_and_reports_them():
    optimizer = adam()
    schedule = OneCycle(optimizer, 0.1, 0.5, cycle_first_step_size=2)
    schedule.step()
    assert optimizer.param_groups[0]["betas"] == schedule.get_mom()[0]
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.85, 0.99))


def test_wrapped_optimizers_are_unwrapped():
    optimizer = adam()
    wrapper = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert lr_schedules.get_torch_optimizer(wrapper) is optimizer
    WarmupLR(wrapper, warmup_min_lr=0.3)
    assert lrs(optimizer) == [0.3]


@pytest.mark.parametrize("thing", [object(), None, SimpleNamespace(optimizer=3)])
def test_what_holds_no_optimizer_is_refused(thing):
    with pytest.raises(TypeError, match="not a subclass"):
        lr_schedules.get_torch_optimizer(thing)


def test_unknown_warmup_type_warns_and_means_log(monkeypatch):
    said = []
    logger = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(logger, "warning", lambda text, *a: said.append(text))
    optimizer = adam()
    schedule = WarmupLR(optimizer, warmup_num_steps=10, warmup_type="cubic")
    assert schedule.warmup_type == "log"
    assert len(said) == 1
    assert "cubic" in said[0]


def parse(*argv):
    return lr_schedules.add_tuning_arguments(argparse.ArgumentParser()).parse_args(argv)


@pytest.mark.parametrize("name", ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupCosineLR"])
def test_options_make_a_section_that_builds(name):
    section, error = lr_schedules.get_config_from_args(parse("--lr_schedule", name))
    assert error is None
    assert section["type"] == name
    extra = {"total_num_steps": 2000} if name == "WarmupCosineLR" else {}
    schedule = getattr(lr_schedules, name)(adam(), **section["params"], **extra)
    schedule.step()
    assert all(lr > 0 for lr in schedule.get_lr()) or name.startswith("Warmup")


def test_options_keep_their_defaults():
    assert vars(parse()) == {
        "lr_schedule": None,
        "lr_range_test_min_lr": 0.001,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_step_size": 1000,
        "lr_range_test_staircase": False,
        "cycle_first_step_size": 1000,
        "cycle_first_stair_count": -1,
        "cycle_second_step_size": -1,
        "cycle_second_stair_count": -1,
        "decay_step_size": 1000,
        "cycle_min_lr": 0.01,
        "cycle_max_lr": 0.1,
        "decay_lr_rate": 0.0,
        "cycle_momentum": False,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0.0,
        "warmup_min_lr": 0,
        "warmup_max_lr": 0.001,
        "warmup_num_steps": 1000,
        "warmup_type": "log",
        "warmup_min_ratio": 0.01,
        "cos_min_ratio": 0.01,
    }


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "--lr_schedule not specified on command line"),
        (["--lr_schedule", "Foo"], "Foo is not supported LR schedule"),
    ],
)
def test_options_without_a_known_schedule_make_none(argv, reason):
    assert lr_schedules.get_config_from_args(parse(*argv)) == (None, reason)


def test_options_override_only_what_they_name():
    params = {"keep": 1, "cycle_min_lr": 9.0}
    lr_schedules.override_params(argparse.Namespace(cycle_max_lr=None, warmup_num_steps=5), params)
    assert params == {"keep": 1, "cycle_min_lr": 9.0, "warmup_num_steps": 5}


@pytest.mark.parametrize(
    ("section", "lr"),
    [
        ({"type": "OneCycle", "params": {"cycle_max_lr": 3}}, 3),
        ({"type": "LRRangeTest", "params": {"lr_range_test_min_lr": 2}}, 2),
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 4}}, 4),
        ({"type": "WarmupDecayLR", "params": {"warmup_max_lr": 5}}, 5),
        ({"type": "WarmupCosineLR", "params": {"warmup_max_lr": 4}}, None),
        ({"type": "OneCycle", "params": {}}, None),
        ({"type": "OneCycle"}, None),
        ({"params": {}}, None),
        ({"type": "Foo", "params": {}}, None),
    ],
)
def test_rate_of_a_section(section, lr):
    found, reason = lr_schedules.get_lr_from_config(section)
    assert found == lr
    assert bool(reason) == (lr is None)
