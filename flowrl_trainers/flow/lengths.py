"""How long velocities are beside those of the base model, level by level."""

import torch
from torch import Tensor

NUM_QUARTERS = 4  # of the noise levels: [0, 1/4), [1/4, 1/2), [1/2, 3/4), [3/4, 1]
SMALLEST_LENGTH = 1e-6  # of a base velocity that is divided by


def norm_ratios(lengths: Tensor, base_lengths: Tensor, sigma: Tensor, good: Tensor) -> Tensor:
    """The mean of |v| / |v_base| in each quarter of the noise levels: (4,), NaN where no level lies.

    Above 1 the velocity is inflated, which rewards do by 5 to 15 percent (arXiv 2606.27771).

    Args:
        lengths: |v| of M velocities, (M,): norms, or root mean squares over the latent.
        base_lengths: Those of the base model at the same states, (M,).
        sigma: Their levels, (M,), in [0, 1].
        good: (M,), False for those that do not count.
    """
    ratio = torch.where(good, lengths / base_lengths.clamp(min=SMALLEST_LENGTH), 0.0)
    quarter = (NUM_QUARTERS * sigma).long().clamp(max=NUM_QUARTERS - 1)
    here = (quarter[:, None] == torch.arange(NUM_QUARTERS, device=sigma.device)) & good[:, None]
    return (ratio[:, None] * here).sum(dim=0) / here.sum(dim=0)
