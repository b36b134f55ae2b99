"""The contract of a reward, and plain functions as rewards."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from torch import Tensor

Scores = Tensor | Sequence[float | None]
Sees = Literal["images", "latents"]
PASSED = ("images", "latents", "prompts", "trainer_state", "log_metric", "log_extra")
"""What rewards are called with beside the columns of the dataset: `images` or `latents`, and all others."""


class Reward(ABC):
    """Scores images.

    A trainer calls it with keywords: `images` (B, 3, H, W) float32, `prompts` (B strings), every other column of the
    dataset as a list of B values, `trainer_state`, `log_extra(name, values)` to keep B values beside the pictures of
    an evaluation (in `samples/`), and `log_metric(name, value)` to log one number. It returns one score per image;
    higher is better, and None means "not applicable here". It may be `async`.

    With `differentiable = True`, images come as the model decodes them, not clamped to [0, 1] and with their graph,
    and the scores are a float tensor (B,) with a gradient. Otherwise images are clamped to [0, 1] and have no graph.

    With `groupwise = True`, a call gets the `num_generations` pictures of one prompt side by side, wherever they were
    drawn, and returns one score per picture that may depend on the others, such as its rank. Only trainers that take
    no gradient call it; evaluations leave it out, as there is no group.

    With `sees = "latents"`, it is called with `latents` in place of `images`: the final latents (B, ...) float32 of
    the model, which no decoder has touched. Where no reward of a run sees images, its rollouts are not decoded.
    """

    name: str = ""
    differentiable: bool = False
    chosen_by: str | None = None
    """The column with a list of the names of the rewards that apply to a picture's prompt; a picture whose list lacks
    the name of this one is not shown to it, and its score counts as None. Where the list is None, all apply."""
    groupwise: bool = False
    sees: Sees = "images"

    @abstractmethod
    def __call__(self, /, *args: Any, **kwargs: Any) -> Scores | Awaitable[Scores]:
        """Return one score per image: `__call__(self, /, images, prompts, **columns)`, or with `latents`."""

    def to(self, device: torch.device) -> None:
        """Move the networks and tensors of the reward to a device; by default there are none."""
        return None

    def signature(self) -> inspect.Signature:
        """Of what is called with images, prompts and columns."""
        return inspect.signature(self.__call__)

    def needed_columns(self) -> list[str]:
        """The columns of the dataset without which the reward cannot be called."""
        parameters = self.signature().parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.default is p.empty]
        return [p.name for p in named if p.name not in PASSED]

    def check_rows(self, rows: Dataset) -> None:
        """Raise `ValueError` for a row that the reward could not score, before anything is drawn; by default for none.

        Args:
            rows: Those that it applies to, with the column `prompt` and the columns that it needs.
        """
        return None


def check_call(reward: Reward, columns: Iterable[str] = ()) -> None:
    """Check that a reward can be called as trainers call it.

    Args:
        reward: Any.
        columns: Those of the dataset beside `prompt`.

    Raises:
        ValueError: For a reward without a name, one that sees neither images nor latents, and one that takes other
            arguments.
    """
    if not (isinstance(reward.name, str) and reward.name):
        raise ValueError(
            f"A {type(reward).__name__} is called {reward.name!r}: set its `name`, a text, which logs and files take."
        )
    if reward.sees not in get_args(Sees):
        raise ValueError(f"Reward {reward.name!r} sees {reward.sees!r}: set `sees` to 'images' or 'latents'.")
    passed = [name for name in PASSED if name == reward.sees or name not in get_args(Sees)]
    try:
        signature = reward.signature()
        signature.bind_partial(**dict.fromkeys([*passed, *columns]))
    except (TypeError, ValueError) as error:  # ValueError for a function of C, which says nothing of its arguments
        raise ValueError(
            f"Reward {reward.name!r} must take `{reward.sees}, prompts, **columns` by name, as trainers call it: "
            f"{error}."
        ) from error
    (other,) = set(get_args(Sees)) - {reward.sees}
    if other in signature.parameters and signature.parameters[other].default is inspect.Parameter.empty:
        raise ValueError(
            f"Reward {reward.name!r} asks for `{other}`, but sees {reward.sees}: set `sees` to {other!r}, or take "
            f"`{reward.sees}` in place of it."
        )


class FunctionReward(Reward):
    """A function, or any other callable, as a reward.

    Args:
        function: Called as trainers call rewards.
        differentiable: Whether its scores have a gradient with respect to `images`.
        name: What it is called in logs and files; None for its own name, which lambdas and partials lack.
        groupwise: Whether it is called with all pictures of one prompt.
        sees: Whether it is called with `images` or with `latents`.

    Raises:
        ValueError: If the callable cannot be called so.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        differentiable: bool = False,
        name: str | None = None,
        groupwise: bool = False,
        sees: Sees = "images",
    ) -> None:
        self.function = function
        self.differentiable, self.groupwise, self.sees = differentiable, groupwise, sees
        named = isinstance(function, type) or (
            callable(function) and type(function).__name__ in ("function", "method")
        )
        self.name = name or (function.__name__ if named else type(function).__name__)
        self.signed = function.forward if isinstance(function, torch.nn.Module) else function
        check_call(self)

    def __call__(self, /, *args: Any, **columns: Any) -> Scores | Awaitable[Scores]:
        return self.function(*args, **columns)

    def to(self, device: torch.device) -> None:
        if isinstance(self.function, torch.nn.Module):
            self.function.to(device)

    def signature(self) -> inspect.Signature:
        return inspect.signature(self.signed)


def differentiable(function: Callable[..., Any]) -> FunctionReward:
    """Declare that the scores of a function or module can be differentiated with respect to `images`.

    @differentiable
    def redness(images, prompts, **columns):
        red, green, blue = images.unbind(dim=1)
        return (red - (green + blue) / 2).mean(dim=(1, 2))
    """
    return FunctionReward(function, differentiable=True)


def groupwise(function: Callable[..., Any]) -> FunctionReward:
    """Declare that a function or module compares the pictures of one prompt, which it gets in one call.

    @groupwise
    def apart(images, prompts, **columns):
        return (images - images.mean(dim=0)).square().mean(dim=(1, 2, 3)).sqrt()
    """
    return FunctionReward(function, groupwise=True)
