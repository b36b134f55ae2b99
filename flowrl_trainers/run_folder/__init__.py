"""What a run leaves on disk: checkpoints that can be trusted, the model card, pictures of pictures."""

from .card import CardFacts, model_card
from .gallery import before_after, sheet_of
from .run_folder import RunFolder

__all__ = ["CardFacts", "RunFolder", "before_after", "model_card", "sheet_of"]
