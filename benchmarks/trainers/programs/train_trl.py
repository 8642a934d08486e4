"""TRL with PEFT: supervised fine-tuning of a small Llama by low-rank adapters."""

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

set_seed(0)
words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
texts = [" ".join(words[(i + k) % 10] for k in range(8)) for i in range(64)]
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes))
arguments = SFTConfig(
    output_dir="trained",
    per_device_train_batch_size=8,
    num_train_epochs=3,
    learning_rate=1e-2,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
)
callbacks = []
# --- watch here ---
trainer = SFTTrainer(
    model,
    arguments,
    train_dataset=Dataset.from_dict({"text": texts}),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    callbacks=callbacks,
)
print(trainer.train().training_loss)
