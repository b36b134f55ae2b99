"""The study with published weights: a method tunes a model for one task, and stands beside published numbers.

    python benchmarks/published.py --model stabilityai/stable-diffusion-3.5-medium --task pickscore
        --method diffusion_nft --prompts train.txt --held_out test.txt
    python benchmarks/published.py --table          # write the page's table from what has been run

The anchors' prompts are the files of the folder `dataset/` of github.com/yifan123/flow_grpo.

Runs `flowrl METHOD` with the settings of `examples/configs/` for the model, the reward of the task, and what `--set`
changes; on a GPU, hours. Every row says whether guidance was on: the base of GenEval is .24 without and .63 with it.
Evaluation is by the ODE on the held-out prompts, whatever the method trained. The task 'geneval' asks a model of
vision and language (`VLM_URL`, `VLM_MODEL`) in place of a detector, so that its numbers are not those of the anchors'
judge: the table says so. Results are kept in one file; what was not run is marked "not run yet".
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import machine

from flowrl_trainers.cli.arguments import TRAINERS, parse
from flowrl_trainers.cli.run import make_trainer
from flowrl_trainers.run_folder.text_files import write_json, write_text

ROOT = Path(__file__).parent.parent
MODEL = "stabilityai/stable-diffusion-3.5-medium"
NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Task:
    """What is tuned for, and what others reached with Stable Diffusion 3.5 Medium at 512 pixels.

    Attributes:
        reward: Its name among the rewards.
        judges: The rewards that training never sees.
        anchors: Published final values of runs that were trained for it, by method; None for one whose name the source
            does not give.
        base: The base model's, without and with guidance; None where it is not known.
        note: How our number differs from theirs.
    """

    reward: str
    judges: tuple[str, ...]
    anchors: tuple[tuple[str | None, float], ...]
    base: tuple[float | None, float | None]
    note: str


TASKS = {
    "geneval": Task(
        "geneval_judge",
        ("pickscore", "clip_score"),
        (("Flow-GRPO", 0.95), ("DiffusionNFT", 0.95), ("ELBO-PG", 0.96), ("DGPO", 0.97)),
        (0.24, 0.63),
        "The anchors are scored by the detector of GenEval, our runs by a vision-language model.",
    ),
    "ocr": Task(
        "ocr",
        ("pickscore", "clip_score"),
        ((None, 0.92), (None, 0.93), (None, 0.94), (None, 0.96)),
        (None, None),
        "The anchors are read by PaddleOCR, our runs by RapidOCR.",
    ),
    "pickscore": Task(
        "pickscore",
        ("clip_score", "aesthetic"),
        ((None, 23.50), (None, 23.61), (None, 23.68), (None, 23.89)),
        (None, None),
        "The same checkpoint scores both.",
    ),
}


def guidance_of(scale: float | None) -> str:
    """The guidance regime in words; None is the pipeline's own scale."""
    if scale is None:
        return "guidance of the pipeline's own scale"
    return "no guidance" if scale <= 1 else f"guidance scale {scale:g}"


def settings_of(args: Any) -> dict[str, Any]:
    """What `flowrl` is told: the config of the model and the method, and what the arguments change.

    Raises:
        ValueError: If there is no config of that model and method.
    """
    short = args.config_of.split("/")[-1].lower().replace("-", "_").replace(".", "_")
    file = ROOT / "examples" / "configs" / f"{args.method}_{short}.yaml"
    if not file.exists():
        known = sorted(path.stem.removeprefix(f"{args.method}_") for path in file.parent.glob(f"{args.method}_*.yaml"))
        raise ValueError(f"`--config_of` ({args.config_of}) has no {file.name} in examples/configs: take {known}.")
    task = TASKS[args.task]
    told = yaml.safe_load(file.read_text(encoding="utf-8"))
    told |= {"model": args.model, "dataset": str(args.prompts), "eval_dataset": str(args.held_out), "seed": args.seed}
    told |= {"reward_funcs": [args.reward or task.reward], "eval_reward_funcs": list(args.judges or task.judges)}
    return told | {"output_dir": str(args.folder), "report_to": "none"} | dict(args.set)


