"""What a run shows in a notebook. Needs IPython, which every notebook has."""

from typing import TYPE_CHECKING, Any

from IPython.display import HTML, Image, display
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker, text_to_html_table

if TYPE_CHECKING:
    from .base_trainer import FlowRLTrainer


class NotebookTable(NotebookProgressCallback):
    """Loss and reward of every log beside the progress; of every evaluation its rows and pictures. Trainer's own knows losses alone."""

    def __init__(self, trainer: "FlowRLTrainer") -> None:
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.tracker = self.training_tracker = NotebookTrainingTracker(state.max_steps, ["Step", "Loss", "Reward"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if logs is not None and "loss" in logs:
            self.tracker.write_line({"Step": state.global_step, "Loss": logs["loss"], "Reward": logs.get("reward", "unknown")})

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        rows = self.trainer.rows
        names = list({name: None for row in rows.values() for name in row})
        table: list[list[Any]] = [[f"After {self.trainer.step_of_weights} updates", *names]]
        table += [[label, *(row.get(name, "") for name in names)] for label, row in rows.items()]
        display(HTML(text_to_html_table(table)))
        if args.log_images and self.trainer.sheet is not None:
            display(Image(filename=self.trainer.sheet))
        self._force_next_update = True
