"""`flowrl evaluate`: adapters beside their base model, on the same prompts and seeds."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from diffusers.loaders import PeftAdapterMixin
from trl import TrlParser

from ..metrics import signs_of_over_optimisation, standard_error_of_change
from ..pipelines import FlowPipeline
from ..rewards import Reward, as_rewards
from ..run_folder import sheet_of
from ..sampling.conditioning import ConditioningCache
from ..sampling.evaluator import Evaluator, ode_sampler
from ..sampling.pictures import Pictures
from ..trainers.base_trainer import SETTINGS
from ..trainers.input_checks import check_dataset
from .arguments import wrong_arguments
from .evaluate_arguments import EvaluateArguments
from .run import load_model, load_prompts, named_reward

SHOWN = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTEXT = {"trainer_state": None, "log_metric": lambda name, value: None, "log_extra": lambda name, values: None}
ADAPTER = "measured"  # a row's label may hold a dot, an adapter's name may not


def evaluate(arguments: list[str]) -> None:
    """Draw, score, print the table and write the files. Raises `ValueError` for wrong arguments."""
    told = _parse(arguments)
    if min(told.pictures_per_prompt, told.batch_size, told.num_inference_steps) < 1:
        raise ValueError("`pictures_per_prompt`, `batch_size` and `num_inference_steps` must be at least 1.")
    labels = [Path(name).name or Path(name).resolve().name for name in told.adapter]
    if len(set(labels)) < len(labels):  # as with run-a/checkpoint-100 and run-b/checkpoint-100
        labels = told.adapter
    if len({"base", *labels}) <= len(labels):
        raise ValueError(
            f"`adapter` has two of the same name, or one called 'base' ({', '.join(labels)}): rename a folder, so that rows can be "
            "told apart."
        )
    unknown = set(told.trained) - set(told.rewards)
    if unknown:
        raise ValueError(f"`trained` names {', '.join(sorted(unknown))}, which `rewards` does not: add it there.")
    rewards = as_rewards([named_reward(name) for name in told.rewards], "rewards")
    called = {
        name: reward.name for name, reward in zip(told.rewards, rewards, strict=True)
    }  # `module.function` is called `function`
    rows, scores, pictures = _rows(told, labels, rewards)
    if not PartialState().is_main_process:
        return
    folder = Path(told.out)
    folder.mkdir(parents=True, exist_ok=True)
    table = _table(rows, told)
    (folder / "table.md").write_text(table + "\n")
    (folder / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
    sheet, _ = sheet_of(pictures)
    sheet.save(folder / "pictures.png")
    print(f"\n{table}\n")
    for label in labels:
        trained = {called[name]: 1.0 for name in told.trained}
        judges = [name for name in called.values() if name not in trained]
        errors = {
            name: standard_error_of_change(before, scores[label][name]) for name, before in scores["base"].items()
        }
        signs = signs_of_over_optimisation(rows["base"], rows[label], trained, judges, errors)
        if signs:
            print(f"{label}: the trained reward rose, but {'; '.join(signs)}: it may have been hacked.")
    print(f"table.md, table.json and pictures.png are in {folder}/.")


def _parse(arguments: list[str]) -> EvaluateArguments:
    usage = "flowrl evaluate --model M --adapter A ... --rewards R ... [--field value ...]"
    parser = TrlParser([EvaluateArguments], prog="flowrl evaluate", usage=usage, allow_abbrev=False)
    with wrong_arguments():
        (told,) = parser.parse_args_and_config(arguments)
    for name in ("adapter", "rewards", "trained"):  # a single name in YAML is a string
        if isinstance(getattr(told, name), str):
            setattr(told, name, [getattr(told, name)])
    if told.dtype not in DTYPES:
        raise ValueError(f"`dtype` is {told.dtype!r}: choose {', '.join(DTYPES)}.")
    return told


def _rows(
    told: EvaluateArguments, labels: list[str], rewards: list[Reward]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, torch.Tensor]], dict[str, Pictures]]:
    """The row, all scores and some pictures of the base model and of every adapter."""
    prompts = check_dataset(load_prompts(told.dataset, told.dataset_config, told.split, told.prompt_column), "dataset")
    pipeline = load_model(told.model, DTYPES[told.dtype])
    flow = FlowPipeline.from_pipeline(pipeline, **{name: getattr(told, name) for name in SETTINGS})
    transformer: PeftAdapterMixin | Any = flow.transformer
    for adapter in told.adapter:  # before hours of drawing
        _load_adapter(pipeline, adapter)
        pipeline.delete_adapters(ADAPTER)
    accelerator = Accelerator(cpu=told.use_cpu)
    cache = ConditioningCache(flow)
    cache.encode(list(prompts["prompt"]), accelerator.device, show_progress=True)
    for module in flow.decoders():
        module.to(accelerator.device).float()
    for part in [transformer, *rewards]:
        part.to(accelerator.device)
    dataset = Dataset.from_list([row for _ in range(told.pictures_per_prompt) for row in prompts])
    evaluator = Evaluator(
        flow,
        cache,
        rewards,
        accelerator,
        seed=told.seed,
        batch_size=told.batch_size,
        decode_batch_size=told.decode_batch_size,
    )
    sampler = ode_sampler(flow, flow.sigmas(told.num_inference_steps).to(accelerator.device))
    transformer.eval()
    rows, scores, pictures = {}, {}, {}
    for label, source in [("base", None), *zip(labels, told.adapter, strict=True)]:
        if source is not None:
            _load_adapter(pipeline, source)
        rows[label], scores[label] = evaluator.row(transformer, dataset, sampler, label, CONTEXT)
        pictures[label] = evaluator.pictures(transformer, dataset, sampler, SHOWN, CONTEXT)
        if source is not None:
            pipeline.delete_adapters(ADAPTER)
    return rows, scores, pictures


def _load_adapter(pipeline: Any, source: str) -> None:
    """Raises `ValueError` for what is no adapter of the pipeline's transformer, or of more than that."""
    try:
        pipeline.load_lora_weights(source, adapter_name=ADAPTER)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"The adapter {source!r} cannot be loaded: {error}") from error
    changed = [part for part, names in pipeline.get_list_adapters().items() if ADAPTER in names]
    if changed != ["transformer"]:
        raise ValueError(
            f"The adapter {source!r} changes {' and '.join(changed) or 'no part of this pipeline'}, but what is measured is the "
            "transformer: pass one that changes it alone."
        )


def _table(rows: dict[str, dict[str, float]], told: EvaluateArguments) -> str:
    names = list({name: None for row in rows.values() for name in row})
    lines = ["| model | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for label, row in rows.items():
        lines.append(f"| {label} | " + " | ".join(f"{row[name]:.3f}" if name in row else "" for name in names) + " |")
    guidance = (
        "the pipeline's own guidance scale"
        if told.guidance_scale is None
        else f"guidance scale {told.guidance_scale:g}"
    )
    drawn = f"{told.pictures_per_prompt} pictures of each prompt, the same seeds for all rows"
    return "\n".join([*lines, "", f"{drawn}, {told.num_inference_steps} steps of the ODE, {guidance}."])
