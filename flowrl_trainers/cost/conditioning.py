"""What a network reads of prompts, by shape alone: the text encoders are not asked."""

import torch
from torch import Tensor

from ..pipelines import Conditioning
from ..pipelines.aura_flow import AuraFlowFlowPipeline
from ..pipelines.chroma import ChromaFlowPipeline
from ..pipelines.cogview_4 import CogView4FlowPipeline
from ..pipelines.diffusers_pipeline import NEGATIVE, DiffusersFlowPipeline
from ..pipelines.flux import FluxFlowPipeline
from ..pipelines.flux_2 import Flux2FlowPipeline
from ..pipelines.lumina_2 import Lumina2FlowPipeline
from ..pipelines.qwen_image import QwenImageFlowPipeline
from ..pipelines.sana import SanaFlowPipeline
from ..pipelines.sit import SiTFlowPipeline
from ..pipelines.stable_diffusion_3 import StableDiffusion3FlowPipeline
from ..pipelines.z_image import ZImageFlowPipeline


def blank_conditioning(flow: DiffusersFlowPipeline, batch: int, dtype: torch.dtype) -> Conditioning:
    """The conditioning of prompts of full length, on the device of the network.

    Prompts of families with ragged embeddings are mostly shorter, so what is estimated of these is an upper bound.

    Args:
        flow: Of a family of diffusers.
        batch: The number of prompts.
        dtype: That of the text encoders.

    Raises:
        ValueError: For a family that is not known here.
    """
    prompt = _of_prompts(flow, batch, dtype)
    return prompt | ({NEGATIVE + name: value for name, value in prompt.items()} if flow.guided else {})


def _of_prompts(flow: DiffusersFlowPipeline, batch: int, dtype: torch.dtype) -> Conditioning:
    config, device = flow.transformer.config, flow.device

    def tokens(width: int, further: int = 0) -> dict[str, Tensor]:
        length = flow.settings["max_sequence_length"] + further
        return {"prompt_embeds": torch.zeros(batch, length, width, dtype=dtype, device=device)}

    def mask(device: torch.device) -> dict[str, Tensor]:
        length = flow.settings["max_sequence_length"]
        return {"prompt_embeds_mask": torch.ones(batch, length, dtype=torch.bool, device=device)}

    def pooled() -> dict[str, Tensor]:
        return {"pooled_prompt_embeds": torch.zeros(batch, config.pooled_projection_dim, dtype=dtype, device=device)}

    host = torch.device("cpu")  # where a mask has numbers: some families ask for its sum
    match flow:
        case SiTFlowPipeline():
            return {"class_labels": torch.zeros(batch, dtype=torch.long, device=device)}
        case StableDiffusion3FlowPipeline():
            # Those of CLIP come before those of T5.
            return tokens(config.joint_attention_dim, flow.pipeline.tokenizer_max_length) | pooled()
        case FluxFlowPipeline():
            return tokens(config.joint_attention_dim) | pooled()
        case Flux2FlowPipeline():
            return tokens(config.joint_attention_dim)
        case QwenImageFlowPipeline():
            return tokens(config.joint_attention_dim) | mask(host)
        case ZImageFlowPipeline():
            return tokens(config.cap_feat_dim) | mask(host)
        case Lumina2FlowPipeline():
            return tokens(config.cap_feat_dim) | mask(host)
        case SanaFlowPipeline():
            return tokens(config.caption_channels) | mask(device)
        case ChromaFlowPipeline() | AuraFlowFlowPipeline():
            return tokens(config.joint_attention_dim) | mask(device)
        case CogView4FlowPipeline():
            return tokens(config.text_embed_dim) | mask(host)
    raise ValueError(f"{type(flow).__name__} is a family whose cost cannot be estimated.")
