# SPDX-License-Identifier: Apache-2.0
"""On a GPU: every kernel by its real route against its torch reference, on streams, threads and large buffers."""

from __future__ import annotations

import threading

import pytest
import torch

from deepspeed.ops import cuda, cuda_fp_quant, cuda_optim, cuda_quant, cuda_tokens, rules
from deepspeed.ops.cuda_fp_quant import FORMATS
from deepspeed.ops.cuda_optim import CHUNK, AdamRule, Gradients, LambRule, TensorLists
from deepspeed.ops.cuda_quant import Scheme, Swizzle
from deepspeed.ops.lamb.fused_lamb import lamb_step

pytestmark = pytest.mark.cuda

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = (1, 3, 5, 257, CHUNK, CHUNK + 5, 1 << 20)
MIXES = (
    (F32, F32, F32, None),
    (F32, F32, BF16, BF16),
    (BF16, BF16, BF16, None),
    (F16, F16, F16, None),
    (BF16, F32, BF16, F16),
)
# the GPU contracts a * b + c, the reference does not: a few roundings in fp32, one in 16 bits
RELATIVE = {F32: 4e-6, BF16: 2**-7, F16: 2**-10}
SCHEMES = [Scheme(bits, asym) for bits in (8, 4) for asym in (False, True)]


@pytest.fixture(autouse=True)
def _on_gpu():
    with torch.device("cuda"):
        yield
    torch.cuda.synchronize()


def by_reference(function, *args):
    class Nowhere(cuda.TorchSide):
        def device_of(self, tensor):
            return None

    before = cuda.use(cuda.Loader(Nowhere()))
    try:
        return function(*args)
    finally:
        cuda.use(before)


def lists(sizes, mix, offset=0):
    made = []
    for role, dtype in enumerate((mix[0], mix[1], mix[1], mix[2], mix[3])):
        row = [None if dtype is None else torch.randn(n + offset).to(dtype)[offset:] for n in sizes]
        made.append([t.abs() if role == 2 else t for t in row])
    return made


def close(got, wanted):
    bound = RELATIVE[got.dtype]
    scale = wanted.double().abs().max().clamp_min(1e-6).item() if wanted.numel() else 1.0
    torch.testing.assert_close(got.double(), wanted.double(), rtol=bound, atol=bound * scale)


def test_every_kernel_has_a_route_on_this_gpu():
    told = cuda.routes()
    assert told
    for route in told:
        assert route.route in ("cubin", "ptx", "nvrtc"), route


@pytest.mark.parametrize("offset", (0, 1))
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("decoupled", (True, False))
def test_adam_agrees_with_the_reference(mix, decoupled, offset):
    p, m, v, g, low = lists(SIZES, mix, offset)
    twin = [[None if t is None else t.clone() for t in row] for row in (p, m, v, g, low)]
    for row in zip(*twin, strict=True):
        rules.adam_step.reference(*row, 1e-2, 0.9, 0.99, 1e-8, 0.1, 3, decoupled, True, 0.5)
    rule = AdamRule(1e-2, 0.9, 0.99, 1e-8, 0.1, 3, decoupled)
    assert cuda_optim.multi_tensor_adam(TensorLists(p, g, m, v, low), rule, Gradients(0.5))
    for got, wanted in zip((p, m, v, low), (twin[i] for i in (0, 1, 2, 4)), strict=True):
        for one, other in zip(got, wanted, strict=True):
            if one is not None:
                close(one, other)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", ("lion", "adagrad"))
def test_lion_and_adagrad_agree_with_their_references(mix, name):
    numbers = (1e-2, 0.9, 0.99, 0.1) if name == "lion" else (1e-2, 1e-10, 0.1)
    for size in SIZES:
        p, m, v, g, low = (row[0] for row in lists((size,), mix))
        state = m if name == "lion" else v
        if name == "lion":
            g = torch.where(m < 0, -g.abs(), g.abs())
        twin = [None if t is None else t.clone() for t in (p, state, g, low)]
        op = getattr(rules, f"{name}_step")
        op.reference(*twin, *numbers, 0.5)
        op(p, state, g, low, *numbers, 0.5)
        for got, wanted in zip((p, state, low), (twin[0], twin[1], twin[3]), strict=True):
            if got is not None:
                close(got, wanted)


