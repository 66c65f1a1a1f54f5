#!/usr/bin/env python3
"""Train the small Llama model in ``examples/models/tiny-llama`` from scratch.

    python examples/train/tiny_llama.py --out DIR --minutes 9      one GPU
    python examples/train/tiny_llama.py --out DIR --smoke          a few steps on the CPU

The model reads bytes (``accelkit.calibration.evaluation.tasks.ByteTokenizer``), has about six
million parameters and learns Python source text and the long-context tasks of
``accelkit.calibration.evaluation.tasks`` at lengths that grow from 512 to 32768 tokens. Workers
write the prompts while the GPU trains; the schedule follows the clock, so that the script ends
in time. DIR receives a Hugging Face model directory: weights, configuration, tokenizer, and a
README.md with the scores, measured on the saved model through transformers.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing as mp
import queue
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_llama_data import (
    ANSWER,
    OTHER,
    QUESTIONS,
    STAGES,
    TEXT,
    WEIGHTS,
    Batch,
    produce,
    read_corpus,
    work,
)
from tiny_llama_scores import measure, write_card
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FFN = 256, 8, 4, 2, 64, 768
VOCABULARY = 264  # 256 bytes, three special tokens, rounded up to a multiple of eight
LONGEST = 32768
ROPE_THETA = 500_000.0
NORM_EPS = 1e-5


# -- model --------------------------------------------------------------------------------------
#
# The layers work on a flat batch of always the same number of tokens, so that they are compiled
# once for all prompt lengths; only attention sees rows and lengths. Parameters are float32, the
# arithmetic is bfloat16, as in inference with the saved weights.


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + NORM_EPS)
    return (y * weight).to(x.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (tokens, heads, head_dim); cos and sin are (tokens, 1, head_dim)."""
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Layer(nn.Module):
    """A Llama decoder layer, with the parameter names of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False),
                "k_proj": nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False),
                "v_proj": nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False),
                "o_proj": nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(HIDDEN, FFN, bias=False),
                "up_proj": nn.Linear(HIDDEN, FFN, bias=False),
                "down_proj": nn.Linear(FFN, HIDDEN, bias=False),
            }
        )

    def weights(self) -> list[Tensor]:
        """The weights in the order that `before_attention` and `after_attention` take them."""
        a, m = self.self_attn, self.mlp
        return [
            self.input_layernorm.weight, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight,
            a.o_proj.weight, self.post_attention_layernorm.weight,
            m.gate_proj.weight, m.up_proj.weight, m.down_proj.weight,
        ]  # fmt: skip


def before_attention(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (tokens, heads, head_dim), of x (tokens, HIDDEN)."""
    y = rms_norm(x, norm)
    q = linear(y, wq).view(-1, HEADS, HEAD_DIM)
    k = linear(y, wk).view(-1, KV_HEADS, HEAD_DIM)
    v = linear(y, wv).view(-1, KV_HEADS, HEAD_DIM)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def after_attention(
    x: Tensor, y: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    """The residual stream x (tokens, HIDDEN) after attention's output y and the MLP."""
    x = x + linear(y, wo)
    y = rms_norm(x, norm)
    return x + linear(F.silu(linear(y, gate)) * linear(y, up), down)


def losses(
    x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor, kinds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted loss, the mean text loss (nats), and each token's hit (argmax == target)."""
    logits = linear(rms_norm(x, norm), embedding).float()
    nats = F.cross_entropy(logits, targets, reduction="none")
    total = torch.zeros((), device=x.device)
    means = []
    for kind, weight in ((TEXT, "text"), (ANSWER, "answer"), (OTHER, "other")):
        chosen = (kinds == kind).float()
        means.append((nats * chosen).sum() / chosen.sum().clamp(min=1.0))
        total = total + WEIGHTS[weight] * means[-1]
    return total, means[0].detach(), logits.detach().argmax(-1) == targets


class Model(nn.Module):
    """LlamaForCausalLM with tied embeddings, for flat batches of equal-length rows."""

    def __init__(self, device: str, compiled: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = 0.04 if "embed" in name else 0.6 / math.sqrt(p.shape[1])
                if "o_proj" in name or "down_proj" in name:
                    scale /= math.sqrt(2 * LAYERS)
                nn.init.normal_(p, std=scale)
        self.to(device)
        wrap: Callable[[Any], Any] = torch.compile if compiled else (lambda function: function)
        self._before, self._after = wrap(before_attention), wrap(after_attention)
        self._losses = wrap(losses)
        inverse = ROPE_THETA ** -(torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
        angles = torch.outer(torch.arange(LONGEST, dtype=torch.float64), inverse).repeat(1, 2)
        self._cos = angles.cos().float().to(device)
        self._sin = angles.sin().float().to(device)
        self.backends = [SDPBackend.FLASH_ATTENTION] if device == "cuda" else [SDPBackend.MATH]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
        """Causal attention within each of the `rows` rows; returns (tokens, HEADS * HEAD_DIM)."""
        q, k, v = (t.view(rows, -1, t.shape[-2], HEAD_DIM).transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(self.backends):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).reshape(-1, HEADS * HEAD_DIM)

    def forward(self, ids: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `losses`; ids and kinds are (rows, length), kinds those of the next tokens."""
        rows, length = ids.shape
        x = self.embed_tokens(ids.reshape(-1)).to(torch.bfloat16)
        cos = self._cos[:length].repeat(rows, 1).unsqueeze(1)
        sin = self._sin[:length].repeat(rows, 1).unsqueeze(1)
        for layer in self.layers:
            norm, wq, wk, wv, *rest = layer.weights()
            q, k, v = self._before(x, cos, sin, norm, wq, wk, wv)
            x = self._after(x, self.attend(q, k, v, rows), *rest)
        targets = torch.roll(ids, -1, 1).reshape(-1)
        return self._losses(
            x, self.norm.weight, self.embed_tokens.weight, targets, kinds.reshape(-1)
        )

    def pick_backend(self, tokens: int) -> None:
        """Time the attention kernels of this GPU, forward and backward, and keep the fastest."""
        length = min(LONGEST, tokens)
        rows, times, first = tokens // length, {}, None
        shapes = [(tokens, h, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS)]
        qkv = [torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            self.backends = [backend]
            try:
                for turn in range(4):
                    if turn == 1:
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                    leaves = [t.clone().requires_grad_() for t in qkv]
                    out = self.attend(*leaves, rows)
                    out.float().square().sum().backward()
                torch.cuda.synchronize()
                seconds = (time.perf_counter() - start) / 3
                found = [out.detach(), *(t.grad for t in leaves)]
                first = first or found
                far = max(
                    float((a - b).abs().max() / b.abs().max())
                    for a, b in zip(found, first, strict=True)
                )
                print(f"attention by {backend.name}: {seconds * 1e3:.1f} ms, differs {far:.1e}")
                if far < 0.03:
                    times[backend] = seconds
            except RuntimeError as error:
                print(f"attention by {backend.name}: {str(error)[:200]}")
        self.backends = [min(times, key=lambda b: times[b])]


# -- saving -------------------------------------------------------------------------------------


def hugging_face_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=LONGEST,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def save_tokenizer(out: Path) -> None:
    """A byte-level tokenizer whose ids are the bytes' values, then <|bos|>, <|eos|>, <|pad|>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes shown as themselves
    others = [b for b in range(256) if b not in plain]
    characters = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({c: b for b, c in characters.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 256)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)


def save(model: Model, out: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer in the layout of transformers."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{n}": p.detach().bfloat16().cpu() for n, p in model.named_parameters()}
    save_file(weights, out / "model.tmp", metadata={"format": "pt"})
    (out / "model.tmp").rename(out / "model.safetensors")
    hugging_face_config().save_pretrained(out)
    save_tokenizer(out)


def load(model: Model, source: Path) -> None:
    """Read weights that `save` wrote."""
    from safetensors.torch import load_file

    weights = load_file(source / "model.safetensors")
    model.load_state_dict({n.removeprefix("model."): w.float() for n, w in weights.items()})


# -- training -----------------------------------------------------------------------------------


def count_answers(hits: Tensor, kinds: Tensor) -> tuple[int, int]:
    """Right answers and all answers of rows of hits; an answer is a run of ANSWER tokens."""
    answer = kinds == ANSWER
    begins = answer.clone()
    begins[:, 1:] &= ~answer[:, :-1]
    run = begins.reshape(-1).cumsum(0) * answer.reshape(-1)
    wrong = torch.zeros(int(begins.sum()) + 1, device=hits.device, dtype=torch.bool)
    wrong[run[(~hits.reshape(-1)) & (run > 0)]] = True
    return int((~wrong[1:]).sum()), len(wrong) - 1


def quick_scores(model: Model, batches: list[Batch], device: str) -> dict[str, float]:
    """Fraction of right answers for each task in the batches, with the training model."""
    scores = {}
    for batch in batches:
        ids = torch.from_numpy(batch.ids).to(device).long()
        kinds = torch.from_numpy(batch.kinds).to(device)
        hits = model(ids, kinds)[2]  # not under no_grad, which would compile everything again
        right, asked = count_answers(hits, kinds)
        scores[batch.samples[0].task] = right / asked
    return scores


def learning_rate(done: float, step: int, peak: float) -> float:
    """Warm-up over 200 steps, constant, then linear to zero over the second half of the time."""
    return peak * min(1.0, (step + 1) / 200) * min(1.0, max(0.0, 2 * (1 - done)))


def train(args: argparse.Namespace, corpus: str, held_out: str) -> str:
    """Train for args.minutes and save; returns a phrase that says how long and on what."""
    device = args.device
    tokens = args.tokens
    context = mp.get_context("fork")
    stage = context.Value("i", 0)
    batches = context.Queue(maxsize=2 * args.workers)
    stages = sorted({n for _, lengths in STAGES for n in lengths})
    jobs = [(t, n, tokens // n, 10**8) for n in stages if n <= tokens for t in QUESTIONS]
    checks: dict[int, list[Batch]] = defaultdict(list)
    for job, batch in zip(jobs, produce(jobs, held_out, args.workers), strict=True):
        checks[job[1]].append(batch)
    offset = 100 if args.resume else 0  # new prompts in a second run
    workers = [
        context.Process(target=work, args=(i + offset, tokens, stage, batches, corpus), daemon=True)
        for i in range(args.workers)
    ]
    for worker in workers:
        worker.start()

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Model(device, compiled=device == "cuda")
    if args.resume:
        load(model, args.resume)
    if device == "cuda":
        model.pick_backend(tokens)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    begun = saved = checked = logged = time.time()
    args.end = max(args.end, begun + 1)  # however long it took to get here
    step = last_step = 0
    running: dict[int, Tensor] = {}
    while True:
        done = args.start + (1 - args.start) * (time.time() - begun) / (args.end - begun)
        if done >= 1 or (args.smoke and step >= 8):
            break
        stage.value = max(i for i, (begin, _) in enumerate(STAGES) if begin <= done)
        try:
            ids_, kinds_ = batches.get(timeout=60)
        except queue.Empty:
            raise SystemExit("the data workers stopped") from None
        ids = torch.from_numpy(ids_).to(device, non_blocking=True).long()
        kinds = torch.from_numpy(kinds_).to(device, non_blocking=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done, step, args.rate)
        loss, text_nats, hits = model(ids, kinds)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 2 and device == "cuda":  # everything is compiled: the schedule's clock starts
            torch.cuda.synchronize()
            print(f"compiled in {time.time() - begun:.0f} s")
            begun = saved = checked = logged = time.time()
        length = ids.shape[1]
        answer = (kinds == ANSWER).reshape(-1)
        now_ = torch.stack(
            (text_nats, (hits & answer).sum() / answer.sum().clamp(min=1), loss.detach())
        )
        running[length] = now_.lerp(running[length], 0.95) if length in running else now_
        now = time.time()
        if now - logged > 10 or step in (1, 100) or args.smoke:
            if device == "cuda":
                torch.cuda.synchronize()
            now = time.time()
            speed = (step - last_step) * tokens / (now - logged) / 1e6
            state = "  ".join(
                f"{n}: text {t / math.log(2):.3f} answer bytes {a:.3f} loss {v:.2f}"
                for n, (t, a, v) in ((n, running[n].tolist()) for n in sorted(running))
            )
            print(f"{now - begun:4.0f} s {done:.3f} step {step} {speed:.2f} Mtok/s  {state}")
            if not math.isfinite(loss.item()):
                raise SystemExit("the loss is not finite")
            if device == "cuda" and now - begun > 20 and step > 200 and speed < 0.15:
                raise SystemExit("too slow to be worth continuing")
            logged, last_step = now, step
        if now - checked > 30 or (args.smoke and step == 4):
            checked = now
            for n in sorted(running):
                scores = quick_scores(model, checks[n], device)
                print(f"  {n}: " + "  ".join(f"{t} {s:.3f}" for t, s in scores.items()))
                if n == 512 and 0.35 < done < 0.45 and scores["key_value"] < 0.2:
                    raise SystemExit("nothing learnt in a third of the time")
        if now - saved > 60:
            saved = now
            save(model, args.out)
    for worker in workers:
        worker.terminate()
    save(model, args.out)
    spent = (time.time() - begun) / 60
    where = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    return f"{spent:.1f} minutes on {where}, {step} steps of {tokens} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--minutes", type=float, default=9.0, help="time until training ends")
    parser.add_argument("--rate", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--resume", type=Path, help="start from the weights in this directory")
    parser.add_argument("--start", type=float, default=0.0, help="enter the schedule here (0-1)")
    parser.add_argument("--workers", type=int, default=14, help="data processes")
    parser.add_argument("--measure", action="store_true", help="only score the model in --out")
    parser.add_argument("--smoke", action="store_true", help="a few small steps on the CPU")
    args = parser.parse_args()
    args.device, args.tokens, corpus_size, answers = "cuda", 65536, 100_000_000, 2048
    args.end = time.time() + 60 * args.minutes
    lengths = [2048, 8192, 16384, 32768]
    if args.smoke:
        args.device, args.tokens, corpus_size, answers = "cpu", 1024, 1_000_000, 4
        args.workers, lengths = min(args.workers, 1), [512]
        STAGES[:] = [(0.0, {512: 0.5, 1024: 0.5})]
    begun = time.time()
    corpus, held_out = read_corpus(False, corpus_size), read_corpus(True, corpus_size // 8)
    print(f"{len(corpus)} characters to train on, {len(held_out)} held out", flush=True)
    print(f"{time.time() - begun:.1f} s to read them", flush=True)
    if args.measure:  # the card says how this model was trained
        how = (args.out / "README.md").read_text().split(" tokens:\n  ")[1].split(".\n")[0]
    else:
        how = train(args, corpus, held_out)
    begun = time.time()
    scores = measure(args.out, lengths, answers, held_out, args.device, min(args.workers, 12))
    write_card(args.out, scores, how)
    print(f"measured in {time.time() - begun:.0f} s; trained {how}\n{scores.table()}")


if __name__ == "__main__":
    main()
