# SPDX-License-Identifier: Apache-2.0
"""Norms, clipping, overflow, partitions and memory lines, against plain torch and brute force."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepspeed.runtime import compiler, utils
from deepspeed.runtime.utils import partition_balanced, partition_uniform


def params(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in ((3, 4), (7,), ()):
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        param.grad = torch.randn(shape, generator=generator).to(dtype)
        made.append(param)
    return made


# ------------------------------------------------------------------ norms
@pytest.mark.parametrize("norm_type", [1, 2, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping_equals_torchs_bit_for_bit(norm_type, max_norm):
    ours, theirs = params(), params()
    norm = utils.clip_grad_norm_(ours, max_norm, norm_type)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type))
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_low_precision_are_taken_in_fp32(dtype):
    made = params(dtype)
    exact = torch.cat([param.grad.double().reshape(-1) for param in made]).norm()
    norm = utils.clip_grad_norm_(made, 0.5)
    assert norm.dtype == torch.float32
    # 20 squares summed in fp32: a few units in its last place
    assert float(norm) == pytest.approx(float(exact), rel=1e-6)
    clipped = torch.cat([param.grad.double().reshape(-1) for param in made]).norm()
    # each element is rounded once to the dtype
    assert float(clipped) == pytest.approx(0.5, rel=torch.finfo(dtype).eps)


def test_clipping_takes_one_tensor_generators_and_nothing():
    (one, *_) = params()
    before = one.grad.norm()
    assert utils.clip_grad_norm_(one, 0.1) == before
    assert float(one.grad.norm()) == pytest.approx(0.1, rel=1e-4)
    assert utils.clip_grad_norm_((param for param in params()), 1.0) > 1
    assert utils.clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0) == 0


def test_weight_and_gradient_norms_agree_with_float64():
    made = params()
    weights = torch.cat([param.detach().double().reshape(-1) for param in made])
    grads = torch.cat([param.grad.double().reshape(-1) for param in made])
    # float32 sums of 20 squares
    assert utils.get_weight_norm(made) == pytest.approx(float(weights.norm()), rel=1e-6)
    assert utils.get_grad_norm(made) == pytest.approx(float(grads.norm()), rel=1e-6)
    assert utils.get_weight_norm(made, math.inf) == float(weights.abs().max())
    assert utils.get_flattened_grad_norm(made) == utils.get_grad_norm(made)
    made[0].grad[0, 0] = math.nan
    assert utils.get_grad_norm(made) == -1


def test_only_the_first_rank_counts_what_all_shares_have(monkeypatch):
    made = params()
    made[1].model_parallel = True
    made[2].ds_pipe_replicated = True
    second = SimpleNamespace(get_model_parallel_rank=lambda: 1)
    first = SimpleNamespace(get_model_parallel_rank=lambda: 0)
    sevens = float(made[1].detach().norm())
    assert utils.get_weight_norm(made, mpu=second) == sevens
    assert utils.get_weight_norm(made, mpu=first) == pytest.approx(
        math.hypot(sevens, float(made[0].detach().norm())), rel=1e-6
    )


def test_norms_of_parts_combine():
    assert utils.get_global_norm([3.0, 4.0]) == 5.0
    assert utils.get_global_norm([]) == 0.0
    tensors = [torch.full((4,), 3.0), torch.full((4,), 4.0)]
    assert utils.get_global_norm_of_tensors(tensors) == 10
    assert utils.clip_tensors_by_global_norm(tensors, max_norm=1.0) == 10
    assert float(utils.get_global_norm_of_tensors(tensors)) == pytest.approx(1, rel=1e-5)
    assert utils.clip_tensors_by_global_norm(tensors, 100.0, global_norm=1.0) == 1.0


def test_zeros_in_gradients_are_counted():
    made = params()
    made[1].grad[:3] = 0
    assert utils.get_grad_zeros(made) == 3


@pytest.mark.parametrize(
    ("value", "bad"), [(math.inf, True), (-math.inf, True), (math.nan, True), (6e4, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_overflow_is_found_in_every_dtype(dtype, value, bad):
    made = params(dtype)
    checker = utils.CheckOverflow([made])
    assert not checker.check()
    made[1].grad[3] = value
    assert checker.check() is bad
    assert checker.check([made[:1]]) is False
    assert bool(utils.CheckOverflow._has_inf_or_nan(made[1].grad)) is bad


def test_overflow_shows_in_norms():
    checker = utils.CheckOverflow()
    assert checker.check_using_norm([1.0, -1])
    assert checker.check_using_norm([1.0, math.inf])
    assert not checker.check_using_norm([1.0, 2.0])


# ------------------------------------------------------------------ partitions
@pytest.mark.parametrize(
    ("items", "parts", "bounds"),
    [(10, 3, [0, 4, 7, 10]), (2, 4, [0, 1, 2, 2, 2]), (0, 2, [0, 0, 0]), (6, 3, [0, 2, 4, 6])],
)
def test_uniform_parts(items, parts, bounds):
    assert partition_uniform(items, parts) == bounds


def heaviest(weights, bounds):
    return max(sum(weights[a:b]) for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("seed", range(8))
def test_balanced_parts_are_as_light_as_any_cut(seed):
    rng = random.Random(seed)
    weights = [rng.randint(0, 9) for _ in range(8)]
    for parts in range(1, 8):
        bounds = partition_balanced(weights, parts)
        assert bounds[0] == 0
        assert bounds[-1] == 8
        assert len(bounds) == parts + 1
        assert bounds == sorted(bounds)
        best = min(
            heaviest(weights, [0, *cut, 8])
            for cut in itertools.combinations_with_replacement(range(9), parts - 1)
        )
        assert heaviest(weights, bounds) == best


def test_balanced_parts_of_few_items():
    assert partition_balanced([1, 1, 1, 1], 8) == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    assert partition_balanced([1, 2, 3, 4, 5], 2) == [0, 3, 5]
    assert utils.prefix_sum_inc([1, 2, 3]) == [1, 3, 6]


def test_alignment_adds_zeros():
    tensors = [torch.ones(3), torch.ones(4)]
    assert [t.tolist() for t in utils.align_dense_tensors(tensors, 4)[2:]] == [[0.0]]
    assert len(utils.align_dense_tensors(tensors, 7)) == 2


# ------------------------------------------------------------------ conveniences
def test_nested_values_move_and_others_stay():
    pair = namedtuple("pair", "left right")
    item = {"a": [torch.ones(1), (torch.ones(2), 3)], "b": pair(torch.ones(1), "text")}
    moved = utils.move_to_device(item, "meta")
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == "meta"
    assert (moved["a"][1][1], moved["b"].right) == (3, "text")
    assert type(moved["b"]) is pair
    assert item["a"][0].device.type == "cpu"
    big = utils.move_to_device(
        [torch.ones(1), torch.ones(9)],
        "meta",
        lambda value: torch.is_tensor(value) and value.numel() > 5,
    )
    assert [tensor.device.type for tensor in big] == ["cpu", "meta"]
    assert utils.get_tensor_bytes(item) == 4 * 4
    source = torch.ones(2)
    copy = utils.copy_to_device([source], "cpu", torch.is_tensor)[0]
    copy.zero_()
    assert source.eq(1).all()


def test_a_seed_fixes_all_three_generators():
    def draw():
        utils.set_random_seed(7)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_folders_are_made_for_files(tmp_path):
    utils.ensure_directory_exists(tmp_path / "a" / "b" / "file.txt")
    assert (tmp_path / "a" / "b").is_dir()
    utils.ensure_directory_exists("file.txt")


def test_small_things():
    assert utils.call_to_str("f", 1, a="x") == "f(1, a='x')"
    assert utils.get_only_unique_item([2, 2]) == 2
    with pytest.raises(RuntimeError, match="expected one value"):
        utils.get_only_unique_item([1, 2])
    assert utils.noop_decorator(len) is len
    with utils.noop_context():
        pass
    made = params()
    assert list(utils.DummyOptim(made).param_groups[0]["params"]) == made
    assert utils.required_torch_version(min_version="2.3")
    utils.empty_cache()


# ------------------------------------------------------------------ memory lines
def test_memory_is_printed_only_when_forced(capsys):
    utils.see_memory_usage("quiet")
    utils.see_memory_usage("after step", force=True)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "after step"
    assert re.fullmatch(
        r"MA [\d.]+ GB         Max_MA [\d.]+ GB         CA [\d.]+ GB         Max_CA \d+ GB ", second
    )
    assert re.fullmatch(r"CPU Virtual Memory:  used = [\d.]+ GB, percent = [\d.]+%", third)


def test_memory_status_names_rank_and_message(capsys):
    utils.memory_status("here", reset_max=True)
    utils.memory_status("elsewhere", print_rank=4)
    line = capsys.readouterr().out
    assert re.match(r"RANK=0 MEMSTATS here device=\w+ current alloc=[\d.]+GB \(delta=", line)
    assert line.count("\n") == 1


# ------------------------------------------------------------------ compiler
def test_disabled_functions_run_and_do_not_import_dynamo(monkeypatch):
    monkeypatch.delitem(compiler.sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(torch.compiler, "disable", lambda func: pytest.fail("dynamo was touched"))

    @compiler.disable
    def double(x):
        return 2 * x

    assert double(4) == 8
    assert double.__name__ == "double"


def test_disabled_functions_go_through_dynamo_once_it_is_there(monkeypatch):
    monkeypatch.setitem(compiler.sys.modules, "torch._dynamo", object())
    monkeypatch.setattr(torch.compiler, "disable", lambda func: lambda x: ("kept out", func(x)))
    assert compiler.disable(abs)(-4) == ("kept out", 4)


def test_enable_compiles_only_where_torch_is_new_enough(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda func: ("compiled", func))
    assert compiler.enable(min_version="2.3")(len) == ("compiled", len)
    assert compiler.enable(min_version="99.0")(len) is len
    assert compiler.enable()(len) == ("compiled", len)
    assert compiler.is_compile_supported()
    assert not compiler.is_compiling()
    assert compiler.dummy_decorator(len) is len


def test_compiled_autograd_can_be_off():
    with compiler.compiled_autograd(False, {}):
        x = torch.ones(1, requires_grad=True)
        (x * 2).backward()
    assert x.grad == 2


def test_used_parameters_are_counted_inside_a_backward_pass():
    used, other = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    counts = []
    used.register_hook(
        lambda grad: counts.append(utils.count_used_parameters_in_backward([used, other]))
    )
    (used * 2 + other.detach()).sum().backward()
    assert counts == [1]
    with pytest.raises(RuntimeError, match="inside a backward pass"):
        utils.count_used_parameters_in_backward([used])
