"""Whether two checkouts train alike, to the last bit: for changes that should alter nothing.

    python benchmarks/compare_checkouts.py OLD_CHECKOUT [NEW_CHECKOUT] [--cases am_lean vgg ...] [--work FOLDER]

Each case is a run of three updates on shapes with a fixed seed, evaluated, saved after the first update in the middle
of a rollout, resumed from there, and saved again. Compared are the adapter, every tensor of every checkpoint, every
logged number but the seconds, and the pictures. `RENAMED` says what the newer checkout calls otherwise.
A run takes about half a minute on one core.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

SHARED = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 2,
    "steps_per_generation": 4, "learning_rate": 0.01, "max_sequence_length": 8, "num_inference_steps": 4,
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "steps",
    "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "log_images": 2, "per_device_eval_batch_size": 4,
    "guidance_scale": 1.0,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "am_lean": (
        "AdjointMatching",
        {"adjoint_steps": 3, "adjoint_clip_quantile": 0.8, "reward_gradient_clip_quantile": 0.9},
    ),
    "am_full": (
        "AdjointMatching",
        {
            "adjoint_steps": 2, "adjoint": "full", "control_cost_order": "2+4", "guidance_scale": 3.0,
            "ema_decay": 0.9,
        },
    ),
    "am_hamiltonian": (
        "AdjointMatching",
        {"adjoint_steps": 2, "adjoint": "current", "loss_type": "hamiltonian", "reward_scale": 2.0},
    ),
    "am_memoryless": ("AdjointMatching", {"adjoint_steps": 8, "num_inference_steps": 8, "dynamics": "memoryless"}),
    "vgg": ("VGGFlow", {"timestep_bins": 2, "ema_decay": 0.9}),
    "vgg_none": (
        "VGGFlow",
        {"timestep_bins": 3, "value_network": "none", "guidance_scale": 3.0, "decode_batch_size": 3},
    ),
    "ac": (
        "ACFlow",
        {"critic": "convolutional", "critic_warmup_max_steps": 1, "critic_steps": 2, "steps_per_generation": 2},
    ),
    "ac_window": (
        "ACFlow",
        {
            "critic": "convolutional", "critic_warmup_max_steps": 0, "timestep_sampling": "pipeline",
            "weighting": "linear", "normalize_weights": False,
        },
    ),
    "ac_none": (
        "ACFlow",
        {
            "critic": "none", "wasserstein_coefficient": 0.0, "timestep_sampling": "logit_normal",
            "guidance_scale": 3.0,
        },
    ),
    "tafs": ("TAFSGRPO", {"beta": 0.02, "num_iterations": 2}),
    "tafs_flow": (
        "TAFSGRPO",
        {
            "kernel": "flow_grpo", "eta": 0.7, "credit_rule": "gain", "log_prob_form": "gaussian", "epsilon": 1e-4,
            "share_initial_noise": False, "beta": 0.0,
        },
    ),
}  # fmt: skip

TIMES = re.compile(r"seconds|runtime|per_second|total_flos")
SAID = re.compile(r"/identity/|/format$")  # of settings, which a newer checkout may have more of
# Of checkpoints before the records of November 2026, as (pattern, what it is called since; None: nothing reads it).
STATE, BATCH = r"loop_state_0\.pt/", r"training_state_0.pt/buffer/batches/\1/"
RENAMED: list[tuple[str, str | None]] = [
    (STATE + r"replayed/.*", None),  # the identity of a run is derived since
    (STATE + r"micro_step$", "training_state_0.pt/buffer/step"),
    (STATE + r"window/(\d+)/(?:tensors/)(?:latents)$", BATCH + "record/states"),
    (STATE + r"window/(\d+)/tensors/(?:velocities|anchors)$", BATCH + "record/base_velocities"),
    (STATE + r"window/(\d+)/tensors/pulls$", BATCH + "record/reward_terms"),
    (STATE + r"window/(\d+)/tensors/final$", BATCH + "record/consistency/final"),
    (STATE + r"window/(\d+)/tensors/shifted_latents$", BATCH + "record/consistency/states"),
    (STATE + r"window/(\d+)/tensors/shifted_sigmas$", BATCH + "record/consistency/sigmas"),
    (STATE + r"window/(\d+)/tensors/shifted_pulls$", BATCH + "record/consistency/reward_terms"),
    (STATE + r"window/(\d+)/tensors/inverse_steps$", BATCH + "record/consistency/inverse_steps"),
    (STATE + r"window/(\d+)/tensors/base_terms$", BATCH + "record/consistency/targets"),
    (STATE + r"window/(\d+)/tensors/", BATCH + "record/"),
    (STATE + r"window/(\d+)/", BATCH),
    (STATE + "ema", "training_state_0.pt/average"),
    (STATE + "algorithm/warmup/warming_up", "training_state_0.pt/algorithm/warmup/running"),
    (STATE + "algorithm/warmup/warmup_rollouts", "training_state_0.pt/algorithm/warmup/rollouts"),
    (STATE + "algorithm/warmup/best_explained", "training_state_0.pt/algorithm/warmup/best"),
    (STATE + "algorithm/warmup/rollouts_without_rise", "training_state_0.pt/algorithm/warmup/without_rise"),
    (STATE, "training_state_0.pt/"),
    (r"trained_parameters\.safetensors/head\.", "trained_parameters.safetensors/value_network."),
]


def run_case(case: str, folder: Path) -> None:
    """Train in this process, with the package that its path finds, and keep what the run left in `FOLDER.pt`."""
    from datasets import Dataset
    from peft import LoraConfig
    from safetensors.torch import load_file

    import flowrl_trainers
    from flowrl_trainers.shapes import load_pipeline, prompts

    torch.set_num_threads(1)
    method, settings = CASES[case]
    trainer_class, config_class = (getattr(flowrl_trainers, f"{method}{kind}") for kind in ("Trainer", "Config"))
    needs_gradient = method in ("AdjointMatching", "VGGFlow")
    held_out = Dataset.from_dict({"prompt": list(prompts("held_out")["prompt"])[:3] * 2})

    def make(steps: int) -> Any:
        pipeline = load_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        return trainer_class(
            pipeline,
            ["shapes"] if needs_gradient else ["shapes", "checker"],
            config_class(output_dir=str(folder), max_steps=steps, **(SHARED | settings)),
            prompts("train"),
            held_out,
            eval_reward_funcs=["checker"] if needs_gradient else None,
            peft_config=LoraConfig(r=4, lora_alpha=8),
        )

    make(1).train()
    trainer = make(3)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    left: dict[str, Any] = {
        "adapter": load_file(folder / "pytorch_lora_weights.safetensors"),
        "evaluation": trainer.evaluate(),
        "metrics": json.loads((folder / "metrics.json").read_text()),
        "history": trainer.state.log_history,
    }
    for file in sorted(folder.glob("checkpoint-*/**/*")):
        if file.suffix == ".safetensors":
            left[str(file.relative_to(folder))] = load_file(file)
        elif file.suffix == ".pt" and "rng" not in file.name:
            left[str(file.relative_to(folder))] = torch.load(file, weights_only=True)
    left |= {file.name: file.read_bytes() for file in sorted((folder / "samples").glob("*.png"))}
    torch.save(flat(left), folder.with_suffix(".pt"))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one dictionary of paths; what is None is left out."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {p: v for key, inner in items for p, v in flat(inner, f"{path}/{key}").items()}
    return {} if value is None else {path: value}


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit; NaN equals NaN."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return both_nan or (type(a) is type(b) and a == b)


def renamed(path: str) -> str | None:
    """What the newer checkout calls it."""
    for pattern, name in RENAMED:
        if re.search(pattern, path):
            return None if name is None else re.sub(pattern, name, path)
    return path


def compare(old: dict[str, Any], new: dict[str, Any]) -> tuple[int, list[str]]:
    """How many values are equal, and one line for each that is not."""
    old, new = ({p: v for p, v in left.items() if not TIMES.search(p)} for left in (old, new))
    named = {renamed(path): value for path, value in old.items()}
    named = {p: v for p, v in named.items() if p is not None and not SAID.search(p)}
    kept = {p for p in new if not SAID.search(p)}
    unread = {p for p in named if p.endswith("consistency/final") and p not in new}
    lines = [f"only in the old one: {p}" for p in sorted(set(named) - kept - unread, key=str)]
    lines += [f"only in the new one: {p}" for p in sorted(kept - set(named), key=str)]
    shared = [p for p in named if p in kept]
    lines += [f"differs: {p}" for p in shared if not same(named[p], new[p])]
    return sum(same(named[p], new[p]) for p in shared), lines


def main() -> None:
    """Run the cases in both checkouts and compare; the exit status says whether all is equal."""
    parser = argparse.ArgumentParser(description="Whether two checkouts train alike, to the last bit.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=Path(__file__).parent.parent)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--work", type=Path, help="Keep what the runs leave here.")
    told = parser.parse_args()
    if os.environ.get("COMPARE_CASE"):
        run_case(os.environ["COMPARE_CASE"], told.old)
        return
    work = told.work or Path(tempfile.mkdtemp())
    failed = False
    for case in told.cases:
        left = []
        for label, checkout in (("old", told.old), ("new", told.new)):
            folder = (work / label / case).resolve()
            folder.mkdir(parents=True)
            quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
            env = os.environ | quiet | {"PYTHONPATH": str(checkout.resolve()), "COMPARE_CASE": case}
            command = [sys.executable, str(Path(__file__).resolve()), str(folder)]
            subprocess.run(command, env=env, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
            left.append(torch.load(folder.with_suffix(".pt"), weights_only=False))
        equal, lines = compare(*left)
        failed |= bool(lines)
        print(f"{case}: {equal} values are equal to the last bit, {len(lines)} are not")
        print("".join(f"    {line}\n" for line in lines[:20]), end="", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
