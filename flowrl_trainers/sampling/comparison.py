"""`Comparison`: the tuned model beside the base model, on the same prompts and seeds."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from ..flow import euler_steps, norm_ratios, root_mean_square
from ..metrics import Change, paired_change
from .evaluator import Evaluator, Sampler
from .flow_model import FlowModel
from .kept_latents import KeptLatents
from .metric_log import MetricLog
from .pictures import Pictures

VELOCITY_ROWS = 8  # of an evaluation, on which the distance to the base is measured

LogMetric = Callable[[str, float], None]


class Comparison:
    """Rows and pictures of the tuned model and of its base; those of the base are drawn once for each dataset and
    sampler.

    Args:
        evaluator: Draws and measures.
        model: The tuned one, which knows its base.
        tuned_weights: A context in which the model has the weights to be evaluated, such as their moving average.
        context: What rewards are called with beside images, prompts and columns, given where their metrics go.
        base_facts: What `KeptLatents` has to know, to keep what the base model draws on disk; None to keep nothing.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        model: FlowModel,
        tuned_weights: Callable[[], AbstractContextManager[None]],
        context: Callable[[LogMetric], dict[str, Any]],
        base_facts: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.evaluator, self.model = evaluator, model
        self.tuned_weights, self.context, self.base_facts = tuned_weights, context, base_facts
        self.base_rows: dict[str, tuple[dict[str, float], dict[str, Tensor]]] = {}
        self.base_pictures: dict[str, Pictures] = {}

    def rows(
        self, dataset: Dataset, samplers: dict[str, Sampler], sigmas: Tensor
    ) -> tuple[dict[str, dict[str, float]], dict[str, Change]]:
        """The rows `base` and `tuned`, and those with the name of every further sampler.

        Args:
            dataset: Held-out prompts.
            samplers: By the names of their rows; the first has none.
            sigmas: The grid on which `velocity_change` is measured.

        Returns:
            The rows, and every reward's change with the first sampler.
        """
        rows: dict[str, dict[str, float]] = {}
        changes: dict[str, Change] = {}
        for name, sampler in samplers.items():
            suffix = f"_{name}" if name else ""
            with self.tuned_weights():
                tuned, tuned_scores = self.row(dataset, sampler, f"tuned{suffix}")
                if not name:
                    tuned |= self.velocity_change(dataset, sigmas)
            known = f"{dataset._fingerprint}{suffix}"
            if known not in self.base_rows:
                with self.model.reference():
                    self.base_rows[known] = self.row(dataset, self._kept(sampler, name), f"base{suffix}")
            base, base_scores = self.base_rows[known]
            if not name:
                changes = {r: paired_change(before, tuned_scores[r]) for r, before in base_scores.items()}
            rows |= {f"base{suffix}": base, f"tuned{suffix}": tuned}
        return rows, changes

    def row(self, dataset: Dataset, sampler: Sampler, label: str) -> tuple[dict[str, float], dict[str, Tensor]]:
        """`Evaluator.row` of the model as it is, with the means of what rewards noted by `log_metric`."""
        noted = MetricLog()
        self.model.eval()
        row, scores = self.evaluator.row(self.model, dataset, sampler, label, self.context(noted.note))
        return row | noted.means(), scores

    @torch.no_grad()
    def velocity_change(self, dataset: Dataset, sigmas: Tensor) -> dict[str, float]:
        """How the velocity differs from the base's, on ODE paths of the model as it is, from a few rows.

        The rows are dealt to the processes.

        Returns:
            `velocity_distance`, the root mean square of the distance relative to the base velocity; and
            `velocity_norm_ratio_N`, |v| / |v_base| in the N-th quarter of the noise levels, see `norm_ratios`.
        """
        moved = length = 0.0
        seen: list[Tensor] = []  # level, |v| and |v_base| of every state
        self.model.eval()
        evaluator, accelerator = self.evaluator, self.evaluator.accelerator
        count, processes = min(VELOCITY_ROWS, len(dataset)), accelerator.num_processes
        mine = torch.arange(count)[accelerator.process_index :: processes]  # none where there are more processes
        batches = list(mine.split(evaluator.batch_size)) if len(mine) else []
        counted = len(batches)
        if self.model.is_sharded:  # all processes call it equally often
            most = math.ceil(math.ceil(count / processes) / evaluator.batch_size)
            batches += [torch.zeros(1, dtype=torch.int64)] * (most - counted)
        for number, rows in enumerate(batches):
            prompts = [dataset[row]["prompt"] for row in rows.tolist()]
            conditioning = evaluator.conditioning(prompts, accelerator.device)

            def velocity(x: Tensor, sigma: Tensor, conditioning: dict[str, Tensor] = conditioning) -> Tensor:
                with accelerator.autocast():
                    return self.model(x, sigma, conditioning, guidance=True)

            latents, _ = evaluator.initial_latents(rows.tolist())
            for step, (x, v, _) in enumerate(euler_steps(velocity, latents, sigmas)):
                with self.model.reference():
                    base = velocity(x, sigmas[step].expand(len(x)))
                if number < counted:
                    moved, length = moved + float((v - base).square().sum()), length + float(base.square().sum())
                    level = sigmas[step].expand(len(x))
                    seen += torch.stack([level, root_mean_square(v), root_mean_square(base)], dim=1)
        parts = gather_object([(moved, length, [row.tolist() for row in seen])])
        moved, length = (sum(part[i] for part in parts) for i in range(2))
        found = {"velocity_distance": math.sqrt(moved / length) if length else math.nan}
        sigma, tuned, base = torch.tensor([row for *_, rows in parts for row in rows]).unbind(dim=1)
        ratios = norm_ratios(tuned, base, sigma, torch.ones_like(sigma, dtype=torch.bool)).tolist()
        return found | {f"velocity_norm_ratio_{n}": r for n, r in enumerate(ratios) if not math.isnan(r)}

    def pictures(self, dataset: Dataset, sampler: Sampler, count: int) -> tuple[Pictures, Pictures]:
        """Base and tuned pictures of `count` evenly spaced rows with different prompts, all on this process."""
        key = f"{dataset._fingerprint}/{count}"
        if key not in self.base_pictures:
            with self.model.reference():
                self.base_pictures[key] = self._pictures(dataset, self._kept(sampler, ""), count)
        with self.tuned_weights():
            return self.base_pictures[key], self._pictures(dataset, sampler, count)

    def _kept(self, sampler: Sampler, name: str) -> Sampler:
        """The sampler of a name, for the base model."""
        if self.base_facts is None:
            return sampler
        return KeptLatents(sampler, self.base_facts() | {"name": name})

    def _pictures(self, dataset: Dataset, sampler: Sampler, count: int) -> Pictures:
        self.model.eval()
        context = self.context(lambda name, value: None)
        return self.evaluator.pictures(self.model, dataset, sampler, count, context)
