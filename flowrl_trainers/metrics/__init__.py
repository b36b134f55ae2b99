"""What is measured of pictures beside their rewards."""

from .diversity import diversity, diversity_by_prompt

__all__ = ["diversity", "diversity_by_prompt"]
