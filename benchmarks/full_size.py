"""One update of each trainer at full size on one GPU, with random weights: seconds and peak memory.

    python benchmarks/full_size.py --models MODEL --out docs/tables/full_size_NAME.md

makes the published tables with these MODEL and NAME: stable-diffusion-3.5-medium and stable_diffusion_3,
FLUX.2-klein-4B and flux_2_klein, SiT-XL/2 and sit.

The transformers and the autoencoders have the published sizes. The text encoders have the published widths but few and
thin layers: the trainer encodes prompts once, before training, and the encoders leave the GPU. The reward is a
PickScore of the published size (CLIP ViT-H/14). Random weights learn nothing; the table shows what an update costs.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    TrainerCallback,
)

from flowrl_trainers import (
    ACFlowTrainer,
    AdjointMatchingTrainer,
    DiffusionNFTTrainer,
    FlowRLTrainer,
    TAFSGRPOTrainer,
    VGGFlowTrainer,
)
from flowrl_trainers.rewards import PickScore
from flowrl_trainers.rewards.hpsv2 import vit_h_14
from flowrl_trainers.shapes import prompts
from flowrl_trainers.shapes.models import new_tokenizer
from flowrl_trainers.sit import SiTPipeline, SiTTransformer2DModel

SIZE, IMAGES, MICRO_BATCH, GROUP, RANK = 512, 8, 4, 4, 32
TRAINERS: dict[type[FlowRLTrainer], dict[str, Any]] = {
    AdjointMatchingTrainer: {},
    VGGFlowTrainer: {},
    ACFlowTrainer: {"critic": "convolutional", "critic_warmup_max_steps": 1},  # the update that is not counted
    DiffusionNFTTrainer: {},
    TAFSGRPOTrainer: {},
}
FOUR_BLOCKS = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def clip_text(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    """A text encoder of two layers for 77 tokens; `width` is the width of its layers and of its output."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=8, max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config)


def stable_diffusion_3_5_medium() -> StableDiffusion3Pipeline:
    """The transformer has 2.2 billion parameters."""
    tokenizer = new_tokenizer()
    tokenizer.model_max_length = 77
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    t5 = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=1))
    transformer = SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
    )  # fmt: skip
    vae = AutoencoderKL(
        **FOUR_BLOCKS, latent_channels=16, sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip_text(tokenizer, 768), tokenizer=tokenizer, text_encoder_2=clip_text(tokenizer, 1280),
        tokenizer_2=tokenizer, text_encoder_3=t5, tokenizer_3=T5Tokenizer(vocab=pieces, extra_ids=0),
    )  # fmt: skip


def flux_2_klein_4b() -> Flux2KleinPipeline:
    """The transformer has 3.9 billion parameters. Distilled to four steps, without guidance."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special[1:], padding_side="right")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    text = Qwen3Config(
        vocab_size=300, hidden_size=2560, intermediate_size=64, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=128, num_layers=5, num_single_layers=20, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=7680, guidance_embeds=False,
    )  # fmt: skip
    return Flux2KleinPipeline(
        transformer=transformer, vae=AutoencoderKLFlux2(), text_encoder=Qwen3ForCausalLM(text), tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), is_distilled=True,
    )  # fmt: skip


def sit_xl_2() -> SiTPipeline:
    """The transformer has 0.7 billion parameters."""
    vae = AutoencoderKL(**FOUR_BLOCKS, latent_channels=4, sample_size=256)
    return SiTPipeline(SiTTransformer2DModel(sample_size=SIZE // 8), vae, FlowMatchEulerDiscreteScheduler())


MODELS: dict[str, tuple[Callable[[], Any], int, dict[str, Any]]] = {
    "stable-diffusion-3.5-medium": (stable_diffusion_3_5_medium, 20, {"guidance_scale": 1.0}),
    "FLUX.2-klein-4B": (flux_2_klein_4b, 4, {}),
    "SiT-XL/2": (sit_xl_2, 20, {"guidance_scale": 1.0}),
}


def build(model: str) -> Any:
    """A pipeline in bfloat16 on the GPU.

    The matrices of its transformer are normal with a standard deviation of 0.02, so that no output is constant.
    """
    torch.manual_seed(0)
    with torch.device("cuda"):
        pipeline = MODELS[model][0]()
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
    return pipeline.to("cuda", torch.bfloat16)


def write_pickscore(folder: Path) -> None:
    """A random checkpoint of PickScore's size, with the vocabulary of the shapes."""
    tokenizer = new_tokenizer()
    settings = vit_h_14().to_dict()
    settings["text_config"]["bos_token_id"] = tokenizer.bos_token_id
    settings["text_config"]["eos_token_id"] = tokenizer.eos_token_id
    settings["text_config"]["pad_token_id"] = tokenizer.pad_token_id
    kept = {name: settings[name] for name in ("text_config", "vision_config", "projection_dim")}
    with torch.device("cuda"):
        model = CLIPModel(CLIPConfig(**kept))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


