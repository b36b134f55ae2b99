"""`Warmup`: how long the critic learns alone before the model learns from it."""

import math
from typing import Any

RISE = 0.01  # the explained variance rises if it exceeds its best value so far by this
PATIENCE = 3  # rollouts without a rise


class Warmup:
    """Ends once the network's explained variance on unseen rollouts stops rising, or after `most_rollouts` rollouts.

    Args:
        most_rollouts: The most rollouts that the warm-up lasts; 0 for no warm-up.
    """

    def __init__(self, most_rollouts: int) -> None:
        self.most_rollouts = most_rollouts
        self.running = most_rollouts > 0
        self.rollouts, self.best, self.without_rise = 0, -math.inf, 0

    def observe(self, explained_variance: float | None) -> None:
        """Judge the network on one more rollout, and end the warm-up if it is time.

        Args:
            explained_variance: The mean over noise levels; None if all rewards were equal, which says nothing about
                the network.
        """
        if explained_variance is not None:
            rose = explained_variance > self.best + RISE
            self.best = max(explained_variance, self.best)
            # A network that explains nothing yet has not stopped rising: it has not begun to learn.
            self.without_rise = 0 if rose or self.best <= RISE else self.without_rise + 1
        if not self.running:
            return
        if self.without_rise >= PATIENCE or self.rollouts >= self.most_rollouts:
            self.running = False
        else:
            self.rollouts += 1

    def state_dict(self) -> dict[str, Any]:
        """The progress of the warm-up, for a checkpoint."""
        return {
            "running": self.running,
            "rollouts": self.rollouts,
            "best": self.best,
            "without_rise": self.without_rise,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.running, self.rollouts = state["running"], state["rollouts"]
        self.best, self.without_rise = state["best"], state["without_rise"]
