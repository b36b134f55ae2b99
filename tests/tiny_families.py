"""Tiny random pipelines of further families, built offline."""

import string
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from flowrl_trainers import FlowPipeline
from flowrl_trainers.shapes.models import new_tokenizer

from .helpers import seeds

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}<|im_end|>\n{% endfor %}"
)
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in string.ascii_lowercase)]
T5 = {"vocab_size": len(PIECES), "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}


def awaken(transformer: torch.nn.Module) -> Any:
    """Zero-initialised output layers would make the velocity constant, and padding tokens start uninitialised."""
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "pad_token" in name or (parameter.dim() > 1 and parameter.std() == 0):
                parameter.normal_(std=0.2)
    return transformer.eval()


def qwen_tokenizer() -> Qwen2Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*letters, *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special[1:], padding_side="right")
    tokenizer.chat_template = CHAT
    return tokenizer


def clip_and_t5() -> dict[str, Any]:
    tokenizer = new_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, projection_dim=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return {
        "text_encoder": CLIPTextModel(clip).eval(), "tokenizer": tokenizer,
        "text_encoder_2": T5EncoderModel(T5Config(**T5)).eval(), "tokenizer_2": t5_tokenizer(),
    }  # fmt: skip


def t5_tokenizer() -> T5Tokenizer:
    return T5Tokenizer(vocab=PIECES, extra_ids=0)


def kl(blocks: int = 2) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        sample_size=32, scaling_factor=1.3, shift_factor=0.2,
    ).eval()  # fmt: skip


def tiny_flux(guidance_embeds: bool = True) -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(**(DYNAMIC if guidance_embeds else {"shift": 1.0}))
    return FluxPipeline(scheduler=scheduler, vae=kl(), transformer=awaken(transformer), **clip_and_t5())


def flux_2_parts(joint: int, guidance_embeds: bool) -> dict[str, Any]:
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=joint, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=1, norm_num_groups=4,
        sample_size=32,
    ).eval()  # fmt: skip
    with torch.no_grad():
        vae.bn.running_mean.normal_(std=0.3)
        vae.bn.running_var.uniform_(0.5, 2)
    return {"scheduler": FlowMatchEulerDiscreteScheduler(**DYNAMIC), "vae": vae, "transformer": awaken(transformer)}


def qwen3(cls: type, layers: int, hidden: int) -> Any:
    config = Qwen3Config(
        vocab_size=300, hidden_size=hidden, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=1024,
    )  # fmt: skip
    return cls(config).eval()


def tiny_flux_2_klein(is_distilled: bool = False) -> Flux2KleinPipeline:
    torch.manual_seed(0)
    parts = flux_2_parts(24, guidance_embeds=False)
    return Flux2KleinPipeline(
        text_encoder=qwen3(Qwen3ForCausalLM, 28, 8), tokenizer=qwen_tokenizer(), is_distilled=is_distilled, **parts
    )


def tiny_flux_2() -> Flux2Pipeline:
    torch.manual_seed(0)
    text = {
        "model_type": "mistral", "vocab_size": 300, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 31,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 1024,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=10)
    ).eval()
    return Flux2Pipeline(text_encoder=encoder, tokenizer=qwen_tokenizer(), **flux_2_parts(24, guidance_embeds=True))


def tiny_qwen_image() -> QwenImagePipeline:
    torch.manual_seed(0)
    text = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.2, 0.9, 1.1, 1.0],
    ).eval()  # fmt: skip
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC, shift_terminal=0.02), vae=vae,
        transformer=awaken(transformer),
        tokenizer=qwen_tokenizer(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ).eval(),
    )  # fmt: skip


def tiny_z_image() -> ZImagePipeline:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=kl(), text_encoder=qwen3(Qwen3Model, 2, 16),
        tokenizer=qwen_tokenizer(), transformer=awaken(transformer),
    )  # fmt: skip


def gemma() -> dict[str, Any]:
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "▁", *string.printable[:95]])}
    config = Gemma2Config(
        vocab_size=len(vocab) + 10, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=4096,
    )  # fmt: skip
    return {"text_encoder": Gemma2Model(config).eval(), "tokenizer": GemmaTokenizer(vocab=vocab, merges=[])}


def tiny_sana() -> SanaPipeline:
    torch.manual_seed(0)
    text = gemma()
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=16, patch_size=1,
    )  # fmt: skip
    blocks: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ()),
    }  # fmt: skip
    vae = AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.7, **blocks).eval()
    return SanaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, transformer=awaken(transformer), **text
    )


def tiny_lumina_2() -> Lumina2Pipeline:
    torch.manual_seed(0)
    text = gemma()
    transformer = Lumina2Transformer2DModel(
        in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=16, cap_feat_dim=16, axes_dim_rope=(4, 6, 6), axes_lens=(300, 64, 64),
    )  # fmt: skip
    # A steep shift, so that what the pipeline takes for the number of tokens counts. Its scale factor is 8 whatever
    # the autoencoder.
    scheduler = FlowMatchEulerDiscreteScheduler(**DYNAMIC, base_image_seq_len=2, max_image_seq_len=16)
    return Lumina2Pipeline(scheduler=scheduler, vae=kl(blocks=4), transformer=awaken(transformer), **text)


