"""A training run of a tiny pipeline as a process of its own: `python training_script.py settings.json`.

settings: `trainer`, the class; `config`, its settings; `kill_at`, an update after which the last process ends itself,
or null, and `how`; `resume`. Leaves `result.pt` (of process 0), and `rollout_<rank>.pt` and `scores_<rank>.pt` (of every rollout), in
the output folder.
"""

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))

import flowrl_trainers
from flowrl_trainers.rewards import differentiable, groupwise
from tests.tiny import tiny_sd3

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green") for shape in ("circle", "square", "cross", "diamond")]


@differentiable
def redness(images, prompts, log_metric, **columns):
    red, green, blue = images.unbind(dim=1)
    for value in images.detach().mean(dim=(1, 2, 3)).tolist():
        log_metric("brightness", value)
    return (red - (green + blue) / 2).mean(dim=(1, 2))


def darkness(images, prompts, **columns):
    return (1 - images.mean(dim=(1, 2, 3))).tolist()


@groupwise
def apart(images, prompts, **columns):
    return (images - images.mean(dim=0)).square().mean(dim=(1, 2, 3)).sqrt()


class Killer(TrainerCallback):
    """Ends the last process at the first micro-step after an update, where nothing is saved.

    how: a signal, which the process sends itself, or "error".
    """

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how = at, how

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != self.at or args.process_index != args.world_size - 1:
            return
        if self.how == "error":
            raise OSError("the judge is gone")
        os.kill(os.getpid(), signal.Signals[self.how])


def main() -> None:
    import_module("flowrl_trainers.networks.value_network").WIDTHS = (32, 32)  # the default is 20 MB large
    torch.set_num_threads(int(os.environ.get("FLOWRL_TEST_THREADS", "1")))
    settings = json.loads(Path(sys.argv[1]).read_text())
    trainer_class = getattr(flowrl_trainers, settings["trainer"])
    dropout = settings["config"].pop("lora_dropout", 0.1)
    rewards = [redness, apart] if settings["config"].pop("groupwise", False) else redness
    config = trainer_class.config_class(
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "guidance_scale": 1.0,
           "max_sequence_length": 8, "num_inference_steps": 3, "log_images": 0} | settings["config"]
    )  # fmt: skip
    # With `rewards_column`, prompts are for one of two rewards or for both.
    choices = [["redness"], ["darkness"], None, ["darkness", "redness"]] * 2
    columns = {config.rewards_column: choices} if config.rewards_column else {}
    trainer = trainer_class(
        tiny_sd3(), [redness, darkness] if columns else rewards, config,
        Dataset.from_dict({"prompt": PROMPTS} | columns),
        peft_config=LoraConfig(r=2, lora_alpha=4, lora_dropout=dropout),
        callbacks=[Killer(settings["kill_at"], settings["how"])] if settings["kill_at"] is not None else None,
    )  # fmt: skip
    rollouts, scores = [], []
    prepare, log_rewards = trainer.prepare, trainer.log_rewards

    def remember(rollout):
        drawn = [b.record.map(torch.clone).to_dict() | {"rows": [e.key.row for e in b.examples]} for b in rollout]
        prepared = prepare(rollout)  # nothing while a critic warms up
        kept = [b.record.map(torch.clone).to_dict() for b in prepared] or [None] * len(drawn)
        rollouts.append([{"drawn": a, "prepared": b} for a, b in zip(drawn, kept, strict=True)])
        return prepared

    def remember_scores(found, rollout):
        scores.append(found.clone())
        log_rewards(found, rollout)

    trainer.prepare, trainer.log_rewards = remember, remember_scores
    trainer.train(resume_from_checkpoint=settings["resume"])
    folder = Path(config.output_dir)
    torch.save(
        trainer.evaluate(trainer.train_dataset.dataset.select(range(3))),
        folder / f"evaluation_{config.process_index}.pt",
    )
    torch.save(rollouts, folder / f"rollout_{config.process_index}.pt")
    torch.save(scores, folder / f"scores_{config.process_index}.pt")
    if trainer.is_world_process_zero():
        history = [
            {k: v for k, v in row.items() if not k.startswith(("seconds/", "train_"))}
            for row in trainer.state.log_history
        ]
        torch.save(
            {
                "weights": {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad},
                "optimizer": trainer.optimizer.state_dict(),
                "state": {
                    "algorithm": trainer.algorithm_state(),
                    "average": trainer.average.state_dict(),
                },
                "history": history,
                "world_size": config.world_size,
                "wrapper": type(trainer.model_wrapped).__name__,
            },
            folder / "result.pt",
        )


if __name__ == "__main__":
    main()
