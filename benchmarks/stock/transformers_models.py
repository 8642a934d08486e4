"""How a stock architecture of transformers is built from its configuration, and trained."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoConfig, Trainer, TrainerCallback, TrainingArguments

from benchmarks.stock import tasks
from benchmarks.stock.run import Heard, Stock, fit, unsaid
from gradwatch import watch

ROWS = 16
SMALL: Mapping[str, Callable[[int], Any]] = {
    "hidden_size": lambda width: width,
    "intermediate_size": lambda width: 4 * width,
    "num_hidden_layers": lambda _: 2,
    "num_attention_heads": lambda _: 4,
    "num_key_value_heads": lambda _: 2,
    "head_dim": lambda width: width // 4,
    "encoder_layers": lambda _: 2,
    "decoder_layers": lambda _: 2,
    "encoder_attention_heads": lambda _: 4,
    "decoder_attention_heads": lambda _: 4,
    "encoder_ffn_dim": lambda width: 4 * width,
    "decoder_ffn_dim": lambda width: 4 * width,
    "vocab_size": lambda _: tasks.VOCABULARY,
    "max_position_embeddings": lambda _: max(64, tasks.LENGTH),
    "pad_token_id": lambda _: 0,
    "bos_token_id": lambda _: 1,
    "eos_token_id": lambda _: 2,
    "mask_token_id": lambda _: 3,
    "decoder_start_token_id": lambda _: 1,
    "forced_eos_token_id": lambda _: None,
    "image_size": lambda _: tasks.IMAGE,
    "num_labels": lambda _: tasks.CLASSES,
}
"""What makes an architecture small, where its configuration has it; all else is the library's own default."""

Batch = dict[str, Tensor]


def causal() -> Batch:
    """Predict the next word."""
    sentence = tasks.language(ROWS)
    return {"input_ids": sentence, "labels": sentence}


def masked() -> Batch:
    """Find the words that are hidden."""
    sentence, labels = tasks.masked(ROWS)
    return {"input_ids": sentence, "labels": labels}


def classes() -> Batch:
    """Classify sentences."""
    sentence, labels = tasks.sorted_by_first(ROWS)
    sentence[:, -1] = 2
    return {"input_ids": sentence, "labels": labels}


def words() -> Batch:
    """Classify words."""
    sentence, labels = tasks.by_word(ROWS)
    return {"input_ids": sentence, "labels": labels}


def answers() -> Batch:
    """Find where something begins and ends."""
    sentence, start, end = tasks.spans(ROWS)
    return {"input_ids": sentence, "start_positions": start, "end_positions": end}


def backwards() -> Batch:
    """Say a sentence backwards."""
    sentence, labels = tasks.reversed_copy(ROWS)
    return {"input_ids": sentence, "labels": labels}


def pictures() -> Batch:
    """Classify pictures."""
    pixels, labels = tasks.stripes(ROWS)
    return {"pixel_values": pixels, "labels": labels}


def sounds() -> Batch:
    """Classify sounds."""
    sound, labels = tasks.tones(ROWS // 2)
    return {"input_values": sound, "labels": labels}


AUTO: Mapping[Callable[[], Batch], str] = {
    causal: "AutoModelForCausalLM",
    masked: "AutoModelForMaskedLM",
    classes: "AutoModelForSequenceClassification",
    words: "AutoModelForTokenClassification",
    answers: "AutoModelForQuestionAnswering",
    backwards: "AutoModelForSeq2SeqLM",
    pictures: "AutoModelForImageClassification",
    sounds: "AutoModelForAudioClassification",
}
"""The class of transformers that a kind of data is for."""


class Pooled(nn.Module):
    """An encoder under a mean over its positions and a linear head of the user's: its own pooler is not used."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        """Put a head on it."""
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, tasks.CLASSES)

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Return the loss, and what it is of."""
        hidden = self.encoder(**inputs).last_hidden_state
        logits = self.head(hidden.flatten(2).mean(2) if hidden.dim() == 4 else hidden.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def configured(kind: str, width: int, extra: Mapping[str, Any]) -> Any:
    """Return the configuration of an architecture, small; what is a function in `extra` is given the width."""
    default = AutoConfig.for_model(kind)
    fixed = [name for name, value in vars(type(default)).items() if isinstance(value, property) and value.fset is None]
    mine = {name: value(width) for name, value in SMALL.items() if hasattr(default, name) and name not in fixed}
    mine |= {name: value(width) if callable(value) else value for name, value in extra.items()}
    return AutoConfig.for_model(kind, **{name: value for name, value in mine.items() if value is not KEEP})


KEEP = object()
"""The library's own default, where `SMALL` would set another value."""


def stock(
    kind: str,
    batch: Callable[[], Batch],
    *,
    pooled: bool = False,
    model: str | Callable[[Any], nn.Module] = "",
    lr: float = 1e-3,
    trainer: bool = False,
    tag: str = "",
    **extra: Any,
) -> Stock:
    """Return an architecture with what it learns; `model` is its class where no auto class fits."""

    def train(width: int, steps: int, heard: Heard) -> None:
        config = configured(kind, width, extra)
        if callable(model):
            network = model(config)
        elif model:
            network = getattr(transformers, model)(config)
        elif pooled:
            network = Pooled(transformers.AutoModel.from_config(config), width)
        else:
            network = getattr(transformers, AUTO[batch]).from_config(config)
        (_with_trainer if trainer else _with_loop)(network, batch, steps, heard, lr)

    how = f"{batch.__name__}{'-pooled' if pooled else ''}{'-trainer' if trainer else ''}{tag and '-'}{tag}"
    return Stock(f"{kind}/{how}", train)


def _with_loop(model: nn.Module, batch: Callable[[], Batch], steps: int, heard: Heard, lr: float) -> None:
    def loss_of(_: int) -> Tensor:
        out = model(**batch())
        loss: Tensor = out["loss"]
        return loss

    fit(model, loss_of, steps, heard, lr=lr)


class _Watch(TrainerCallback):
    """Attaches gradwatch where the Trainer has its optimizer."""

    def __init__(self, heard: Heard) -> None:
        self.heard, self.watcher = heard, None

    def on_train_begin(self, *_: Any, model: nn.Module, optimizer: Any, **__: Any) -> None:
        self.watcher = watch(model, optimizer, sinks=[self.heard], on_alert=unsaid)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.watcher.close()


class _Told(Trainer):
    """Tells the loss."""

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        given = super().compute_loss(*arguments, **keywords)
        self.watching.watcher.record(given[0] if isinstance(given, tuple) else given)
        return given


def _with_trainer(model: nn.Module, batch: Callable[[], Batch], steps: int, heard: Heard, lr: float) -> None:
    batches = [batch() for _ in range(steps)]
    rows = [{name: value[i] for name, value in b.items()} for b in batches for i in range(len(b["labels"]))]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            max_steps=steps,
            per_device_train_batch_size=len(rows) // steps,
            learning_rate=lr,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=0,
        )
        watching = _Watch(heard)
        told = _Told(model=model, args=arguments, train_dataset=rows, callbacks=[watching])
        told.watching = watching
        told.train()