def tiny_aura_flow() -> AuraFlowPipeline:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, out_channels=4, pos_embed_max_size=256**2,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)  # as they are initialised, attention hardly counts in so narrow a network
    return AuraFlowPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73), vae=kl(), transformer=awaken(transformer),
        tokenizer=t5_tokenizer(), text_encoder=UMT5EncoderModel(UMT5Config(**T5)).eval(),
    )  # fmt: skip


def glm_tokenizer() -> PreTrainedTokenizerFast:
    """As GLM's, it pads on the left and begins every text with two tokens of its own."""
    special = ["<|endoftext|>", "[gMASK]", "<sop>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(
        "[gMASK] <sop> $A", special_tokens=[(s, vocab[s]) for s in special[1:]]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], padding_side="left")


def tiny_cogview_4(**scheduler: Any) -> CogView4Pipeline:
    torch.manual_seed(0)
    text = GlmConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=1024, pad_token_id=0,
    )  # fmt: skip
    transformer = CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, text_embed_dim=16,
        time_embed_dim=16, condition_dim=8,
    )  # fmt: skip
    settings = {
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
        "base_shift": 0.25,
        "max_shift": 0.75,
    } | scheduler
    return CogView4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**settings), vae=kl(), transformer=awaken(transformer),
        tokenizer=glm_tokenizer(), text_encoder=GlmModel(text).eval(),
    )  # fmt: skip


def tiny_chroma() -> ChromaPipeline:
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC), vae=kl(), transformer=awaken(transformer),
        tokenizer=t5_tokenizer(), text_encoder=T5EncoderModel(T5Config(**T5)).eval(),
    )  # fmt: skip


# The pipeline of a family, and its settings for pictures of 32 pixels in tests.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "flux": (tiny_flux, {"max_sequence_length": 64}),
    "flux schnell": (lambda: tiny_flux(guidance_embeds=False), {"max_sequence_length": 64}),
    "flux 2": (tiny_flux_2, {"max_sequence_length": 512}),
    "flux 2 klein": (tiny_flux_2_klein, {"max_sequence_length": 64}),
    "flux 2 klein distilled": (lambda: tiny_flux_2_klein(is_distilled=True), {"max_sequence_length": 64}),
    "qwen image": (tiny_qwen_image, {"max_sequence_length": 512}),
    "z image": (tiny_z_image, {"max_sequence_length": 64}),
    "sana": (tiny_sana, {"max_sequence_length": 32}),
    "lumina 2": (tiny_lumina_2, {"max_sequence_length": 256}),
    "aura flow": (tiny_aura_flow, {"max_sequence_length": 64}),
    "cogview 4": (tiny_cogview_4, {"max_sequence_length": 64}),
    "chroma": (tiny_chroma, {"max_sequence_length": 64}),
}


def tiny(family: str) -> Any:
    """A tiny random pipeline of a family, the same at every call."""
    pipeline = FAMILIES[family][0]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- what their stock pipelines draw --------------------------------------------------------------------------------

PROMPTS = ["a red circle", "a green square and a blue triangle"]
# Guidance off, and at another value than the default; those without a choice have one case.
GUIDANCE = {
    "flux": [{"guidance_scale": 2.0}, {"guidance_scale": 2.0, "true_cfg_scale": 3.0, "negative_prompt": "a cross"}],
    "flux schnell": [{}],
    "flux 2": [{"guidance_scale": 2.0}],
    "flux 2 klein": [{"guidance_scale": 1.0}, {"guidance_scale": 3.0}],
    "flux 2 klein distilled": [{}],
    "qwen image": [{"guidance_scale": 1.0}, {"guidance_scale": 3.0, "negative_prompt": "a cross"}],
    "z image": [{"guidance_scale": 0.0}, {"guidance_scale": 3.0, "negative_prompt": "a cross"}],
    "sana": [{"guidance_scale": 1.0}, {"guidance_scale": 3.0, "negative_prompt": "a cross"}],
    "lumina 2": [{"guidance_scale": 1.0}, {"guidance_scale": 3.0, "negative_prompt": "a cross"}],
    "aura flow": [{"guidance_scale": 1.0}, {"guidance_scale": 3.0, "negative_prompt": "a cross"}],
    "cogview 4": [{"guidance_scale": 1.0}, {"guidance_scale": 3.0, "negative_prompt": "a cross"}],
    "chroma": [{"guidance_scale": 1.0}, {"guidance_scale": 3.0, "negative_prompt": "a cross"}],
}


def stock(family: str, pipeline, flow: FlowPipeline, steps: int = 4) -> torch.Tensor:
    """The pictures of the pipeline's own `__call__`, with the arguments that a card would show."""
    arguments = flow.call_arguments() | {"num_inference_steps": steps, "output_type": "pt"}
    if family == "cogview 4":  # what it draws of a prompt depends on the longest of the batch
        return torch.cat(
            [pipeline(prompt=p, generator=g, **arguments).images for p, g in zip(PROMPTS, seeds(2), strict=True)]
        )
    if "negative_prompt" in arguments and family != "sana":
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    return pipeline(prompt=list(PROMPTS), generator=seeds(2), **arguments).images
