"""`RewardWatch`: what is odd about the rewards of a run, said once."""

import torch
from torch import Tensor

from ..rewards import Reward

HUGE = 1e6  # in size; float32 keeps seven digits, so differences of one are lost beyond 1e7
PATIENCE = 10  # rollouts without a difference within any prompt

ALONE = (
    "is trained alone and no other looks at the pictures, so that nothing would betray that it was hacked: pass "
    "`eval_reward_funcs`, or train a second reward beside it."
)


class RewardWatch:
    """Looks at the scores of every rollout and says what a user should know, once for each reward.

    Args:
        rewards: R of them.
        judged: Whether rewards that training never sees look at the pictures, too.
    """

    def __init__(self, rewards: list[Reward], *, judged: bool) -> None:
        self.rewards, self.alone = rewards, len(rewards) == 1 and not judged
        self.said: set[tuple[str, str]] = set()
        self.spoke: set[str] = set()
        self.flat = dict.fromkeys((r.name for r in rewards), 0)  # rollouts in a row in which no group had a difference

    def observe(self, scores: Tensor, groups: Tensor) -> list[str]:
        """One sentence for each thing that is odd and was not said before.

        Args:
            scores: (M, R) of all images of a rollout, NaN for None, infinite for what is invalid.
            groups: (M,), equal numbers for images of one prompt.
        """
        found = [(self.rewards[0].name, "alone", ALONE)] if self.alone else []
        sizes = groups.unique(return_counts=True)[1]
        for reward, column in zip(self.rewards, scores.unbind(dim=1), strict=True):
            name, known = reward.name, column.isfinite()
            if not known.any() and name in self.spoke:
                continue
            if not known.any():
                found.append((name, "silent", "has given no score so far: is it meant for these prompts?"))
                continue
            self.spoke.add(name)
            largest = float(column[known].abs().max())
            if largest > HUGE:
                found.append((name, "huge", f"gave a score of {largest:.3g}: divide it, as rounding grows with it."))
            if bool((sizes > 1).any()):
                self.flat[name] = self.flat[name] + 1 if share_without_spread(column[:, None], groups) == 1 else 0
                if self.flat[name] == PATIENCE:
                    text = f"was the same for all pictures of each prompt for {PATIENCE} rollouts: it teaches nothing."
                    found.append((name, "flat", text))
        fresh = [(name, text) for name, what, text in found if (name, what) not in self.said]
        self.said |= {(name, what) for name, what, _ in found}
        return [f"Reward {name!r} {text}" for name, text in fresh]


def share_without_spread(scores: Tensor, groups: Tensor) -> Tensor:
    """The share of prompts with several pictures whose pictures all earned the same; NaN without such prompts.

    Args:
        scores: (M, R), not finite where there is none.
        groups: (M,), equal numbers for images of one prompt.
    """
    _, member, sizes = groups.unique(return_inverse=True, return_counts=True)
    known, index = scores.isfinite(), member[:, None].expand_as(scores)
    high, low = (
        scores.new_full((len(sizes), scores.shape[1]), -bound).scatter_reduce(
            0, index, torch.where(known, scores, -bound), how
        )
        for bound, how in ((torch.inf, "amax"), (-torch.inf, "amin"))
    )
    differs = (high > low).any(dim=1)
    return (~differs)[sizes > 1].float().mean()
