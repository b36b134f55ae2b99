"""What a run shows in a notebook. Needs IPython, which every notebook has."""

from collections.abc import Callable
from typing import Any

from IPython.display import HTML, Image, display
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils.notebook import NotebookProgressCallback, NotebookTrainingTracker, text_to_html_table

from ..run_folder import RunFolder


class NotebookTable(NotebookProgressCallback):
    """Loss and reward of every log beside the progress; of every evaluation its rows and pictures.

    That of Trainer shows losses alone.

    Args:
        run_folder: Knows rows and pictures.
        step_of_weights: Says which update made the weights.
    """

    def __init__(self, run_folder: RunFolder, step_of_weights: Callable[[], int]) -> None:
        super().__init__()
        self.run_folder, self.step_of_weights = run_folder, step_of_weights

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.tracker = self.training_tracker = NotebookTrainingTracker(state.max_steps, ["Step", "Loss", "Reward"])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            reward = logs.get("reward", "unknown")
            self.tracker.write_line({"Step": state.global_step, "Loss": logs["loss"], "Reward": reward})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        rows = self.run_folder.rows
        names = list({name: None for row in rows.values() for name in row})
        table: list[list[Any]] = [[f"After {self.step_of_weights()} updates", *names]]
        table += [[label, *(row.get(name, "") for name in names)] for label, row in rows.items()]
        display(HTML(text_to_html_table(table)))
        if self.run_folder.sheet is not None:
            display(Image(filename=self.run_folder.sheet))
        self._force_next_update = True
