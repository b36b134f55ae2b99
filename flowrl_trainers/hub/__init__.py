"""What a run leaves for others to look at."""

from .card import CardFacts, model_card
from .gallery import before_after

__all__ = ["CardFacts", "before_after", "model_card"]
