"""The Trainer of transformers: a small GPT-2 learns to count."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

set_seed(0)
starts = torch.randint(0, 50, (64, 1))
rows = [{"input_ids": row, "labels": row} for row in (starts + torch.arange(16)) % 50]
model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4))
arguments = TrainingArguments(
    output_dir="trained",
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    num_train_epochs=8,
    learning_rate=1e-2,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
)
callbacks = []
# --- watch here ---
trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
print(trainer.train().training_loss)
