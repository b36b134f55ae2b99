"""SiT as a diffusers pipeline, and the conversion of checkpoints of its original code."""

from .convert import convert_checkpoint, load_transformer
from .pipeline import SiTPipeline
from .transformer import SiTTransformer2DModel

__all__ = ["SiTPipeline", "SiTTransformer2DModel", "convert_checkpoint", "load_transformer"]
