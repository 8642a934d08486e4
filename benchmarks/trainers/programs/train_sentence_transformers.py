"""Sentence Transformers: a small BERT learns which sentences belong together."""

import tempfile
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast, set_seed

set_seed(0)
colors, sizes = ["red", "green", "blue", "black", "white"], ["small", "large", "round", "flat", "old", "new"]
animals = ["cat", "dog", "bird", "fish", "horse"]
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *colors, *sizes, *animals]
folder = Path(tempfile.mkdtemp())
(folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
widths = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BertModel(BertConfig(vocab_size=len(words), **widths)).save_pretrained(folder)
word_vectors = Transformer(str(folder))
model = SentenceTransformer(modules=[word_vectors, Pooling(32)], device="cpu")

pairs = [(f"{color} {animal}", f"{animal} {size}") for color in colors for size in sizes for animal in animals]
arguments = SentenceTransformerTrainingArguments(
    output_dir="trained",
    per_device_train_batch_size=10,
    num_train_epochs=2,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
callbacks = []
# --- watch here ---
trainer = SentenceTransformerTrainer(
    model,
    arguments,
    train_dataset=Dataset.from_dict({"anchor": [one for one, _ in pairs], "positive": [other for _, other in pairs]}),
    loss=MultipleNegativesRankingLoss(model),
    callbacks=callbacks,
)
print(trainer.train().training_loss)
