# SPDX-License-Identifier: Apache-2.0
"""The Trainer on sequences that accelerate splits over two ranks: the losses of whole ones."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.helpers.libraries import forget

transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("transformers.trainer", exc_type=ImportError)  # what it needs may be broken
accelerate_utils = pytest.importorskip("accelerate.utils")
if not hasattr(accelerate_utils, "DeepSpeedSequenceParallelConfig"):
    pytest.skip("this accelerate does not split sequences", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore")


def losses_of(folder, stage, split):
    warnings.simplefilter("ignore")
    forget()
    options = {}
    if split:
        options["parallelism_config"] = accelerate_utils.ParallelismConfig(
            sp_backend="deepspeed",
            sp_size=2,
            sp_handler=accelerate_utils.DeepSpeedSequenceParallelConfig(
                sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
            ),
        )
    settings = {
        "zero_optimization": {"stage": stage},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
        use_cache=False,
    )
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 64, (32, 16), generator=generator)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        deepspeed=settings if split else None,
        **options,
    )
    trainer = transformers.Trainer(
        model=transformers.LlamaForCausalLM(config),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def split_losses(rank, folder, stage):
    losses = losses_of(folder, stage, True)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from deepspeed.utils import groups

    ALL_ATTENTION_FUNCTIONS["sdpa"] = ALL_ATTENTION_FUNCTIONS["sdpa"].ulysses_core
    groups.reset()
    return losses


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_on_split_sequences_has_the_losses_of_whole_ones(ranks2, tmp_path, stage):
    plain = losses_of(tmp_path, stage, False)
    assert len(plain) == 4
    # Adam turns the rounding of small gradients into steps; losses of 4 agree to some 1e-5.
    for losses in ranks2.run(split_losses, str(tmp_path), stage):
        assert losses == pytest.approx(plain, rel=1e-4)
