"""The model card of a run."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .text_files import write_json, write_text

FACTS = "card.json"
SHAPES = "flowrl_trainers.shapes"
LIBRARIES = ("flowrl-trainers", "trl", "diffusers", "transformers", "peft", "torch")
LONG = 90  # a call of more letters takes a line for each argument
VELOCITY_NOTE = (
    "velocity_distance is how far the tuned velocity is from the base model's, as a share of that; "
    "velocity_norm_ratio_0 to _3 are its length beside that of the base model, in the quarters of the noise levels "
    "from clean to noisy."
)
NO_NUMBER = "\u2014"


def versions() -> dict[str, str]:
    """Those of the libraries that a run depends on."""
    return {name: version(name) for name in LIBRARIES}


@dataclass
class CardFacts:
    """What a card says, all of it taken from the run, in types that JSON keeps.

    Attributes:
        name: The heading.
        method: The name of the algorithm.
        paper: Title, arXiv id and, where they are known, authors and a note.
        tags: Those of the method.
        base_model: A Hub id, `flowrl_trainers.shapes`, or None if it is known under no name others could load.
        has_adapter: Whether the weights are an adapter or a whole transformer.
        rewards: Names and weights.
        settings: The main ones.
        sampling: The arguments of the pipeline's call.
        sampling_note: What they leave unsaid, in Markdown; not empty where a seed does not draw the same picture.
        scheduler: The lines that set the one which the pipeline needs, None for its own.
        loader: Module and class that load the base model.
        prompt: An example of what it draws.
        task: Its `pipeline_tag`, None where the Hub knows none.
        rows: `base` and `tuned` of the last evaluation, empty if there was none.
        picture: The path of a sheet beside the card.
        curve: The path of the reward curve beside the card.
        gallery: Prompt, seed and path of each picture of the tuned model beside the card.
        repository: Where the weights are on the Hub.
        dataset: The prompts on the Hub.
        licence: `license`, `license_name` and `license_link` as the Hub calls them; empty where nobody knows.
        further_tags: Those of the user.
        command: The command that repeats the run, None where a script made it.
        versions: Of the libraries.
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
    rows: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    picture: str | None = None
    curve: str | None = None
    gallery: list[dict[str, Any]] = field(default_factory=list)
    repository: str | None = None
    dataset: str | None = None
    sampling_note: str = ""
    scheduler: str | None = None
    loader: tuple[str, str] = ("diffusers", "DiffusionPipeline")
    prompt: str = "your prompt"
    task: str | None = "text-to-image"
    licence: dict[str, str] = field(default_factory=dict)
    further_tags: list[str] = field(default_factory=list)
    command: str | None = None
    versions: dict[str, str] = field(default_factory=versions)


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write `card.json` with the facts, and from that file alone `README.md`, so that it can be written again."""
    write_json(folder / FACTS, asdict(facts))
    settings = folder / "config.yaml"
    config = settings.read_text(encoding="utf-8") if settings.exists() else None
    write_text(folder / "README.md", model_card(read_facts(folder), config))


def read_facts(folder: Path) -> CardFacts:
    """The facts of a card that was written into a folder. Raises `ValueError` where there are none, or others."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no {FACTS} that can be read ({error}): name the folder of a run, which keeps the facts of "
            "its card there."
        ) from error
    if not isinstance(facts, dict) or set(facts) != {entry.name for entry in fields(CardFacts)}:
        raise ValueError(
            f"{folder / FACTS} holds other facts than this version of flowrl-trainers knows: use the version that "
            "wrote it."
        )
    return CardFacts(**facts)


def model_card(facts: CardFacts, config: str | None = None) -> str:
    """The card in Markdown with its YAML head.

    Names, prompts and values appear as they are: `_plain`, `_code`, `_fenced` and `_literal` escape what Markdown,
    HTML or Python would read as something else. A number that is missing or not finite is a dash.

    Args:
        facts: What it says.
        config: The text of `config.yaml`, if it is there.
    """
    parts = [f"---\n{_head(facts).to_yaml()}\n---", f"# {_plain(facts.name)}", _summary(facts)]
    if facts.gallery:
        parts += ["<Gallery />"]
    if facts.picture or facts.rows or facts.curve:
        parts += ["## What it brought"]
    if facts.picture:
        parts += [f"![Pictures of the base model and of the tuned one, same prompts and seeds]({facts.picture})"]
    if facts.rows:
        parts += [_table(facts)]
    if facts.curve:
        parts += [f"![The reward over the updates]({facts.curve})"]
    parts += ["## Use", _usage(facts), "## How it was trained", _training(facts, config)]
    if not facts.licence:
        parts += ["## Licence", _licence(facts)]
    parts += ["## Cite", _citations(facts)]
    return ("\n\n".join(parts) + "\n").encode(errors="backslashreplace").decode()  # half of a pair has no bytes