def run(args: Any) -> dict[str, Any]:
    """Train and evaluate; returns the record of the run.

    Args:
        args: The arguments of the command.
    """
    settings = settings_of(args)
    told, config = parse(args.method, TRAINERS[args.method].config_class, [], settings)
    trainer = make_trainer(args.method, told, config)
    trainer.train()
    trainer.save_model(_internal_call=True)
    trainer.evaluate()
    trainer.save_model()
    rows = trainer.rows
    ode = "tuned_ode" in rows
    return {
        "model": args.model,
        "task": args.task,
        "method": args.method,
        "seed": args.seed,
        "reward": trainer.rewards[0].name,
        "guidance": guidance_of(config.guidance_scale),
        "updates": trainer.state.global_step,
        "pictures": len(trainer.eval_dataset),
        "seconds": trainer.seconds_so_far(),
        "machine": machine(),
        "torch": torch.__version__,
        "base": rows["base_ode" if ode else "base"],
        "tuned": rows["tuned_ode" if ode else "tuned"],
        "settings": settings,
    }


def table(runs: list[Mapping[str, Any]]) -> str:
    """The anchors and our runs, in Markdown; a method that was not run has a row that says so."""
    lines = []
    for name, task in TASKS.items():
        bases = zip(task.base, ("without", "with"), strict=True)
        known = [f"{value:g} {regime} guidance" for value, regime in bases if value is not None]
        base = f"the published base is {' and '.join(known)}" if known else "our source names no base"
        lines += [
            f"**{name}**: Stable Diffusion 3.5 Medium, 512 pixels; {base}. {task.note}",
            "",
            "| run | guidance | base | tuned | updates | machine |",
            "|---|---|---:|---:|---:|---|",
        ]
        lines += [
            f"| published, {method or 'method not named in our source'} | see its paper | | {value:g} | | |"
            for method, value in task.anchors
        ]
        for method in TRAINERS:
            found = [r for r in runs if (r["task"], r["method"]) == (name, method)]
            for r in found:
                before, after = (r[row][f"reward/{r['reward']}"] for row in ("base", "tuned"))
                lines.append(
                    f"| `{method}`, {r['model']}, seed {r['seed']} | {r['guidance']} | {before:.3f} | {after:.3f} "
                    f"| {r['updates']} | {r['machine']} |"
                )
            if not found:
                lines.append(f"| `{method}` | | | {NOT_RUN} | | |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def pair(text: str) -> tuple[str, Any]:
    """A setting and its value, of 'name=value', read as YAML."""
    name, _, value = text.partition("=")
    return name, yaml.safe_load(value)


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default=MODEL, help="A Hub id or a folder.")
    found.add_argument("--config_of", default=MODEL, help="The model whose config in examples/configs is taken.")
    found.add_argument("--task", choices=TASKS, help="What is tuned for.")
    found.add_argument("--method", choices=TRAINERS, default="diffusion_nft", help="The trainer.")
    found.add_argument("--prompts", type=Path, help="Those of training, as `flowrl --dataset` takes them.")
    found.add_argument("--held_out", type=Path, help="Those of evaluation.")
    found.add_argument("--seed", type=int, default=0, help="The seed.")
    found.add_argument("--reward", help="In place of the task's, such as 'module.function' that asks a server.")
    found.add_argument("--judges", nargs="+", help="In place of the task's.")
    found.add_argument("--set", nargs="*", type=pair, default=[], help="Further settings, as name=value.")
    found.add_argument("--folder", type=Path, default=Path("published"), help="The folder of the run.")
    results = ROOT / "benchmarks" / "results" / "published.json"
    found.add_argument("--results", type=Path, default=results, help="The results file.")
    out = ROOT / "docs" / "tables" / "published.md"
    found.add_argument("--out", type=Path, default=out, help="The table.")
    found.add_argument("--table", action="store_true", help="Write the table alone.")
    return found


def main() -> None:
    """Run what was asked for, add it to the results file, and write the table."""
    args = parser().parse_args()
    for name in ("task", "prompts", "held_out"):
        if vars(args)[name] is None and not args.table:
            raise ValueError(f"`--{name}` is missing, which a run needs: name it, or pass `--table`.")
    runs = json.loads(args.results.read_text(encoding="utf-8"))["runs"] if args.results.exists() else []
    if not args.table:
        runs.append(run(args))
        args.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.results, {"runs": runs})
    write_text(args.out, table(runs))


if __name__ == "__main__":
    main()
