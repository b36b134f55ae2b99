"""The files of a run: adapter, card, configuration, pictures, checkpoints, and what is pushed to the Hub.

Trainer saves and loads models of transformers; a diffusers pipeline needs its own files. Its public hooks are overridden where they
exist; `_save_checkpoint`, `_load_from_checkpoint`, `_load_best_model` and `_push_from_checkpoint` are private, but there is no
public place between writing a checkpoint and deleting older ones.
"""

import json
import logging
from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import yaml
from diffusers import ModelMixin
from huggingface_hub import HfApi
from peft import LoraConfig
from safetensors.torch import load_file, save_file, save_model
from transformers import Trainer, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import HubStrategy, rotate_checkpoints
from transformers.utils.hub import PushInProgress

from ..pipelines import FlowPipeline
from ..rewards import Reward
from ..run_folder import CardFacts, before_after, model_card
from ..run_folder.checkpoints import MANIFEST, checkpoint_to_resume, write_manifest
from ..sampling.flow_model import FlowModel
from ..sampling.micro_batch import MicroBatch
from ..sampling.prompt_groups import ImageKey
from .base_config import FlowRLConfig
from .evaluation import Pictures

logger = logging.getLogger(__name__)

WEIGHTS = "trained_parameters.safetensors"
NOT_OF_THE_RUN = ("hub_token", "output_dir", "resume_from_checkpoint", "local_rank")


