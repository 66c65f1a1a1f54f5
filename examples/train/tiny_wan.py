#!/usr/bin/env python3
"""Train the small video pipeline in ``examples/models/tiny-wan`` from scratch.

    python examples/train/tiny_wan.py --out DIR --seconds 600      one GPU
    python examples/train/tiny_wan.py --out DIR --smoke            a few steps on the CPU

A Wan pipeline of about six million parameters, made of diffusers' and transformers' own classes:
a video autoencoder that halves frames, rows and columns, a two-layer text encoder over a
vocabulary of words, and a diffusion transformer. It learns the moving shapes of ``shapes.py``,
drawn while it trains. First the autoencoder is trained, then transformer and text encoder
together by flow matching, with prompts left out now and then for guidance, on grids of several
sizes. DIR receives a pipeline directory and a README.md with the scores of the saved pipeline.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import shapes
import tiny_wan_scores
import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
)
from tiny_wan_scores import pixels
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

CHANNELS = 8  # of a latent
TEXT_LENGTH = 512  # what WanPipeline pads prompts to
WORDS_LENGTH = 32  # and how many of those positions a training prompt may fill
FLOW_SHIFT = 6.0
NO_PROMPT = 0.1  # share of the training clips without a prompt
TOKENS = 20 * 13 * 16 * 16  # video tokens in a batch
# Latent frames, rows and columns: share of the steps in the first and in the last moment.
GRIDS: dict[tuple[int, int, int], tuple[float, float]] = {
    (13, 32, 32): (0.25, 0.65),
    (9, 24, 24): (0.50, 0.20),
    (5, 16, 16): (0.22, 0.12),
    (13, 48, 48): (0.03, 0.03),
}


# -- parts --------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the prompts, lower case; ids 0, 1 and 2 are padding, end and unknown word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {w: i for i, w in enumerate([*special, *shapes.WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_text_encoder(words: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=math.ceil(words / 8) * 8,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            relative_attention_max_distance=32,
            relative_attention_num_buckets=16,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def make_vae() -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
        is_residual=True,
    )
    last = {WanResidualBlock: "conv2", WanAttentionBlock: "proj", WanResample: "resample.1"}
    for module in vae.modules():  # only the shortcuts, which average and repeat, are left
        if type(module) in last:
            layer = module.get_submodule(last[type(module)])
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    for part in (vae.encoder, vae.decoder):
        _pass_colours(part)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    nn.init.constant_(vae.quant_conv.bias[CHANNELS:], -6.0)  # almost no noise
    return vae


def _pass_colours(part: Any) -> None:
    """Let the first three channels pass the encoder or the decoder almost unchanged.

    Training begins with that and not with the long search for it. The channels between carry a
    constant plus a code that is orthogonal to it, for which normalisation and SiLU are nearly
    linear.
    """
    enter, leave, width = part.conv_in, part.conv_out, part.conv_in.out_channels
    constant, gain = 1.5, 2.5
    code = torch.linalg.qr(torch.cat((torch.ones(width, 1), torch.randn(width, 3)), 1))[0][:, 1:]
    with torch.no_grad():
        enter.weight *= 0.03
        enter.weight[:, :3] = 0
        enter.weight[:, :3, -1, 1, 1] = code
        enter.bias.fill_(constant)
        part.norm_out.gamma.fill_(gain)
        leave.weight[:3] = 0
        leave.weight[:3, :, -1, 1, 1] = code.T * constant / gain
        leave.weight -= leave.weight.mean(1, keepdim=True)  # the constant ends here
        nn.init.zeros_(leave.bias)


def make_transformer() -> WanTransformer3DModel:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=64,
        freq_dim=256,
        ffn_dim=352,
        num_layers=7,
    )
    nn.init.zeros_(model.proj_out.weight)
    return model


def make_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )


# -- autoencoder --------------------------------------------------------------------------------


def _convolve_whole(self: WanCausalConv3d, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """`WanCausalConv3d.forward` as one convolution of images whose channels are those of the
    last three frames: GPUs have fast kernels for those, not for few channels in three dimensions.
    """
    n, frames = x.shape[0], x.shape[2]
    images = x.movedim(2, 1)  # (n, frames, channels, rows, columns)
    reach, stride = self.kernel_size[0], self.stride[0]
    images = F.pad(images, (0, 0, 0, 0, 0, 0, self._padding[4], 0))
    frames = (images.shape[1] - reach) // stride + 1
    steps = [images[:, i : i + stride * (frames - 1) + 1 : stride] for i in range(reach)]
    images = torch.cat(steps, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    weight = self.weight.transpose(1, 2).flatten(1, 2)
    images = F.conv2d(images, weight, self.bias, padding=(self._padding[2], self._padding[0]))
    return images.unflatten(0, (n, frames)).movedim(1, 2)


def _resample_whole(self: WanResample, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """`WanResample.forward` on a whole clip at once, where diffusers goes chunk by chunk with a
    cache: the first frame stays alone in time, the others are halved or doubled."""
    if self.mode == "upsample3d":
        first, rest = x[:, :, :1], self.time_conv(x[:, :, 1:])
        rest = rest.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
        x = torch.cat((first, rest), 2)
    n, frames = x.shape[0], x.shape[2]
    x = self.resample(x.movedim(2, 1).flatten(0, 1)).unflatten(0, (n, frames)).movedim(1, 2)
    if self.mode == "downsample3d":
        x = torch.cat((x[:, :, :1], self.time_conv(x)), 2)
    return x


class WholeClips:
    """The autoencoder's encoder and decoder on whole clips: the same function of its weights as
    `encode` and `decode`, in a few large operations instead of one per frame."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae

    @contextmanager
    def _whole(self) -> Iterator[None]:
        forwards = {WanResample: _resample_whole, WanCausalConv3d: _convolve_whole}
        modules = [m for m in self.vae.modules() if type(m) in forwards]
        for module in modules:
            module.forward = types.MethodType(forwards[type(module)], module)
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents of (n, 3, frames, height, width)."""
        with self._whole():
            mean, log_variance = self.vae.quant_conv(self.vae.encoder(video)).chunk(2, 1)
        return mean, log_variance.float().clamp(-20, 10)

    def decode(self, latents: Tensor) -> Tensor:
        with self._whole():
            return self.vae.decoder(self.vae.post_quant_conv(latents), first_chunk=True)


class Clips:
    """Endless training clips: scenes that are not held out, drawn on the device."""

    def __init__(self, device: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def scenes(self, n: int) -> list[shapes.Scene]:
        return [shapes.random_scene(self.rng, 1, False) for _ in range(n)]

    def video(self, scenes: list[shapes.Scene], grid: tuple[int, int, int]) -> Tensor:
        return shapes.draw(scenes, *pixels(grid), self.generator)


def run_record(part: str, steps: int, begun: float, device: str) -> dict[str, Any]:
    """One line of training.json."""
    where = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    return {"part": part, "steps": steps, "seconds": round(time.time() - begun), "device": where}


def train_vae(
    vae: AutoencoderKLWan, clips: Clips, seconds: float, device: str, smoke: bool
) -> dict[str, Any]:
    """Train on squared error with a faint Kullback-Leibler term; then set the latents' mean and
    standard deviation. Returns its `run_record`."""
    whole = WholeClips(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    grids = [(5, 16, 16), (9, 24, 24), (5, 24, 40), (9, 32, 32), (5, 48, 48)]
    step, begun = 0, time.time()
    logged = begun
    while (done := (time.time() - begun) / seconds) < 1 and not (smoke and step >= 3):
        grid = grids[0 if smoke else step % len(grids)]
        video = clips.video(clips.scenes(2 if smoke else 60_000 // math.prod(grid)), grid)
        for group in optimizer.param_groups:
            group["lr"] = 8e-4 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        with torch.autocast(device, torch.bfloat16):
            mean, log_variance = whole.encode(video)
            noise = torch.randn(mean.shape, device=device)
            latents = mean + noise * torch.exp(0.5 * log_variance)
            error = F.mse_loss(whole.decode(latents).float(), video)
        mean = mean.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        (error + 1e-4 * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if time.time() - logged > 5 or smoke:
            logged = time.time()
            decibels = -10 * math.log10(error.item() / 4)
            print(f"vae {time.time() - begun:4.0f} s step {step}: {decibels:.1f} dB", flush=True)
    with torch.no_grad():
        mean = whole.encode(clips.video(clips.scenes(2 if smoke else 64), (9, 32, 32)))[0]
    std, mean = torch.std_mean(mean.float(), (0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    print(f"latents' standard deviation: {[round(v, 2) for v in std.tolist()]}", flush=True)
    return run_record("autoencoder", step, begun, device)


# -- transformer --------------------------------------------------------------------------------


class Muon:
    """Momentum whose updates are made orthogonal (Jordan et al. 2024, "Muon: an optimizer for
    hidden layers"), for matrices; those of one shape are handled together."""

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        self.matrices = matrices
        self.momentum = [torch.zeros_like(p) for p in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from the gradients; its root mean square is a fifth of the rate."""
        matrices = self.matrices
        gradients = [p.grad for p in matrices if p.grad is not None]
        torch._foreach_lerp_(self.momentum, gradients, 0.05)
        updates = torch._foreach_lerp(gradients, self.momentum, 0.95)
        for shape in {p.shape for p in matrices}:
            chosen = [i for i, p in enumerate(matrices) if p.shape == shape]
            x = torch.stack([updates[i] for i in chosen]).bfloat16()
            x = x.mT if shape[0] > shape[1] else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-12)
            for _ in range(5):  # the coefficients of Jordan's quintic iteration
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x.mT if shape[0] > shape[1] else x
            step = -0.2 * rate * math.sqrt(max(shape))
            torch._foreach_add_([matrices[i] for i in chosen], list(x.float()), alpha=step)


class Denoiser(nn.Module):
    """Transformer and text encoder, which are trained together."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def forward(self, x: Tensor, sigma: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The velocity at noise level `sigma` (n) of x (n, channels, frames, rows, columns)."""
        text = self.text_encoder(ids, mask).last_hidden_state * mask[..., None]
        text = F.pad(text, (0, 0, 0, TEXT_LENGTH - text.shape[1]))
        return self.transformer(x, 1000 * sigma, text, return_dict=False)[0]


def train_denoiser(
    model: Denoiser,
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    clips: Clips,
    end: float,
    check: Callable[[Denoiser], None],
    args: argparse.Namespace,
) -> tuple[Denoiser, dict[str, Any]]:
    """Flow matching until the clock shows `end`; returns the weights' moving average and the
    `run_record`. After each quarter of the time, `check` gets the average so far."""
    device, smoke = args.device, args.smoke
    whole, average = WholeClips(vae), copy.deepcopy(model)
    mean, std = (
        torch.tensor(v, device=device).view(1, -1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    if not smoke:
        torch.fx.experimental._config.use_duck_shape = False  # sizes equal by chance may differ
        model.transformer.compile_repeated_blocks(dynamic=True)
    blocks = [p for p in model.transformer.blocks.parameters() if p.dim() == 2]
    taken = set(map(id, blocks))
    others = [p for p in model.parameters() if id(p) not in taken]
    muon = Muon(blocks)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=device == "cuda")
    emphasis = std / std.mean()  # of the channels that matter most in pixels
    losses: dict[tuple[int, int, int], list[Tensor]] = {}

    def backward(grid: tuple[int, int, int]) -> None:
        """Gradients of one batch, whose loss goes to `losses`."""
        n = 2 if smoke else min(128, TOKENS // (grid[0] * grid[1] * grid[2] // 4))
        scenes = clips.scenes(n)
        prompts = ["" if clips.rng.random() < NO_PROMPT else s.prompt for s in scenes]
        text = tokenizer(
            prompts, padding="max_length", max_length=WORDS_LENGTH, return_tensors="pt"
        ).to(device)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                latents = whole.encode(clips.video(scenes, grid))[0].float()
            latents = (latents - mean) / std
            noise = torch.randn_like(latents)
            sigma = torch.randn(n, device=device).sigmoid()
            sigma = FLOW_SHIFT * sigma / (1 + (FLOW_SHIFT - 1) * sigma)
            noisy = latents.lerp(noise, sigma.view(-1, 1, 1, 1, 1))
            velocity = model(noisy, sigma, text.input_ids, text.attention_mask)
        thing = (latents - latents.mean((2, 3, 4), keepdim=True)).square().mean(1) > 1
        weight = emphasis * (1 + 3 * thing[:, None])
        loss = (weight * (velocity.float() - noise + latents).square()).mean()
        loss.backward()
        losses.setdefault(grid, []).append(loss.detach())

    step, checks, begun = 0, 0, time.time()
    if not smoke:  # compile, before the schedule's clock starts
        for grid in GRIDS:
            backward(grid)
            torch.cuda.synchronize()
            print(f"dit {time.time() - begun:4.0f} s: grid {grid} is compiled", flush=True)
        model.zero_grad(set_to_none=True)
        losses.clear()
    logged = begun = time.time()
    while (done := (time.time() - begun) / max(end - begun, 1.0)) < 1 and not (smoke and step >= 3):
        rate = args.rate * min(1, (step + 1) / 150) * (0.5 + 0.5 * math.cos(math.pi * done))
        adam.param_groups[0]["lr"] = rate / 4
        shares = [a + (b - a) * done for a, b in GRIDS.values()]
        backward((3, 8, 8) if smoke else clips.rng.choices(list(GRIDS), shares)[0])
        nn.utils.clip_grad_norm_(others, 1.0)
        muon.step(rate)
        adam.step()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            keep = min(0.998, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)
        step += 1
        if 4 * done >= checks + 1 or (smoke and step == 2):
            checks += 1
            check(average)
        if time.time() - logged > 10 or smoke:
            values = {g: torch.stack(v).mean().item() for g, v in losses.items()}
            logged = time.time()
            losses.clear()
            means = "  ".join(f"{'x'.join(map(str, g))} {v:.3f}" for g, v in values.items())
            print(f"dit {logged - begun:4.0f} s step {step}: {means}", flush=True)
            if not all(map(math.isfinite, values.values())):
                raise SystemExit("the loss is not finite")
    return average, run_record("transformer and text encoder", step, begun, device)


# -- saving and running -------------------------------------------------------------------------


def save(vae: AutoencoderKLWan, model: Denoiser, runs: list[dict[str, Any]], out: Path) -> None:
    """The pipeline in bfloat16 as a directory that `WanPipeline.from_pretrained` opens."""
    parts = [copy.deepcopy(m).to("cpu", torch.bfloat16) for m in (vae, *model.children())]
    vae, transformer, text_encoder = parts
    pipe = WanPipeline(make_tokenizer(), text_encoder, vae, make_scheduler(), transformer)
    pipe.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(runs, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="pipeline directory to write")
    parser.add_argument("--report", type=Path, help="directory for scores and pictures")
    parser.add_argument("--seconds", type=float, default=600.0, help="until training ends")
    parser.add_argument(
        "--vae-seconds", type=float, default=60.0, help="of these for the autoencoder"
    )
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--resume", type=Path, help="start from the pipeline in this directory")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts a measure")
    parser.add_argument("--seed", type=int, default=0, help="of weights and training clips")
    parser.add_argument("--smoke", action="store_true", help="a few small steps on the CPU")
    args = parser.parse_args()
    args.device = device = "cpu" if args.smoke else "cuda"
    end = time.time() + args.seconds
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = make_tokenizer()
    vae, transformer = make_vae(), make_transformer()
    text_encoder = make_text_encoder(len(tokenizer))
    if args.resume:  # the parts that the directory has
        if (args.resume / "vae").exists():
            vae = AutoencoderKLWan.from_pretrained(args.resume / "vae")
        if (args.resume / "transformer").exists():
            transformer = WanTransformer3DModel.from_pretrained(args.resume / "transformer")
            text_encoder = UMT5EncoderModel.from_pretrained(args.resume / "text_encoder").float()
    vae, model = vae.to(device), Denoiser(transformer, text_encoder).to(device)
    clips = Clips(device, args.seed)
    runs: list[dict[str, Any]] = []  # what made the weights, those of the resumed pipeline first
    if args.resume and (args.resume / "training.json").exists():
        runs = json.loads((args.resume / "training.json").read_text())
    if args.vae_seconds > 0:
        runs.append(train_vae(vae, clips, args.vae_seconds, device, args.smoke))
    vae.requires_grad_(False)
    main_grid = (3, 8, 8) if args.smoke else (13, 32, 32)
    if args.smoke:
        args.prompts = 4

    def check(average: Denoiser) -> None:
        save(vae, average, runs, args.out)
        pipe = tiny_wan_scores.load(args.out, device)
        scores, _ = tiny_wan_scores.measure(pipe, main_grid, min(args.prompts, 25), 7)
        print(f"  of {scores['n']} prompts: {scores['right']}", flush=True)

    model, run = train_denoiser(model, vae, tokenizer, clips, end, check, args)
    runs.append(run)
    save(vae, model, runs, args.out)
    grids = [main_grid] if args.smoke else list(GRIDS)
    tiny_wan_scores.evaluate(args.out, args.report or args.out, args.prompts, device, grids)


if __name__ == "__main__":
    main()
