"""`flowrl demo`: tune the embedded pipeline, and show the pictures before and after."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from ..run_folder import sheet_of
from ..run_folder.text_files import write_json
from ..shapes import prompts
from ..trainers import FlowRLTrainer
from .arguments import TRAINERS, parse
from .convergence import FREE, Rise, judge, recorded_rises, refuse_other_settings
from .run import make_trainer

SHARED = {
    "model": "shapes",
    "dataset": "shapes",
    "reward_funcs": ["shapes"],
    "eval_reward_funcs": ["checker"],
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": [
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    ],
    "output_dir": "flowrl-demo",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 55,
    "learning_rate": 1e-3,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
    "logging_steps": 5,
    "save_strategy": "no",
    "report_to": "none",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "adjoint_matching": {
        "max_steps": 60,
        "per_device_train_batch_size": 24,
        "adjoint_steps": 20,
        "control_to_velocity_ratio": 0.3,
        "reward_gradient_clip_quantile": 0.9,
        "adjoint_clip_quantile": 0.9,  # over all 20 steps a few grow without bound; see docs/adjoint_matching.md
    },
    "vgg_flow": {
        "max_steps": 40,
        "per_device_train_batch_size": 24,
        "value_network_learning_rate": 1e-4,
        "finite_difference_step": 0.05,  # with the default, the value network does not settle; see docs/vgg_flow.md
        "eta_schedule": "linear",
        "control_to_velocity_ratio": 1.0,
    },
    "ac_flow": {
        "max_steps": 50,
        "num_inference_steps": 8,
        "per_device_train_batch_size": 128,
        "timestep_sampling": "noisy",
        "target": "fixed",
        "advantage_clip": 2.0,
    },
    "diffusion_nft": {
        "max_steps": 50,
        "num_inference_steps": 8,
        "per_device_train_batch_size": 128,
    },
    "tafs_grpo": {
        "max_steps": 60,
        "per_device_train_batch_size": 192,
        "num_generations": 16,
        "beta": 0.02,
    },
}
PICTURES_PER_PROMPT = 4
SHOWN = 8


def demo(arguments: list[str]) -> None:
    """Tune, evaluate with and without the adapter, and write the files; with `--check`, judge how much was learned.

    Raises `ValueError` if an argument is unknown or wrong, and `RuntimeError` if a check fails.
    """
    method, arguments = _take_method(arguments)
    check, arguments = "--check" in arguments, [part for part in arguments if part != "--check"]
    if check:
        refuse_other_settings(arguments)
    args, config = parse("demo", TRAINERS[method].config_class, arguments, SHARED | METHODS[method])
    if config.resume_from_checkpoint:
        raise ValueError(
            f"`resume_from_checkpoint` ({config.resume_from_checkpoint!r}) has no effect in a demo, which starts "
            f"anew: leave it out, or give the demo's settings to `flowrl {method}`."
        )
    trainer = make_trainer(method, args, config)
    held_out = list(prompts("held_out")["prompt"])
    trainer.train()
    trainer.save_model(_internal_call=True)  # before anything else can fail
    if trainer.is_world_process_zero():
        scale = config.guidance_scale
        sampling = "no guidance" if scale is not None and scale <= 1 else f"guidance scale {scale}"
        print(f"\n{len(held_out) * PICTURES_PER_PROMPT} pictures of held-out prompts, same seeds, {sampling}:\n")
    trainer.evaluate(Dataset.from_dict({"prompt": held_out * PICTURES_PER_PROMPT}))
    if trainer.is_world_process_zero():
        folder = trainer.run_folder.path
        _draw_before_after(trainer, folder)
        print("\nseconds: " + ", ".join(f"{phase} {value:.0f}" for phase, value in trainer.seconds.items()))
        print(f"Adapter, card and pictures are in {folder}/: look at README.md and before_after.png.")
    trainer.save_model()
    if check and trainer.is_world_process_zero():
        print(judge(method, rise_of(trainer.rows), recorded_rises(method, checked_settings(method))))


def checked_settings(method: str) -> dict[str, Any]:
    """The settings of a method's demo on which what it learns depends."""
    return {name: value for name, value in (SHARED | METHODS[method]).items() if name not in FREE}


def rise_of(rows: dict[str, dict[str, float]]) -> Rise:
    """What a demo did to the checker's accuracy, by its rows of base and tuned model."""
    pictures = PICTURES_PER_PROMPT * len(prompts("held_out"))
    return Rise(rows["base"]["checker_accuracy"], rows["tuned"]["checker_accuracy"], pictures)


def _take_method(arguments: list[str]) -> tuple[str, list[str]]:
    """Split `--trainer METHOD` off the arguments."""
    if "--trainer" not in arguments:
        return "adjoint_matching", arguments
    at = arguments.index("--trainer")
    method = arguments[at + 1] if at + 1 < len(arguments) else ""
    if method not in METHODS:
        raise ValueError(f"`--trainer` is {method!r}: choose {', '.join(METHODS)}.")
    return method, arguments[:at] + arguments[at + 2 :]


def _draw_before_after(trainer: FlowRLTrainer, folder: Path) -> None:
    """Draw evenly spaced held-out prompts, and write their seeds and boxes too, from which they can be redrawn."""
    base, tuned = trainer.pictures(prompts("held_out"), SHOWN)
    sheet, boxes = sheet_of({"base": base, "tuned": tuned})
    sheet.save(folder / "before_after.png")
    facts = {"prompts": tuned.prompts, "seeds": tuned.seeds, "tuned_boxes": boxes["tuned"]}
    write_json(folder / "before_after.json", facts)
