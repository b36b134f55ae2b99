"""`Warmup`: how long a network learns alone before others learn from it."""

import math
from typing import Any

RISE = 0.01  # of the explained variance: what counts as rising
PATIENCE = 3  # rollouts without a rise


class Warmup:
    """Ends where the network's explained variance on rollouts that it has not seen no longer rises, or after so many rollouts.

    Args:
        most_rollouts: the most that it lasts; 0 for no warm-up.
    """

    def __init__(self, most_rollouts: int) -> None:
        self.most_rollouts = most_rollouts
        self.running = most_rollouts > 0
        self.rollouts, self.best, self.without_rise = 0, -math.inf, 0

    def observe(self, explained_variance: float | None) -> None:
        """Judge the network on one more rollout.

        explained_variance: the mean over noise levels; None where all rewards were equal, which tells nothing of the network.
        """
        if explained_variance is not None:
            rose = explained_variance > self.best + RISE
            self.best = max(explained_variance, self.best)
            # A network that explains nothing yet has not stopped rising: it has not begun.
            self.without_rise = 0 if rose or self.best <= RISE else self.without_rise + 1
        if not self.running:
            return
        if self.without_rise >= PATIENCE or self.rollouts >= self.most_rollouts:
            self.running = False
        else:
            self.rollouts += 1

    def state_dict(self) -> dict[str, Any]:
        """How far it has come."""
        return {
            "running": self.running,
            "rollouts": self.rollouts,
            "best": self.best,
            "without_rise": self.without_rise,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.running, self.rollouts = state["running"], state["rollouts"]
        self.best, self.without_rise = state["best"], state["without_rise"]