@pytest.mark.parametrize("mix", MIXES[:4])
def test_lamb_agrees_with_the_reference(mix):
    p, m, v, g, low = lists((5, 0, CHUNK + 3, 1 << 18), mix)
    twin = [[None if t is None else t.clone() for t in row] for row in (p, low, m, v, g)]
    numbers = (0.1, 0.9, 0.99, 10.0, 0.01, 1e-6, 2.0, 2, 1, True, 0.1)
    wanted = [lamb_step(*row, *numbers) for row in zip(*twin, strict=True)]
    rule = LambRule(0.1, 0.9, 0.99, 1e-6, 0.1, 2, 0.01, 10.0)
    ratios = cuda_optim.multi_tensor_lamb(TensorLists(p, g, m, v, low), rule, Gradients(0.5))
    loose = 4 * RELATIVE[mix[1]] + 1e-5  # moments of 16 bits are rounded once more
    torch.testing.assert_close(ratios, torch.cat(wanted), rtol=loose, atol=0)
    for one, other in zip(p, twin[0], strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=loose, atol=2 * loose)


@pytest.mark.parametrize("dtype", (F32, BF16, F16, torch.float64))
def test_norms_agree_with_float64_and_repeat_bit_for_bit(dtype):
    xs = [torch.randn(n + 1).to(dtype)[1:] for n in (0, *SIZES)]
    got = cuda_optim.squared_norms(xs)
    wanted = torch.stack([x.double().square().sum() for x in xs])
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=0)
    assert torch.equal(got, cuda_optim.squared_norms(xs))
    bad = torch.zeros(1, dtype=torch.int32)
    cuda_optim.squared_norms([torch.full((9,), float("nan")), torch.ones(3)], bad)
    assert bad.item() == 1


@pytest.mark.parametrize("dtype", (F32, BF16, F16))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantization_agrees_with_the_reference(dtype, scheme):
    x = torch.randn(48, 1030).to(dtype)
    q, params = cuda_quant.quantize(x, 48, scheme)
    wanted, wanted_params = by_reference(cuda_quant.quantize, x, 48, scheme)
    # an offset is about 2^bits / 2 less than a product of that size, which the GPU does not round
    torch.testing.assert_close(
        params, wanted_params, rtol=1e-6, atol=1e-6 + 2.0**scheme.bits / 2**24
    )
    back = cuda_quant.dequantize(q, params, 48, scheme, F32)
    other = by_reference(cuda_quant.dequantize, wanted, wanted_params, 48, scheme, F32)
    # contraction may tip a value at a tie by a step, seldom
    assert ((back - other).abs() <= 1.01 * params[:, :1]).all()
    assert ((back - other).abs() > 1e-4).float().mean() < 1e-3
    swizzled, _ = cuda_quant.swizzle_quantize(x, 48, scheme, Swizzle(2, 3, 4))
    order = torch.arange(48).reshape(3, 4, 2, 2).permute(2, 1, 0, 3).reshape(-1)
    assert torch.equal(swizzled, q[order])
    mean, numbers = cuda_quant.quantized_reduction(q.reshape(-1), params, (48, 16), scheme, 3)
    got = cuda_quant.dequantize(mean, numbers, 16, scheme, F32).reshape(-1)
    exact = back.reshape(3, -1).mean(0)
    assert ((got - exact).abs() <= 1.01 * numbers[:, 0].max()).all()


@pytest.mark.parametrize("form", FORMATS)
def test_small_floats_agree_with_the_reference(form):
    x = torch.randn(64, 128).to(BF16)
    packed = cuda_fp_quant.fp_quantize(x, 128, form)
    # the reference on the CPU: torch's GPU kernels multiply by the reciprocal of a number, and so round twice
    with torch.device("cpu"):
        assert torch.equal(packed.cpu(), cuda_fp_quant.fp_quantize(x.cpu(), 128, form))
    back = cuda_fp_quant.fp_dequantize(packed, 128, form, BF16)
    assert torch.equal(back, by_reference(cuda_fp_quant.fp_dequantize, packed, 128, form, BF16))
    rows = torch.tensor([3, 0, 31])
    part = cuda_fp_quant.fp_dequantize(packed, 128, form, BF16, (rows, 2))
    assert torch.equal(part.reshape(3, 256), back.reshape(32, 256)[rows])


