"""The embedded default: a small trained Stable Diffusion 3 pipeline that draws coloured shapes, and its judges."""

from .checker import check, objects_in
from .models import WEIGHTS, load_clip, load_pipeline
from .prompts import all_prompts, prompts
from .scenes import COLOURS, SHAPES, SceneObject, caption, draw, parse, random_scene

__all__ = [
    "COLOURS",
    "SHAPES",
    "WEIGHTS",
    "SceneObject",
    "all_prompts",
    "caption",
    "check",
    "draw",
    "load_clip",
    "load_pipeline",
    "objects_in",
    "parse",
    "prompts",
    "random_scene",
]
