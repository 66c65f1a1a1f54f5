"""A random Llama with a byte tokenizer in a folder, a plan for it, and the probe method within
reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from accelkit.patches import method, methods
from accelkit.patches.adapters import facts
from accelkit.patches.plan import Budget, Evidence, LayerPlan, Limits, Plan, Policy, Rule

LAYERS, HEADS = 2, 4
SITES = [f"model.layers.{n}.self_attn" for n in range(LAYERS)]


@contextmanager
def probe_methods() -> Iterator[None]:
    """While open, the methods folder also holds `probe_window`."""
    folder = str(Path(__file__).parent / "probe_methods")
    methods.__path__.append(folder)
    _forget()
    try:
        yield
    finally:
        methods.__path__.remove(folder)
        _forget()


def _forget() -> None:
    method.names.cache_clear()
    method._load.cache_clear()


def tiny_model(**changes: Any) -> Any:
    """The same random model at every call."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 264,
        "max_position_embeddings": 4096,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **changes})).eval()


def byte_tokenizer() -> Any:
    """Ids are bytes, then <|bos|>, <|eos|>, <|pad|>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    characters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({c: b for b, c in characters.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 256)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )


def save_tiny(folder: Path, **changes: Any) -> Path:
    """Write model and tokenizer into `folder`."""
    tiny_model(**changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tiny_plan(model: Any, min_length: int = 512, sparse: bool = True) -> Plan:
    """Heads 1 … 3 of each layer run `probe_window`, head 0 is dense; with evidence and rounds made
    up for pictures."""
    probe = method.load("probe_window")
    row = (0, 1, 1, 2) if sparse else (0,) * HEADS
    evidence = Evidence(
        tokens=1024,
        error=(0.0, 0.01, 0.02, 0.005),
        recall=(1.0, 0.97, 0.95, 0.99),
        density=(1.0, 0.2, 0.25, 0.4),
        weight=(1.0,) * HEADS,
        ms=0.6,
        dense_ms=1.5,
    )
    rule = Rule(phase="prefill", min_tokens=min_length, policies=row)
    policies = [Policy(), Policy(methods=(probe(),)), Policy(methods=(probe(blocks=2),))]
    return Plan(
        producer={"name": "accelkit", "version": "0.1.0", "torch": torch.__version__},
        fingerprint=facts(model)[0],
        policies=tuple(policies if sparse else policies[:1]),
        sites={s: LayerPlan(rules=(rule,), evidence={"prefill": evidence}) for s in SITES},
        limits=Limits(min_length=min_length, max_length=4096),
        budget=Budget(max_rel_error=0.02),
        measured={
            "predicted_error": 0.018,
            "measured_error": 0.015,
            "prefill_tokens": 1024,
            "prefill_ms": 20.0,
            "prefill_dense_ms": 30.0,
            "prefill_speedup": 1.5,
            "per_task": {"needle": 0.015, "text": 0.011},
            "rounds": [
                {"predicted_error": 0.02, "measured_error": 0.031},
                {"predicted_error": 0.012, "measured_error": 0.015},
            ],
        },
    )
