"""Tiny random diffusers pipelines of every supported family: the real pipeline classes with tiny
components built from their configs. Nothing is downloaded.

`tiny_pipe(family)` builds one, the same at every call; `latents(pipe, family, …)` runs it; `NARROW`
is a method that makes all of them sparse.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
)

from accelkit.patches.method import load

WORDS = (
    "a an the red green blue ball cube ring moves falls left right up down over under".split()  # noqa: SIM905
)
TEXT, HEADS, DIM = 16, 2, 16
"""Width of every text encoder; heads of every denoiser and their size."""
VIDEO = {"height": 128, "width": 128, "num_frames": 9}


class Near(load("window")):  # type: ignore[misc]
    """A static window on both sides, in denoising."""

    phases: ClassVar = ("denoise",)


NARROW = Near(sink_tokens=16, window_tokens=17, block=16)


def tokenizer(length: int = 12) -> PreTrainedTokenizerFast:
    """Words to ids, padded at the end, `length` at most."""
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    inner = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate([*special, *WORDS])}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=length,
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )
    made.padding_side = "right"
    return made


def t5(cls: type = T5EncoderModel, config: type = T5Config, width: int = TEXT) -> Any:
    return cls(
        config(
            vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def clip(cls: type = CLIPTextModel) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=64, hidden_size=TEXT, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, projection_dim=TEXT, max_position_embeddings=77,
            pad_token_id=0, eos_token_id=1, bos_token_id=2,
        )
    )  # fmt: skip


def flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


def image_vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, latent_channels=channels, norm_num_groups=2, shift_factor=0.0,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def wan_denoiser() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=DIM, in_channels=16,
        out_channels=16, text_dim=TEXT, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def wan_vae() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip


def wan(two: bool = False) -> DiffusionPipeline:
    return diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(UMT5EncoderModel, UMT5Config),
        vae=wan_vae(),
        scheduler=flow(shift=3.0),
        transformer=wan_denoiser(),
        transformer_2=wan_denoiser() if two else None,
        boundary_ratio=0.7 if two else None,
    )


def hunyuan() -> DiffusionPipeline:
    return diffusers.HunyuanVideoPipeline(
        text_encoder=LlamaModel(
            LlamaConfig(
                vocab_size=64, hidden_size=TEXT, intermediate_size=16, num_hidden_layers=3,
                num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0,
            )
        ),
        tokenizer=tokenizer(),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=DIM,
            num_layers=1, num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1,
            text_embed_dim=TEXT, pooled_projection_dim=TEXT, rope_axes_dim=(4, 6, 6),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1,
            norm_num_groups=2,
        ),
        scheduler=flow(shift=7.0),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(),
    )  # fmt: skip


def hunyuan15() -> DiffusionPipeline:
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(
            Qwen2_5_VLTextConfig(
                vocab_size=64, hidden_size=TEXT, intermediate_size=16, num_hidden_layers=3,
                num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
                rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2],
                                 "rope_theta": 1e4},
            )
        ),
        tokenizer=tokenizer(),
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=HEADS, attention_head_dim=DIM,
            num_layers=2, num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=TEXT,
            text_embed_2_dim=TEXT, image_embed_dim=8, rope_axes_dim=(4, 6, 6), target_size=128,
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1,
            spatial_compression_ratio=8,
        ),
        scheduler=flow(shift=7.0),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
    )  # fmt: skip
    # The class fixes these; they would make more text than there is video.
    pipe.tokenizer_max_length, pipe.prompt_template_encode_start_idx = 12, 2
    pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 6, 5
    return pipe


def cogvideox(patch_size_t: int | None = None) -> DiffusionPipeline:
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1,
            norm_num_groups=2, temporal_compression_ratio=4,
        ),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=DIM, in_channels=4, out_channels=4,
            time_embed_dim=8, text_embed_dim=TEXT, num_layers=2, sample_width=16,
            sample_height=16, sample_frames=9, patch_size=2, patch_size_t=patch_size_t,
            temporal_compression_ratio=4, max_text_seq_length=12,
            use_rotary_positional_embeddings=True, patch_bias=patch_size_t is None,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip


def ltx() -> DiffusionPipeline:
    return diffusers.LTXPipeline(
        scheduler=flow(),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=1, patch_size_t=1,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
        ),
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=HEADS,
            attention_head_dim=DIM, cross_attention_dim=HEADS * DIM, num_layers=2,
            caption_channels=TEXT,
        ),
    )  # fmt: skip


def mochi() -> DiffusionPipeline:
    return diffusers.MochiPipeline(
        scheduler=flow(),
        vae=diffusers.AutoencoderKLMochi(
            latent_channels=4, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=diffusers.MochiTransformer3DModel(
            patch_size=2, num_attention_heads=HEADS, attention_head_dim=DIM, num_layers=2,
            pooled_projection_dim=16, in_channels=4, text_embed_dim=TEXT, time_embed_dim=8,
        ),
    )  # fmt: skip


class Unguarded:
    """Stands in for Cosmos' safety checker, whose package and weights are not here."""

    def to(self, *args: Any, **kwargs: Any) -> Unguarded:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def cosmos_denoiser(channels: int = 4, mask: int = 0, **options: Any) -> Any:
    """`mask` more channels come in than go out: which frames are given. The padding mask, one more
    channel in released weights, is left out: it would need torchvision.
    """
    return diffusers.CosmosTransformer3DModel(
        concat_padding_mask=False, in_channels=channels + mask, out_channels=channels,
        num_attention_heads=HEADS, attention_head_dim=DIM, num_layers=2, mlp_ratio=2,
        text_embed_dim=TEXT, adaln_lora_dim=4, max_size=(8, 32, 32), patch_size=(1, 2, 2),
        rope_scale=(1.0, 1.0, 1.0), **options,
    )  # fmt: skip


