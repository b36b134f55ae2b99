"""What has to happen between the steps of Trainer's loop."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from .base_trainer import FlowRLTrainer


class LoopCallback(TrainerCallback):
    """Sets the sampler's epoch, skips updates whose gradient is not finite, keeps the moving average, stops at the target."""

    def __init__(self, trainer: "FlowRLTrainer") -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # accelerate does not reach a sampler behind both a shard and a resumed position.
        self.trainer.sampler.set_epoch(int(state.epoch or 0))

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        parameters = [p for p in self.trainer.model.parameters() if p.grad is not None]
        finite = all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None)
        self.trainer.log_metric("skipped_updates", float(not finite))
        if not finite:  # optimizers leave parameters without a gradient, and their moments, alone
            for parameter in parameters:
                parameter.grad = None

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.step(self.trainer.trained_parameters())
        target, reward = self.trainer.args.target_reward, self.trainer.rollout_reward
        if target is not None and reward is not None and reward >= target:
            control.should_training_stop = True
