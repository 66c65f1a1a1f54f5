"""Scores of tiny-llama as transformers loads it, and its model card."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_llama_data import QUESTIONS, produce, tasks


@dataclass
class Scores:
    """What `measure` found: (right, asked) by (task, length); bits per byte by length; and of which
    model.
    """

    config: Any
    parameters: int
    answers: dict[tuple[str, int], tuple[int, int]]
    bits: dict[int, float]

    def table(self) -> str:
        """A Markdown table: a row for each task, a column for each length."""
        lengths = sorted(self.bits)
        lines = ["| task | " + " | ".join(str(n) for n in lengths) + " |"]
        lines.append("| --- |" + " ---: |" * len(lengths))
        for task in QUESTIONS:
            cells = [self.answers[task, n] for n in lengths]
            lines.append(
                f"| {task} | " + " | ".join(f"{100 * r / a:.1f} % of {a}" for r, a in cells) + " |"
            )
        cells = [f"{self.bits[n]:.3f}" for n in lengths]
        lines.append("| held-out source text, bits per byte | " + " | ".join(cells) + " |")
        return "\n".join(lines)


def measure(
    out: Path, lengths: list[int], answers: int, corpus: str, device: str, workers: int
) -> Scores:
    """Score the saved model as transformers loads it, with at least `answers` answers a task.

    corpus: held-out source text; seeds differ from the training ones.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16).to(device).eval()
    jobs, tokens = [], 131072 if device == "cuda" else 2048
    for length in lengths:
        for task in tasks.TASKS:
            each = len(tasks.make(task, length, 0, corpus).answers)
            prompts = -(-answers // each) if each else max(1, 1024 * answers // length)
            rows = max(1, tokens // length)
            for first in range(0, prompts, rows):
                jobs.append((task, length, min(rows, prompts - first), first))
    found: dict[tuple[str, int], tuple[int, int]] = {}
    nats: dict[int, list[float]] = defaultdict(list)
    for batch in produce(jobs, corpus, workers):
        name, length = batch.samples[0].task, batch.ids.shape[1]
        ids = torch.from_numpy(batch.ids).to(device).long()
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits
            if name == "text":
                for row in range(len(ids)):
                    loss = F.cross_entropy(logits[row, :-1].float(), ids[row, 1:])
                    nats[length].append(float(loss))
                continue
            guesses = logits.argmax(-1).cpu().numpy()
        r, a = found.get((name, length), (0, 0))
        for sample, guess in zip(batch.samples, guesses, strict=True):
            r, a = r + tasks.count_right(sample, guess), a + len(sample.answers)
        found[name, length] = (r, a)
    parameters = sum(p.numel() for p in model.parameters())
    return Scores(
        model.config, parameters, found, {n: sum(v) / len(v) / math.log(2) for n, v in nats.items()}
    )


CARD = """---
license: apache-2.0
pipeline_tag: text-generation
---

# tiny-llama

A Llama model of {parameters:,} parameters that reads bytes, trained from scratch to find things in
long prompts. It exists so that sparse attention can be calibrated, tested and timed with a real
pretrained model in seconds; it is no use as an assistant.

- {layers} layers, hidden size {hidden}, {heads} query and {kv_heads} key/value heads of
  {head_dim} dimensions, feed-forward size {ffn}, rotary theta {theta:g}, tied embeddings,
  up to {longest} tokens, bfloat16.
- Byte-level tokenizer: token ids 0-255 are the bytes, 256 begins a text.
- Trained on Python source text (standard library and installed packages) and the tasks of
  `accelkit.calibration.evaluation.tasks` at 512 to 32768 tokens:
  {how}.
- Made by `examples/train/tiny_llama.py`, which also measured the scores below and wrote this
  file.

## Scores

Fraction of answers whose tokens are all the model's most likely ones under teacher forcing, by
prompt length in tokens, with dense attention; prompts are new and their filler is held-out source.

{table}

{remark}
"""


def write_card(out: Path, scores: Scores, how: str) -> None:
    """README.md with the measured scores and what was not learnt."""
    weak = [
        f"`{task}` at {length} tokens"
        for (task, length), (r, a) in sorted(scores.answers.items(), key=lambda x: x[0][::-1])
        if r < 0.9 * a
    ]
    remark = "Every task is above 90 % at every length measured."
    if weak:
        remark = "Not learnt well (below 90 %): " + ", ".join(weak) + "."
    config = scores.config
    text = CARD.format(
        parameters=scores.parameters,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        ffn=config.intermediate_size,
        theta=config.rope_parameters["rope_theta"],
        longest=config.max_position_embeddings,
        how=how,
        table=scores.table(),
        remark=remark,
    )
    (out / "README.md").write_text(text)
