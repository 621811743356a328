"""Trainers compare logits and labels by position: an attached model must fit in without a word to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Tiny, samples
from torch import Tensor
from transformers import Trainer, TrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Single prompts with the last six tokens as the answer."""

    def __init__(self, tiny: Tiny, count: int = 4) -> None:
        self.rows = []
        for sample in (samples(tiny, "batch") * 2)[:count]:
            inputs = tiny.inputs(sample)
            labels = inputs["input_ids"].clone()
            labels[:, :-6] = -100
            self.rows.append({**inputs, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return self.rows[row]


def one(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return rows[0]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        max_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        learning_rate=0.0,
        **changes,
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_trains(tiny: Tiny, tmp_path: Path, smoothing: float) -> None:
    model, rows = tiny.model(), Rows(tiny)
    with tiny.attach(model) as pruner:
        trainer = Trainer(
            model, arguments(tmp_path, label_smoothing_factor=smoothing), train_dataset=rows, data_collator=one
        )
        result = trainer.train()
        assert torch.isfinite(torch.tensor(result.training_loss))
        assert pruner.trace.tokens_per_layer.final == 8


def test_metrics_see_the_predictions_of_the_labels(tiny: Tiny, tmp_path: Path) -> None:
    """Accuracy over labelled positions is that of the model's own logits, counted from the end."""
    model, rows, seen = tiny.model(), Rows(tiny), {}
    model.config.text_config.use_cache = False  # older trainers gather every output, and a cache cannot be

    def accuracy(predictions: Any) -> dict[str, float]:
        logits, labels = torch.tensor(predictions.predictions), torch.tensor(predictions.label_ids)
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) & (labels[:, 1:] != -100)
        seen["right"] = int(right.sum())
        return {"right": float(right.sum())}

    def logits_alone(output: Any, labels: Tensor) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    with tiny.attach(model):
        expected = 0
        for row in rows.rows:
            with torch.no_grad():
                logits = model(**row).logits
            hits = logits[:, -7:-1].argmax(-1) == row["labels"][:, -6:]
            expected += int(hits.sum())
        Trainer(
            model,
            arguments(tmp_path),
            eval_dataset=rows,
            data_collator=one,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=logits_alone,
        ).evaluate()
    assert seen["right"] == expected


def test_sft_trainer_of_trl(tiny: Tiny, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    datasets.config.HF_DATASETS_CACHE = tmp_path
    model, rows = tiny.model(), Rows(tiny)
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        max_steps=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        learning_rate=0.0,
        gradient_checkpointing=False,
    )
    with tiny.attach(model):
        trainer = trl.SFTTrainer(
            model,
            config,
            train_dataset=datasets.Dataset.from_list([{"row": i} for i in range(4)]),
            data_collator=lambda batch: rows[batch[0]["row"]],
            processing_class=tiny.processor,
        )
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "mean_token_accuracy" in entry]
    assert logged
    assert all(0 <= entry["mean_token_accuracy"] <= 1 for entry in logged)
