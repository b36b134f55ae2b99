"""The report of `flowrl check_reward`: numbers, and a sentence for each that a run would suffer from."""

import math

import numpy as np

from ..sampling.reward_trial import ASCENT_STEPS, Trial

MUCH = 1.0  # standard deviations within a prompt, by which a distortion moves scores
LEVEL = 0.25  # of the prompts, whose pictures all score the same
APART = 0.1  # of the change of scores along the gradient


def report_of(name: str, trial: Trial, megabytes: float, drawn: str) -> str:
    """The report in Markdown.

    Args:
        name: Of the reward.
        trial: What was found out.
        megabytes: What loading and scoring took.
        drawn: What pictures were scored.
    """
    found = warnings_of(trial)
    verdict = [f"- {sentence}" for sentence in found] or ["- Nothing speaks against it here."]
    rows = [f"| {question} | {answer} |" for question, answer in _numbers(trial, megabytes)]
    return "\n".join([f"# `{name}`", "", *verdict, "", "| | |", "|---|---|", *rows, "", f"{drawn}."])


def _numbers(trial: Trial, megabytes: float) -> list[tuple[str, str]]:
    scores = [score for score in trial.flat if math.isfinite(score)]
    without = sum(map(math.isnan, trial.flat))
    spread = trial.spread
    rows = [
        ("range", f"{min(scores):.4g} to {max(scores):.4g}, mean {np.mean(scores):.4g}"),
        ("None, faults", f"{without}, {len(trial.flat) - len(scores) - without} of {len(trial.flat)} pictures"),
        ("spread within prompts", f"{spread.within:.3g} (standard deviation: the signal of GRPO and AC-Flow)"),
        ("spread between prompts", f"{spread.between:.3g}"),
        ("prompts whose pictures all score the same", f"{spread.level:.0%}"),
        *((f"moved by {name}", _moved(change, spread.within)) for name, change in trial.moved.items()),
        ("the same pictures again", _change(trial.repeats)),
        ("each picture by itself", _change(trial.alone)),
    ]
    if trial.gradient is not None and trial.ascent is not None:
        gradient, (before, after) = trial.gradient, map(np.mean, trial.ascent)
        rows += [
            ("gradient norm", f"{gradient.norm:.3g} per picture"),
            ("gradient against finite difference", f"{gradient.disagreement:.1%} apart"),
            (f"{ASCENT_STEPS} steps of ascent from noise", f"{before:.4g} to {after:.4g}"),
        ]
    return [
        *rows,
        ("time", f"{1000 * trial.seconds:.3g} ms per picture"),
        (
            "memory",
            f"{megabytes:.0f} MB for weights and scoring; on a CPU without what drawing left free for it",
        ),
    ]


def _moved(change: float, within: float) -> str:
    share = f", {abs(change) / within:.2g} of the spread within prompts" if within > 0 else ""
    return f"{change:+.3g}{share}"


def _change(largest: float) -> str:
    return "the same scores" if largest == 0 else f"up to {largest:.2g} apart"


def warnings_of(trial: Trial) -> list[str]:
    """A sentence for each finding that spoils a run; the bounds are our choice."""
    scores, spread, sentences = trial.flat, trial.spread, []
    faults, without = sum(map(math.isinf, scores)), sum(map(math.isnan, scores))
    if faults:
        sentences.append(f"{faults} of {len(scores)} scores are NaN or infinite: mend the reward.")
    if without:
        sentences.append(f"{without} of {len(scores)} pictures have no score (None) and teach nothing.")
    if spread.level > LEVEL:
        sentences.append(
            f"For {spread.level:.0%} of the prompts all pictures score the same: methods that compare pictures of one "
            "prompt learn nothing from these; take more pictures per prompt, or other prompts."
        )
    moved = [name for name, change in trial.moved.items() if spread.within > 0 and abs(change) > MUCH * spread.within]
    if moved:
        verb = "moves" if len(moved) == 1 else "move"
        sentences.append(
            f"{' and '.join(moved).capitalize()} {verb} the scores by more than pictures of one prompt differ: a run "
            "will learn that first."
        )
    if trial.repeats > 0:
        sentences.append(
            f"The same pictures score up to {trial.repeats:.2g} apart when asked again: a run cannot be repeated."
        )
    if trial.gradient is not None:
        sentences += _about_gradient(trial)
    return sentences


def _about_gradient(trial: Trial) -> list[str]:
    sentences = []
    if trial.gradient is not None and trial.gradient.norm == 0:
        sentences.append("The gradient is zero: no method that differentiates the reward can learn from it.")
    elif trial.gradient is not None and trial.gradient.disagreement > APART:
        sentences.append(
            f"The gradient is {trial.gradient.disagreement:.0%} apart from a finite difference: check that nothing is "
            "rounded, clipped or detached, and that weights are in float32."
        )
    if trial.ascent is not None:
        reached, usual = (float(np.mean([s for s in of if math.isfinite(s)])) for of in (trial.ascent[1], trial.flat))
        if reached > usual:
            sentences.append(
                f"Noise scores {reached:.4g} after {ASCENT_STEPS} steps of gradient ascent, more than the model's "
                f"pictures ({usual:.4g}): watch another reward that training never sees."
            )
    return sentences