def test_tokens_masks_and_biases_agree_with_the_references():
    tokens = torch.stack([torch.randperm(3000)[:1000] for _ in range(6)]).int().reshape(2, 3, 1000)
    expected = tokens.sort(-1).values
    assert torch.equal(cuda_tokens.token_sort_(tokens, 3000), expected)
    for first in (True, False):
        x = torch.randn(3, 3000, 64) if first else torch.randn(3000, 3, 64)
        index = tokens[0].contiguous()
        got = cuda_tokens.token_gather(x, index, first)
        assert torch.equal(got, by_reference(cuda_tokens.token_gather, x, index, first))
        target, twin = torch.zeros_like(x), torch.zeros_like(x)
        cuda_tokens.token_scatter_(target, got, index, first)
        assert torch.equal(
            target, by_reference(cuda_tokens.token_scatter_, twin, got, index, first)
        )
    mask = torch.randn(3, 2, 64, 64, dtype=F16)
    index = torch.stack([torch.randperm(64)[:16].sort().values for _ in range(6)])
    index = index.int().reshape(2, 3, 16)
    wanted = by_reference(cuda_tokens.mask_gather, mask, index, 16)
    assert torch.equal(cuda_tokens.mask_gather(mask, index, 16), wanted)
    image = torch.randn(2, 320, 16, 16, dtype=F16).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(320, dtype=F16)
    terms = (image, bias, image.flip(0).contiguous(memory_format=torch.channels_last), bias)
    wanted = by_reference(cuda_tokens.bias_add, *terms)
    assert torch.equal(cuda_tokens.bias_add(*terms), wanted)


def test_a_launch_waits_for_the_current_stream_only():
    stream = torch.cuda.Stream()
    rule = AdamRule(0.1, 0.9, 0.99, 1e-8, 0.0, 1, True)
    other = [[torch.ones(8)] for _ in range(4)]
    assert cuda_optim.multi_tensor_adam(TensorLists(*other), rule)  # the first pinned buffer waits
    p, m, v, g = (torch.zeros(1 << 20) for _ in range(4))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        g.fill_(1.0)
        assert cuda_optim.multi_tensor_adam(TensorLists([p], [g], [m], [v]), rule)
        done = stream.record_event()
        assert not done.query()  # the launch did not wait
    done.synchronize()
    # the step saw the gradient that the same stream wrote before it
    torch.testing.assert_close(p, torch.full_like(p, -0.1), rtol=1e-5, atol=0)


def test_a_fresh_thread_and_a_backward_hook_can_launch():
    p = torch.ones(1000, requires_grad=True)
    seen = []

    def hook(grad):
        seen.append(cuda_optim.squared_norms([grad]).item())

    p.register_hook(hook)
    (p * 2).sum().backward()
    thread = threading.Thread(target=hook, args=(torch.full((10,), 3.0, device="cuda"),))
    thread.start()
    thread.join()
    assert seen == [4000.0, 90.0]


def test_a_step_can_be_captured_in_a_graph_once_its_table_is_there():
    rule = AdamRule(0.1, 0.9, 0.99, 1e-8, 0.0, 1, True)
    p, m, v = (torch.zeros(1000) for _ in range(3))
    g = torch.ones(1000)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert cuda_optim.multi_tensor_adam(TensorLists([p], [g], [m], [v]), rule)
    torch.cuda.current_stream().wait_stream(stream)
    p.zero_()
    with torch.cuda.graph(graph, stream=stream):
        assert cuda_optim.multi_tensor_adam(TensorLists([p], [g], [m], [v]), rule)
    assert not p.any()
    graph.replay()
    torch.cuda.synchronize()
    assert p.any()


@pytest.mark.slow
def test_more_than_two_to_the_31_elements_are_all_stepped():
    numel = (1 << 31) + 12_345
    if torch.cuda.get_device_properties(0).total_memory < 4 * numel * 2 + (2 << 30):
        pytest.skip("needs about 20 GiB of device memory")
    p = torch.zeros(numel, dtype=BF16)
    rule = ([p], [torch.ones_like(p)], [torch.zeros_like(p)])
    assert cuda_optim.multi_tensor_lion(TensorLists(*rule), 1.0, (0.9, 0.99), 0.0)
    assert p[0] == -1 and p[1 << 31] == -1 and p[-1] == -1
    assert cuda_optim.squared_norms([p]).item() == numel
