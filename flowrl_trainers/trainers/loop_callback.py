"""What has to happen between the steps of Trainer's loop."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

if TYPE_CHECKING:
    from .base_trainer import FlowRLTrainer

logger = logging.getLogger(__name__)


class LoopCallback(TrainerCallback):
    """Sets the sampler's epoch, skips updates whose gradient is not finite, keeps the moving average, stops where there is a reason."""

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
        self.trainer._updates += 1
        if self.trainer.ema is not None:
            self.trainer.ema.step(self.trainer.trained_parameters())
        reason = self.trainer.reason_to_stop()
        if reason is not None:
            logger.warning("Training stops after %d updates: %s.", state.global_step, reason)
            control.should_training_stop = control.should_log = True
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS
            control.should_save |= args.save_strategy == SaveStrategy.STEPS
