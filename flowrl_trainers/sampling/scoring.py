"""Latents in, one score per image and reward out, with the gradient of their weighted sum where it is asked for."""

import asyncio
import copy
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..flow.advantages import with_room
from ..pipelines import FlowPipeline
from ..rewards import Reward
from ..rewards.scores import checked_scores
from .group_scores import GroupScores
from .prompt_groups import Example
from .reward_notes import checked_notes, spread_notes

MEGAPIXEL = 2**20
MOST_NAMED = 8  # prompts in a note

Context = Callable[[], dict[str, Any]]
"""What every reward is called with beside images, prompts and columns: `trainer_state`, `log_metric`, `log_extra`."""


Decoder = Callable[[Tensor], Tensor]
"""Maps latents (B, ...) to images (B, 3, H, W), not clamped, with a gradient."""

Judging = Callable[[list[Reward]], AbstractContextManager[None]]
"""Makes a context in which decoders and some rewards are on the device; see `Placement.judging`."""


def leave_in_place(rewards: list[Reward]) -> AbstractContextManager[None]:
    """The context of networks that are on the device anyway."""
    return nullcontext()


def call_rewards(
    rewards: list[Reward],
    images: Tensor | None,
    examples: list[Example],
    latents: Tensor | None = None,
    **context: Any,
) -> Tensor:
    """The scores of images: (B, number of rewards) float32.

    NaN stands where a reward returned None, and infinity where its score is not finite. Asynchronous rewards run
    together.

    Args:
        rewards: Called one after the other; groupwise ones take the images for one group.
        images: (B, 3, H, W); None where no reward sees them.
        examples: B of them, with prompts and columns.
        latents: Those of the images, (B, ...); None where no reward sees them.
        context: Passed on to every reward.

    Raises:
        ValueError: For anything but one number or None per image, and for a reward that sees what is None.
    """
    return ask_rewards(rewards, images, examples, latents, **context)()


def ask_rewards(
    rewards: list[Reward],
    images: Tensor | None,
    examples: list[Example],
    latents: Tensor | None = None,
    **context: Any,
) -> Callable[[], Tensor]:
    """Call the rewards; asynchronous ones go on in a thread until the function that is returned waits for the scores.

    Every reward gets a copy of images or latents, prompts and columns, so that none can change what another sees. An
    error of a reward bears a note with its name, the update and the prompts. Arguments as in `call_rewards`.
    """
    prompts = [e.prompt for e in examples]
    views = {"images": images, "latents": latents}
    device = next((view.device for view in views.values() if view is not None), torch.device("cpu"))
    chosen = [rows_of(reward, examples) for reward in rewards]
    results: list[Any] = []
    for reward, rows in zip(rewards, chosen, strict=True):
        view = views[reward.sees]
        if view is None:
            raise ValueError(f"Reward {reward.name!r} sees {reward.sees}, and there are none here: pass them.")
        if not rows:
            results.append(torch.zeros(0, device=device))
            continue
        seen = view if len(rows) == len(examples) else view[rows]
        given: dict[str, Any] = {
            reward.sees: seen.clone(),
            "prompts": [prompts[i] for i in rows],
            **{n: _copied([examples[i].columns[n] for i in rows]) for n in examples[0].columns},
        }
        notes = checked_notes(spread_notes(context, rows, len(examples)), reward.name, len(rows))
        with _named(reward, given["prompts"], context):
            results.append(reward(**given, **notes))
    waiting = {i: result for i, result in enumerate(results) if inspect.isawaitable(result)}
    answers = None
    if waiting:
        named = [
            _answer(rewards[i], result, [prompts[row] for row in chosen[i]], context) for i, result in waiting.items()
        ]
        answers = asyncio.run_coroutine_threadsafe(_together(named, device, torch.is_grad_enabled()), _event_loop())

    def scores() -> Tensor:
        if answers is not None:
            for i, result in zip(waiting, answers.result(), strict=True):
                results[i] = result
        if not rewards:
            return torch.zeros(len(examples), 0, device=device)
        found = [
            _of_all(_as_tensor(reward, result, len(rows), device), rows, len(examples))
            for reward, result, rows in zip(rewards, results, chosen, strict=True)
        ]
        return torch.stack(found, dim=1)

    return scores


def rows_of(reward: Reward, examples: list[Example]) -> list[int]:
    """The numbers of the examples that a reward is shown; see `Reward.chosen_by`."""
    if reward.chosen_by is None:
        return list(range(len(examples)))
    names = [example.columns[reward.chosen_by] for example in examples]
    return [i for i, listed in enumerate(names) if listed is None or reward.name in listed]


