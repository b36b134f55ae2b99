"""What the tests of trainers share: the trainers with short settings, a reward with a gradient, a first
rollout.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn

import flowrl_trainers
from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer, FlowPipeline, FlowRLTrainer
from flowrl_trainers.cost.architectures import Architecture
from flowrl_trainers.rewards import differentiable
from flowrl_trainers.sampling.buffer import MicroBatch
from flowrl_trainers.sampling.prompt_groups import Example
from flowrl_trainers.trainers.adjoint_matching_trainer import AdjointMatchingRecord

from .tiny import tiny_sd3

# Every trainer with the settings that make its run short; tests that hold for each are parametrized by these names.
TRAINERS: dict[str, dict[str, Any]] = {
    "AdjointMatchingTrainer": {"adjoint_steps": 2, "control_to_velocity_ratio": 0.3},
    "VGGFlowTrainer": {"timestep_bins": 2, "control_to_velocity_ratio": 0.3},
    "ACFlowTrainer": {"num_generations": 2, "critic": "convolutional", "critic_warmup_max_steps": 1},
    "DiffusionNFTTrainer": {"num_generations": 2, "timestep_bins": 2, "old_policy_ramp": None},
    "TAFSGRPOTrainer": {"num_generations": 2},
}
FIXED_TARGET = "ACFlowTrainer, fixed target"
# AC-Flow in its other form too, for tests of what a form could break.
FORMS = TRAINERS | {
    FIXED_TARGET: {
        "num_generations": 2,
        "target": "fixed",
        "critic": "reward_of_estimate",
        "rollout_policy": "old",
        "old_policy_decay": 0.5,
        "timestep_bins": 2,
    }
}
CAPTIONS = ["a red circle", "a blue square", "a green cross", "a red circle and a blue square"]
LORA = LoraConfig(r=4, lora_alpha=8)


@differentiable
def redness(images, prompts, **columns):
    red, green, blue = images.unbind(dim=1)
    return (red - (green + blue) / 2).mean(dim=(1, 2))


def constant(images, prompts, **columns):
    return 0 * images.sum(dim=(1, 2, 3))


def seeds(count: int) -> list[torch.Generator]:
    """A generator for each picture, the same at every call."""
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


# ---- trainers of a tiny pipeline ---------------------------------------------------------------------------------


def trainer_of(form: str) -> str:
    """The name of the class of a key of `FORMS`."""
    return form.partition(",")[0]


def make_trainer(
    name: str,
    folder: Path,
    pipeline=None,
    reward=redness,
    dataset=None,
    eval_dataset=None,
    lora: bool = True,
    own_critic: nn.Module | None = None,
    **settings,
) -> FlowRLTrainer:
    """Any of `FORMS`, for two updates of four images in three steps; with a critic, AC-Flow that is given it."""
    trainer = getattr(flowrl_trainers, trainer_of(name))
    defaults = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, num_inference_steps=3, guidance_scale=1.0,
        max_sequence_length=8, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    return trainer(
        tiny_sd3() if pipeline is None else pipeline,
        reward,
        trainer.config_class(**(defaults | FORMS[name] | settings)),
        Dataset.from_dict({"prompt": CAPTIONS}) if dataset is None else dataset,
        eval_dataset,
        peft_config=LoraConfig(r=2, lora_alpha=4) if lora else None,
        **({} if own_critic is None else {"critic": own_critic}),
    )


def adjoint_matching_config(folder: Path, **settings) -> AdjointMatchingConfig:
    defaults = dict(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, num_inference_steps=4, adjoint_steps=3,
        guidance_scale=1.0, max_sequence_length=8, reward_scale=50.0, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return AdjointMatchingConfig(**(defaults | settings))


def adjoint_matching(
    folder: Path, pipeline, reward=redness, lora: LoraConfig | None = LORA, dataset=None, **settings
) -> AdjointMatchingTrainer:
    """Adjoint matching of two images in four steps: the trainer on which what all trainers share is tested."""
    dataset = Dataset.from_dict({"prompt": CAPTIONS}) if dataset is None else dataset
    extra = {
        name: settings.pop(name) for name in ("eval_dataset", "eval_reward_funcs", "callbacks") if name in settings
    }
    config = adjoint_matching_config(folder, **settings)
    return AdjointMatchingTrainer(pipeline, reward, config, dataset, peft_config=lora, **extra)


def architecture_of(pipeline: Any) -> Architecture:
    """What `flowrl estimate` knows of a pipeline: its configuration alone."""
    parts = {name: dict(pipeline.components[name].config) for name in ("transformer", "vae", "scheduler")}
    for name, config in parts.items():
        config["_class_name"] = type(pipeline.components[name]).__name__
    settings = {name: value for name, value in pipeline.config.items() if name == "is_distilled"}
    return Architecture("tiny", type(pipeline).__name__, settings, parts)


# ---- a look inside -----------------------------------------------------------------------------------------------


def first_examples(t: FlowRLTrainer) -> list[Example]:
    """What the first micro-step asks for."""
    return next(iter(t.get_train_dataloader()))


def first_rollout(t: FlowRLTrainer) -> tuple[list[Example], list[MicroBatch]]:
    examples = first_examples(t)
    return examples, t.make_rollout(examples)


def targets(batch: MicroBatch[AdjointMatchingRecord]) -> Tensor:
    """The target velocities (B, K, ...) of adjoint matching on the ODE, for a quadratic cost of weight 1."""
    return batch.record.base_velocities - batch.record.adjoints


def update_rows(t: FlowRLTrainer) -> list[dict[str, float]]:
    """The rows of the log that tell of updates, not of evaluations or of the whole run."""
    return [row for row in t.state.log_history if "loss" in row]


# ---- an update of any family -------------------------------------------------------------------------------------


def base_weights(transformer: nn.Module) -> dict[str, Tensor]:
    """The weights without the adapter, under their names before it came."""
    return {n.replace(".base_layer", ""): v for n, v in transformer.state_dict().items() if "lora_" not in n}


def code_block(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)
    return code


def check_card(t: FlowRLTrainer, pipeline: Any) -> None:
    """The code of the card that a run left draws, from the saved pipeline, what the trainer's own sampler draws.

    Where the sampler draws noise, every draw is 1 in both: they share no generator.

    Args:
        t: whose `output_dir` holds card and adapter.
        pipeline: the base model, to be saved and loaded.
    """
    folder = Path(t.args.output_dir)
    pipeline.save_pretrained(folder / "base")
    code = code_block((folder / "README.md").read_text(encoding="utf-8"))
    for old, new in (
        ('"path/to/the/base/model"', repr(str(folder / "base"))),
        ('load_lora_weights(".")', f"load_lora_weights({str(folder)!r})"),
        (").images[0]", ", generator=generator, output_type='pt').images[0]"),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    (seed,), (generator,), scope = seeds(1), seeds(1), {}
    sampler, latents = t.evaluation_samplers()[""], t.flow.initial_latents(1, [generator])
    with (
        torch.no_grad(),
        patch("diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor", lambda s, **k: torch.ones(s)),
        patch("flowrl_trainers.trainers.tafs_grpo_trainer.noise", lambda g, s, device: torch.ones(len(g), *s)),
    ):
        exec(code, {"generator": seed}, scope)
        conditioning = t.flow.encode_prompts([t.flow.example_prompt])
        (ours,) = t.flow.images(sampler(t.model, latents, conditioning, [generator]))
    torch.testing.assert_close(scope["image"], ours, atol=1e-4, rtol=0)


def check_update(
    folder: Path,
    trainer: str,
    make_pipeline: Callable[[], Any],
    draw: Callable[[Any, FlowPipeline], Tensor],
    prompts: list[str],
    settings: dict[str, Any],
) -> None:
    """One update changes the adapter alone, bit for bit, and the stock loader draws what was learned, within 1e-4, as
    does the code of the card.

    Args:
        folder: where the run is saved.
        trainer: the name of its class.
        make_pipeline: a pipeline, the same at every call.
        draw: the stock pictures of the first two of four prompts, in four steps from `seeds(2)`.
        prompts: the four prompts.
        settings: of the config, beside the short ones.
    """
    pipeline = make_pipeline()
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    cls = getattr(flowrl_trainers, trainer)
    config = cls.config_class(
        **{
            "output_dir": str(folder), "max_steps": 2 if trainer == "ACFlowTrainer" else 1,
            "per_device_train_batch_size": 4, "learning_rate": 0.05, "save_strategy": "no", "report_to": "none",
            # CogView4's stock pipeline takes times in whole thousandths, which quarters are and thirds are not.
            "num_inference_steps": 4 if trainer == "TAFSGRPOTrainer" else 3, "use_cpu": True, "disable_tqdm": True,
        } | TRAINERS[trainer] | settings
    )  # fmt: skip
    t = cls(
        pipeline, redness, config, Dataset.from_dict({"prompt": prompts}), peft_config=LoraConfig(r=2, lora_alpha=6)
    )
    t.train()
    after = base_weights(t.flow.transformer)
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert any(p.abs().max() > 0 for name, p in t.model.named_parameters() if "lora_B" in name)
    t.save_model()
    fresh = make_pipeline()
    check_card(t, fresh)
    base = draw(fresh, t.flow)
    fresh.load_lora_weights(str(folder))
    loaded = draw(fresh, t.flow)
    assert (loaded - base).abs().max() > 1e-4
    torch.testing.assert_close(loaded, t.flow.sample(prompts[:2], 4, generator=seeds(2)), atol=1e-4, rtol=0)
