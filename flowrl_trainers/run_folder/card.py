"""The model card of a run."""

from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from huggingface_hub import ModelCardData

SHAPES = "flowrl_trainers.shapes"
LIBRARIES = ("flowrl-trainers", "trl", "diffusers", "transformers", "peft", "torch")


@dataclass
class CardFacts:
    """What a card says, all of it taken from the run.

    base_model: a Hub id, `flowrl_trainers.shapes`, or None if it is known under no name others could load. rows:
    `base` and `tuned` of the last evaluation, empty if there was none. sampling: the arguments of the pipeline's call;
    sampling_note: what they leave unsaid; scheduler: the lines that set the one which the pipeline needs, None for its
    own. loader: module and class that load the base model. prompt: an example of what it draws. task: its
    `pipeline_tag`, None where the Hub knows none. license, further_tags: what the user said. picture: the path of a
    sheet beside the card.
    """

    name: str
    method: str
    paper: dict[str, str] | None
    tags: list[str]
    base_model: str | None
    has_adapter: bool
    rewards: dict[str, float]
    settings: dict[str, Any]
    sampling: dict[str, Any]
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    picture: str | None = None
    repository: str | None = None
    dataset: str | None = None
    sampling_note: str = ""
    scheduler: str | None = None
    loader: tuple[str, str] = ("diffusers", "DiffusionPipeline")
    prompt: str = "your prompt"
    task: str | None = "text-to-image"
    license: str | None = None
    further_tags: list[str] = field(default_factory=list)


def model_card(facts: CardFacts) -> str:
    """The card in Markdown with its YAML head."""
    known = facts.base_model is not None and facts.base_model != SHAPES
    head = ModelCardData(
        library_name="diffusers",
        pipeline_tag=facts.task,
        license=facts.license,
        base_model=facts.base_model if known else None,
        datasets=[facts.dataset] if facts.dataset else None,
        tags=[*([facts.task] if facts.task else []), "flow-matching", "flowrl-trainers", *facts.tags]
        + (["lora"] if facts.has_adapter else [])
        + facts.further_tags,
    )
    parts = [f"---\n{head.to_yaml()}\n---", f"# {facts.name}", _summary(facts)]
    if facts.picture:
        parts += [f"![Pictures of the base model and of the tuned one, same prompts and seeds]({facts.picture})"]
    if facts.rows:
        parts += ["## What it brought", _table(facts)]
    parts += ["## Use", _usage(facts), "## How it was trained", _training(facts)]
    return "\n\n".join(parts) + "\n"


def _summary(facts: CardFacts) -> str:
    what = "A LoRA for" if facts.has_adapter else "The fine-tuned transformer of"
    base = f"`{facts.base_model}`" if facts.base_model else "a flow-matching pipeline"
    aims = []
    for verb, sign in (("raise", 1), ("lower", -1)):
        named = [
            f"`{name}`" + ("" if abs(w) == 1 else f" (weight {abs(w):g})")
            for name, w in facts.rewards.items()
            if sign * w > 0
        ]
        aims += [f"{verb} {' and '.join(named)}"] if named else []
    return f"{what} {base}, tuned by {facts.method} to {' and to '.join(aims)} with flowrl-trainers."


def _table(facts: CardFacts) -> str:
    names = list({name: None for row in facts.rows.values() for name in row})
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    # Numbers that a reward logged are of the tuned model alone, and diversity needs two right pictures of a prompt.
    for label, row in facts.rows.items():
        lines += [f"| {label} | " + " | ".join(f"{row[name]:.3f}" if name in row else "" for name in names) + " |"]
    sampling = ", ".join(f"{name} {value}" for name, value in facts.sampling.items())
    trained = ", ".join(f"`{name}`" for name in facts.rewards)
    sampling += f"; {facts.sampling_note}" if facts.sampling_note else ""
    seen = f"Training saw {trained} alone; what else is listed, it never saw."
    note = f"Held-out prompts, the same seeds for all rows ({sampling}). {seen}"
    return "\n".join([*lines, "", note])


def _usage(facts: CardFacts) -> str:
    here = facts.repository or "."
    if facts.base_model == SHAPES:
        load = "from flowrl_trainers.shapes import load_pipeline\n\npipe = load_pipeline()"
    else:
        base = facts.base_model or "path/to/the/base/model"
        module, loader = facts.loader
        load = f'from {module} import {loader}\n\npipe = {loader}.from_pretrained("{base}")'
    if facts.has_adapter:
        load += f'\npipe.load_lora_weights("{here}")'
    else:
        load += f'\npipe.transformer = type(pipe.transformer).from_pretrained("{here}", subfolder="transformer")'
    if facts.scheduler is not None:
        load += f"\n{facts.scheduler}"
    arguments = ", ".join(f"{name}={value!r}" for name, value in facts.sampling.items())
    return f'```python\n{load}\nimage = pipe("{facts.prompt}", {arguments}).images[0]\n```'


def _training(facts: CardFacts) -> str:
    rows = "\n".join(f"| `{name}` | {value} |" for name, value in facts.settings.items())
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    method = facts.method
    if facts.paper is not None:
        paper = f"[{facts.paper['title']}](https://huggingface.co/papers/{facts.paper['id']})"
        method += f", after {paper}{facts.paper.get('note', '')}"
    return (
        f"Method: {method}. Every setting is in `config.yaml`; the main ones:\n\n"
        f"| setting | value |\n|---|---|\n{rows}\n\nVersions: {versions}."
    )
