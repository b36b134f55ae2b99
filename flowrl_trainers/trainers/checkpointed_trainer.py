"""`CheckpointedTrainer`: `transformers.Trainer` whose checkpoints can be trusted and gone on from.

Every override of Trainer around saving, resuming, pushing and clipping stands in this file. Public hooks are
overridden where there are any. `_save_checkpoint`, `_load_from_checkpoint`, `_load_best_model`,
`_push_from_checkpoint`, `_save_optimizer_and_scheduler` and `_load_optimizer_and_scheduler` are private, but there is
no public place between writing a checkpoint and deleting older ones; so is `_clip_grad_norm`, as Trainer's callbacks
come after its clipping.
"""

import json
import logging
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn

import httpx2
import torch
from accelerate.utils import gather_object
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, TrainOutput, rotate_checkpoints
from transformers.utils.hub import PushInProgress

from ..run_folder.checkpoints import (
    MANIFEST,
    PART_OF_OPTIMIZER,
    WEIGHTS,
    checkpoint_to_resume,
    checkpoints,
    write_error,
    write_manifest,
)  # fmt: skip
from ..run_folder.earlier_run import files_of_a_run, models_of_a_run, move_aside, refuse_earlier_run
from ..run_folder.text_files import write_json
from ..sampling.metric_log import MetricLog
from ..sampling.sharding import copy_whole, is_sharded, load_own_parts, own_parts, whole, whole_parameters
from .base_config import FlowRLConfig
from .input_checks import writable_folder
from .other_processes import ALARMS, Alarm, is_broken_connection
from .sigterm import EXIT_STATUS, SigtermCallback
from .trackers import close_tensorboard

logger = logging.getLogger(__name__)

BROKE_OFF = "Training broke off"
FORMAT = 6  # of what a checkpoint keeps: a change of it takes the next number, so that the others are refused

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What saving raises where it cannot write; `RuntimeError` is what torch makes of a full disk."""


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint keeps beside the files of the model and of Trainer.

    Attributes:
        tensors: Those that training changes, the same on all processes; loading copies into them.
        values: Tensors, numbers, strings, lists and dictionaries of this process.
    """

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class UpdateCounter(TrainerCallback):
    """Counts the updates since `train` was called; how often is logged, evaluated and saved follows the configuration.

    Trainer would go on with the intervals that the checkpoint of a resumed run was saved with.
    """

    def __init__(self) -> None:
        self.updates = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.updates += 1


class BestNumber(TrainerCallback):
    """Forgets the best number of a checkpoint where a resumed run looks for the best of another."""

    def __init__(self) -> None:
        self.is_of_another = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.is_of_another:
            logger.warning(
                "The best number so far is not of `metric_for_best_model` (%s): the best is looked for anew.",
                args.metric_for_best_model,
            )
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            self.is_of_another = False


