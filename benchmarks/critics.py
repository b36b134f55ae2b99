"""How much of a reward's differences critics explain at noisy states, on shapes: pictures of the base model.

    python benchmarks/critics.py --out docs/tables/critics.md

What could be explained: of each noised picture several continuations are drawn; the share of the within-prompt
variance of their rewards that lies between states is the most that a critic can explain, if continuations are drawn
as the pictures of a state are; how far they are says the row of their mean reward. What critics explain: each
learns for as many seconds from pictures of the training prompts, noised afresh at any level, as AC-Flow's does, and is
judged on pictures of held-out prompts at the same levels. 'reward of the estimate' learns one number for each tenth of
the levels: it is the reward of the clean estimate of one step, less the mean of its prompt, times what fits best.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from flowrl_trainers import FlowPipeline
from flowrl_trainers.flow import clean_estimate, explained_variance, interpolate, renoise, shape_rewards
from flowrl_trainers.networks import BackboneCritic, critic
from flowrl_trainers.rewards import as_rewards
from flowrl_trainers.sampling.draws import ImageKey
from flowrl_trainers.sampling.prompt_groups import Example
from flowrl_trainers.sampling.scoring import call_rewards, decoded
from flowrl_trainers.shapes import load_pipeline, prompts
from flowrl_trainers.trainers.estimate_fit import EstimateFit

LEVELS = (0.9, 0.75, 0.6, 0.45, 0.3)
BINS = torch.linspace(0, 1, 5)  # from each of which AC-Flow draws a state of every picture
STEPS, PER_PROMPT, BATCH, CONTINUATIONS = 8, 8, 64, 6
Value = Callable[[Tensor, Tensor, list[int]], Tensor]
"""Maps states (B, ...), levels (B,) and the pictures' numbers to values (B,)."""


class World:
    """Pictures of some prompts, drawn by the base model in 8 steps, and what they earned.

    Args:
        flow: Draws.
        texts: The prompts.
        reward: The name of the reward.
        generator: Of the noise.
    """

    def __init__(self, flow: FlowPipeline, texts: list[str], reward: str, generator: torch.Generator) -> None:
        self.flow, self.rewards, self.generator = flow, as_rewards(reward), generator
        self.texts = [text for text in texts for _ in range(PER_PROMPT)]
        self.groups = torch.arange(len(texts)).repeat_interleave(PER_PROMPT)
        self.conditioning = flow.encode_prompts(self.texts)
        parts = [self.drawn(list(rows)) for rows in torch.arange(len(self.texts)).split(512)]
        self.latents = torch.cat(parts)
        self.returns = shape_rewards(self.score(self.latents, list(range(len(self.texts)))), self.groups, torch.inf)

    def of(self, rows: list[int]) -> dict[str, Tensor]:
        """The conditioning of some pictures."""
        return {name: value[rows] for name, value in self.conditioning.items()}

    @torch.no_grad()
    def drawn(self, rows: list[int]) -> Tensor:
        """Pictures by the Euler ODE."""
        x = self.flow.initial_latents(len(rows), self.generator)
        return self.flow.sample_latents(self.flow.transformer, self.of(rows), x, self.flow.sigmas(STEPS))

    @torch.no_grad()
    def score(self, latents: Tensor, rows: list[int]) -> Tensor:
        """The reward (B,) of latents (B, ...)."""
        examples = [Example(ImageKey(row, 0, 0), self.texts[row], {}) for row in rows]
        found = [
            call_rewards(self.rewards, decoded(self.flow, latents[start : start + 256]), examples[start : start + 256],
                         trainer_state=None, log_metric=lambda *a: None, log_extra=lambda *a: None)
            for start in range(0, len(rows), 256)
        ]  # fmt: skip
        return torch.cat(found)[:, 0]

    def noised(self, rows: list[int], sigma: Tensor) -> Tensor:
        """States (B, ...) at levels (B,)."""
        x = self.latents[rows]
        return interpolate(x, torch.randn(x.shape, generator=self.generator), sigma)

    @torch.no_grad()
    def velocity(self, states: Tensor, sigma: Tensor, rows: list[int]) -> Tensor:
        """Of the base model."""
        return self.flow.velocity(self.flow.transformer, states, sigma, self.of(rows), guidance=False)

    def continued(self, states: Tensor, level: float, rows: list[int], count: int) -> Tensor:
        """The rewards (B, count) of continuations of states (B, ...) at a level, by the coefficients-preserving
        kernel.
        """
        states, rows = states.repeat_interleave(count, dim=0), [row for row in rows for _ in range(count)]
        down = torch.tensor([level, *(s for s in self.flow.sigmas(STEPS, "uniform").tolist() if s < level)])
        for sigma, sigma_next in pairwise(down):
            now, then = sigma.expand(len(rows)), sigma_next.expand(len(rows))
            mean, std = renoise(states, self.velocity(states, now, rows), now, then, 0.7)
            states = mean + std * torch.randn(states.shape, generator=self.generator)
        return self.score(states, rows).unflatten(0, (-1, count))

    def continuations(self, level: float, count: int) -> Tensor:
        """The rewards (P, CONTINUATIONS) of continuations of the P pictures of `count` prompts, noised to a level."""
        found = []
        for part in torch.arange(count * PER_PROMPT).split(256):
            states = self.noised(part.tolist(), torch.full((len(part),), level))
            found.append(self.continued(states, level, part.tolist(), CONTINUATIONS))
        return torch.cat(found)


