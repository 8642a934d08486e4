"""Stock Trainers of Hugging Face with the callback: true numbers, and a training that is bitwise that without it.

python -m benchmarks.huggingface    # Seq2SeqTrainer, trl's SFTTrainer with LoRA, SentenceTransformerTrainer, MLflow

Each is trained twice on the CPU, from configurations and without a network. The truth is the norm in float64 of each
gradient as it is when the Trainer begins to clip. What is not installed is said and skipped:
`pip install trl peft sentence-transformers mlflow-skinny`.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

import gradwatch
from benchmarks.command import parsed, parser
from gradwatch.huggingface import GradientCallback

WORDS = [f"word{k}" for k in range(60)]
CLIP = 1e-3
"""Far below most norms here, so that clipping does something: or the norms before it tell nothing."""
Norms = dict[str, float]
Make = Callable[[Path, int, list[Any]], Any]
"""Makes a Trainer that writes into a folder and takes so many steps, with callbacks."""


def shared(folder: Path, steps: int) -> dict[str, Any]:
    """Return the arguments that all Trainers get."""
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 0,
    }


def tokenizer() -> PreTrainedTokenizerFast:
    """Make one that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {word: k for k, word in enumerate(["[PAD]", "[UNK]", "[EOS]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, sep_token="[SEP]", mask_token="[MASK]", **special)


def sentence(k: int, length: int) -> str:
    """Return a row of words that depends on `k`."""
    return " ".join(WORDS[(7 * k + 3 * i * (k + 1)) % len(WORDS)] for i in range(length))


def seq2seq(folder: Path, steps: int, callbacks: list[Any]) -> Any:
    """Make a Seq2SeqTrainer of a small T5."""
    sizes = {"vocab_size": 66, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    words = tokenizer()
    rows = [{"input_ids": words(sentence(k, 6 + k % 3))["input_ids"], "labels": [k % 60 + 6] * 4} for k in range(32)]
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(**shared(folder, steps)),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(words, model=model),
        callbacks=callbacks,
    )


def sft_lora(folder: Path, steps: int, callbacks: list[Any]) -> Any:
    """Make trl's SFTTrainer of a small GPT-2 with LoRA; it checkpoints activations and takes bfloat16 by default."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    config = GPT2Config(vocab_size=66, n_positions=32, n_embd=16, n_layer=2, n_head=2, eos_token_id=2, bos_token_id=2)
    return SFTTrainer(
        model=GPT2LMHeadModel(config),
        args=SFTConfig(**shared(folder, steps), max_length=24),
        train_dataset=Dataset.from_list([{"text": sentence(k, 8 + k % 5)} for k in range(32)]),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, task_type="CAUSAL_LM"),
        callbacks=callbacks,
    )


def sentences(folder: Path, steps: int, callbacks: list[Any]) -> Any:
    """Make a SentenceTransformerTrainer of a small BERT."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.models import Pooling, Transformer

    sizes = {"vocab_size": 66, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32)).save_pretrained(folder / "bert")
    tokenizer().save_pretrained(folder / "bert")
    model = SentenceTransformer(modules=[Transformer(str(folder / "bert")), Pooling(16)], device="cpu")
    pairs = [{"anchor": sentence(k, 5), "positive": sentence(k, 7)} for k in range(32)]
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**shared(folder, steps)),
        train_dataset=Dataset.from_list(pairs),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=callbacks,
    )


def norms_now(model: torch.nn.Module) -> Norms:
    """Return the norm of each gradient there is, in float64."""
    return {n: p.grad.double().norm().item() for n, p in model.named_parameters() if p.grad is not None}


def trained(make: Make, folder: Path, steps: int, callbacks: list[Any]) -> tuple[list[Norms], list[Any]]:
    """Train; return the gradients before clipping, and all that the training leaves behind."""
    torch.manual_seed(0)
    folder.mkdir()
    trainer = make(folder, steps, callbacks)
    before: list[Norms] = []
    clip = trainer.accelerator.clip_grad_norm_

    def noted(*args: Any, **kwargs: Any) -> Any:
        before.append(norms_now(trainer.model))
        return clip(*args, **kwargs)

    trainer.accelerator.clip_grad_norm_ = noted
    trainer.train()
    state = trainer.optimizer.state_dict()["state"]
    logged = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
    moments = [t for values in state.values() for t in values.values()]
    return before, [*trainer.model.state_dict().values(), *moments, torch.get_rng_state(), torch.tensor(logged)]


