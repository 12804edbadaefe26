# SPDX-License-Identifier: Apache-2.0
"""What the tests of products share: a witness of those that went through fp32."""

from __future__ import annotations

import pytest

from deepspeed.accelerator import product_functions as through


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the products computed through fp32, in order."""
    calls: list[str] = []
    for name in ("_linear", "_matmul", "_convolution", "_attention"):
        real = getattr(through, name)
        monkeypatch.setattr(
            through, name, lambda *a, real=real, name=name: (calls.append(name[1:]), real(*a))[1]
        )
    return calls