def explainable(scores: Tensor) -> float:
    """The share of the within-prompt variance of continuations (B, C), prompt by prompt, that lies between states."""
    within = scores.var(dim=1).mean()  # of the continuations of a state
    between = scores.mean(dim=1).unflatten(0, (-1, PER_PROMPT)).var(dim=1).mean() - within / scores.shape[1]
    return float(between.clamp(min=0) / (between + within))


def judged(value: Value, held_out: World) -> list[float]:
    """The explained variance on held-out prompts at each of `LEVELS`."""
    found = []
    for level in LEVELS:
        values, returns = [], []
        for part in torch.arange(len(held_out.texts)).split(256):
            rows, sigma = part.tolist(), torch.full((len(part),), level)
            with torch.no_grad():
                values.append(value(held_out.noised(rows, sigma), sigma, rows))
            returns.append(held_out.returns[rows])
        found.append(float(explained_variance(torch.cat(returns), torch.cat(values))))
    return found


def learned(
    network: torch.nn.Module, call: Callable[[World], Value], train: World, seconds: float, rate: float
) -> int:
    """Train a network for some seconds by AdamW on batches of 64; returns the number of updates."""
    optimizer, updates, start = torch.optim.AdamW(network.parameters(), lr=rate), 0, time.process_time()
    while time.process_time() - start < seconds:
        rows = torch.randint(len(train.texts), (BATCH,), generator=train.generator).tolist()
        sigma = torch.rand(BATCH, generator=train.generator)
        loss = (call(train)(train.noised(rows, sigma), sigma, rows) - train.returns[rows]).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
    return updates


def of_estimates(world: World) -> Value:
    """The reward of the clean estimate of one step, less the mean of its prompt's pictures."""

    def value(states: Tensor, sigma: Tensor, rows: list[int]) -> Tensor:
        scores = world.score(clean_estimate(states, world.velocity(states, sigma, rows), sigma), rows)
        return shape_rewards(scores, world.groups[rows], torch.inf)

    return value