class CheckpointedTrainer(Trainer, ABC):
    """Trainer with complete checkpoints, an exact resumption, and what was learned kept where training breaks off.

    A subclass writes its model, says its training state, takes it up, and does what comes before training: the four
    methods under "the contract".
    """

    args: FlowRLConfig
    model: nn.Module
    control: TrainerControl

    def __init__(self, *, metrics: MetricLog, callbacks: list[TrainerCallback], **kwargs: Any) -> None:
        self.metrics = metrics
        self.seconds: dict[str, float] = {}
        self.best_step: int | None = None  # that of the checkpoint whose weights stand at the end
        self._counter, self._best, self._sigterm = UpdateCounter(), BestNumber(), SigtermCallback(self.on_any_process)
        self._training_since: float | None = None
        self._owns_output_dir = self._together = False
        # Files that this trainer writes before it trains, of an evaluation, are none of an earlier run.
        self._found = set(files_of_a_run(Path(str(kwargs["args"].output_dir))))
        super().__init__(callbacks=[self._counter, self._best, *callbacks, self._sigterm], **kwargs)

    # ---- the contract ----------------------------------------------------------------------------------------------

    @abstractmethod
    def write_model(self, folder: Path) -> None:
        """Write the model, and what is said of it, into a folder; called on the main process alone, inside
        `weights_to_write`.
        """

    @abstractmethod
    def training_state(self) -> TrainingState:
        """What a checkpoint has to keep."""

    @abstractmethod
    def load_training_state(self, values: dict[str, Any] | None, folder: Path, *, resume: bool) -> None:
        """Take up what `training_state` said; its tensors are loaded afterwards.

        Args:
            values: Of this process; None where a checkpoint that is loaded as the best one has none
                (`save_only_model`).
            folder: The checkpoint.
            resume: Whether training goes on from here. If not, the weights are all that is wanted, and what belongs to
                them.

        Raises:
            ValueError: For a checkpoint of another run.
        """

    @abstractmethod
    def before_training(self) -> None:
        """What comes before the first update, of a resumed run too; raises `ValueError` for what cannot be trained."""

    def reason_to_stop(self) -> str | None:
        """Why training should end after this update, if it should; asked of a finished run that is resumed, too."""
        return None

    # ---- training --------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Try what can be tried beforehand (see `before_training`), then train.

        The resumed run repeats what the uninterrupted one would have done, bit for bit. SIGTERM saves a checkpoint
        after the update at hand and ends the process with status 143, unless the caller handles that signal himself.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint of `output_dir`, "auto" for that or, where
                none is whole, a new run, or a checkpoint's folder. Warnings say which ones were passed over and why.
            trial: As in `transformers.Trainer`.
            ignore_keys_for_eval: As in `transformers.Trainer`.

        Raises:
            ValueError: Where no checkpoint is whole (True), or the named one is incomplete or damaged; for one of
                another run; for a new run in an `output_dir` that holds another, without `overwrite_output_dir`.
            RuntimeError: Where a checkpoint cannot be written, or another process failed.
            SystemExit: After SIGTERM.
        """
        if not isinstance(resume_from_checkpoint, (str, PathLike, bool, NoneType)):
            raise TypeError(
                f"`resume_from_checkpoint` ({resume_from_checkpoint!r}) must be True, 'auto' or a checkpoint's folder."
            )
        self.best_step, self._counter.updates = None, 0
        with self.one_for_all(), ExitStack() as listening:  # until what was learned is kept
            try:
                folder = self._find_checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
                self._take_output_dir(folder, auto=resume_from_checkpoint == "auto")
                if folder is not None and self._load_if_finished(folder):
                    return TrainOutput(self.state.global_step, 0.0, {})
                self.before_training()
                self._training_since = time.perf_counter()
                listening.enter_context(self._sigterm.listening())
                output = super().train(None if folder is None else str(folder), trial, ignore_keys_for_eval)
                if self.on_any_process(self._sigterm.arrived):  # after the last checkpoint that could be saved
                    self._end_process()
            except (Exception, KeyboardInterrupt):
                if self._counter.updates:
                    self._keep_what_was_learned()
                raise
            finally:
                if self._training_since is not None:
                    self.seconds, self._training_since = self.seconds_so_far(), None
        return output

    @contextmanager
    def one_for_all(self) -> Iterator[None]:
        """Inside, an error of one process is told to the others and ends them; one inside another changes nothing."""
        if self.args.world_size == 1 or self._together:
            yield
            return
        self._together, alarm = True, Alarm(next(ALARMS))
        try:
            with alarm.heard():
                yield
        except (Exception, KeyboardInterrupt) as error:
            self._blame(error, alarm)
            raise
        finally:
            self._together = False

    def _blame(self, error: BaseException, alarm: Alarm) -> None:
        """Tell the other processes of an error; raises `RuntimeError` with theirs where it only says they are gone."""
        if not is_broken_connection(error):
            alarm.ring(error)
            return
        sentence = (
            f"Process {self.args.process_index} cannot go on, as {alarm.cause()}: look at what that process printed."
        )
        logger.error(sentence)  # at once: launchers end the other processes as soon as one has failed
        raise RuntimeError(sentence) from None

    def _take_output_dir(self, folder: Path | None, *, auto: bool) -> None:
        """Refuse, or move aside, what an earlier run left in `output_dir`; once this trainer trains there, it stays.

        Args:
            folder: The checkpoint to go on from, if any.
            auto: Whether the run starts anew where there is none: checkpoints that were cut off in the middle (they
                have no manifest) may then lie there, and are deleted when their step comes; others that are not whole
                are moved aside.
        """
        # A checkpoint in it may be a link, and a link elsewhere may lead to one.
        places = () if folder is None else (folder.parent.resolve(), folder.resolve().parent)
        goes_on = self.output_dir.resolve() in places
        if not goes_on:
            left, saved = models_of_a_run(self.output_dir), checkpoints(self.output_dir)
            if self._owns_output_dir:  # this trainer trained before: nobody may resume from a mixture of two trainings
                left = saved
            elif self.args.overwrite_output_dir:
                left = [path for path in files_of_a_run(self.output_dir) if path in self._found]
            elif auto and folder is None:
                refuse_earlier_run(self.output_dir, [path for path in left if path not in saved])
                left = [path for path in saved if (path / MANIFEST).exists()]
            else:
                refuse_earlier_run(self.output_dir, left)
            self.accelerator.wait_for_everyone()  # all have looked before the first one moves
            if left and self.args.should_save:
                close_tensorboard(self.callback_handler.callbacks)
                aside = move_aside(self.output_dir, left)
                logger.warning("What an earlier run left in %s is now in %s.", self.output_dir, aside)
            self.accelerator.wait_for_everyone()
        self._owns_output_dir = True

    def on_any_process(self, here: bool) -> bool:
        """Whether something is so on any process; all of them must ask."""
        if self.args.world_size == 1:
            return here
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.args.device), "sum") > 0)

    def _leave(self, folder: Path) -> None:
        """Write the adapter, and end the process as SIGTERM asked for; folder: the checkpoint of this update."""
        if self.args.should_save:
            logger.warning("%s is whole: `resume_from_checkpoint=True` goes on from it, bit for bit.", folder)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self._end_process()

    def _end_process(self) -> NoReturn:
        if self.args.should_save or is_sharded(self.model):
            self._keep_what_was_learned("SIGTERM ended training")
        self.accelerator.wait_for_everyone()
        raise SystemExit(EXIT_STATUS)

    def _keep_what_was_learned(self, what_happened: str = BROKE_OFF) -> None:
        broke_off = f"{what_happened} after {self.state.global_step} updates"
        if is_sharded(self.model) and what_happened == BROKE_OFF:  # the others are elsewhere, and give no weights
            logger.error("%s: what it had learned is in its checkpoints.", broke_off)
            return
        try:
            self.save_model(_internal_call=True)
        except WRITE_ERRORS as error:  # logged, as raising it would hide why training broke off
            logger.error(
                "%s, and not all that it leaves could be written to %s: %s", broke_off, self.output_dir, error
            )
        else:
            logger.error("%s: what it has learned is in %s.", broke_off, self.output_dir)

    def seconds_so_far(self) -> dict[str, float]:
        """Seconds of training and of evaluation, those before a resumption included."""
        running = 0.0 if self._training_since is None else time.perf_counter() - self._training_since
        return self.seconds | {"training": self.seconds.get("training", 0.0) + running}

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args.output_dir))

    @property
    def step_of_weights(self) -> int:
        """The update that made the weights as they are: the last, or that of the best checkpoint at the end."""
        return self.best_step or self.state.global_step

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip every part of the model by itself to `max_grad_norm`, and note the norms of all but the first."""
        (_, first), *others = self.model.named_children()
        norm = self.accelerator.clip_grad_norm_(first.parameters(), self.args.max_grad_norm)  # unscales all gradients
        for name, part in others:
            norm_of_part = torch.nn.utils.clip_grad_norm_(part.parameters(), self.args.max_grad_norm)
            self.metrics.note(f"{name}_grad_norm", whole(norm_of_part))
        return whole(norm)

    # ---- saving ----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model and what is said of it into `output_dir` or another folder; see `write_model`.

        With FSDP2, all processes must call it: the trained weights are gathered in the memory of the first one's host.
        """
        with self.weights_to_write():
            if self.args.should_save:
                folder = output_dir or self.output_dir
                if not _internal_call:
                    writable_folder(folder)
                Path(folder).mkdir(parents=True, exist_ok=True)
                self.write_model(Path(folder))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def weights_to_write(self) -> AbstractContextManager[None]:
        """A context in which the model of the process that saves has the weights to be written, whole.

        All processes enter it; one inside another changes nothing.
        """
        return whole_parameters(self.model, kept=self.args.should_save)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the run's repository on the Hub; raises `ValueError` where the Hub does not let us."""
        try:
            super().init_hf_repo(token=token, private=private)
        except (OSError, httpx2.HTTPError, HFValidationError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ValueError(
                f"The Hub gives this run no repository ({reason}): log in by `hf auth login` and unset "
                "`HF_HUB_OFFLINE`, or leave `push_to_hub` out and push the folder later."
            ) from error

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.output_dir / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            self._write_checkpoint(folder, model, trial)
        except WRITE_ERRORS as error:
            sentence = write_error(self.output_dir, folder, error)  # with the free space as it is now
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # a part of it is of no use, and may have filled the disk
            raise RuntimeError(sentence) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            # Only now: until the manifest is there, older checkpoints are the newest good ones.
            rotate_checkpoints(str(self.output_dir), limit, self.state.best_model_checkpoint, use_mtime=True)
        if self.args.push_to_hub:
            self._push_checkpoint(folder)
        if self._sigterm.leaving:
            self._leave(folder)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With `save_strategy="best"`, what this returns decides whether a checkpoint is saved after an evaluation.
        return super()._determine_best_metric(metrics, trial) or self._sigterm.leaving

    def _write_checkpoint(self, folder: Path, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, its manifest last.

        Args:
            folder: The checkpoint; what an earlier run, or a damaged checkpoint, left there is deleted.
            model: As in `transformers.Trainer`.
            trial: As in `transformers.Trainer`.
        """
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        kept: Any = self.state.stateful_callbacks  # a dictionary, once training has begun
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):  # perhaps one that the resumed run did not have
                kept.setdefault(type(callback).__name__, callback.state())
        if self.args.metric_for_best_model is not None:
            of_best = self.output_dir / f"checkpoint-{self.state.best_global_step}"
            if self.args.should_save and of_best != folder and not (of_best / MANIFEST).exists():
                shutil.rmtree(of_best, ignore_errors=True)  # cut off by a kill; Trainer would take it for whole
            self.state.best_model_checkpoint = self._best_checkpoint(folder)
        super()._save_checkpoint(model, trial)
        if self.args.should_save:  # again, as JSON has no sign for a number that is not finite
            written = folder / "trainer_state.json"
            write_json(written, json.loads(written.read_text()))
        state = self.training_state()
        if not self.args.save_only_model:
            best_of = {"best_of": self._best_of}
            torch.save({"format": FORMAT} | best_of | state.values, self._values_file(folder))
        tensors: dict[str, Tensor] = {}
        for name, value in state.tensors.items():
            gathered = whole(value.detach()).contiguous()
            if self.args.should_save:
                tensors[name] = gathered.cpu() if is_sharded(self.model) else gathered
        if self.args.should_save:
            save_file(tensors, folder / WEIGHTS)
            shutil.copymode(folder / "trainer_state.json", folder / WEIGHTS)  # safetensors lets nobody else read it
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder)

    def _best_checkpoint(self, folder: Path) -> str | None:
        """That of the best evaluation among those with a checkpoint, as far as Trainer looks for the best.

        Trainer itself knows the best evaluation alone, which has no checkpoint where `save_steps` is larger than
        `eval_steps`.

        Args:
            folder: The checkpoint that is being written.
        """
        kept = checkpoints(self.output_dir)
        if self.state.best_model_checkpoint is not None:  # of a resumed run, it may lie elsewhere
            kept = [Path(self.state.best_model_checkpoint), *kept]
        whole_ones = [path for path in kept if (path / MANIFEST).exists()]
        places = {int(path.name.rpartition("-")[2]): path for path in (*whole_ones, folder)}
        name = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        # NaN is null in the file of a checkpoint.
        rows = [row for row in self.state.log_history if row.get(name) is not None and not math.isnan(row[name])]
        found = {int(row["step"]): row[name] for row in rows if row["step"] in places}
        best = max if self.args.greater_is_better else min
        return str(places[best(found, key=found.__getitem__)]) if found else None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None  # as training has begun
        assert self.lr_scheduler is not None
        # Trainer would save the frozen network too, and accelerate would take a step to see the optimizer's state.
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(own_parts(self.optimizer.state_dict()), self._optimizer_file(Path(output_dir)))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            assert self.optimizer is not None
            assert self.lr_scheduler is not None
            load_own_parts(self.optimizer, self._load(self._optimizer_file(Path(checkpoint))))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _optimizer_file(self, folder: Path) -> Path:
        return folder / PART_OF_OPTIMIZER.format(self.args.process_index)

    def _values_file(self, folder: Path) -> Path:
        return folder / f"training_state_{self.args.process_index}.pt"

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called before the manifest is written; `_save_checkpoint` pushes afterwards."""

    def _push_checkpoint(self, folder: Path) -> None:
        """Push as `hub_strategy` says, in the background; without `training_args.bin`, which holds the token."""
        with self.weights_to_write():
            if self.is_world_process_zero():
                self._push_from_first_process(folder)

    @cached_property
    def _hub(self) -> HfApi:
        """One for the run, as it queues its pushes: the Hub refuses commits at the same time."""
        return HfApi()

    def _push_from_first_process(self, folder: Path) -> None:
        strategy = self.args.hub_strategy
        pending: Any = self.push_in_progress  # a `PushInProgress`, whose jobs transformers declares as one
        earlier = [] if pending is None or pending.is_done() else pending.jobs
        if strategy == HubStrategy.END or (earlier and not self.args.hub_always_push):
            return
        self.save_model(_internal_call=True)

        step = self.state.global_step

        def say_failure(job: Future[Any]) -> None:
            if job.exception() is not None:
                reason = " ".join(str(job.exception()).split())
                logger.warning(
                    "The push of step %d failed (%s): push when training is over, by `push_to_hub`.", step, reason
                )

        def upload(path: Path, path_in_repo: str | None = None) -> Any:
            job = self._hub.upload_folder(
                repo_id=str(self.hub_model_id),
                folder_path=path,
                path_in_repo=path_in_repo,
                commit_message=f"Training in progress, step {step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                run_as_future=True,
                ignore_patterns=["_*", "checkpoint-*"],
            )
            job.add_done_callback(say_failure)
            return job

        jobs = [upload(self.output_dir)]
        if strategy == HubStrategy.CHECKPOINT:
            jobs.append(upload(folder, "last-checkpoint"))
        elif strategy == HubStrategy.ALL_CHECKPOINTS:
            jobs.append(upload(folder, folder.name))
        all_jobs: Any = [*earlier, *jobs]
        self.push_in_progress: Any = PushInProgress(all_jobs)

    # ---- resuming --------------------------------------------------------------------------------------------------

    def _find_checkpoint(self, wanted: str | Literal[True]) -> Path | None:
        """The checkpoint to resume from, if any; says which ones were passed over. See `checkpoint_to_resume`."""
        folder, passed_over = checkpoint_to_resume(self.output_dir, wanted)
        if self.args.world_size > 1:
            found = sorted(set(map(str, gather_object([folder and folder.name]))))
            if len(found) > 1:
                raise ValueError(
                    f"The processes find different checkpoints to resume from ({', '.join(found)}): let `output_dir` "
                    "be a folder that all of them see."
                )
        for bad, fault in passed_over.items():
            logger.warning("Passed over %s, which is %s.", bad, fault)
        if folder is not None:
            logger.info("Resuming from %s.", folder)
        elif passed_over:
            logger.warning("No checkpoint in %s is complete: the run starts anew.", self.output_dir)
        return folder

    def _load_if_finished(self, folder: Path) -> bool:
        """Load a checkpoint that ends its run, or the best one then; Trainer would train one update more.

        Returns whether it does end its run; if not, Trainer loads it once more.
        """
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        epochs = math.ceil(self.args.num_train_epochs * self.updates_per_epoch)
        updates = self.args.max_steps if self.args.max_steps > 0 else epochs
        self._load_from_checkpoint(str(folder))
        values = self._saved_values(folder) or {}
        self._best.is_of_another = (
            state.best_metric is not None and values.get("best_of", self._best_of) != self._best_of
        )
        reason = f"the run has {updates}" if state.global_step >= updates else self.reason_to_stop()
        if reason is None and not self._best.is_of_another:
            reason = self._patience_lost(state)
        if reason is None:
            return False
        logger.warning("%s has %d updates, and nothing is left to train: %s.", folder, state.global_step, reason)
        state.is_local_process_zero, state.is_world_process_zero = (
            self.is_local_process_zero(),
            self.is_world_process_zero(),
        )
        self.state = state
        if self._best.is_of_another:
            logger.warning("The best checkpoint was chosen by another number: the model is that of %s.", folder)
        elif self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_of(folder)
        return True

    @property
    def _best_of(self) -> list[Any]:
        """What the best checkpoint is chosen by."""
        return [self.args.metric_for_best_model, self.args.greater_is_better]

    def _patience_lost(self, state: TrainerState) -> str | None:
        """Let early stopping count on from where a checkpoint was; why it ends the run, if it does."""
        kept: Any = state.stateful_callbacks  # a dictionary, once it is read from a file
        stopping = [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        for callback in stopping:
            found = kept.get(type(callback).__name__, [])
            for saved in (found if isinstance(found, list) else [found])[-1:]:
                callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
            if callback.early_stopping_patience_counter >= callback.early_stopping_patience:
                return f"{callback.early_stopping_patience_counter} evaluations brought nothing better"
        return None

    def _load_best_of(self, folder: Path) -> None:
        """Load the best checkpoint of a finished run, which may have been moved; folder: its last checkpoint."""
        noted = Path(str(self.state.best_model_checkpoint))
        best = next((place for place in (folder.parent / noted.name, noted) if place.is_dir()), None)
        if best is None:
            logger.warning("The best checkpoint, %s, is gone: the model is that of %s.", noted, folder)
            return
        self.state.best_model_checkpoint = str(best)
        self._load_best_model()

    @property
    def updates_per_epoch(self) -> int:
        """The updates of one pass over the prompts."""
        return len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        values = self._saved_values(folder)
        old = (folder / f"loop_state_{self.args.process_index}.pt").exists()
        if old or (values is not None and values.get("format") != FORMAT):
            raise ValueError(
                f"{folder} was saved by another version of flowrl-trainers, which kept other things: finish that run "
                "with that version, or start anew."
            )
        if values is None:
            raise ValueError(
                f"{folder} has no {self._values_file(folder).name}, as fewer processes than the "
                f"{self.args.world_size} of this run saved it: resume with as many as then."
            )
        self.load_training_state(values, folder, resume=True)
        self._load_tensors(folder)

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        self.best_step = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
        self.load_training_state(self._saved_values(folder), folder, resume=False)
        self._load_tensors(folder)

    def _saved_values(self, folder: Path) -> dict[str, Any] | None:
        """What this process kept in a checkpoint; None where it kept nothing."""
        file = self._values_file(folder)
        return self._load(file) if file.exists() else None

    def _load(self, file: Path) -> dict[str, Any]:
        # Processes on the CPU have the devices "cpu:0", "cpu:1", ..., which `torch.load` does not know.
        device = "cpu" if self.args.device.type == "cpu" else self.args.device
        return torch.load(file, map_location=device, weights_only=True)

    def _load_tensors(self, folder: Path) -> None:
        tensors = self.training_state().tensors
        with safe_open(folder / WEIGHTS, "pt") as saved:
            if set(saved.keys()) != set(tensors):
                raise ValueError(
                    f"{folder} holds other trained parameters than this run: resume with the same model and "
                    "`peft_config`."
                )
            for name, tensor in tensors.items():  # one at a time, as all of them may not fit on every process
                copy_whole(tensor, saved.get_tensor(name))
