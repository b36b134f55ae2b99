"""Latents in, one score per image and reward out, with the gradient of their weighted sum where it is asked for."""

import asyncio
import inspect
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from ..pipelines import FlowPipeline
from ..rewards import Reward
from .prompt_groups import Example

MEGAPIXEL = 2**20


def call_rewards(rewards: list[Reward], images: torch.Tensor, examples: list[Example], **context: Any) -> torch.Tensor:
    """The scores of images `(B, 3, H, W)`: (B, number of rewards) float32.

    NaN stands where a reward said None, and infinity where it gave a number that is not finite. Asynchronous rewards run together.
    context: passed on to every reward. Raises `ValueError` for a wrong number of scores.
    """
    return ask_rewards(rewards, images, examples, **context)()


def ask_rewards(rewards: list[Reward], images: torch.Tensor, examples: list[Example], **context: Any) -> Callable[[], torch.Tensor]:
    """Call the rewards as `call_rewards` does; the asynchronous ones go on in a thread until what is returned waits for the scores."""
    columns = {name: [e.columns[name] for e in examples] for name in examples[0].columns}
    prompts = [e.prompt for e in examples]
    results = [reward(images=images, prompts=prompts, **columns, **context) for reward in rewards]
    waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    thread = ThreadPoolExecutor(1)  # a notebook's own thread already runs a loop
    answers = thread.submit(_wait_for, [results[i] for i in waiting], images.device, torch.is_grad_enabled()) if waiting else None
    thread.shutdown(wait=False)

    def scores() -> torch.Tensor:
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


def _as_tensor(reward: Reward, scores: Any, images: torch.Tensor) -> torch.Tensor:
    absent = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    if not isinstance(scores, torch.Tensor):
        if not isinstance(scores, Iterable):
            raise ValueError(f"Reward {reward.name!r} returned {scores!r} for {len(images)} images: return one score per image.")
        scores = list(scores)
        if len(scores) == len(images):
            absent = torch.tensor([s is None for s in scores], device=images.device)
        scores = torch.tensor([0.0 if s is None else float(s) for s in scores])
    if scores.shape != (len(images),):
        raise ValueError(
            f"Reward {reward.name!r} returned scores of shape {tuple(scores.shape)} for {len(images)} images: return one score per image."
        )
    scores = scores.to(images.device, torch.float32)
    return torch.where(absent, torch.nan, torch.where(scores.isfinite(), scores, torch.inf))


def pictures_at_a_time(flow: FlowPipeline, most: int) -> int:
    """How many pictures of the pipeline's size have a megapixel together, between one and `most`; `most` where the size is unknown."""
    asked = flow.call_arguments()
    if "height" not in asked or "width" not in asked:
        return most
    return max(1, min(most, MEGAPIXEL // (asked["height"] * asked["width"])))


def decoded(flow: FlowPipeline, latents: torch.Tensor) -> torch.Tensor:
    """`flow.images` of final latents (B, ...), a megapixel at a time: a decoder needs gigabytes for each."""
    return torch.cat([flow.images(part) for part in latents.split(pictures_at_a_time(flow, len(latents)))])


def score_with_gradient(
    flow: FlowPipeline,
    latents: torch.Tensor,
    examples: list[Example],
    rewards: list[Reward],
    weights: torch.Tensor,
    batch_size: int,
    **context: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode and score final latents (B, ...), `batch_size` at a time.

    Returns the scores (B, number of rewards), as `call_rewards` does, and the gradient (B, ...) of `sum_j weights[j] reward_j` with
    respect to the latents; a score that is not finite contributes nothing to it. Raises `ValueError` for a reward whose scores carry
    no gradient.
    """
    scores, gradients = [], []
    for start in range(0, len(latents), batch_size):
        x = latents[start : start + batch_size].detach().requires_grad_()
        images, part = flow.decode(x), examples[start : start + batch_size]
        columns = [call_rewards([reward], images, part, **context) for reward in rewards]
        for reward, column in zip(rewards, columns, strict=True):
            if not column.requires_grad:
                raise ValueError(
                    f"Reward {reward.name!r} is marked differentiable, but its scores carry no gradient: compute them from `images` by "
                    "torch operations alone, without `detach`, `no_grad` or `item`."
                )
        values = torch.cat(columns, dim=1)
        total = (torch.where(values.isfinite(), values, 0.0) * weights).sum()
        gradients += [torch.autograd.grad(total, x)[0]]
        scores += [values.detach()]
    return torch.cat(scores), torch.cat(gradients)