def _of_all(scores: Tensor, rows: list[int], count: int) -> Tensor:
    """Scores (count,) of all images, NaN for those that the reward was not shown; scores: (R,), those of `rows`."""
    if len(rows) == count:
        return scores
    return scores.new_full((count,), torch.nan).index_copy(0, torch.tensor(rows, device=scores.device).long(), scores)


def _copied(column: list[Any]) -> list[Any]:
    """A copy of a column; of values that cannot be copied (open files, endless nesting), the list alone."""
    try:
        return copy.deepcopy(column)
    except (TypeError, RecursionError):
        return list(column)


@contextmanager
def _named(reward: Reward, prompts: list[str], context: dict[str, Any]) -> Iterator[None]:
    """Note on an error inside which reward failed, when, and on what."""
    try:
        yield
    except Exception as error:
        state = context.get("trainer_state")
        when = "" if state is None else f" after {state.global_step} updates"
        error.add_note(f"Reward {reward.name!r} failed{when} on the prompts {prompts[:MOST_NAMED]}.")
        raise


async def _answer(reward: Reward, awaited: Awaitable[Any], prompts: list[str], context: dict[str, Any]) -> Any:
    with _named(reward, prompts, context):
        return await awaited


async def _together(awaited: list[Any], device: torch.device, grad_enabled: bool) -> list[Any]:
    """The answers; in a thread, which has a gradient mode and a current GPU of its own."""
    with torch.set_grad_enabled(grad_enabled), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return await asyncio.gather(*awaited)


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """The one loop of this process, in a thread of its own: clients keep their connections from call to call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="asynchronous rewards", daemon=True).start()
    return loop


def _as_tensor(reward: Reward, scores: Any, count: int, device: torch.device) -> Tensor:
    """Scores (B,) float32 of what a reward returned, in the form of `call_rewards`; raises `ValueError` as it does."""
    checked = checked_scores(reward.name, scores, count)
    absent = torch.zeros(count, dtype=torch.bool, device=device)
    if not isinstance(checked, Tensor):
        absent = torch.tensor([score is None for score in checked], device=device)
        checked = torch.tensor([0.0 if score is None else score for score in checked])
    found = checked.to(device, torch.float32)
    return torch.where(absent, torch.nan, torch.where(found.isfinite(), found, torch.inf))


def _no_gradient(reward: Reward) -> ValueError:
    return ValueError(
        f"Reward {reward.name!r} is marked differentiable, but its scores carry no gradient: compute them from "
        f"`{reward.sees}` by torch operations alone, without `detach`, `no_grad` or `item`."
    )


def pictures_at_a_time(flow: FlowPipeline, most: int) -> int:
    """How many pictures of the pipeline's size make a megapixel, from one to `most`; `most` if that is unknown."""
    asked = flow.call_arguments()
    if "height" not in asked or "width" not in asked:
        return most
    return max(1, min(most, MEGAPIXEL // (asked["height"] * asked["width"])))


def decoded(flow: FlowPipeline, latents: Tensor) -> Tensor:
    """`flow.images` of final latents (B, ...), a megapixel at a time: a decoder needs gigabytes for each."""
    return torch.cat([flow.images(part) for part in latents.split(pictures_at_a_time(flow, len(latents)))])


def seen_images(flow: FlowPipeline, rewards: list[Reward], latents: Tensor) -> Tensor | None:
    """`decoded`, where a reward sees images; else None."""
    return decoded(flow, latents) if any(reward.sees == "images" for reward in rewards) else None


class Scorer:
    """Scores final latents by the rewards of a run.

    Args:
        flow: Decodes latents.
        rewards: R of them.
        weights: (R,), those of their sum.
        context: See `Context`.
        batch_size: The images scored at a time.
        decode_batch_size: The images decoded and scored at a time; None for `batch_size`, and where a gradient is
            taken through a decoder for at most a megapixel of them.
        group_size: The images of a prompt, which groupwise rewards see together.
        judging: A context in which decoders and these rewards are on the device; see `Placement`.
    """

    def __init__(
        self,
        flow: FlowPipeline,
        rewards: list[Reward],
        weights: Tensor,
        context: Context,
        batch_size: int,
        decode_batch_size: int | None = None,
        group_size: int = 1,
        judging: Judging = leave_in_place,
    ) -> None:
        self.flow, self.rewards, self.weights, self.context = flow, rewards, weights, context
        self.batch_size, self.decode_batch_size = batch_size, decode_batch_size
        self.group_size, self.judging = group_size, judging
        self.gradient_decoder: Decoder | None = None
        """Decodes where a gradient is taken; None for the pipeline's own."""

    @property
    def compares(self) -> bool:
        """Whether a reward is groupwise, so that `score` needs all images of a rollout in one call."""
        return any(reward.groupwise for reward in self.rewards)

    @torch.no_grad()
    def score(self, latents: Tensor, examples: list[Example]) -> Tensor:
        """Scores (B, R) of the pictures of final latents (B, ...), without gradients; see `call_rewards`.

        While asynchronous rewards look at the pictures of one decoded batch, the next is decoded; nothing is decoded
        where no reward sees images. With groupwise rewards, all processes must call it, with all images of a rollout;
        an image that is passed several times, in several states, is compared state by state.

        Raises:
            ValueError: For prompts with fewer or more images than a group has, where a reward is groupwise.
        """
        with self.judging(self.rewards):
            return self._score(latents, examples)

    def _score(self, latents: Tensor, examples: list[Example]) -> Tensor:
        size = self.decode_batch_size or self.batch_size
        scores: list[Tensor] = []
        asked: list[Callable[[], Tensor]] = []
        single = [reward for reward in self.rewards if not reward.groupwise]
        groups = GroupScores(self._ask_about_group, examples, self.group_size) if self.compares else None
        for start, part in zip(range(0, len(latents), size), latents.split(size), strict=True):
            images = seen_images(self.flow, self.rewards, part)
            scores += [answer() for answer in asked]
            asked = [ask_rewards(single, images, examples[start : start + size], part, **self.context())]
            if groups is not None:
                groups.add(start, [part] if images is None else [part, images])
        found = torch.cat([*scores, *(answer() for answer in asked)])
        return found if groups is None else self._in_order(found, groups.scores())

    def _ask_about_group(self, views: list[Tensor], examples: list[Example]) -> Callable[[], Tensor]:
        """Ask the groupwise rewards; views: latents (G, ...), and images where a reward sees them."""
        latents, images = (*views, None)[:2]
        groupwise = [reward for reward in self.rewards if reward.groupwise]
        return ask_rewards(groupwise, images, examples, latents, **self.context())

    def _in_order(self, single: Tensor, groupwise: Tensor) -> Tensor:
        """The columns of both kinds of rewards in the order of the rewards."""
        columns = {False: iter(single.unbind(dim=1)), True: iter(groupwise.unbind(dim=1))}
        return torch.stack([next(columns[reward.groupwise]) for reward in self.rewards], dim=1)

    def score_with_gradient(self, latents: Tensor, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """Scores (B, R) of final latents (B, ...), and the gradient (B, ...) of their weighted sum.

        A score that is not finite contributes nothing to the gradient. Scores are of the pictures that the gradient
        goes through, those of `gradient_decoder` where there is one.

        Raises:
            ValueError: For a reward whose scores carry no gradient.
        """
        with self.judging(self.rewards):
            return self._score_with_gradient(self.rewards, self.weights, latents, examples)

    def probe_gradients(self, latents: Tensor, examples: list[Example]) -> Tensor:
        """The scores of `score_with_gradient`, but reward by reward, so that none hides that another is no function of
        the images.
        """
        with self.judging(self.rewards):
            columns = (
                self._score_with_gradient([reward], weight[None], latents, examples)[0]
                for reward, weight in zip(self.rewards, self.weights, strict=True)
            )
            return torch.cat(list(columns), dim=1)

    def _score_with_gradient(
        self, rewards: list[Reward], weights: Tensor, latents: Tensor, examples: list[Example]
    ) -> tuple[Tensor, Tensor]:
        decodes = any(reward.sees == "images" for reward in rewards)
        decode = self.gradient_decoder or self.flow.decode
        together = pictures_at_a_time(self.flow, self.batch_size) if decodes else self.batch_size
        size = self.decode_batch_size or together
        scores, gradients = [], []
        for start in range(0, len(latents), size):
            x = latents[start : start + size].detach().requires_grad_()
            images, part = decode(x) if decodes else None, examples[start : start + size]
            columns = [call_rewards([reward], images, part, x, **self.context()) for reward in rewards]
            for reward, column in zip(rewards, columns, strict=True):
                if not column.requires_grad and rows_of(reward, part):
                    raise _no_gradient(reward)
            values = torch.cat(columns, dim=1)
            total = (torch.where(values.isfinite(), values, 0.0) * weights).sum()
            gradient: Tensor | None = torch.zeros_like(x)
            if total.requires_grad:  # else no reward applies to any of these images
                (gradient,) = torch.autograd.grad(total, x, allow_unused=True)
            if gradient is None:  # what requires one are the weights of a reward, and not the images
                raise _no_gradient(next(reward for reward in rewards if rows_of(reward, part)))
            gradients.append(gradient)
            scores.append(values.detach())
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
            column = with_room(column)
            row |= {f"reward/{reward.name}": column.mean(), f"reward_std/{reward.name}": column.std(correction=0)}
            total = None if total is None else total + weight * float(column.mean())
        return row, total
