"""`flowrl evaluate`: adapters beside their base model, on the same prompts and seeds."""

import math
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from torch import Tensor

from ..metrics import paired_change, signs_of_over_optimisation
from ..pipelines import FlowPipeline
from ..rewards import Reward, as_rewards
from ..rewards.named import refuse_groupwise
from ..run_folder import sheet_of
from ..run_folder.text_files import write_json, write_text
from ..sampling.conditioning import ConditioningCache
from ..sampling.evaluator import Evaluator, ode_sampler
from ..sampling.flow_model import FlowModel
from ..sampling.pictures import Pictures
from ..sampling.prompt_sources import is_prompt_file
from ..sampling.sharding import asks_for_sharding, refuse_other_sharding
from ..trainers.base_trainer import PIPELINE_SETTINGS
from ..trainers.input_checks import check_columns, check_dataset, writable_folder
from .arguments import beside
from .evaluate_arguments import EvaluateArguments
from .named_reward import named_reward
from .parser import SettingsParser, config_file
from .run import load_model, load_prompts

SHOWN = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTEXT: dict[str, Any] = {
    "trainer_state": None,
    "log_metric": lambda name, value: None,
    "log_extra": lambda name, values: None,
}
ADAPTER = "measured_{}"  # by number: the row's label may hold a dot, and an adapter's name may not


def evaluate(arguments: list[str]) -> None:
    """Draw, score, print the table and write the files. Raises `ValueError` if an argument is unknown or wrong."""
    args = _parse(arguments)
    labels = _labels(args.adapter)
    PartialState(cpu=args.use_cpu)  # which finds the other processes
    refuse_other_sharding()
    unknown = set(args.trained) - set(args.rewards)
    if unknown:
        raise ValueError(f"`trained` names {', '.join(sorted(unknown))}, which `rewards` does not: add it there.")
    split = args.split or ("train" if is_prompt_file(args.dataset) else "held_out")
    prompts = check_dataset(load_prompts(args.dataset, args.dataset_config, split, args.prompt_column), "dataset")
    rewards = as_rewards([named_reward(name) for name in args.rewards], "rewards")
    refuse_groupwise(rewards, "rewards")
    check_columns(rewards, prompts, "dataset")
    folder = writable_folder(args.out, "out")
    # A function given as `module.function` is a reward called `function`.
    called = {name: reward.name for name, reward in zip(args.rewards, rewards, strict=True)}
    rows, scores, pictures = _rows(args, labels, rewards, prompts)
    if not PartialState().is_main_process:
        return
    table = _table(rows, args)
    write_text(folder / "table.md", table + "\n")
    write_json(folder / "table.json", rows)
    sheet, _ = sheet_of(pictures)
    sheet.save(folder / "pictures.png")
    print(f"\n{table}\n")
    trained = {called[name]: 1.0 for name in args.trained}
    judges = [name for name in called.values() if name not in trained]
    for label in labels:
        changes = {name: paired_change(before, scores[label][name]) for name, before in scores["base"].items()}
        signs = signs_of_over_optimisation(rows["base"], rows[label], trained, judges, changes)
        if signs:
            print(f"{label}: the trained reward rose, but {'; '.join(signs)}: it may have been hacked.")
    print(f"table.md, table.json and pictures.png are in {folder}/.")


def _parse(arguments: list[str]) -> EvaluateArguments:
    usage = "flowrl evaluate --model M --adapter A ... --rewards R ... [--field value ...]"
    parser = SettingsParser([EvaluateArguments], prog="flowrl evaluate", usage=usage, allow_abbrev=False)
    (args,) = parser.read(arguments)
    args.dataset = beside(config_file(arguments), args.dataset)
    return args


def _labels(adapters: list[str]) -> list[str]:
    """The names of the rows: the last part of every path, or whole paths if two have the same last part."""
    labels = [Path(name).name or Path(name).resolve().name for name in adapters]
    if len(set(labels)) < len(labels):  # as with run-a/checkpoint-100 and run-b/checkpoint-100
        labels = adapters
    if len({"base", *labels}) <= len(labels):
        raise ValueError(
            f"`adapter` has two of the same name, or one called 'base' ({', '.join(labels)}): rename a folder, so "
            "that rows can be told apart."
        )
    return labels