def cosmos() -> DiffusionPipeline:
    return diffusers.CosmosTextToWorldPipeline(
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=cosmos_denoiser(extra_pos_embed_type="learnable"),
        vae=diffusers.AutoencoderKLCosmos(
            latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8), attention_resolutions=(8,), resolution=64,
            num_layers=1, patch_size=4, spatial_compression_ratio=8,
            temporal_compression_ratio=4,
        ),
        scheduler=diffusers.EDMEulerScheduler(
            sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min"
        ),
        safety_checker=Unguarded(),
    )  # fmt: skip


def cosmos2(pipeline: str, mask: int) -> DiffusionPipeline:
    """Predict2, text to image or a first frame to video."""
    return getattr(diffusers, pipeline)(
        text_encoder=t5(),
        tokenizer=tokenizer(),
        transformer=cosmos_denoiser(16, mask, extra_pos_embed_type=None),
        vae=wan_vae(),
        scheduler=flow(use_karras_sigmas=True),
        safety_checker=Unguarded(),
    )


def cosmos25() -> DiffusionPipeline:
    """Predict2.5, text to video."""
    words = tokenizer()
    words.chat_template = "{{ messages[-1]['content'][0]['text'] }}"
    return diffusers.Cosmos2_5_PredictBasePipeline(
        text_encoder=qwen_vl(),
        tokenizer=words,
        transformer=cosmos_denoiser(
            16, 1, extra_pos_embed_type=None,
            use_crossattn_projection=True, crossattn_proj_in_channels=TEXT,
            encoder_hidden_states_channels=TEXT,
        ),
        vae=wan_vae(),
        scheduler=diffusers.UniPCMultistepScheduler(
            use_karras_sigmas=True, use_flow_sigmas=True, prediction_type="flow_prediction",
            sigma_max=200.0, sigma_min=0.01,
        ),
        safety_checker=Unguarded(),
    )  # fmt: skip


def flux() -> DiffusionPipeline:
    return diffusers.FluxPipeline(
        scheduler=flow(),
        vae=image_vae(1),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=2,
            attention_head_dim=DIM, num_attention_heads=HEADS, joint_attention_dim=TEXT,
            pooled_projection_dim=TEXT, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip


def qwen_vl() -> Any:
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 64, "hidden_size": TEXT, "intermediate_size": 16,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2],
                                    "rope_theta": 1e4},
            },
            vision_config={
                "depth": 1, "hidden_size": TEXT, "intermediate_size": 16, "num_heads": 2,
                "out_hidden_size": TEXT,
            },
        )
    )  # fmt: skip