class RunFiles(Trainer):
    """The half of `FlowRLTrainer` that writes and reads files."""

    args: FlowRLConfig
    model: FlowModel
    flow: FlowPipeline
    rewards: list[Reward]
    eval_rewards: list[Reward]
    reward_weights: torch.Tensor
    peft_config: LoraConfig | None
    rows: dict[str, dict[str, float]]
    seconds: dict[str, float]
    settings: dict[str, Any]
    told_for_card: dict[str, Any]
    replayed_settings: ClassVar[tuple[str, ...]]
    ema: Any
    push_in_progress: PushInProgress | None
    head_name: ClassVar[str] = "head"
    _name: ClassVar[str]
    _tag_names: ClassVar[list[str]]
    _paper: ClassVar[dict[str, str]]
    rollout_reward: float | None
    _best_step: int | None = None  # of the checkpoint whose weights stand at the end
    sheet: Path | None = None  # of the last evaluation
    _metrics: dict[str, list[float]]
    _window: list[MicroBatch]
    _micro_step: int

    @abstractmethod
    def averaged_weights(self) -> AbstractContextManager[None]: ...

    @abstractmethod
    def seconds_so_far(self) -> dict[str, float]: ...

    @abstractmethod
    def algorithm_state(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_algorithm_state(self, state: dict[str, Any]) -> None: ...

    # ---- the model and what is said of it --------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as stock diffusers reads it (or `transformer/`), the card, `config.yaml` and `metrics.json`."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with self.averaged_weights():
                if self.peft_config is not None:
                    self.flow.save_lora(folder)
                else:
                    self.flow.save_transformer(folder / "transformer")
                for name, network in self.extra_networks().items():
                    self._save_network(network, folder / name)
            (folder / "config.yaml").write_text(yaml.safe_dump(self.settings, sort_keys=False))
            self.write_metrics(folder)
            self._write_card(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def extra_networks(self) -> dict[str, torch.nn.Module]:
        """The networks that are trained beside the transformer, under the names of their folders."""
        return {} if self.model.head is None else {self.head_name: self.model.head}

    @staticmethod
    def _save_network(network: torch.nn.Module, folder: Path) -> None:
        if isinstance(network, ModelMixin):
            network.save_pretrained(folder)
        else:
            folder.mkdir(exist_ok=True)
            save_model(network, str(folder / "model.safetensors"))

    def run_settings(self) -> dict[str, Any]:
        """Every setting that differs from its default, under the names of the command line, as `config.yaml` keeps it."""
        values = self.args.to_dict()
        defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(self.args)}
        changed = {k: v for k, v in values.items() if k in defaults and v != defaults[k] and k not in NOT_OF_THE_RUN}
        settings: dict[str, Any] = {"model": self.flow.name, "reward_funcs": [r.name for r in self.rewards]}
        settings["eval_reward_funcs"] = [r.name for r in self.eval_rewards]
        if self.peft_config is None:
            settings["lora_r"] = 0
        else:
            settings |= {f"lora_{name}": getattr(self.peft_config, f"lora_{name}") for name in ("alpha", "dropout")}
            targets = self.peft_config.target_modules or []
            settings |= {"lora_r": self.peft_config.r, "lora_target_modules": [targets] if isinstance(targets, str) else sorted(targets)}
        return json.loads(json.dumps(settings | changed, default=str))  # plain types alone, for YAML

    def write_metrics(self, folder: Path) -> None:
        """`metrics.json`: the rows of the last evaluation and the seconds so far."""
        report = self.rows | {"seconds": {phase: round(value, 1) for phase, value in self.seconds_so_far().items()}}
        (folder / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """Write the card of the run into `output_dir`; what is told once stands in later cards too.

        model_name: the heading. dataset_name: the data set of the prompts on the Hub. tags: added to those of the method.
        """
        # `push_to_hub` passes the name that the card has anyway.
        told = {"name": None if model_name in ("", self._default_name) else model_name, "dataset": dataset_name, "license": license}
        self.told_for_card |= {name: value for name, value in told.items() if value is not None}
        if tags is not None:
            self.told_for_card["further_tags"] = [tags] if isinstance(tags, str) else list(tags)
        if self.is_world_process_zero():
            self._write_card(Path(self.args.output_dir))

    def _write_card(self, folder: Path) -> None:
        output = Path(self.args.output_dir)
        sheet = next((s for s in (output / "before_after.png", self.sheet) if s is not None and s.exists()), None)
        args = self.args
        adapter = {} if self.peft_config is None else {"LoRA rank, alpha": f"{self.peft_config.r}, {self.peft_config.lora_alpha}"}
        sampling = self.flow.call_arguments() | {"num_inference_steps": args.eval_num_inference_steps or args.num_inference_steps}
        told: dict[str, Any] = {"name": self._default_name} | self.told_for_card
        facts = CardFacts(
            method=self._name,
            paper=self._paper,
            tags=self._tag_names,
            base_model=self.flow.name,
            loader=self.flow.loader(),
            scheduler=self.flow.scheduler_code(self.renoises),
            has_adapter=self.peft_config is not None,
            rewards=dict(zip([r.name for r in self.rewards], self.reward_weights.tolist(), strict=True)),
            settings={"updates": self.step_of_weights, "images per update": args.images_per_update}
            | {"learning rate": args.learning_rate, "seed": args.seed}
            | adapter
            | self.card_settings(),
            **({"sampling": sampling} | self.card_sampling()),
            rows=self.rows,
            picture=sheet.relative_to(output).as_posix() if sheet and folder.resolve() == output.resolve() else None,
            repository=self.hub_model_id,
            prompt=self.flow.example_prompt,
            task=self.flow.task,
            **told,
        )
        (folder / "README.md").write_text(model_card(facts))

    @property
    def step_of_weights(self) -> int:
        """The update that made the weights as they are: the last, or that of the best checkpoint at the end."""
        return self._best_step or self.state.global_step

    @property
    def _default_name(self) -> str:
        args = self.args
        return args.hub_model_id.split("/")[-1] if args.hub_model_id else Path(args.output_dir).resolve().name

    @property
    def renoises(self) -> bool:
        """Whether pictures are drawn by a sampler that draws all noise afresh at every step, which the stock scheduler can."""
        return False

    def card_sampling(self) -> dict[str, Any]:
        """The facts of `CardFacts` about sampling, where an algorithm does not draw by the ODE on the stock grid."""
        return {}

    def card_settings(self) -> dict[str, Any]:
        """The settings of the algorithm that its card shows."""
        return {}

    def write_sheet(self, base: Pictures, tuned: Pictures) -> None:
        """`samples/step-N.png` with base and tuned pictures under one another, its facts beside it, and both to TensorBoard."""
        folder = Path(self.args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        sheet, _ = before_after(base.prompts, {"base": base.images, "tuned": tuned.images}, Pictures.right(base, tuned))
        stem = folder / f"step-{self.step_of_weights:06d}"
        sheet.save(f"{stem}.png")
        facts = {"prompts": base.prompts, "seeds": base.seeds, "base": base.scores, "tuned": tuned.scores, "extra": tuned.extra}
        Path(f"{stem}.json").write_text(json.dumps(facts, indent=2, default=str) + "\n")
        self.sheet = Path(f"{stem}.png")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for label, pictures in (("base", base), ("tuned", tuned)):
                    callback.tb_writer.add_images(f"samples/{label}", pictures.images.cpu().numpy(), self.step_of_weights)

    # ---- checkpoints -----------------------------------------------------------------------------------------------------

    def find_checkpoint(self, wanted: str | Literal[True]) -> Path:
        """The checkpoint to resume from; says which incomplete ones were passed over. See `checkpoint_to_resume`."""
        folder, passed_over = checkpoint_to_resume(Path(self.args.output_dir), wanted)
        for incomplete in passed_over:
            logger.warning("Passed over %s, which is incomplete: it has no valid %s.", incomplete, MANIFEST)
        logger.info("Resuming from %s.", folder)
        return folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / MANIFEST).unlink(missing_ok=True)  # of an earlier run that got as far
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if not self.args.save_only_model:
            torch.save(self._loop_state(), folder / f"loop_state_{self.args.process_index}.pt")
        if self.args.should_save:
            save_file({name: value.detach().contiguous() for name, value in self._changed_tensors().items()}, folder / WEIGHTS)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_manifest(folder)
            # Only now: until the manifest is there, older checkpoints are the newest good ones.
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)
        if self.args.push_to_hub and self.is_world_process_zero():
            self._push_checkpoint(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Called before the manifest is written; `_save_checkpoint` pushes afterwards."""

    def _push_checkpoint(self, folder: Path) -> None:
        """Push as `hub_strategy` says, in the background; without Trainer's `training_args.bin`, which holds the token."""
        strategy, pending = self.args.hub_strategy, self.push_in_progress
        earlier = [] if pending is None or pending.is_done() else pending.jobs
        if strategy == HubStrategy.END or (earlier and not self.args.hub_always_push):
            return
        self.save_model(_internal_call=True)

        def upload(path: str | Path, path_in_repo: str | None = None) -> Any:
            return HfApi().upload_folder(
                repo_id=self.hub_model_id,
                folder_path=path,
                path_in_repo=path_in_repo,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                run_as_future=True,
                ignore_patterns=["_*", "checkpoint-*"],
            )

        jobs = [upload(self.args.output_dir)]
        if strategy == HubStrategy.CHECKPOINT:
            jobs.append(upload(folder, "last-checkpoint"))
        elif strategy == HubStrategy.ALL_CHECKPOINTS:
            jobs.append(upload(folder, folder.name))
        self.push_in_progress = PushInProgress([*earlier, *jobs])

    def _replayed(self) -> dict[str, Any]:
        """What must be as it was for a resumed run to repeat the uninterrupted one."""
        return {
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "number of processes": self.args.world_size,
            "steps_per_generation": self.args.micro_steps_per_rollout,
            "reward_weights": self.reward_weights.tolist(),
            "arguments of the pipeline": self.flow.call_arguments(),
        } | {name: getattr(self.args, name) for name in self.replayed_settings}

    def _loop_state(self) -> dict[str, Any]:
        used_up = self._micro_step % (self.args.micro_steps_per_rollout * self.args.num_iterations) == 0
        window = [
            {"keys": [[e.key.row, e.key.image, e.key.rollout] for e in b.examples], "tensors": b.tensors, "good": b.good}
            for b in ([] if used_up else self._window)
        ]
        return {
            "replayed": self._replayed(),
            "micro_step": self._micro_step,
            "window": window,
            "metrics": dict(self._metrics),
            "seconds": self.seconds_so_far(),
            "rollout_reward": self.rollout_reward,
            "ema": None if self.ema is None else self.ema.state_dict(),
            "algorithm": self.algorithm_state(),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        own = folder / f"loop_state_{self.args.process_index}.pt"
        if not own.exists():
            raise ValueError(
                f"{folder} has no {own.name}: it was saved with `save_only_model` or by fewer processes, and cannot be gone on from."
            )
        state = torch.load(own, map_location=self.args.device, weights_only=True)
        for name, value in self._replayed().items():
            if state["replayed"][name] != value:
                raise ValueError(
                    f"{folder} was saved with {name} {state['replayed'][name]}, but this run has {value}: a resumed run repeats the "
                    "uninterrupted one only with the same."
                )
        self._load_weights(folder)
        self._take_up_rows(folder)
        self._micro_step = state["micro_step"]
        self._window = [
            MicroBatch([self.train_dataset[ImageKey(*key)] for key in part["keys"]], part["tensors"], part["good"])
            for part in state["window"]
        ]
        self._metrics.update(state["metrics"])
        self.seconds.update(state["seconds"])
        self.rollout_reward = state["rollout_reward"]
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.load_algorithm_state(state["algorithm"])

    def _changed_tensors(self) -> dict[str, torch.Tensor]:
        """What training changes: the trained parameters, and the buffers of networks that are trained whole (running statistics)."""
        tensors: dict[str, torch.Tensor] = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        whole = {"head": self.model.head, "transformer": self.model.transformer if self.peft_config is None else None}
        for part, network in whole.items():
            if network is not None:
                kept = network.state_dict(keep_vars=True)
                tensors |= {f"{part}.{name}": buffer for name, buffer in network.named_buffers() if name in kept}
        return tensors

    def _load_weights(self, folder: Path) -> None:
        weights, tensors = load_file(folder / WEIGHTS), self._changed_tensors()
        if set(weights) != set(tensors):
            raise ValueError(f"{folder} holds other trained parameters than this run: resume with the same model and `peft_config`.")
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(weights[name])

    def _take_up_rows(self, folder: Path) -> int:
        """The last evaluation before a checkpoint, which its card tells of, and its sheet of pictures; returns the checkpoint's update."""
        self.rows = json.loads((folder / "metrics.json").read_text())
        self.rows.pop("seconds")
        step = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
        sheets = sorted((Path(self.args.output_dir) / "samples").glob("step-*.png"), reverse=True)
        self.sheet = next((sheet for sheet in sheets if self.rows and sheet.stem <= f"step-{step:06d}"), None)
        return step

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        self._load_weights(folder)
        self._best_step = self._take_up_rows(folder)
        own = folder / f"loop_state_{self.args.process_index}.pt"
        if own.exists():  # not with `save_only_model`
            state = torch.load(own, map_location=self.args.device, weights_only=True)
            self.load_algorithm_state(state["algorithm"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
