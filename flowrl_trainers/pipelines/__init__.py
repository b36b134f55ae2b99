"""Diffusers pipelines, and models of your own, seen as velocity fields."""

from .aura_flow import AuraFlowFlowPipeline
from .base import Conditioning, FlowPipeline
from .chroma import ChromaFlowPipeline
from .cogview_4 import CogView4FlowPipeline
from .diffusers_pipeline import DiffusersFlowPipeline
from .flux import FluxFlowPipeline
from .flux_2 import Flux2FlowPipeline, Flux2KleinFlowPipeline
from .lumina_2 import Lumina2FlowPipeline
from .packed_pipeline import PackedFlowPipeline
from .qwen_image import QwenImageFlowPipeline
from .sana import SanaFlowPipeline
from .sit import SiTFlowPipeline
from .stable_diffusion_3 import StableDiffusion3FlowPipeline
from .z_image import ZImageFlowPipeline

__all__ = [
    "AuraFlowFlowPipeline",
    "ChromaFlowPipeline",
    "CogView4FlowPipeline",
    "Conditioning",
    "DiffusersFlowPipeline",
    "FlowPipeline",
    "Flux2FlowPipeline",
    "Flux2KleinFlowPipeline",
    "FluxFlowPipeline",
    "Lumina2FlowPipeline",
    "PackedFlowPipeline",
    "QwenImageFlowPipeline",
    "SanaFlowPipeline",
    "SiTFlowPipeline",
    "StableDiffusion3FlowPipeline",
    "ZImageFlowPipeline",
]
