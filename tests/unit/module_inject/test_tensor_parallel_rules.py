# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism without ranks: sizes of shards, cutting and joining, rules and where they come from, merge rules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import deepspeed
from deepspeed.checkpoint.merge_slices import MergeRules
from deepspeed.checkpoint.tensor_parts import part_of
from deepspeed.comm.mesh import Axis
from deepspeed.module_inject import (
    AutoTPConfig,
    AutoTPPresets,
    PartitionType,
    tp_layer,
    tp_shard,
)
from deepspeed.module_inject.auto_tp import AutoTP
from deepspeed.module_inject.layers import (
    DS_AUTOTP_UC_META,
    LinearAllreduce,
    LinearLayer,
    SubParamLinearLayer,
    collect_autotp_universal_checkpoint_info,
    set_autotp_mode,
)
from deepspeed.module_inject.tp_collectives import overlapped_linear
from deepspeed.module_inject.tp_cut import Cut
from deepspeed.module_inject.tp_parser import guess_specs
from deepspeed.module_inject.tp_plan_converter import TPPlanConverter
from deepspeed.runtime.tensor_parallel import division, request
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig, _get_hf_tp_plan
from deepspeed.runtime.tensor_parallel.division import find_rules
from deepspeed.utils import groups


@pytest.fixture(autouse=True)
def _units():
    yield
    tp_shard.set_tp_grain_size(1)
    tp_shard.set_num_kv_heads(None)
    set_autotp_mode(training=False)


