"""The evaluation of a run: base and tuned model on held-out prompts, with the same seeds."""

import logging
import math
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers.training_utils import EMAModel
from torch import nn
from transformers import TrainerControl

from ..flow import euler_step
from ..metrics import signs_of_over_optimisation, standard_error_of_change
from ..pipelines import Conditioning
from ..sampling.conditioning import ConditioningCache
from .evaluation import Pictures, Sampler, draw_rows, evaluation_row, picture_seed
from .input_checks import check_dataset
from .run_files import RunFiles

logger = logging.getLogger(__name__)

VELOCITY_ROWS = 8  # of an evaluation, on which the distance to the base is measured


def _ignore(name: str, value: float) -> None:
    """For calls of rewards whose numbers nobody logs."""


def means(noted: dict[str, list[float]]) -> dict[str, float]:
    """The mean of the numbers that all processes noted under each name; to be called by all of them."""
    everywhere = gather_object([dict(noted)])  # one per process
    names = dict.fromkeys(name for part in everywhere for name in part)
    values = {name: [value for part in everywhere for value in part.get(name, [])] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


class RunEvaluation(RunFiles):
    """The part of `FlowRLTrainer` that evaluates."""

    conditioning: ConditioningCache
    sigmas: torch.Tensor
    ema: EMAModel | None
    control: TrainerControl
    _base_rows: dict[str, tuple[dict[str, float], dict[str, torch.Tensor]]]
    _base_pictures: dict[str, Pictures]

    @abstractmethod
    def evaluation_samplers(self) -> dict[str, Sampler]: ...

    @abstractmethod
    def trained_parameters(self) -> list[nn.Parameter]: ...

    @abstractmethod
    def reward_context(self, log_metric: Callable[[str, float], None] | None = None) -> dict[str, Any]: ...

    def evaluate(
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Draw one picture per row, with seeds that are the row's own, and score it with all rewards.

        Returns and logs, with the prefix, what `evaluation_row` finds (`reward/<name>`, the mean over all rows, `diversity`, statistics
        that betray a hacked reward), the same of the base model with the same seeds under `base_reward/<name>` and so on, and
        `velocity_distance`, how far the velocity has moved from the base's, relative to it. Further samplers of an algorithm have rows of
        their own, such as `ode_reward/<name>` and `base_ode_reward/<name>`. Writes a sheet of `log_images` pictures into `samples/`. Raises
        `ValueError` without a dataset.
        """
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise ValueError("`evaluate` needs prompts: pass `eval_dataset` to it or to the trainer.")
        check_dataset(dataset, "eval_dataset")
        self.conditioning.encode(list(dataset["prompt"]), self.args.device, show_progress=False)
        start, known = time.perf_counter(), dataset._fingerprint
        with self.judges_at_hand():
            errors = self._evaluate_rows(dataset, known)
            if self.args.log_images and self.is_world_process_zero():
                base_pictures, tuned_pictures = self.pictures(dataset, self.args.log_images)
                if base_pictures.images.dim() == 4:  # a model of vectors has nothing to show
                    self.write_sheet(base_pictures, tuned_pictures)
        trained = {r.name: weight for r, weight in zip(self.rewards, self.reward_weights.tolist(), strict=True) if weight != 0}
        signs = signs_of_over_optimisation(self.rows["base"], self.rows["tuned"], trained, [r.name for r in self.eval_rewards], errors)
        if signs and self.is_world_process_zero():
            logger.warning(
                "The trained reward moved as it should, but %s: it may have been hacked. Look at the pictures.", "; ".join(signs)
            )
        self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + time.perf_counter() - start
        metrics: dict[str, float] = {}
        for label, row in self.rows.items():
            prefix = "_".join(part for part in (metric_key_prefix, *label.removeprefix("tuned").split("_")) if part)
            metrics |= {f"{prefix}_{name}": value for name, value in row.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_rows(self, dataset: Dataset, known: str) -> dict[str, float]:
        """Fill `rows`; returns the standard error of every reward's change."""
        self.rows, errors = {}, {}
        for name, sampler in self.evaluation_samplers().items():
            suffix = f"_{name}" if name else ""
            noted: dict[str, list[float]] = defaultdict(list)
            with self.averaged_weights():
                tuned, tuned_scores = self._evaluation_row(dataset, sampler, f"tuned{suffix}", noted)
                if not name:
                    tuned["velocity_distance"] = self._velocity_distance(dataset)
            if known + suffix not in self._base_rows:
                with self.model.reference():
                    self._base_rows[known + suffix] = self._evaluation_row(dataset, sampler, f"base{suffix}", defaultdict(list))
            base, base_scores = self._base_rows[known + suffix]
            if not name:
                errors = {reward: standard_error_of_change(before, tuned_scores[reward]) for reward, before in base_scores.items()}
            self.rows |= {f"base{suffix}": base, f"tuned{suffix}": tuned}
        return errors

    @contextmanager
    def judges_at_hand(self) -> Iterator[None]:
        """Inside, the rewards that training never sees are on the device; outside, their memory is free for training."""
        for judge in self.eval_rewards:
            judge.to(self.args.device)
        try:
            yield
        finally:
            for judge in self.eval_rewards:
                judge.to(torch.device("cpu"))
            for reward in self.rewards:  # which may share a network with a judge
                reward.to(self.args.device)

    def ode_sampler(self, sigmas: torch.Tensor) -> Sampler:
        """The Euler ODE with guidance on a grid from 1 to 0."""

        def sample(
            transformer: nn.Module, latents: torch.Tensor, conditioning: Conditioning, generators: list[torch.Generator]
        ) -> torch.Tensor:
            return self.flow.sample_latents(transformer, conditioning, latents, sigmas)

        return sample

    def _evaluation_row(
        self, dataset: Dataset, sampler: Sampler, label: str, noted: dict[str, list[float]]
    ) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """With the means of what rewards noted by `log_metric`, over all processes."""
        self.model.eval()
        row, scores = evaluation_row(
            self.flow,
            self.model.active_transformer,
            self.conditioning,
            dataset,
            [*self.rewards, *self.eval_rewards],
            sampler,
            self.args,
            self.accelerator,
            label,
            self.reward_context(lambda name, value: noted[name].append(float(value))),
        )
        return row | means(noted), scores

    @torch.no_grad()
    def _velocity_distance(self, dataset: Dataset) -> float:
        """Root mean square of the distance to the base velocity, relative to that, on ODE paths of the tuned model from a few rows.

        The rows are dealt to the processes.
        """
        moved = length = 0.0
        self.model.eval()
        own = torch.arange(self.args.process_index, min(VELOCITY_ROWS, len(dataset)), self.args.world_size)
        for rows in own.split(self.args.per_device_eval_batch_size) if len(own) else ():
            conditioning = self.conditioning([dataset[row]["prompt"] for row in rows.tolist()], self.args.device)
            generators = [torch.Generator().manual_seed(picture_seed(self.args.seed, row)) for row in rows.tolist()]
            x = self.flow.initial_latents(len(rows), generators).to(self.args.device)
            for sigma, sigma_next in pairwise(self.sigmas):
                level = sigma.expand(len(x))
                with self.accelerator.autocast():
                    velocity = self.flow.velocity(self.model.active_transformer, x, level, conditioning)
                    with self.model.reference():
                        base = self.flow.velocity(self.model.active_transformer, x, level, conditioning)
                moved, length = moved + float((velocity - base).square().sum()), length + float(base.square().sum())
                x = euler_step(x, velocity, sigma, sigma_next)
        moved, length = (sum(parts) for parts in zip(*gather_object([(moved, length)]), strict=True))
        return math.sqrt(moved / length) if length else math.nan

    def pictures(self, dataset: Dataset, count: int) -> tuple[Pictures, Pictures]:
        """Base and tuned pictures of `count` evenly spaced rows of a dataset with different prompts, of this process alone."""
        key = f"{dataset._fingerprint}/{count}"
        self.model.eval()

        def draw() -> Pictures:
            rewards, context = [*self.rewards, *self.eval_rewards], self.reward_context(_ignore)
            transformer = self.model.active_transformer
            sampler = next(iter(self.evaluation_samplers().values()))
            return draw_rows(
                self.flow, transformer, self.conditioning, dataset, count, rewards, sampler, self.args, self.accelerator, context
            )

        with self.judges_at_hand():
            if key not in self._base_pictures:
                with self.model.reference():
                    self._base_pictures[key] = draw()
            with self.averaged_weights():
                return self._base_pictures[key], draw()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model has the moving average of its weights, where one is kept."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.trained_parameters())
        self.ema.copy_to(self.trained_parameters())
        try:
            yield
        finally:
            self.ema.restore(self.trained_parameters())
