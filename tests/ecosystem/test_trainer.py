# SPDX-License-Identifier: Apache-2.0
"""The Trainer of transformers with and without us: the same losses, resumed too; whole files; sharded construction."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.helpers.libraries import forget, llama

transformers = pytest.importorskip("transformers", minversion="4.45")
pytest.importorskip("transformers.trainer", exc_type=ImportError)  # what it needs may be broken
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, SAVE_AT = 4, 2
SETTINGS = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
}


def settings(stage, offload):
    if stage is None:
        return None
    zero = {
        "stage": stage,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {**SETTINGS, "zero_optimization": zero}


def arguments(folder, stage=None, offload=False, **options):
    forget()
    usual = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_steps": SAVE_AT,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(
        output_dir=str(folder), deepspeed=settings(stage, offload), **{**usual, **options}
    )


def trainer(folder, stage=None, offload=False, model=llama, **options):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 32, (24, 8), generator=generator)
    args = arguments(folder, stage, offload, **options)
    data = [{"input_ids": row, "labels": row} for row in rows]
    return transformers.Trainer(model=model(), args=args, train_dataset=data, eval_dataset=data[:4])


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("stage", "offload", "bf16"),
    [(0, False, False), (1, False, True), (2, True, False), (3, False, False), (3, True, True)],
)
def test_losses_are_those_without_deepspeed_and_those_after_a_resume(
    stage, offload, bf16, tmp_path
):
    plain = trainer(tmp_path / "plain")
    plain.train()
    run = trainer(tmp_path / "run", stage, offload, bf16=bf16)
    run.train()
    # fp32: sums in another order, logged to four digits; bf16: weights of 8 bits against autocast-free fp32.
    assert losses(run) == pytest.approx(losses(plain), abs=2e-2 if bf16 else 2e-4)
    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=2e-2)
    assert run.predict(run.eval_dataset).predictions.shape == (4, 8, 32)
    assert all("grad_norm" in e for e in run.state.log_history if "loss" in e)

    again = trainer(tmp_path / "run", stage, offload, bf16=bf16)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{SAVE_AT}"))
    assert losses(again) == losses(run)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_saved_model_is_whole(stage, tmp_path):
    run = trainer(tmp_path, stage)
    run.train()
    run.save_model(str(tmp_path / "final"))
    plain = trainer(tmp_path / "plain")
    plain.train()
    forget()
    found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "final")
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name].float(), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_adapters_alone_are_trained_and_saved(stage, tmp_path):
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    def adapted():
        options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        return peft.get_peft_model(llama(), peft.LoraConfig(**options))

    run = trainer(tmp_path, stage, model=adapted)
    run.train()
    want = {n: tuple(p.shape) for n, p in adapted().named_parameters() if p.requires_grad}
    saved = load_file(tmp_path / f"checkpoint-{SAVE_AT}" / "adapter_model.safetensors")
    assert sorted(tuple(v.shape) for v in saved.values()) == sorted(want.values())
    wrapper = run.model_wrapped.optimizer
    states = getattr(wrapper, "optimizer", wrapper).state.values()
    moments = sum(state["exp_avg"].numel() for state in states)
    assert moments == sum(torch.Size(shape).numel() for shape in want.values())

    again = trainer(tmp_path, stage, model=adapted)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVE_AT}"))
    assert losses(again) == losses(run)


def build_sharded_train_and_generate(rank, folder, source):
    warnings.simplefilter("ignore")
    sharded = None

    def load():
        nonlocal sharded
        model = transformers.LlamaForCausalLM.from_pretrained(source)
        sharded = all(p.numel() == 0 for p in model.parameters())
        return model

    run = trainer(Path(folder) / "run", 3, model=load, gradient_checkpointing=True)
    run.train()
    run.model.eval()
    with torch.no_grad():  # ranks stop at different lengths, and go on together
        ids = run.model.generate(
            torch.ones(1, 3, dtype=torch.long),
            attention_mask=torch.ones(1, 3, dtype=torch.long),
            max_new_tokens=2 + 3 * rank,
            do_sample=False,
            eos_token_id=None,
            synced_gpus=True,
        )
    return sharded, losses(run), ids.shape[1]


def test_from_pretrained_shards_as_it_loads_and_ranks_generate_together(ranks2, tmp_path):
    llama().save_pretrained(tmp_path / "source")
    got = ranks2.run(
        build_sharded_train_and_generate, str(tmp_path), str(tmp_path / "source"), timeout=150
    )
    plain = trainer(tmp_path / "plain", gradient_accumulation_steps=4)
    plain.train()
    for rank, (sharded, found, length) in enumerate(got):
        assert sharded
        assert found == pytest.approx(losses(plain), abs=2e-4)
        assert length == 5 + 3 * rank
