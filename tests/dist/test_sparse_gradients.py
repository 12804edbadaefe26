# SPDX-License-Identifier: Apache-2.0
"""Embedding gradients that travel as rows train like dense ones, whatever rows the ranks have."""

from __future__ import annotations

import pytest
import torch

import deepspeed

# rows that each rank touches, a micro-batch each: shared and own ones, repeated ones, none on one rank
FEW = [[[1, 2, 2], [5, 2, 39]], [[3], []], [[7, 1], [1, 30, 8]]]
MANY = [[list(range(0, 30)), list(range(5, 40))]] * 2
CASES = [
    # sparse layers, key, stage, rows, extra configuration
    (True, False, 0, FEW, {}),
    (True, True, 0, MANY, {"gradient_clipping": 0.01}),
    (False, True, 0, FEW, {"gradient_clipping": 0.01}),
    (False, True, 0, MANY, {}),
    (True, True, 0, FEW[:2], {"gradient_accumulation_steps": 2}),
    (True, True, 0, FEW, {"gradient_allreduce_op": "sum"}),
    (True, True, 1, FEW[:2], {"gradient_accumulation_steps": 2}),
    (False, True, 2, FEW, {}),
    (True, False, 3, FEW, {}),
]


class Bags(torch.nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(3)
        self.words = torch.nn.Embedding(40, 4, sparse=sparse)
        self.bag = torch.nn.EmbeddingBag(40, 4, mode="sum", sparse=sparse)
        self.head = torch.nn.Linear(4, 1)

    def forward(self, rows):
        hidden = self.head.weight.new_zeros(4)
        if rows:
            ids = torch.tensor(rows)
            hidden = self.words(ids).sin().sum(0) + self.bag(ids, torch.tensor([0]))[0]
        return self.head(hidden).square().sum()


def train(rank, cases):
    trained = []
    for sparse, key, stage, batches, extra in cases:
        net = Bags(sparse)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            **({"sparse_gradients": True} if key else {}),
            **extra,
        }
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
        engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
        assert engine.sparse_tensor_module_names == {"words.weight", "bag.weight"}
        for batch in batches:
            engine.backward(engine(batch[rank]))
            if stage == 0:
                assert net.words.weight.grad is None or net.words.weight.grad.is_sparse is sparse
            engine.step()
        with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
            trained.append([p.detach().clone() for p in net.parameters()])
    return trained


def by_hand(batches, extra):
    net = Bags(False).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    every = extra.get("gradient_accumulation_steps", 1)
    ranks = 1 if extra.get("gradient_allreduce_op") == "sum" else 2
    for step, batch in enumerate(batches, 1):
        for rows in batch:
            (net(rows) / ranks / every).backward()
        if step % every == 0:
            if "gradient_clipping" in extra:
                torch.nn.utils.clip_grad_norm_(net.parameters(), extra["gradient_clipping"])
            optimizer.step()
            optimizer.zero_grad()
    return list(net.parameters())


def check(case, first, second):
    for a, b, want in zip(first, second, by_hand(*case[3:]), strict=True):
        assert torch.equal(a, b), case
        # fp32 against double over a few steps
        torch.testing.assert_close(
            a.double(), want, rtol=1e-5, atol=1e-6, msg=lambda m: f"{case}: {m}"
        )


def test_rows_train_like_dense_gradients(ranks2):
    for case, first, second in zip(CASES, *ranks2.run(train, CASES, timeout=240), strict=True):
        check(case, first, second)


def averages_and_sums(rank):
    net = Bags(True)
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    found = []
    for average in (True, False):
        engine.gradient_average = average
        engine.backward(engine(FEW[0][rank]))
        found.append([p.grad.to_dense() for p in net.parameters()])
        net.zero_grad()
    gathered = engine.all_gather_scalar(found[0][2], engine.data_parallel_group)
    net = Bags(False)
    config["bf16"] = {"enabled": True}
    other = deepspeed.initialize(
        model=net, optimizer=torch.optim.SGD(net.parameters()), config=config
    )[0]
    with pytest.raises(NotImplementedError, match="gradient_allreduce_op"):
        other.gradient_average = False
    return (*found, gathered)


def test_gradients_are_added_up_on_request(ranks2):
    mean, total, gathered = ranks2.run(averages_and_sums)[0]
    for a, b in zip(mean, total, strict=True):
        assert a.any()
        torch.testing.assert_close(2 * a, b)
    assert len(gathered) == 2 and torch.equal(*gathered)


def saves_and_loads(rank, folder):
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
    sparse = {**config, "sparse_gradients": True}
    names = {"words.weight", "bag.weight"}
    saved, other = (
        deepspeed.initialize(model=Bags(False), config=made)[0] for made in (sparse, config)
    )
    head = deepspeed.initialize(
        model=torch.nn.ModuleDict({"head": torch.nn.Linear(4, 1)}), config=config
    )[0]
    saved.save_checkpoint(folder / "all", tag="t")
    head.save_checkpoint(folder / "head", tag="t")
    assert saved.sparse_tensor_module_names == names and not other.sparse_tensor_module_names
    other.load_checkpoint(folder / "all", load_module_strict=False)
    head.load_checkpoint(folder / "all", load_module_strict=False)
    assert other.sparse_tensor_module_names == names and not head.sparse_tensor_module_names
    saved.load_checkpoint(folder / "head", load_module_strict=False)
    return saved.sparse_tensor_module_names == names


def test_names_of_sparse_weights_are_kept_in_checkpoints(ranks2, tmp_path):
    assert all(ranks2.run(saves_and_loads, tmp_path))
