"""Diffusers pipelines, and models of your own, seen as velocity fields."""

from .base import Conditioning, FlowPipeline
from .stable_diffusion_3 import StableDiffusion3FlowPipeline

__all__ = ["Conditioning", "FlowPipeline", "StableDiffusion3FlowPipeline"]
