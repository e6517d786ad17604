"""Hugging Face's Trainer fine-tunes a small BERT with FAM: a `compute_loss` of two lines, and `optimizers=`.

    python recipes/examples/fine_tune_bert.py

Nothing is downloaded: the model is made from a configuration, and the sentences are random words. The class
says in which half of the vocabulary the first word is. For your task take `from_pretrained` and your data.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from fam_optim import FAM

torch.manual_seed(0)
WORDS, LENGTH, CLS = 40, 12, 1


def sentences(number: int) -> list[dict[str, Tensor]]:
    tokens = torch.randint(2, WORDS, (number, LENGTH))
    tokens[:, 0] = CLS
    return [{"input_ids": row, "labels": (row[1] < WORDS // 2).long()} for row in tokens]


size: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
config = BertConfig(vocab_size=WORDS, intermediate_size=128, **size)
model = BertForSequenceClassification(config)
fam = FAM.for_model(model, torch.optim.AdamW, lr=1e-3)


class FlatTrainer(Trainer):
    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(model, *args, **kwargs)
        return fam.regularize(loss) if model.training else loss


def accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(1) == predictions.label_ids).mean())}


with tempfile.TemporaryDirectory() as folder:
    settings: dict[str, Any] = {"num_train_epochs": 6, "per_device_train_batch_size": 32, "use_cpu": True}
    arguments = TrainingArguments(folder, save_strategy="no", **settings)
    data: dict[str, Any] = {"train_dataset": sentences(1024), "eval_dataset": sentences(512)}
    trainer = FlatTrainer(model, arguments, **data, compute_metrics=accuracy, optimizers=(fam, None))
    trainer.train()
    print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.1%}")
