"""A run of `flowrl` on Ray Train: one worker per GPU, on as many machines as the cluster has.

    python examples/ray_train.py 8 ac_flow --config run.yaml --output_dir /shared/run --save_steps 50

The first argument is the number of workers, the others are those of `flowrl`; `--cpu` tries it without GPUs. The
folder of `--output_dir` must lie where all machines see it. Every checkpoint is reported to Ray. If a worker or its
machine is lost, Ray starts all workers anew, and they go on from the newest whole checkpoint, bit for bit. Needs
`ray[train]`.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flowrl_trainers.cli.arguments import TRAINERS, parse
from flowrl_trainers.cli.run import make_trainer

FAILURES = 3  # of workers, before the run is given up


class ReportToRay(TrainerCallback):
    """Hands every checkpoint to Ray, once it is whole; all workers report together."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        whole = Checkpoint.from_directory(folder) if state.is_world_process_zero else None
        ray.train.report({"step": state.global_step}, checkpoint=whole)


def loop(command: dict[str, Any]) -> None:
    """What each worker does; command: the method, and the arguments of `flowrl`."""
    args, config = parse(command["method"], TRAINERS[command["method"]].config_class, command["arguments"], {})
    trainer = make_trainer(command["method"], args, config)
    trainer.add_callback(ReportToRay())
    trainer.train(resume_from_checkpoint="auto")  # also what Ray started anew
    trainer.save_model()


def main() -> None:
    """Train; the folder `ray` beside the run's holds what was reported."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("workers", type=int)
    parser.add_argument("method", choices=list(TRAINERS))
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--cpu", action="store_true", help="for a trial without GPUs")
    own, arguments = parser.parse_known_args()
    run = Path(own.output_dir).resolve()
    arguments += ["--output_dir", str(run)]
    if own.cpu:
        arguments += ["--use_cpu", "true", "--ddp_backend", "gloo"]
    # Workers find modules where this process does, such as one with a reward in the current folder.
    ray.init(
        include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}}
    )
    TorchTrainer(
        loop,
        train_loop_config={"method": own.method, "arguments": arguments},
        torch_config=TorchConfig(backend="gloo" if own.cpu else "nccl"),
        scaling_config=ScalingConfig(num_workers=own.workers, use_gpu=not own.cpu),
        run_config=RunConfig(
            name=run.name, storage_path=str(run.parent / "ray"), failure_config=FailureConfig(max_failures=FAILURES)
        ),
    ).fit()


if __name__ == "__main__":
    main()