def by_continuations(train: World, held_out: World, count: int) -> tuple[list[float], list[float]]:
    """On `count` held-out prompts, at each of `LEVELS`: the share that could be explained, and what the mean reward of
    the same continuations explains, times the factor that fits best on half as many training prompts.
    """
    shares, explained = [], []
    for level in LEVELS:
        factor = 0.0
        for world, prompts_of_world in ((train, count // 2), (held_out, count)):
            scores = world.continuations(level, prompts_of_world)
            seen = shape_rewards(scores.mean(dim=1), world.groups[: len(scores)], torch.inf)
            returns = world.returns[: len(scores)]
            if world is train:
                factor = float((seen * returns).sum() / seen.square().sum())
        shares.append(explainable(scores))
        explained.append(float(explained_variance(returns, factor * seen)))
    return shares, explained


def fitted(train: World) -> EstimateFit:
    """What a few rollouts would have fitted: the shaped rewards of estimates to the returns, as AC-Flow does it."""
    fit = EstimateFit(torch.device("cpu"))
    for low, high in pairwise(BINS.tolist()):
        rows = list(range(min(512, len(train.texts))))
        sigma = low + (high - low) * torch.rand(len(rows), generator=train.generator)
        seen = of_estimates(train)(train.noised(rows, sigma), sigma, rows)
        fit.observe(seen[:, None], train.returns[rows], sigma[:, None])
    return fit


def main() -> None:
    """Print, and write with `--out`, the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reward", default="checker")
    parser.add_argument("--prompts", type=int, default=160, help="of training, with 8 pictures each")
    parser.add_argument("--held_out", type=int, default=128, help="prompts on whose pictures critics are judged")
    parser.add_argument("--seconds", type=float, default=80, help="of a core that each critic learns, doubled once")
    parser.add_argument("--only", nargs="*", default=["convolutional", "backbone"])
    parser.add_argument("--explainable", type=int, default=64, help="prompts of which continuations are drawn")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    flow = FlowPipeline.from_pipeline(load_pipeline(), guidance_scale=1.0, max_sequence_length=8)
    flow.transformer.requires_grad_(False)
    generator, start = torch.Generator().manual_seed(0), time.process_time()
    texts = sorted(set(prompts("train")["prompt"]))
    texts = [texts[i] for i in torch.randperm(len(texts), generator=generator)[: options.prompts].tolist()]
    train = World(flow, texts, options.reward, generator)
    judge = sorted(set(prompts("held_out")["prompt"]))[: options.held_out]
    held_out = World(flow, judge, options.reward, torch.Generator().manual_seed(1))
    print(f"{len(train.texts)} and {len(held_out.texts)} pictures in {time.process_time() - start:.0f} s", flush=True)

    head = ["critic", "seconds", "updates", *(f"sigma {level:g}" for level in LEVELS)]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]

    def write(name: str, seconds: str, updates: str, shares: list[float]) -> None:
        lines.append(f"| {name} | {seconds} | {updates} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
        print(lines[-1], flush=True)

    def report(name: str, seconds: float, updates: int, value: Value) -> None:
        write(name, f"{seconds:.0f}", str(updates), judged(value, held_out))

    if options.explainable:
        start = time.process_time()
        shares, explained = by_continuations(train, held_out, options.explainable)
        write("*what could be explained*", "", "", shares)
        write(f"mean reward of {CONTINUATIONS} continuations", f"{time.process_time() - start:.0f}", "0", explained)

    start = time.process_time()
    fit = fitted(train)
    spent = time.process_time() - start
    estimate = of_estimates(held_out)
    report(
        "reward of the estimate", spent, 0,
        lambda z, s, rows: fit.factors(s) * estimate(z, s, rows),
    )  # fmt: skip
    shape, features = train.latents.shape[1:], flow.prompt_features(train.of([0]))[0]
    networks = {
        "convolutional": lambda: critic(shape, features.shape[-1]),
        "backbone": lambda: BackboneCritic(
            flow.transformer,
            partial(flow.velocity, guidance=False),
            flow.last_layer,
            (train.latents[:1], train.of([0])),
            flow.lora_target_modules,
        ),
    }
    for name in options.only:
        network = networks[name]()

        def of(world: World, network: torch.nn.Module = network) -> Value:
            if isinstance(network, BackboneCritic):
                return lambda z, s, rows: network(z, s, world.of(rows))
            return lambda z, s, rows: network(z, s, *world.flow.prompt_features(world.of(rows)))

        updates = 0
        for part in range(2):
            updates += learned(network, of, train, options.seconds, 1e-3)
            report(name, (part + 1) * options.seconds, updates, of(held_out))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
