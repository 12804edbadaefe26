# SPDX-License-Identifier: Apache-2.0
"""Token dropping and bias additions, run on the CPU through the loader, against plain indexing."""

from __future__ import annotations

import pytest
import torch

from deepspeed.ops import cuda, cuda_tokens


@pytest.fixture(params=("kernel", "reference"))
def way(request, kernels):
    before = cuda.use(cuda.Loader()) if request.param == "reference" else None
    yield kernels if request.param == "kernel" else None
    if before is not None:
        cuda.use(before)


def ran(way, times=1):
    return way is None or len(way.calls("cuLaunchKernel")) == times


@pytest.mark.parametrize("length", (1, 2, 3, 255, 256, 257, 1000, 8192))
def test_rows_of_tokens_are_sorted(way, length):
    rows = torch.randint(-5, 1000, (2, 1, length), dtype=torch.int32)
    wanted = rows.sort(-1).values
    got = cuda_tokens.token_sort_(rows, length)
    assert got is rows and torch.equal(rows, wanted) and ran(way)


def test_rows_too_long_for_the_kernel_are_sorted_by_torch(kernels):
    rows = torch.randperm(9000).to(torch.int32)[None]
    assert torch.equal(
        cuda_tokens.token_sort_(rows, 9000)[0], torch.arange(9000, dtype=torch.int32)
    )
    assert kernels.calls("cuLaunchKernel") == []


@pytest.mark.parametrize("batch_first", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int8))
@pytest.mark.parametrize("hidden", (8, 3))
def test_tokens_are_gathered_and_scattered_back(way, batch_first, dtype, hidden):
    batch, tokens, keep = 3, 11, 5
    shape = (batch, tokens, hidden) if batch_first else (tokens, batch, hidden)
    x = torch.randint(-9, 9, shape).to(dtype)
    index = torch.stack([torch.randperm(tokens)[:keep].sort().values for _ in range(batch)]).int()
    got = cuda_tokens.token_gather(x, index, batch_first)
    full = x if batch_first else x.transpose(0, 1)
    wanted = torch.stack([full[b, index[b].long()] for b in range(batch)])
    assert torch.equal(got if batch_first else got.transpose(0, 1), wanted)

    target = torch.zeros_like(x)
    assert cuda_tokens.token_scatter_(target, got, index, batch_first) is target
    expected = torch.zeros_like(full)
    for b in range(batch):
        expected[b, index[b].long()] = wanted[b]
    assert torch.equal(target if batch_first else target.transpose(0, 1), expected)
    assert ran(way, 2)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bool, torch.float32))
def test_masks_are_cut_to_the_kept_tokens(way, dtype):
    mask = torch.randint(0, 2, (2, 3, 7, 7)).to(dtype)
    index = torch.tensor([[[0, 3, 6], [1, 2, 5]]] * 2, dtype=torch.int32)
    got = cuda_tokens.mask_gather(mask, index, 3)
    for layer in range(2):
        for b in range(2):
            at = index[layer, b].long()
            assert torch.equal(got[layer, b], mask[b][:, at][:, :, at])
    assert torch.equal(cuda_tokens.mask_gather(mask, None, 4), mask[:, :, :4, :4])
    assert ran(way, 2)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("channels", (8, 6))
def test_biases_are_added_in_channels_last_order(way, dtype, channels):
    def image():
        return (
            torch.randn(2, channels, 3, 5).to(dtype).contiguous(memory_format=torch.channels_last)
        )

    x, other = image(), image()
    bias, more = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)
    column = (1, -1, 1, 1)
    sums = {
        (bias,): x.float() + bias.float().view(column),
        (bias, other): x.float() + bias.float().view(column) + other.float(),
        (bias, other, more): x.float()
        + bias.float().view(column)
        + other.float()
        + more.float().view(column),
    }
    for terms, wanted in sums.items():
        got = cuda_tokens.bias_add(x, *terms)
        assert torch.equal(got, wanted.to(dtype))
        assert got.is_contiguous(memory_format=torch.channels_last)
    assert ran(way, 3)


def test_an_index_outside_the_tokens_touches_nothing(kernels):
    full = torch.zeros(1, 4, 2)
    kept = torch.ones(1, 3, 2)
    cuda_tokens.token_scatter_(full, kept, torch.tensor([[-1, 2, 4]], dtype=torch.int32), True)
    assert full[0].sum(1).tolist() == [0, 0, 2, 0]


def test_shapes_that_do_not_fit_are_refused(way):
    x, index = torch.ones(2, 5, 3), torch.zeros(2, 4, dtype=torch.int32)
    image = torch.ones(1, 4, 2, 2)
    for wrong in (
        lambda: cuda_tokens.token_sort_(index.long(), 4),
        lambda: cuda_tokens.token_gather(x, index.long(), True),
        lambda: cuda_tokens.token_gather(x, index[:1], True),
        lambda: cuda_tokens.token_scatter_(x, torch.ones(2, 3, 3), index, True),
        lambda: cuda_tokens.token_scatter_(x, torch.ones(2, 4, 3).half(), index, True),
        lambda: cuda_tokens.mask_gather(torch.ones(2, 5, 5), None, 3),
        lambda: cuda_tokens.mask_gather(torch.ones(1, 1, 5, 5), None, 6),
        lambda: cuda_tokens.mask_gather(torch.ones(1, 1, 5, 5), index[None], 4),
        lambda: cuda_tokens.bias_add(image, torch.ones(3)),
        lambda: cuda_tokens.bias_add(image, torch.ones(4).half()),
        lambda: cuda_tokens.bias_add(image, torch.ones(4), torch.ones(1, 4, 2, 1)),
    ):
        with pytest.raises(ValueError):
            wrong()