def qwen_image() -> DiffusionPipeline:
    pipe = diffusers.QwenImagePipeline(
        scheduler=flow(),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        text_encoder=qwen_vl(),
        tokenizer=tokenizer(),
        transformer=diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=DIM,
            num_attention_heads=HEADS, joint_attention_dim=TEXT, axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "the {}", 1
    return pipe


def sd3() -> DiffusionPipeline:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=DIM,
            num_attention_heads=HEADS, joint_attention_dim=2 * TEXT, caption_projection_dim=32,
            pooled_projection_dim=2 * TEXT, out_channels=4, pos_embed_max_size=16,
            dual_attention_layers=(0,),
        ),
        scheduler=flow(),
        vae=image_vae(4),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(width=2 * TEXT),
        tokenizer_3=tokenizer(),
    )  # fmt: skip


def pixart() -> DiffusionPipeline:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5(),
        vae=image_vae(4),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=16, num_layers=2, patch_size=2, attention_head_dim=DIM,
            num_attention_heads=HEADS, caption_channels=TEXT, in_channels=4, out_channels=8,
            cross_attention_dim=HEADS * DIM, use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


IMAGE = {"height": 128, "width": 128, "max_sequence_length": 12}
PIPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "wan": (wan, {**VIDEO, "max_sequence_length": 12}),
    "wan22": (lambda: wan(two=True), {**VIDEO, "max_sequence_length": 12}),
    "hunyuan": (
        hunyuan,
        {
            **VIDEO,
            "max_sequence_length": 12,
            "prompt_template": {"template": "the {}", "crop_start": 1},
        },
    ),
    "hunyuan15": (hunyuan15, VIDEO),
    "cogvideox": (cogvideox, {**VIDEO, "max_sequence_length": 12}),
    "cogvideox15": (lambda: cogvideox(2), {**VIDEO, "num_frames": 13, "max_sequence_length": 12}),
    "ltx": (ltx, {**VIDEO, "height": 64, "width": 64, "max_sequence_length": 12}),
    "mochi": (mochi, {**VIDEO, "num_frames": 13, "max_sequence_length": 12}),
    "cosmos": (cosmos, {**VIDEO, "max_sequence_length": 12}),
    "cosmos2": (
        lambda: cosmos2("Cosmos2VideoToWorldPipeline", 1),
        {**VIDEO, "max_sequence_length": 12, "image": Image.new("RGB", (128, 128), "teal")},
    ),
    "cosmos2_image": (lambda: cosmos2("Cosmos2TextToImagePipeline", 0), IMAGE),
    "cosmos25": (cosmos25, {**VIDEO, "max_sequence_length": 12}),
    "flux": (flux, {**IMAGE, "height": 256}),
    "qwen_image": (
        qwen_image,
        {**IMAGE, "height": 192, "negative_prompt": "the ring", "true_cfg_scale": 2.0},
    ),
    "sd3": (sd3, IMAGE),
    "pixart": (pixart, {**IMAGE, "use_resolution_binning": False, "clean_caption": False}),
}
"""Family → how to build it and how to call it."""


def tiny_pipe(family: str) -> DiffusionPipeline:
    """A random pipeline of `family` in evaluation mode, the same at every call."""
    torch.manual_seed(0)
    pipe = PIPES[family][0]()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(
    pipe: DiffusionPipeline, family: str, prompt: str = "a red ball moves left", steps: int = 2,
    seed: int = 0, **options: Any,
) -> Tensor:  # fmt: skip
    """Final latents of one generation with equal noise for equal `seed`."""
    arguments = copy.deepcopy(PIPES[family][1]) | options
    out = pipe(
        prompt=prompt,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_dict=False,
        **arguments,
    )
    return out[0]
