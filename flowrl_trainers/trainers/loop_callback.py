"""What has to happen between the steps of Trainer's loop."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..sampling.metric_log import MetricLog
from ..sampling.prompt_groups import PromptGroupSampler
from ..sampling.sharding import is_sharded, own_part
from .moving_average import MovingAverage

logger = logging.getLogger(__name__)


class LoopCallback(TrainerCallback):
    """Sets the sampler's epoch, skips updates whose gradient is not finite, keeps the average, stops where there is a
    reason.

    Args:
        sampler: Deals the prompts.
        model: The trained one.
        metrics: Note skipped updates.
        average: Of the trained weights.
        reason_to_stop: Says after an update why training should end, if it should.
        on_any_process: Says whether something is so on any process.
    """

    def __init__(
        self,
        sampler: PromptGroupSampler,
        model: nn.Module,
        metrics: MetricLog,
        average: MovingAverage,
        reason_to_stop: Callable[[], str | None],
        on_any_process: Callable[[bool], bool],
    ) -> None:
        self.sampler, self.model, self.metrics, self.average = sampler, model, metrics, average
        self.reason_to_stop, self.on_any_process = reason_to_stop, on_any_process

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # accelerate does not reach a sampler behind both a shard and a resumed position.
        self.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.logging_strategy == IntervalStrategy.NO:  # else what is noted would be kept for a log that never comes
            self.metrics.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        gradients = [own_part(p.grad) for p in parameters if p.grad is not None]
        # The largest absolute value of all, which NaN and infinity pass on: a GPU is waited for once. Of a sharded
        # network, each process looks at its part, which may be empty.
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g.numel()], norm_type=torch.inf)
        finite = bool(norm.isfinite())
        if is_sharded(self.model):
            finite = not self.on_any_process(not finite)
        self.metrics.note("skipped_updates", float(not finite))
        if not finite:  # optimizers leave parameters without a gradient, and their moments, alone
            for parameter in parameters:
                parameter.grad = None

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.average.step()
        reason = self.reason_to_stop()
        if reason is not None:
            logger.warning("Training stops after %d updates: %s.", state.global_step, reason)
            control.should_training_stop = control.should_log = True
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS
            control.should_save |= args.save_strategy == SaveStrategy.STEPS
