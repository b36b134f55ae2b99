"""`LossScaler`: the scaling of losses in float16, which lets an update without gradients pass."""

from typing import Any

import torch
from torch.optim import Optimizer


class LossScaler(torch.amp.GradScaler):
    """Scales losses, so that small gradients survive float16, and lowers the scale where they overflow.

    torch's own raises for an update without gradients, as there are while a critic warms up, or where no prompt's
    images earned differently. Here such an update is what it is in float32: the optimizer leaves parameters without a
    gradient alone, learning rates move on, and the scale stays.

    Gradients must be unscaled by `unscale_` before every step, which is when it is seen whether there are any.
    """

    idle = False
    """Whether the update at hand has no gradients."""

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer by the scale, and note whether one is not finite."""
        self.idle = all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        if not self.idle:
            super().unscale_(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step, unless a gradient was not finite."""
        return optimizer.step(*args, **kwargs) if self.idle else super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Lower the scale after an overflow, raise it after many steps without one."""
        if not self.idle:
            super().update(new_scale)
