# SPDX-License-Identifier: Apache-2.0
"""The library's own threads: any number gives the same bits, several callers and forked children get on."""

from __future__ import annotations

import multiprocessing
import sys
import threading

import pytest
import torch

from deepspeed.ops import native, registry
from deepspeed.ops.norms import squared_norm
from tests.unit.ops.cases import BF16, CASES, F32, run

pytestmark = pytest.mark.skipif(
    native.status().route != "native", reason="there is no native library here"
)
MIX = (F32, F32, BF16, BF16)


@pytest.mark.parametrize("name", ["adam_step", "lamb_step", "squared_norm"])
def test_the_number_of_threads_does_not_show(name):
    op, case = registry.ops()[name], CASES[name]
    args = case.make((1 << 20) + 7, (F32,) if name == "squared_norm" else MIX)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(op, case, args))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_more_threads_than_the_library_allows_are_cut_to_its_limit():
    torch.set_num_threads(1)
    one = squared_norm(x := torch.randn(1 << 20))
    library = native.load()
    assert library is not None
    form = native.abi.FORMATS["ds_norm_args"]
    out = torch.zeros((), dtype=torch.float64)
    packed = form.pack(form.size, 1 << 20, x.numel(), x.data_ptr(), out.data_ptr(), 0, 0)
    assert library.entry("ds_squared_norm")(packed) == 0
    assert torch.equal(one, out)


def test_several_callers_at_once():
    torch.set_num_threads(2)
    op, case = registry.ops()["adam_step"], CASES["adam_step"]
    args = case.make(300_000, MIX)
    expected = run(op, case, args)
    failures = []

    def work():
        for _ in range(20):
            got = run(op, case, args)
            if not all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)):
                failures.append(got)

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def _child(x, answer):
    packed_threads = 2
    form = native.abi.FORMATS["ds_norm_args"]
    packed = form.pack(form.size, packed_threads, x.numel(), x.data_ptr(), answer.data_ptr(), 0, 0)
    library = native.load()
    assert library is not None
    raise SystemExit(library.entry("ds_squared_norm")(packed))


@pytest.mark.skipif(sys.platform != "linux", reason="only POSIX systems fork")
# Python 3.12 warns of any fork beside threads: that the library copes is what is tested
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own():
    torch.set_num_threads(2)
    x = torch.randn(1 << 20)
    expected = squared_norm(x)
    answer = torch.zeros((), dtype=torch.float64).share_memory_()
    child = multiprocessing.get_context("fork").Process(target=_child, args=(x, answer))
    child.start()
    child.join(timeout=60)
    alive = child.is_alive()
    if alive:
        child.kill()
    assert not alive, "the child waits for threads that it does not have"
    assert child.exitcode == 0
    assert torch.equal(answer, expected)
    # and the parent's own threads still work
    assert torch.equal(squared_norm(x), expected)
