"""What a run leaves on disk: checkpoints that can be trusted, the model card, pictures of pictures."""

from .card import CardFacts, model_card
from .gallery import before_after

__all__ = ["CardFacts", "before_after", "model_card"]