class Clock(TrainerCallback):
    """Notes when each update is done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the GPU to finish the update, then note the time."""
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def measure(model: str, trainer_class: type[FlowRLTrainer], reward: PickScore, updates: int) -> str:
    """Train for some updates, and return a row of the table. Afterwards nothing holds the trainer's memory.

    Args:
        model: One of `MODELS`.
        trainer_class: One of `TRAINERS`.
        reward: The reward.
        updates: The number of updates to measure, after one that is not counted.
    """
    _, steps, settings = MODELS[model]
    changes = dict(TRAINERS[trainer_class])
    if trainer_class is not TAFSGRPOTrainer:
        changes["num_inference_steps"] = steps
    if trainer_class is VGGFlowTrainer:
        changes["timestep_bins"] = min(trainer_class.config_class.timestep_bins, steps - 1)
    asked = [str(number) for number in range(64)] if model.startswith("SiT") else list(prompts("train")["prompt"])[:64]
    clock, folder = Clock(), tempfile.TemporaryDirectory()
    config = trainer_class.config_class(
        output_dir=folder.name, max_steps=1 + updates, per_device_train_batch_size=MICRO_BATCH, num_generations=GROUP,
        gradient_accumulation_steps=IMAGES // MICRO_BATCH, height=SIZE, width=SIZE, bf16=True, report_to="none",
        save_strategy="no", disable_tqdm=True, **(settings | changes),
    )  # fmt: skip
    pipeline = build(model)
    size = sum(parameter.numel() for parameter in pipeline.transformer.parameters()) / 1e9
    dataset, lora = Dataset.from_dict({"prompt": asked}), LoraConfig(r=RANK, lora_alpha=RANK)
    trainer = trainer_class(pipeline, reward, config, dataset, peft_config=lora, callbacks=[clock])
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = statistics.median(later - sooner for sooner, later in zip(clock.times, clock.times[1:], strict=False))
    memory = torch.cuda.max_memory_allocated() / 2**30
    folder.cleanup()
    method = f"{trainer_class._name} | {config.num_inference_steps}"
    return f"| {model} | {size:.1f} B | {method} | {seconds:.1f} | {memory:.0f} |"


def main() -> None:
    """Print the table in Markdown, row by row, and write it to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="The models to measure.")
    updates = "The counted updates of each, after one that is not counted."
    parser.add_argument("--updates", type=int, default=3, help=updates)
    parser.add_argument("--out", type=Path, default=None, help="A Markdown file, which is rewritten after every row.")
    args = parser.parse_args()
    lines = [
        "| model | transformer | trainer | sampler steps | seconds per update | peak memory, GiB |",
        "|---|---:|---|---:|---:|---:|",
    ]
    foot = (
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}. Random weights, bfloat16, LoRA of rank {RANK}, "
        f"{SIZE} x {SIZE} pixels, no guidance, {IMAGES} images per update in micro-batches of {MICRO_BATCH}, no "
        f"gradient checkpointing; reward: PickScore (random ViT-H/14, bfloat16); {GROUP} images per prompt, AC-Flow "
        "with the convolutional critic after a warm-up of one rollout, else the defaults. Seconds: median of "
        f"{args.updates} updates after a first "
        "one that is not counted, with rollout, reward and loss."
    )
    with tempfile.TemporaryDirectory() as folder:
        write_pickscore(Path(folder))
        reward = PickScore(folder, folder, dtype=torch.bfloat16)
    for model in tqdm(args.models, desc="models"):
        for trainer_class in TRAINERS:
            lines.append(measure(model, trainer_class, reward, args.updates))
            gc.collect()
            torch.cuda.empty_cache()
            print(lines[-1], flush=True)
            if args.out is not None:
                args.out.write_text("\n".join([*lines, foot]) + "\n")
    print("\n".join([*lines, foot]))


if __name__ == "__main__":
    main()