def _head(facts: CardFacts) -> ModelCardData:
    """What the Hub reads: how the model is found, its gallery, and what it reached on held-out prompts."""
    known = facts.base_model is not None and facts.base_model != SHAPES
    rewards = [f"reward-model:{name}" for name in facts.rewards]
    results = [
        EvalResult(
            task_type=facts.task or "image-generation",
            dataset_type=facts.dataset or "held-out-prompts",
            dataset_name="held-out prompts",
            metric_type=name,
            metric_value=round(value, 4),
        )
        for name, value in facts.rows.get("tuned", {}).items()
        if value is not None and math.isfinite(value)
    ]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=facts.task,
        base_model=facts.base_model if known else None,
        datasets=[facts.dataset] if facts.dataset else None,
        tags=[*([facts.task] if facts.task else []), "diffusers", "flow-matching", "flowrl-trainers", *facts.tags]
        + (["lora"] if facts.has_adapter else [])
        + rewards
        + facts.further_tags,
        model_name=facts.name if results else None,
        eval_results=results or None,
        base_model_relation=("adapter" if facts.has_adapter else "finetune") if known else None,
        widget=[{"text": shown["prompt"], "output": {"url": shown["picture"]}} for shown in facts.gallery] or None,
        license=facts.licence.get("license"),
        license_name=facts.licence.get("license_name"),
        license_link=facts.licence.get("license_link"),
    )


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
    """A line for each number; the last column is what tuning changed."""
    labels = list(facts.rows)
    names = list({name: None for row in facts.rows.values() for name in row})
    lines = ["| | " + " | ".join(map(_plain, [*labels, "tuned - base"])) + " |", "|---|" + "---:|" * (len(labels) + 1)]
    # Numbers that a reward logged are of the tuned model alone, and diversity needs two right pictures of a prompt.
    for name in names:
        values = [facts.rows[label].get(name) for label in labels]
        before, after = (facts.rows.get(label, {}).get(name) for label in ("base", "tuned"))
        change = None if before is None or after is None else after - before
        cells = [*map(_number, values), _number(change, "+.3f")]
        lines += [f"| {_plain(name)} | " + " | ".join(cells) + " |"]
    sampling = ", ".join(f"{name} {_plain(_literal(value))}" for name, value in facts.sampling.items())
    trained = ", ".join(map(_code, facts.rewards))
    sampling += f"; {facts.sampling_note}" if facts.sampling_note else ""
    seen = f"Training saw {trained} alone; what else is listed, it never saw."
    note = f"Held-out prompts, the same seeds in all columns ({sampling}). {seen}"
    if any(name.startswith("velocity_") for name in names):
        note += f" {VELOCITY_NOTE}"
    if facts.picture and "checker_accuracy" in names:
        note += " Green frames are around pictures that the checker accepts, red ones around the others."
    return "\n".join([*lines, "", note])


def _number(value: float | None, style: str = ".3f") -> str:
    return f"{value:{style}}" if value is not None and math.isfinite(value) else NO_NUMBER


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
    call = {"prompt": _literal(facts.prompt)} | {name: _literal(value) for name, value in facts.sampling.items()}
    said = ""
    if facts.gallery and not facts.sampling_note:
        first = facts.gallery[0]
        load = f"import torch\n{load}"
        call |= {
            "prompt": _literal(first["prompt"]), "generator": f"torch.Generator().manual_seed({first['seed']})"
        }  # fmt: skip
        said = 'This draws the first picture of the gallery; on a GPU, add `.to("cuda")` to the pipeline.\n\n'
    arguments = [f"{name}={value}" for name, value in call.items()]
    draw = f"pipe({', '.join(arguments)}).images[0]"
    if len(draw) > LONG:
        draw = "pipe(\n    " + ",\n    ".join(arguments) + "\n).images[0]"
    return f"{said}```python\n{load}\nimage = {draw}\n```"


def _training(facts: CardFacts, config: str | None) -> str:
    method = _plain(facts.method)
    if facts.paper is not None:
        paper = f"[{_plain(facts.paper['title'])}](https://huggingface.co/papers/{facts.paper['id']})"
        method += f", after {paper}{facts.paper.get('note', '')}"
    rows = "\n".join(f"| {_code(name)} | {_plain(str(value))} |" for name, value in facts.settings.items())
    parts = [f"Method: {method}. The main settings:", f"| setting | value |\n|---|---|\n{rows}"]
    if facts.command is not None:
        where = "start where the files of prompts and rewards that it names are"
        parts += [f"Run again, with `config.yaml` of this folder; {where}:", _fenced(facts.command, "bash")]
    if config is not None:
        title = "config.yaml: the settings of this run; all others have their defaults"
        parts += [f"<details><summary>{title}</summary>", _fenced(config, "yaml"), "</details>"]
    parts += [f"Versions: {', '.join(f'{name} {number}' for name, number in facts.versions.items())}."]
    return "\n\n".join(parts)


def _licence(facts: CardFacts) -> str:
    base = f"that of {_code(facts.base_model)}" if facts.base_model else "that of the base model"
    return (
        f"Nobody has named the licence of these weights yet; {base} binds them in any case. Who publishes them can "
        "name it by `flowrl card FOLDER --license NAME`."
    )


def _citations(facts: CardFacts) -> str:
    """BibTeX of the method's paper and of this library."""
    entries = []
    if facts.paper is not None:
        number, authors = facts.paper["id"], facts.paper.get("authors")
        lines = {"title": facts.paper["title"]} | ({"author": authors} if authors else {})
        lines |= {"year": f"20{number[:2]}", "eprint": number, "archivePrefix": "arXiv"}
        entries += [_bibtex("article", f"arxiv{number}", lines | {"journal": f"arXiv preprint arXiv:{number}"})]
    library = {"title": "flowrl-trainers: reward fine-tuning of flow-matching image models"}
    library |= {"author": "{The flowrl-trainers authors}", "version": facts.versions["flowrl-trainers"]}
    entries += [_bibtex("software", "flowrl_trainers", library)]
    return _fenced("\n\n".join(entries), "bibtex")


def _bibtex(kind: str, key: str, lines: dict[str, str]) -> str:
    body = ",\n".join(f"  {name} = {{{' '.join(value.split())}}}" for name, value in lines.items())
    return f"@{kind}{{{key},\n{body}\n}}"


def _fenced(text: str, language: str) -> str:
    """A block of code, in a fence that is longer than any in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"{fence}{language}\n{text.strip()}\n{fence}"
