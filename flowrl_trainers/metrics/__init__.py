"""What is measured of pictures beside their rewards."""

from .diversity import diversity, diversity_by_prompt
from .image_statistics import colour_entropy, edge_density

__all__ = ["colour_entropy", "diversity", "diversity_by_prompt", "edge_density"]
