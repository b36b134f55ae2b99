"""One run of the study, in a process of its own, so that its peak memory is its own: `study.py` starts it.

python benchmarks/study_run.py NAME FACTOR FOLDER [--quick]
"""

import argparse
import base64
import datetime
import io
import resource
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from datasets import Dataset
from machine import machine
from PIL import Image
from study_measures import Record, collapse
from study_plan import Length, Run, plan
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flowrl_trainers import FlowRLTrainer
from flowrl_trainers.cli.arguments import TRAINERS, parse
from flowrl_trainers.cli.memory import keep_freed_memory
from flowrl_trainers.cli.quiet import hush
from flowrl_trainers.cli.run import make_trainer
from flowrl_trainers.cost import Drawing, Kind
from flowrl_trainers.rewards import ShapesReward
from flowrl_trainers.run_folder.text_files import write_json
from flowrl_trainers.shapes import prompts

SHOWN = 6  # pictures of the grid
COMPARED = 32  # prompts on which the distance of features is measured


class Recorder(TrainerCallback):
    """Says when a run is evaluated and when it ends, and keeps what it found as points.

    Seconds are of the processor: those of the clock would be longer beside another run.

    Args:
        trainer: The trainer.
        length: Of the run.
    """

    def __init__(self, trainer: FlowRLTrainer, length: Length) -> None:
        self.trainer, self.length = trainer, length
        self.seconds, self.began = 0.0, 0.0
        self.each: list[float] = []
        self.rewards: list[float] = []
        self.points: list[dict[str, Any]] = []
        self.explained: list[dict[str, float]] = []
        self.calls = reward_calls(trainer)
        trainer.add_callback(self)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An update begins with its rollout."""
        self.began = process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for an evaluation where one is due."""
        self.each.append(process_time() - self.began)
        self.seconds += self.each[-1]
        spent = state.global_step / self.length.updates
        if self.length.seconds is not None:
            spent = max(spent, self.seconds / self.length.seconds)
        control.should_evaluate |= spent >= (len(self.points) + 1) / self.length.evaluations
        control.should_training_stop |= spent >= 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep the rewards of rollouts, and what the critic explains of them."""
        logs = logs or {}
        if "reward" in logs:
            self.rewards.append(logs["reward"])
        explained = {n: v for n, v in logs.items() if n.startswith("critic/explained_variance")}
        if explained:
            self.explained.append({"updates": state.global_step} | explained)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep a point, and end a run that has collapsed."""
        rewards, self.rewards = self.rewards, []
        self.points.append(
            {
                "updates": state.global_step,
                "seconds": self.seconds,
                "reward_calls": self.calls * state.global_step,
                "training_reward": statistics.mean(rewards) if rewards else None,
                "rows": {name: dict(row) for name, row in self.trainer.rows.items()},
            }
        )
        control.should_training_stop |= collapse(self.points) is not None


def peak_mebibytes() -> float:
    """The most memory that this process has had."""
    units = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units


def reward_calls(trainer: FlowRLTrainer) -> float:
    """The pictures that an update has scored, as the method's equations need them."""
    calls = trainer.args.calls(Drawing(guided=False, decoded_together=1))
    scored = [c for c in calls if c.kind in (Kind.REWARD, Kind.REWARD_GRADIENT) and c.needed]
    return sum(call.batch * call.count for call in scored) / trainer.args.updates_on_rollout


def measure(run: Run, factor: float, folder: Path) -> Record:
    """Train and judge.

    Args:
        run: Which.
        factor: On its learning rate.
        folder: For what the trainer leaves.
    """
    began, settings = perf_counter(), run.settings(factor)
    told = settings | {"output_dir": str(folder), "disable_tqdm": True, "cache_base_pictures": False}
    args, config = parse("demo", TRAINERS[run.method.demo].config_class, [], told)
    trainer = make_trainer(run.method.demo, args, config)
    held_out = list(prompts("held_out")["prompt"])
    asked = [held_out[i * len(held_out) // run.length.prompts] for i in range(run.length.prompts)]
    trainer.eval_dataset = Dataset.from_dict({"prompt": asked * run.length.pictures})
    recorder = Recorder(trainer, run.length)
    trainer.train()
    base, tuned = trainer.pictures(trainer.eval_dataset, min(COMPARED, run.length.prompts))
    space = ShapesReward()
    with torch.no_grad():
        moved = (space.image_embeddings(tuned.images) - space.image_embeddings(base.images)).norm(dim=1)
    return {
        "stage": run.stage,
        "setting": run.setting,
        "label": run.label,
        "seed": run.seed,
        "factor": factor,
        "settings": settings,
        "machine": machine(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "wall_seconds": perf_counter() - began,
        "seconds_per_update": statistics.median(recorder.each),
        "peak_mib": peak_mebibytes(),
        "points": recorder.points,
        "explained_variance": recorder.explained,
        "feature_distance": float(moved.mean()),
        "collapse": collapse(recorder.points),
        "prompts": tuned.prompts[:SHOWN],
        "pictures": {"base": strip(base.images), "tuned": strip(tuned.images)},
    }


def strip(images: torch.Tensor) -> str:
    """The first pictures (B, 3, H, W) in one row, as a PNG in base64."""
    file = io.BytesIO()
    row = torch.cat(list(images[:SHOWN].mul(255).round().byte()), dim=2)
    Image.fromarray(row.permute(1, 2, 0).numpy()).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """Measure the run of a name, and write `record.json` into its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="The name of the run.")
    parser.add_argument("factor", type=float, help="On the learning rate of the demo.")
    parser.add_argument("folder", type=Path, help="The folder of the run.")
    parser.add_argument("--quick", action="store_true", help="The run is one of the quick study.")
    args = parser.parse_args()
    keep_freed_memory()
    hush()
    run = next(run for run in plan(args.quick) if run.name == args.name)
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        record = measure(run, args.factor, Path(folder))
    write_json(args.folder / "record.json", record)


if __name__ == "__main__":
    main()