def off(reports: list[gradwatch.Report], before: list[Norms]) -> float:
    """Return how far the norms of any report are from the truth, as a share of it; infinity if one is missing."""
    if len(reports) != len(before):
        return math.inf
    worst = 0.0
    for report, truth in zip(reports, before, strict=True):
        snapshot = report.snapshot
        norms = {p.name: n for p, n in zip(snapshot.model.parameters, snapshot.norm, strict=True) if n is not None}
        if norms.keys() != truth.keys() or snapshot.stage != "before_clip":
            return math.inf
        worst = max(worst, *(abs(norms[name] - n) / n if n else abs(norms[name]) for name, n in truth.items()))
    return worst


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Tell whether tensors are equal bit by bit."""
    pairs = zip(a, b, strict=False)
    return len(a) == len(b) and all(x.cpu().numpy().tobytes() == y.cpu().numpy().tobytes() for x, y in pairs)


def check(make: Make, top: Path, steps: int) -> Mapping[str, tuple[bool, str]]:
    """Train with and without the callback; return verdicts."""
    reports: list[gradwatch.Report] = []
    _, plain = trained(make, top / "plain", steps, [])
    callback = GradientCallback(sinks=[reports.append], every_n_steps=1, probe_every_n_steps=2)
    before, seen = trained(make, top / "seen", steps, [callback])
    error = off(reports, before)
    clipped = sum(math.hypot(*norms.values()) > 2 * CLIP for norms in before)
    losses = [report.snapshot.loss for report in reports]
    logged = seen[-1][:, 0].tolist()
    gap = max((math.inf if a is None else abs(a - b) for a, b in zip(losses, logged, strict=False)), default=math.inf)
    recorded = len(gradwatch.read_run(top / "seen").snapshots)
    alerts = sorted({alert.finding.code for alert in reports[-1].open}) if reports else []
    return {
        "norms": (
            error < 1e-5 and clipped > steps / 2,
            f"{len(before)} steps, {clipped} of them clipped, {len(before[0])} gradients, {error:.1e} from the truth",
        ),
        "bitwise": (same(plain, seen), f"{len(seen)} tensors: weights, optimizer, generator, losses"),
        "loss": (gap < 1e-4 and len(losses) == len(logged), f"{gap:.1e} from what the Trainer logs"),
        "record": (recorded == steps, f"{recorded} snapshots; open at the end: {', '.join(alerts) or 'nothing'}"),
    }


def tracker(top: Path, steps: int) -> Mapping[str, tuple[bool, str]]:
    """Train with MLflow's own callback, offline, and read from its store what it got."""
    import mlflow

    mlflow.set_tracking_uri((top / "mlruns").as_uri())

    def make(folder: Path, steps: int, callbacks: list[Any]) -> Any:
        from transformers.integrations.integration_utils import MLflowCallback

        return seq2seq(folder, steps, [MLflowCallback(), *callbacks])

    before, _ = trained(make, top / "seen", steps, [GradientCallback(every_n_steps=2)])
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    told = client.get_metric_history(run.info.run_id, "gradwatch/norm_global")
    truth = [math.log10(math.hypot(*norms.values())) for norms in before[::2]]
    right = [m.step for m in told] == list(range(0, steps, 2)) and all(
        abs(m.value - t) < 1e-5 for m, t in zip(told, truth, strict=True)
    )
    loss = client.get_metric_history(run.info.run_id, "loss")
    return {"scalars": (right and len(loss) == steps, f"{len(told)} of gradwatch beside {len(loss)} of the Trainer")}


CASES: list[tuple[str, tuple[str, ...], Callable[[Path, int], Mapping[str, tuple[bool, str]]]]] = [
    ("Seq2SeqTrainer", (), lambda top, steps: check(seq2seq, top, steps)),
    ("SFTTrainer with LoRA", ("trl", "peft", "datasets"), lambda top, steps: check(sft_lora, top, steps)),
    (
        "SentenceTransformerTrainer",
        ("sentence_transformers", "datasets"),
        lambda top, steps: check(sentences, top, steps),
    ),
    ("MLflow", ("mlflow",), tracker),
]


def main() -> int:
    """Print a line for each verdict; return 1 if one is FAIL."""
    mine = parser(__doc__)
    mine.add_argument("--steps", type=int, default=30)
    options = parsed(mine)
    steps = 4 if options.quick else options.steps
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "MLFLOW_ALLOW_FILE_STORE": "true"}
    logging.getLogger("gradwatch").setLevel(logging.ERROR)
    failed = 0
    for name, packages, case in CASES:
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            print(f"SKIP {name}: not installed: {', '.join(missing)}")
            continue
        with tempfile.TemporaryDirectory() as top:
            for what, (right, figures) in case(Path(top), steps).items():
                failed += not right
                print(f"{'PASS' if right else 'FAIL'} {name}, {what}: {figures}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
