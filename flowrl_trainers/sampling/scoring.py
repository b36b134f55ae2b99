"""Latents in, one score per image and reward out, with the gradient of their weighted sum where it is asked for."""

import asyncio
import inspect
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..pipelines import FlowPipeline
from ..rewards import Reward
from .prompt_groups import Example

MEGAPIXEL = 2**20

Context = Callable[[], dict[str, Any]]
"""What every reward is called with beside images, prompts and columns: `trainer_state`, `log_metric`, `log_extra`."""


def call_rewards(rewards: list[Reward], images: Tensor, examples: list[Example], **context: Any) -> Tensor:
    """The scores of images: (B, number of rewards) float32.

    NaN stands where a reward returned None, and infinity where its score is not finite. Asynchronous rewards run
    together.

    Args:
        rewards: Called one after the other.
        images: (B, 3, H, W).
        examples: B of them, with prompts and columns.
        context: Passed on to every reward.

    Raises:
        ValueError: For a wrong number of scores.
    """
    return ask_rewards(rewards, images, examples, **context)()


def ask_rewards(
    rewards: list[Reward], images: Tensor, examples: list[Example], **context: Any
) -> Callable[[], Tensor]:
    """Call the rewards; asynchronous ones go on in a thread until the function that is returned waits for the scores.

    Arguments as in `call_rewards`.
    """
    columns = {name: [e.columns[name] for e in examples] for name in examples[0].columns}
    prompts = [e.prompt for e in examples]
    results = [reward(images=images, prompts=prompts, **columns, **context) for reward in rewards]
    waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    thread = ThreadPoolExecutor(1)  # a notebook's own thread already runs a loop
    awaited = [results[i] for i in waiting]
    answers = thread.submit(_wait_for, awaited, images.device, torch.is_grad_enabled()) if waiting else None
    thread.shutdown(wait=False)

    def scores() -> Tensor:
        if answers is not None:
            for i, result in zip(waiting, answers.result(), strict=True):
                results[i] = result
        return torch.stack([_as_tensor(r, s, images) for r, s in zip(rewards, results, strict=True)], dim=1)

    return scores


def _wait_for(awaitables: list[Any], device: torch.device, grad_enabled: bool) -> list[Any]:
    """The answers; in a thread, which has a gradient mode and a current GPU of its own."""
    with torch.set_grad_enabled(grad_enabled), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return asyncio.run(_together(awaitables))


async def _together(awaitables: list[Any]) -> list[Any]:
    return await asyncio.gather(*awaitables)


def _as_tensor(reward: Reward, scores: Any, images: Tensor) -> Tensor:
    absent = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    if not isinstance(scores, Tensor):
        if not isinstance(scores, Iterable):
            raise ValueError(
                f"Reward {reward.name!r} returned {scores!r} for {len(images)} images: return one score per image."
            )
        scores = list(scores)
        if len(scores) == len(images):
            absent = torch.tensor([s is None for s in scores], device=images.device)
        scores = torch.tensor([0.0 if s is None else float(s) for s in scores])
    if scores.shape != (len(images),):
        raise ValueError(
            f"Reward {reward.name!r} returned scores of shape {tuple(scores.shape)} for {len(images)} images: return "
            "one score per image."
        )
    scores = scores.to(images.device, torch.float32)
    return torch.where(absent, torch.nan, torch.where(scores.isfinite(), scores, torch.inf))


def pictures_at_a_time(flow: FlowPipeline, most: int) -> int:
    """How many pictures of the pipeline's size make a megapixel, from one to `most`; `most` if that is unknown."""
    asked = flow.call_arguments()
    if "height" not in asked or "width" not in asked:
        return most
    return max(1, min(most, MEGAPIXEL // (asked["height"] * asked["width"])))


def decoded(flow: FlowPipeline, latents: Tensor) -> Tensor:
    """`flow.images` of final latents (B, ...), a megapixel at a time: a decoder needs gigabytes for each."""
    return torch.cat([flow.images(part) for part in latents.split(pictures_at_a_time(flow, len(latents)))])


class Scorer:
    """Scores final latents by the rewards of a run.

    Args:
        flow: Decodes latents.
        rewards: R of them.
        weights: (R,), those of their sum.
        context: See `Context`.
        batch_size: The images of a micro-batch.
        decode_batch_size: The images decoded and scored at a time; None for a micro-batch, and where a gradient is
            taken for a megapixel.
    """

    def __init__(
        self,
        flow: FlowPipeline,
        rewards: list[Reward],
        weights: Tensor,
        context: Context,
        batch_size: int,
        decode_batch_size: int | None = None,
    ) -> None:
        self.flow, self.rewards, self.weights, self.context = flow, rewards, weights, context
        self.batch_size, self.decode_batch_size = batch_size, decode_batch_size

    @torch.no_grad()
    def score(self, latents: Tensor, examples: list[Example]) -> Tensor:
        """Scores (B, R) of the pictures of final latents (B, ...), without gradients; see `call_rewards`.

        While asynchronous rewards look at the pictures of one decoded batch, the next is decoded.
        """
        size = self.decode_batch_size or self.batch_size
        scores: list[Tensor] = []
        asked: list[Callable[[], Tensor]] = []
        for start, part in zip(range(0, len(latents), size), latents.split(size), strict=True):
            images = decoded(self.flow, part)
            scores += [answer() for answer in asked]
            asked = [ask_rewards(self.rewards, images, examples[start : start + size], **self.context())]
        return torch.cat([*scores, *(answer() for answer in asked)])

    def score_with_gradient(self, latents: Tensor, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """Scores (B, R) of final latents (B, ...), and the gradient (B, ...) of their weighted sum.

        A score that is not finite contributes nothing to the gradient.

        Raises:
            ValueError: For a reward whose scores carry no gradient.
        """
        size = self.decode_batch_size or pictures_at_a_time(self.flow, self.batch_size)
        scores, gradients = [], []
        for start in range(0, len(latents), size):
            x = latents[start : start + size].detach().requires_grad_()
            images, part = self.flow.decode(x), examples[start : start + size]
            columns = [call_rewards([reward], images, part, **self.context()) for reward in self.rewards]
            for reward, column in zip(self.rewards, columns, strict=True):
                if not column.requires_grad:
                    raise ValueError(
                        f"Reward {reward.name!r} is marked differentiable, but its scores carry no gradient: compute "
                        "them from `images` by torch operations alone, without `detach`, `no_grad` or `item`."
                    )
            values = torch.cat(columns, dim=1)
            total = (torch.where(values.isfinite(), values, 0.0) * self.weights).sum()
            gradients += [torch.autograd.grad(total, x)[0]]
            scores += [values.detach()]
        return torch.cat(scores), torch.cat(gradients)

    def summary(self, scores: Tensor) -> tuple[dict[str, Tensor], float | None]:
        """What is logged of the scores (M, R) of all images of a rollout, and the mean weighted sum.

        Returns:
            `reward/NAME` and `reward_std/NAME`, mean and standard deviation over the finite scores, for every reward
            that has one; and the sum of the weighted means, None where a reward has none, as nobody knows the sum
            then.
        """
        row: dict[str, Tensor] = {}
        total: float | None = 0.0
        for reward, weight, column in zip(self.rewards, self.weights.tolist(), scores.unbind(dim=1), strict=True):
            column = column[column.isfinite()]
            if not len(column):
                total = None
                continue
            row |= {f"reward/{reward.name}": column.mean(), f"reward_std/{reward.name}": column.std(correction=0)}
            total = None if total is None else total + weight * float(column.mean())
        return row, total
