"""The model card of a run."""

import math
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from huggingface_hub import ModelCardData

SHAPES = "flowrl_trainers.shapes"
LIBRARIES = ("flowrl-trainers", "trl", "diffusers", "transformers", "peft", "torch")
NO_NUMBER = "\u2014"


@dataclass
class CardFacts:
    """What a card says, all of it taken from the run.

    base_model: a Hub id, `flowrl_trainers.shapes`, or None if it is known under no name others could load. rows:
    `base` and `tuned` of the last evaluation, empty if there was none. sampling: the arguments of the pipeline's call;
    sampling_note: what they leave unsaid, in Markdown; scheduler: the lines that set the one which the pipeline needs,
    None for its own. loader: module and class that load the base model. prompt: an example of what it draws. task: its
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
    """The card in Markdown with its YAML head.

    Names, prompts and values appear as they are: `_plain`, `_code` and `_literal` escape what Markdown, HTML or Python
    would read as something else. A number that is missing or not finite is a dash.
    """
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
    parts = [f"---\n{head.to_yaml()}\n---", f"# {_plain(facts.name)}", _summary(facts)]
    if facts.picture:
        parts += [f"![Pictures of the base model and of the tuned one, same prompts and seeds]({facts.picture})"]
    if facts.rows:
        parts += ["## What it brought", _table(facts)]
    parts += ["## Use", _usage(facts), "## How it was trained", _training(facts)]
    return ("\n\n".join(parts) + "\n").encode(errors="backslashreplace").decode()  # half of a pair has no bytes


def _plain(text: str) -> str:
    """A text in one line, with a backslash before what Markdown or HTML would read as something else."""
    flat = " ".join(text.split())
    return re.sub(r"[\\`*\[\]<>&|#~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", flat)


def _code(text: str) -> str:
    """A text in the type of code, also in the cell of a table."""
    flat = " ".join(text.split())
    return f"`{flat}`" if flat and not set("`|") & set(flat) else f"<code>{_plain(flat)}</code>"


def _literal(value: Any) -> str:
    """A value as Python code; strings in double quotes."""
    if not isinstance(value, str):
        return repr(value)
    # `repr` takes double quotes where a text has single ones alone.
    return '"' + '\\"'.join(repr("'" + part)[2:-1] for part in value.split('"')) + '"'


def _summary(facts: CardFacts) -> str:
    what = "A LoRA for" if facts.has_adapter else "The fine-tuned transformer of"
    base = _code(facts.base_model) if facts.base_model else "a flow-matching pipeline"
    aims = []
    for verb, sign in (("raise", 1), ("lower", -1)):
        named = [
            _code(name) + ("" if abs(w) == 1 else f" (weight {abs(w):g})")
            for name, w in facts.rewards.items()
            if sign * w > 0
        ]
        aims += [f"{verb} {' and '.join(named)}"] if named else []
    aim = f" to {' and to '.join(aims)}" if aims else ""
    return f"{what} {base}, tuned by {_plain(facts.method)}{aim} with flowrl-trainers."


def _table(facts: CardFacts) -> str:
    names = list({name: None for row in facts.rows.values() for name in row})
    lines = ["| | " + " | ".join(map(_plain, names)) + " |", "|---|" + "---:|" * len(names)]
    # Numbers that a reward logged are of the tuned model alone, and diversity needs two right pictures of a prompt.
    for label, row in facts.rows.items():
        lines += [f"| {_plain(label)} | " + " | ".join(_number(row.get(name)) for name in names) + " |"]
    sampling = ", ".join(f"{name} {_plain(_literal(value))}" for name, value in facts.sampling.items())
    trained = ", ".join(map(_code, facts.rewards))
    sampling += f"; {facts.sampling_note}" if facts.sampling_note else ""
    seen = f"Training saw {trained} alone; what else is listed, it never saw."
    note = f"Held-out prompts, the same seeds for all rows ({sampling}). {seen}"
    return "\n".join([*lines, "", note])


def _number(value: float | None) -> str:
    return f"{value:.3f}" if value is not None and math.isfinite(value) else NO_NUMBER


def _usage(facts: CardFacts) -> str:
    here = _literal(facts.repository or ".")
    if facts.base_model == SHAPES:
        load = "from flowrl_trainers.shapes import load_pipeline\n\npipe = load_pipeline()"
    else:
        base = facts.base_model or "path/to/the/base/model"
        module, loader = facts.loader
        load = f"from {module} import {loader}\n\npipe = {loader}.from_pretrained({_literal(base)})"
    if facts.has_adapter:
        load += f"\npipe.load_lora_weights({here})"
    else:
        load += f'\npipe.transformer = type(pipe.transformer).from_pretrained({here}, subfolder="transformer")'
    if facts.scheduler is not None:
        load += f"\n{facts.scheduler}"
    # By name: the first argument of some pipelines is a picture.
    call = ", ".join(f"{name}={_literal(value)}" for name, value in {"prompt": facts.prompt, **facts.sampling}.items())
    return f"```python\n{load}\nimage = pipe({call}).images[0]\n```"


def _training(facts: CardFacts) -> str:
    rows = "\n".join(f"| {_code(name)} | {_plain(str(value))} |" for name, value in facts.settings.items())
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    method = _plain(facts.method)
    if facts.paper is not None:
        paper = f"[{_plain(facts.paper['title'])}](https://huggingface.co/papers/{facts.paper['id']})"
        method += f", after {paper}{facts.paper.get('note', '')}"
    return (
        f"Method: {method}. Every setting is in `config.yaml`; the main ones:\n\n"
        f"| setting | value |\n|---|---|\n{rows}\n\nVersions: {versions}."
    )
