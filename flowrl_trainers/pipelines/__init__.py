"""Diffusers pipelines, and models of your own, seen as velocity fields."""

from .base import Conditioning, FlowPipeline
from .diffusers_pipeline import DiffusersFlowPipeline
from .flux import FluxFlowPipeline
from .flux_2 import Flux2FlowPipeline, Flux2KleinFlowPipeline
from .qwen_image import QwenImageFlowPipeline
from .sana import SanaFlowPipeline
from .sit import SiTFlowPipeline
from .stable_diffusion_3 import StableDiffusion3FlowPipeline
from .z_image import ZImageFlowPipeline

__all__ = [
    "Conditioning",
    "DiffusersFlowPipeline",
    "FlowPipeline",
    "Flux2FlowPipeline",
    "Flux2KleinFlowPipeline",
    "FluxFlowPipeline",
    "QwenImageFlowPipeline",
    "SanaFlowPipeline",
    "SiTFlowPipeline",
    "StableDiffusion3FlowPipeline",
    "ZImageFlowPipeline",
]