@pytest.mark.parametrize("heads", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("grain", [1, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shards_cover_a_dimension_and_keep_heads_whole(heads, grain, ranks):
    tp_shard.set_num_kv_heads(heads)
    tp_shard.set_tp_grain_size(grain)
    for size in (1, 5, 48, 101, 384, 50257):
        for name in ("self_attn.q_proj", "mlp.up_proj", "lm_head", None):
            sizes = tp_shard.get_shard_size_list(size, ranks, name)
            assert len(sizes) == ranks and sum(sizes) == size and min(sizes) >= 0
            if heads and size % heads == 0 and name in ("self_attn.q_proj", None):
                assert all(n % (size // heads) == 0 for n in sizes)
            elif size >= grain * ranks:
                assert sum(n % grain > 0 for n in sizes) <= 1


def test_a_head_has_its_own_rules():
    tp_shard.set_num_kv_heads(2)
    assert tp_shard.get_shard_size_list(10, 2, "model.lm_head") == [5, 5]
    assert tp_shard.get_shard_size_list(10, 3, "lm_head") == [4, 3, 3]
    assert tp_shard.get_shard_size_list(10, 3, "attn.q") == [5, 5, 0]
    assert tp_shard.get_shard_size(10, 3, "attn.q", rank=2) == 0


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("widths", [((3, 2),), ((4, 2), (2, 1), (2, 1)), ((2, 0), (1, 0), (1, 1))])
def test_cut_parts_join_to_the_whole(dim, widths):
    cut = Cut(dim, widths)
    shape = [4, 4]
    shape[dim] = sum(cut.sizes)
    whole = torch.randn(shape)
    parts = [cut.take(whole, rank) for rank in range(2)]
    assert [part.shape[dim] for part in parts] == list(cut.by_rank)
    assert torch.equal(cut.join(parts), whole)
    assert all(part.untyped_storage().nbytes() == part.numel() * 4 for part in parts)
    with pytest.raises(ValueError, match="cannot be cut"):
        cut.take(torch.empty(1, 1), 0)


def test_rules_are_read_checked_and_merged():
    config = AutoTPConfig.from_dict(
        {
            "strict_mode": True,
            "layer_specs": [
                {"patterns": "a\\.weight$", "partition_type": "ROW", "model_types": ["llama"]},
                {"patterns": [".*"], "partition_type": "skip"},
            ],
        }
    )
    assert config.find_matching_spec("a.weight", "Llama").partition_type is PartitionType.ROW
    assert config.find_matching_spec("a.weight", "gpt2").partition_type is PartitionType.SKIP
    for broken, word in (
        ({"layers": []}, "unknown keys"),
        ({"layer_specs": [{"patterns": ["a"], "dim": 1}]}, "unknown keys"),
        ({"layer_specs": [{"patterns": ["a"], "partition_type": "both"}]}, "partition_type"),
        ({"layer_specs": [{"patterns": []}]}, "matches nothing"),
    ):
        with pytest.raises(ValueError, match=word):
            AutoTPConfig.from_dict(broken)


class Attention(nn.Module):
    def __init__(self, names="q_proj k_proj v_proj q_norm o_proj"):
        super().__init__()
        for name in names.split():
            self.add_module(name, nn.LayerNorm(4) if "norm" in name else nn.Linear(8, 8))


class Net(nn.Module):
    def __init__(self, block, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": block(), "mlp": nn.Linear(8, 8)})])
        self.lm_head = nn.Linear(8, 10)


def rules_of(model, **section):
    specs = find_rules(model, TPTrainingConfig(autotp_size=2, **section)).layer_specs
    return [(s.partition_type.value, s.patterns) for s in specs]


def test_rules_come_from_the_user_then_the_models_plan_then_its_family_then_its_names():
    guessed = rules_of(Net(Attention))
    start = r"layers\.0\.self_attn\."
    assert guessed[0] == ("skip", [rf"{start}q_norm\.weight$"])
    assert guessed[1] == ("column", [rf"{start}{n}_proj\.weight$" for n in "qkv"])
    assert guessed[2] == ("row", [rf"{start}o_proj\.weight$"])
    assert rules_of(Net(Attention, model_type="bloom")) == rules_of(
        Net(Attention), preset_model="bloom"
    )
    planned = Net(Attention, model_type="bloom", base_model_tp_plan={"*.q_proj": "colwise"})
    assert rules_of(planned) == [("column", [r".*.*\.q_proj\.weight$"])]
    own = {"layer_specs": [{"patterns": ["x"]}]}
    assert rules_of(planned, partition_config=own) == [("column", ["x"]), *rules_of(planned)]
    own["use_default_specs"] = False
    assert rules_of(planned, partition_config=own) == [("column", ["x"])]


def test_a_model_whose_layers_are_not_known_is_refused():
    for names, word in (("c_attn c_proj", "several weights in one"), ("a b", "not known")):
        with pytest.raises(ValueError, match=word):
            rules_of(Net(lambda names=names: Attention(names)))
    assert guess_specs(Net(lambda: Attention("q_proj k_proj"))) == []  # no row behind


def test_plans_of_transformers_become_rules_whole_or_not_at_all():
    plan = {
        "a.*.b": "rowwise_split_input",
        "head": "colwise_rep",
        "n": "replicated_with_grad_allreduce",
    }
    row, head, norm = TPPlanConverter.convert(plan)
    assert row.split_input and head.gather_output and norm.grad_allreduce
    assert row.matches("model.a.0.b.weight") and not row.matches("model.a.0.b.bias")
    with pytest.raises(ValueError, match="packed_colwise.*use_default_specs"):
        TPPlanConverter.convert({**plan, "e": "packed_colwise"})
    assert _get_hf_tp_plan(nn.Linear(1, 1)) is None


def test_family_rules_name_layers_of_their_families():
    names = {
        "llama": ("model.layers.3.self_attn.q_proj", "model.layers.3.mlp.down_proj"),
        "phi3": ("model.layers.3.mlp.gate_up_proj", "model.layers.3.self_attn.o_proj"),
        "mixtral": ("m.layers.0.block_sparse_moe.experts.1.w1", "m.layers.0.self_attn.o_proj"),
        "deepseek_v2": ("m.layers.0.mlp.experts.1.up_proj", "m.layers.0.mlp.down_proj"),
    }
    for family, (column, row) in names.items():
        preset = AutoTPPresets.get_preset(family)
        for name, kind in ((column, PartitionType.COLUMN), (row, PartitionType.ROW)):
            assert preset.find_matching_spec(f"{name}.weight").partition_type is kind, name
    assert AutoTPPresets.get_preset("unheard") is None


def test_a_preset_is_the_same_in_capitals():
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 8}
    model = Net(Attention, **sizes)
    small = rules_of(model, preset_model="phi3")
    assert rules_of(model, preset_model="Phi3") == small
    assert ("column", [r".*\.self_attn\.qkv_proj\.weight$"]) in small
    with pytest.raises(ValueError, match="depends on its configuration"):
        rules_of(nn.Linear(2, 2), preset_model="phi3")


class Biased(nn.Module):
    """Has the helpers that models make their position biases with; a head's bias is its number."""

    n_head = 5

    def build_mpt_alibi_tensor(self, num_heads, length, alibi_bias_max=8, device=None):
        return torch.arange(num_heads, device=device)[:, None, None].expand(-1, 1, length)

    def get_alibi_mask(self, tensor, length):
        return self.build_mpt_alibi_tensor(self.n_head, length)


class Bloom(nn.Module):
    def build_alibi_tensor(self, mask, num_heads, dtype):
        raise AssertionError("is replaced")


def test_position_biases_are_of_the_ranks_heads_after_other_engines_made_groups(monkeypatch):
    # MPT's and Baichuan's differ in their helpers' names only; a model has one of the two
    mpt, baichuan, bloom = Biased(), Biased(), Bloom()
    mpt.get_alibi_mask = baichuan.build_mpt_alibi_tensor = None
    baichuan.get_alibi_mask = lambda tensor, length: torch.arange(baichuan.n_head)[:, None]
    with monkeypatch.context() as patch:
        patch.setattr(groups, "get_tensor_model_parallel_world_size", lambda: 2)
        for model in (mpt, baichuan, bloom):
            division._divide_biases(model, 5, rank=1)
    assert mpt.build_mpt_alibi_tensor(2, 3)[:, 0, 0].tolist() == [3, 4]
    baichuan.n_head = 2
    assert baichuan.get_alibi_mask(None, 3)[:, 0].tolist() == [3, 4] and baichuan.n_head == 2
    mask = torch.ones(1, 3, dtype=torch.long)
    own = bloom.build_alibi_tensor(mask, 2, torch.float32)
    # heads 3 and 4 of 5 (arXiv:2108.12409): 2^-8, then the first of the row between; token 2
    assert own[:, 0, 2].tolist() == [2 * 2**-8, 2 * 2**-1]


def test_overlapped_columns_keep_to_autocast_on_the_cpu(monkeypatch):
    layer = LinearLayer(nn.Linear(3, 4))
    alone = layer.axis
    layer.axis, layer.tp_overlap_comm = SimpleNamespace(size=2), True
    monkeypatch.setattr(tp_layer, "sum_of_grads", lambda x, axis: x)
    monkeypatch.setattr(
        tp_layer, "overlapped_linear", lambda x, w, _: overlapped_linear(x, w, alone)
    )
    x = torch.randn(2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("outputs", [0, 5])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)])
def test_overlapped_products_are_those_of_a_linear_layer(outputs, shape):
    weight = torch.randn(outputs, 3, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    found = []
    for multiply in (lambda x, w: overlapped_linear(x, w, Axis.alone()), functional.linear):
        pair = [part.clone().requires_grad_() for part in (x, weight)]
        out = multiply(*pair)
        out.square().sum().backward()
        found.append([out.detach(), *(part.grad for part in pair)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def divided(model, specs, **options):
    config = AutoTPConfig.from_dict({"layer_specs": specs, "use_default_specs": False, **options})
    division = AutoTP(model, [], partition_config=config)
    division._replace_module(model)
    return model


def test_layers_keep_their_parameter_objects_and_their_results():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Embedding(2, 2), nn.LayerNorm(5))
    weight, x = model[0].weight, torch.randn(2, 3)
    expected = model[1](model[0](x))
    divided(
        model,
        [
            {"patterns": ["0.weight"], "shape": [2, -1]},
            {"patterns": ["1.weight"], "partition_type": "row"},
            {"patterns": [".*weight"]},
        ],
    )
    assert [type(m) for m in model] == [
        SubParamLinearLayer,
        LinearAllreduce,
        nn.Embedding,
        nn.LayerNorm,
    ]
    assert model[0].weight is weight and torch.equal(model[1](model[0](x)), expected)


def test_a_layer_in_several_places_stays_one():
    linear = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear, linear)})
    divided(model, [{"patterns": [".*"]}])
    assert isinstance(model["a"], LinearLayer)
    assert model["b"][0] is model["b"][1] is model["a"]


def test_rules_that_cannot_be_followed_are_refused():
    for specs, options, word in (
        ([{"patterns": ["1.weight"]}], {"strict_mode": True}, "strict_mode"),
        ([{"patterns": [".*"], "partition_dim": 1, "shape": [-1, 2]}], {}, "partition_dim"),
        ([{"patterns": [".*"], "shape": [3, -1]}], {}, "do not make up"),
    ):
        with pytest.raises(ValueError, match=word):
            divided(nn.Sequential(nn.Linear(4, 4)), specs, **options)


@pytest.mark.parametrize("kind", ["column", "row", "joined"])
def test_parts_of_a_state_merge_to_the_whole_by_what_layers_wrote_down(kind):
    tp_shard.set_num_kv_heads(3)
    linear = nn.Linear(12, 12)
    whole = {name: p.detach().clone() for name, p in linear.named_parameters()}
    make = {
        "column": lambda: LinearLayer(linear, None, True, name="attn.q"),
        "row": lambda: LinearAllreduce(linear, None, True, name="attn.o"),
        "joined": lambda: SubParamLinearLayer(
            linear, None, True, shape=((6, 3, 3), -1), name="qkv"
        ),
    }
    layer = make[kind]()
    layer.tp_world_size = 2
    layer._freeze_partition_sizes(12)
    layer._mark_uc_metadata()
    rules = MergeRules(collect_autotp_universal_checkpoint_info(layer))
    for name, param in layer.named_parameters():
        cut, meta = layer._cut(name == "bias"), getattr(param, DS_AUTOTP_UC_META)
        parts = [whole[name] if cut.dim is None else cut.take(whole[name], r) for r in range(2)]
        assert torch.equal(rules.merge(name, parts)["param"], whole[name])
        for rank, part in enumerate(parts):
            assert torch.equal(part_of(meta, whole[name].flatten(), rank, 2), part.flatten())
    assert rules.unmatched() == []


def test_a_request_is_checked_against_the_configuration():
    model = nn.Linear(2, 2)
    assert deepspeed.tp_model_init(model, 2, torch.bfloat16) is model
    asked = request.request_of(nn.Sequential(model), None)
    assert asked is deepspeed._TP_MODEL_INIT_ARGS
    deepspeed._TP_MODEL_INIT_ARGS = None
    assert request.merged({"a": 1}, asked, None) == {"a": 1, "tensor_parallel": {"autotp_size": 2}}
    for config, word in (
        ({"tensor_parallel": {"autotp_size": 4}}, "tensor_parallel.autotp_size"),
        ({"fp16": {"enabled": True}}, "Conflicting dtype"),
    ):
        with pytest.raises(ValueError, match=word):
            request.merged(config, asked, None)
    with pytest.raises(ValueError, match="provided tp_group"):
        request.merged({}, request.TPRequest(2, None, object()), object())
    with pytest.raises(ValueError, match="tp_size"):
        deepspeed.tp_model_init(model, 0, torch.float32)
