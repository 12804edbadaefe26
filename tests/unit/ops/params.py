# SPDX-License-Identifier: Apache-2.0
"""Params for optimizers to step: random ones, their twins for a second optimizer, and the same gradients for both."""

from __future__ import annotations

import torch


def params_of(shapes=((7, 5), (33,), ()), dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def twins(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def set_grads(*lists):
    for group in zip(*lists, strict=True):
        grad = torch.randn(group[0].shape).to(group[0].dtype)
        for param in group:
            param.grad = grad.clone()