def _rows(
    args: EvaluateArguments, labels: list[str], rewards: list[Reward], prompts: Dataset
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Tensor]], dict[str, Pictures]]:
    """Measure the base model and every adapter.

    Args:
        args: The settings.
        labels: The names of the adapters' rows.
        rewards: The rewards to measure.
        prompts: The prompts to draw.

    Returns:
        By label, "base" first: the row, the scores (N,) of every reward, and some pictures.
    """
    for adapter in args.adapter:
        _refuse_no_adapter(adapter)
    pipeline = load_model(args.model, DTYPES[args.dtype])
    flow = FlowPipeline.from_pipeline(pipeline, **{name: getattr(args, name) for name in PIPELINE_SETTINGS})
    # All of them at the start: one that does not fit is found before hours of drawing, and none can be added to a
    # network once it is shared.
    names = [_load_adapter(pipeline, adapter, number) for number, adapter in enumerate(args.adapter)]
    accelerator = Accelerator(cpu=args.use_cpu)
    cache = ready_to_draw(flow, list(prompts["prompt"]), accelerator.device)
    model = FlowModel(flow, has_adapter=True).requires_grad_(False).eval()
    if asks_for_sharding():
        model.shard(accelerator)
    else:
        model.to(accelerator.device)
    for reward in rewards:
        reward.to(accelerator.device)
    dataset = Dataset.from_list([row for _ in range(args.pictures_per_prompt) for row in prompts])
    evaluator = Evaluator(
        flow,
        cache,
        rewards,
        accelerator,
        seed=args.seed,
        batch_size=args.batch_size,
        decode_batch_size=args.decode_batch_size,
        show_progress=sys.stderr.isatty(),
    )
    sampler = ode_sampler(flow.sigmas(args.num_inference_steps).to(accelerator.device))
    transformer: Any = flow.transformer  # a `PeftAdapterMixin`
    rows, scores, pictures = {}, {}, {}
    for label, name in [("base", None), *zip(labels, names, strict=True)]:
        if name is not None:
            transformer.set_adapter(name)
        with model.reference() if name is None else nullcontext():
            rows[label], scores[label] = evaluator.row(model, dataset, sampler, label, CONTEXT)
            pictures[label] = evaluator.pictures(model, dataset, sampler, SHOWN, CONTEXT)
    return rows, scores, pictures


def ready_to_draw(flow: FlowPipeline, prompts: list[str], device: torch.device) -> ConditioningCache:
    """Encode prompts, and move the decoders to the device, where they compute in float32."""
    cache = ConditioningCache(flow)
    cache.encode(prompts, device, show_progress=sys.stderr.isatty())
    for module in flow.decoders():
        module.to(device).float()
    return cache


def _refuse_no_adapter(source: str) -> None:
    """Raises `ValueError`, before the model is loaded, for what is no Hub id and no folder or file with weights."""
    path = Path(source)
    if not path.exists() and source.count("/") != 1:
        raise ValueError(
            f"The adapter {source!r} cannot be loaded: there is no such folder, and an id of the Hub reads "
            "'user/name'; name another."
        )
    if path.is_dir() and not any(file.suffix in (".safetensors", ".bin") for file in path.iterdir()):
        raise ValueError(
            f"The adapter {source!r} cannot be loaded: the folder holds no weights of a LoRA; pass that of a run "
            "which trained one, or one of its checkpoints."
        )


def _load_adapter(pipeline: Any, source: str, number: int) -> str:
    """Load an adapter, and return its name; raises `ValueError` unless it changes the transformer and nothing else."""
    name = ADAPTER.format(number)
    try:
        with warnings.catch_warnings():  # of peft: there are several adapters, and one is on at a time
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            pipeline.load_lora_weights(source, adapter_name=name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"The adapter {source!r} cannot be loaded: {error}") from error
    changed = [part for part, names in pipeline.get_list_adapters().items() if name in names]
    if changed != ["transformer"]:
        raise ValueError(
            f"The adapter {source!r} changes {' and '.join(changed) or 'no part of this pipeline'}, but what is "
            "measured is the transformer: pass one that changes it alone."
        )
    return name


def _table(rows: dict[str, dict[str, float]], args: EvaluateArguments) -> str:
    """The rows in Markdown, and how their pictures were drawn."""
    names = list({name: None for row in rows.values() for name in row})
    lines = ["| model | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for label, row in rows.items():
        cells = ["" if name not in row else "-" if math.isnan(row[name]) else f"{row[name]:.3f}" for name in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    guidance = (
        "the pipeline's own guidance scale"
        if args.guidance_scale is None
        else f"guidance scale {args.guidance_scale:g}"
    )
    drawn = f"{args.pictures_per_prompt} pictures of each prompt, the same seeds for all rows"
    return "\n".join([*lines, "", f"{drawn}, {args.num_inference_steps} steps of the ODE, {guidance}."])
