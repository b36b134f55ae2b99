"""`FlowRLConfig`: the settings that all trainers share."""

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import SchedulerType, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations import get_available_reporting_integrations

from ..cost import Call, Drawing, Kind, Phase
from ..pipelines.quantization import Quantization
from ..suggestions import did_you_mean
from .attention import check_backend_name
from .config_checks import Range, check_fields, refuse_unsupported, shown
from .optimizer_checks import check_optimizer
from .schedule_checks import check_schedule


@dataclass
class FlowRLConfig(TrainingArguments):
    r"""Settings shared by all trainers, beside those of `transformers.TrainingArguments`.

    `per_device_train_batch_size` counts images per device and micro-step. One update takes
    `per_device_train_batch_size * gradient_accumulation_steps * processes` images, which `num_generations` must
    divide. One rollout fills `steps_per_generation` micro-steps and is used `num_iterations` times.

    Different from `TrainingArguments`: `learning_rate` 1e-4, `lr_scheduler_type` "constant", `logging_steps` 1,
    `remove_unused_columns` False (other columns reach the rewards), `ddp_find_unused_parameters` False, `disable_tqdm`
    False whatever the verbosity.
    """

    learning_rate: float = HfArg(default=1e-4, help="The initial learning rate of AdamW.")
    lr_scheduler_type: SchedulerType | str = HfArg(default="constant", help="The learning rate schedule.")
    logging_steps: float = HfArg(
        default=1, help="Log every this many updates; a number below 1 is a share of all updates."
    )
    remove_unused_columns: bool | None = HfArg(
        default=False, help="Must stay false: the other columns of the dataset are passed to the rewards."
    )
    ddp_find_unused_parameters: bool | None = HfArg(
        default=False, help="Whether DDP looks for parameters without gradients; every trained one has a gradient."
    )
    disable_tqdm: bool | None = HfArg(
        default=False,
        help="Whether a terminal shows a line for each log, as a file does, in place of the live line and the bars.",
    )
    greater_is_better: bool | None = HfArg(
        default=None,
        help="Whether a larger `metric_for_best_model` is better. Default: yes for rewards; else unless its name "
        "ends in 'loss'.",
    )

    overwrite_output_dir: bool = HfArg(
        default=False,
        help="Whether a new run may start in an `output_dir` that holds another, whose files are moved to "
        "`<output_dir>.before-1` (or -2, ...). Default: such a folder is refused. A run that is resumed stays there.",
    )

    # Sampling
    num_inference_steps: Annotated[int, Range(at_least=1)] = HfArg(
        default=20, help="The number of sampler steps of a rollout."
    )
    eval_num_inference_steps: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None, help="The number of sampler steps of an evaluation. Default: `num_inference_steps`."
    )
    guidance_scale: Annotated[float, Range(at_least=0)] | None = HfArg(
        default=None,
        help="The guidance scale of rollouts and evaluations; 1 is off, 0 for Z-Image. Default: the pipeline's own.",
    )
    guidance_in_one_call: bool | None = HfArg(
        default=None,
        help="Whether both branches of guidance are computed in one call of twice the batch, where no weight takes a "
        "gradient: faster, with twice the activations, and the same but for rounding. Not for TAFS-GRPO. Default: the "
        "pipeline's own, mostly not.",
    )
    negative_prompt: str | None = HfArg(
        default=None, help="What guidance leads away from. Default: the pipeline's own, mostly the empty prompt."
    )
    height: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None, help="The height of images in pixels. Default: the pipeline's own."
    )
    width: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None, help="The width of images in pixels. Default: the pipeline's own."
    )
    max_sequence_length: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None, help="The number of prompt tokens of families that take it. Default: the pipeline's own."
    )

    # Rollouts
    num_generations: Annotated[int, Range(at_least=1)] = HfArg(
        default=1, help="The number of images per prompt in a rollout. Must divide the images per update."
    )
    steps_per_generation: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None,
        help="The number of micro-steps that one rollout fills, a multiple of `gradient_accumulation_steps`. "
        "Default: `gradient_accumulation_steps`, one update per rollout.",
    )
    num_iterations: Annotated[int, Range(at_least=1)] = HfArg(default=1, help="How many times each rollout is used.")
    rollout_batch_size: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None,
        help="The number of images per device that are drawn, scored and given to the base model at a time, a "
        "multiple of `per_device_train_batch_size`, which is the size of updates alone: larger batches are faster and "
        "need more memory, and rewards are called with them. TAFS-GRPO draws in batches of its updates all the same, "
        "as rounding depends on the size of a batch. Default: `per_device_train_batch_size`.",
    )
    decode_batch_size: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None,
        help="The number of images decoded and scored at a time. Default: a batch, decoded a megapixel at a time, "
        "and scored so too where a gradient is taken.",
    )

    # Memory
    quantization: Quantization | None = HfArg(
        default=None,
        help="In how many bits the linear layers of a model that is named by id or folder are kept, to train a LoRA "
        "on: 'nf4' (4 bits, by bitsandbytes, on a GPU alone), 'int8' or 'float8' (8 bits, by torchao). They compute "
        "in the precision of `bf16` or `fp16`. Default: all bits. A pipeline that you quantised is taken as it is.",
    )
    text_encoder_quantization: Quantization | None = HfArg(
        default=None, help="The same of the text encoders of a model that is named. Default: all bits."
    )
    offload_between_phases: bool = HfArg(
        default=False,
        help="Whether the network waits in the memory of the host while pictures are decoded and scored, and the "
        "autoencoder and the rewards while it draws and learns, so that they need not fit on the device together: "
        "slower, and the same results.",
    )
    frozen_copy: Literal["float32", "as_loaded"] = HfArg(
        default="float32",
        help="The precision of the copy of the network that stays as it was where all weights are trained: that of "
        "the trained weights, or the one in which the model was loaded, such as bfloat16, which is half of it.",
    )
    embedding_memory_gib: Annotated[float, Range(at_least=0)] | None = HfArg(
        default=None,
        help="The GiB of encoded prompts that each process keeps in memory; those beyond are read from a file in the "
        "folder for temporary files (`TMPDIR`), with the same results. Default: all are kept in memory.",
    )
    cache_encoded_prompts: bool = HfArg(
        default=False,
        help="Whether encoded prompts are kept on disk, below `HF_ASSETS_CACHE`, so that the next run with the same "
        "prompts and text encoders does not encode them again.",
    )

    # Cheaper calls
    compile_blocks: bool = HfArg(
        default=False,
        help="Whether the repeated blocks of the network are compiled (`torch.compile`), for rollouts, evaluations "
        "and updates alike. The first updates take minutes longer; results differ by rounding.",
    )

    merge_adapter: bool = HfArg(
        default=False,
        help="Whether rollouts are drawn with the adapter added to the weights, which saves the path beside them and "
        "takes memory for a second copy of the adapted weights; the same but for rounding. In float32 alone, as lower "
        "precision would round small changes away. Not for TAFS-GRPO.",
    )
    attention_backend: str | None = HfArg(
        default=None,
        help="The kernel that computes attention, by diffusers' name, such as 'flash'; it needs a gradient. Families "
        "whose attention is torch's in any case, as that of Stable Diffusion 3, refuse it. Default: diffusers' own.",
    )

    decoder_dtype: Literal["float32", "bfloat16", "float16"] = HfArg(
        default="float32",
        help="The precision in which pictures are decoded, those of evaluations too. Trainers that take the gradient "
        "of the reward need float32.",
    )

    cache_base_pictures: bool = HfArg(
        default=False,
        help="Whether what the base model draws in evaluations is kept on disk, below `HF_ASSETS_CACHE`, so that the "
        "next run with the same model, prompts, seeds and sampler does not draw it again.",
    )
    log_images: Annotated[int, Range(at_least=0)] = HfArg(
        default=8,
        help="The number of held-out prompts whose pictures every evaluation writes into `samples/`; 0 for none.",
    )

    # Training
    ema_decay: Annotated[float, Range(above=0, below=1)] | None = HfArg(
        default=None,
        help="The decay of a moving average of the trained weights, which is evaluated and saved in their place; "
        "below 1. The average warms up as in diffusers' `EMAModel`. Default: no average.",
    )
    max_bad_sample_share: Annotated[float, Range(at_least=0, at_most=1)] = HfArg(
        default=0.25,
        help="Samples whose reward, reward gradient or loss is not finite are left out; where they are more than "
        "this share of a rollout or micro-batch, the run stops. Between 0 and 1.",
    )
    target_reward: float | None = HfArg(
        default=None, help="Training stops once the mean weighted reward of a rollout reaches this. Default: never."
    )

    # Rewards
    reward_weights: list[float] | None = HfArg(
        default=None, help="One weight per reward; the reward that is maximised is the weighted sum. Default: all 1."
    )

    rewards_column: str | None = HfArg(
        default=None,
        help="The column with a list of the names of the rewards that apply to a prompt, so that one run mixes tasks: "
        "pictures of other prompts are not shown to a reward, whose score counts as None. A row without a list is for "
        "all rewards. Rewards of `eval_reward_funcs` see all pictures. Default: all rewards apply to all prompts.",
    )

    __repr__ = TrainingArguments.__repr__  # hides tokens; `@dataclass` writes one that shows them

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            cls.__repr__ = FlowRLConfig.__repr__

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        parameters = inspect.signature(cls.__init__).parameters
        unknown = [name for name in settings if name not in parameters]
        if unknown and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            names = ", ".join(map(repr, unknown))
            raise TypeError(f"{cls.__name__} has no setting {names}{did_you_mean(unknown, parameters)}.")
        return super().__new__(cls)

    @property
    def images_per_update(self) -> int:
        """The images of one update, over all micro-steps and processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def images_at_once(self) -> int:
        """The images per device that phases outside of updates take at a time."""
        return self.rollout_batch_size or self.per_device_train_batch_size

    @property
    def micro_steps_per_rollout(self) -> int:
        """The micro-steps of one pass over a rollout."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def images_per_device(self) -> int:
        """The images of one rollout on one process."""
        return self.per_device_train_batch_size * self.micro_steps_per_rollout

    @property
    def updates_per_rollout(self) -> int:
        """The updates of one pass over a rollout."""
        return self.micro_steps_per_rollout // self.gradient_accumulation_steps

    @property
    def images_per_rollout(self) -> int:
        """The images of one rollout, over all micro-steps and processes."""
        return self.images_per_update * self.updates_per_rollout

    @property
    def pool_size(self) -> int | None:
        """The (prompt, noise) pairs that all rollouts are drawn from; None where each draws new noise."""
        return None

    # ---- what one rollout and its updates cost ----------------------------------------------------------------------

    @property
    def updates_on_rollout(self) -> int:
        """The updates that use one rollout, over all passes."""
        return self.updates_per_rollout * self.num_iterations

    @property
    def keeps_old_policy(self) -> bool:
        """Whether an earlier set of the trained weights is kept beside the present one."""
        return False

    def calls(self, drawing: Drawing) -> list[Call]:
        """What one process computes for one rollout and all updates on it, once nothing warms up; see `Call`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it calls: override `calls`.")

    def first_calls(self, drawing: Drawing) -> list[Call]:
        """What is computed once in a run beside that, by its first rollouts."""
        return []

    def rollout_calls(self, drawing: Drawing) -> list[Call]:
        """The steps of the sampler on all images."""
        images, steps = self.images_per_device, self.num_inference_steps
        return drawing.velocities(Kind.FORWARD, images, self.images_at_once, steps, Phase.ROLLOUT)

    def evaluation_calls(self, drawing: Drawing) -> list[Call]:
        """The pictures of one batch of an evaluation."""
        steps, size = self.eval_num_inference_steps or self.num_inference_steps, self.per_device_eval_batch_size
        calls = drawing.velocity(Kind.FORWARD, size, steps, Phase.EVALUATION)
        for call in replace(drawing, decodes=True).scores(size, self.decode_batch_size or size):
            calls.append(replace(call, phase=Phase.EVALUATION))
        return calls

    @property
    def reward_decoder_name(self) -> str | None:
        """The tiny autoencoder that takes the gradient of the reward, if any."""
        return None

    @property
    def head_kind(self) -> Literal["value_network", "critic"] | None:
        """The network that is trained beside the transformer."""
        return None

    @property
    def latents_kept(self) -> int:
        """The latents of each image that wait in the buffer for the loss."""
        return 0

    def prompts_of_batches(self, size: int) -> list[int]:
        """The number of different prompts in every batch of `size` images of a rollout, on the first process."""
        share = self.images_per_update // self.world_size
        starts = range(0, self.images_per_rollout, self.images_per_update)
        prompts = [(start + image) // self.num_generations for start in starts for image in range(share)]
        return [len(set(prompts[first : first + size])) for first in range(0, len(prompts), size)]

    def __post_init__(self) -> None:
        weights: Any = self.reward_weights
        if weights is not None:  # YAML reads one weight as a number, and 1e-2 in a list as a string
            try:
                listed = weights if isinstance(weights, (list, tuple)) else [weights]
                if any(isinstance(weight, bool) for weight in listed):
                    raise TypeError("a truth value is no weight")
                self.reward_weights = [float(weight) for weight in listed]
            except (TypeError, ValueError) as error:
                raise ValueError(f"`reward_weights` is {weights!r}: name one number per reward.") from error
        refuse_unsupported(self)
        check_fields(self)
        if self.output_dir is not None and (not str(self.output_dir).strip() or "\0" in str(self.output_dir)):
            raise ValueError(f"`output_dir` ({self.output_dir!r}) must be the path of a folder.")
        if self.reward_weights and not any(self.reward_weights):
            raise ValueError(
                f"`reward_weights` ({self.reward_weights}) are all 0, so that nothing would be maximised: leave a "
                "reward that is to be watched alone to `eval_reward_funcs`."
            )
        if self.push_to_hub:
            self._check_hub_name()
        check_optimizer(self)
        if self.merge_adapter and (self.bf16 or self.fp16):
            raise ValueError(
                f"`merge_adapter` is True with `{'bf16' if self.bf16 else 'fp16'}`, which would round small changes "
                "of the weights away: leave one of them out."
            )
        if self.merge_adapter and self.quantization is not None:
            raise ValueError(
                f"`merge_adapter` is True with `quantization` ({self.quantization!r}), and nothing can be added to "
                "quantised weights: leave one of them out."
            )
        if self.attention_backend is not None:
            check_backend_name(self.attention_backend)
        if self.max_steps == 0:
            raise ValueError("`max_steps` (0) must be at least 1, or -1 to train for `num_train_epochs`.")
        if self.eval_strategy == "steps" and not self.eval_steps:
            raise ValueError(
                f"`eval_strategy` is 'steps', but `eval_steps` is {self.eval_steps}: say after how many updates to "
                "evaluate."
            )
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            raise ValueError(
                "`save_strategy` is 'best', but `metric_for_best_model` is None: name the metric, such as "
                "'reward/shapes'."
            )
        if self.gradient_checkpointing_kwargs and not self.gradient_checkpointing:
            raise ValueError(
                f"`gradient_checkpointing_kwargs` ({shown(self.gradient_checkpointing_kwargs)}) has no effect without "
                "`gradient_checkpointing`: set that to True."
            )
        if self.greater_is_better is None and "reward/" in (self.metric_for_best_model or ""):
            self.greater_is_better = True  # Trainer would take False if the reward's name ends in "loss"
        try:
            super().__post_init__()
        except ValueError as error:  # as of `tf32` on a device without it
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ValueError(f"`transformers.TrainingArguments` refuses these settings: {reason}.") from error
        for tracker in self.report_to or []:
            if tracker not in (known := get_available_reporting_integrations()):
                raise ValueError(
                    f"`report_to` names {tracker!r}, which is unknown or not installed: install it, or choose "
                    f"{', '.join([*known, 'none'])}."
                )
        accumulation, images = self.gradient_accumulation_steps, self.images_per_update
        if images % self.num_generations:
            below = images // self.num_generations * self.num_generations
            nearest = " or ".join(str(n) for n in (below, below + self.num_generations) if n)
            raise ValueError(
                f"The images per update ({images} = per_device_train_batch_size {self.per_device_train_batch_size} * "
                f"gradient_accumulation_steps {accumulation} * {self.world_size} processes) must be a multiple of "
                f"`num_generations` ({self.num_generations}), the images per prompt: make it {nearest}."
            )
        if self.steps_per_generation is not None and self.steps_per_generation % accumulation:
            raise ValueError(
                f"`steps_per_generation` ({self.steps_per_generation}) must be a multiple of "
                f"`gradient_accumulation_steps` ({accumulation}): a rollout fills whole updates."
            )
        self.check_whole_micro_batches("rollout_batch_size")
        if self.n_gpu > 1:
            raise ValueError(
                f"One process sees {self.n_gpu} GPUs, which would share each batch: start one process per GPU with "
                "`accelerate launch` or `flowrl METHOD --accelerate_config ddp`, or let it see one "
                "(`CUDA_VISIBLE_DEVICES=0`)."
            )
        if self.mixed_precision != (asked := "fp16" if self.fp16 else "bf16" if self.bf16 else "no"):
            raise ValueError(
                f"accelerate's configuration says `mixed_precision` {self.mixed_precision!r} and this one {asked!r}: "
                "set `bf16` or `fp16` here, where the trainers look."
            )
        if TorchDynamoPlugin().backend != DynamoBackend.NO:
            raise ValueError(
                "`torch_compile` must be False in accelerate's configuration too (`dynamo_backend` 'no'): it would "
                "compile updates alone, and not the rollouts they must agree with."
            )
        if self.save_only_model and self.ema_decay is not None and self.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end` needs the moving average of a checkpoint, which `save_only_model` leaves "
                "out: choose one."
            )
        check_schedule(self)

    def _check_hub_name(self) -> None:
        """Raises `ValueError` where the Hub would not have a repository of this name."""
        setting = "output_dir" if self.hub_model_id is None else "hub_model_id"
        name = self.hub_model_id or Path(str(self.output_dir)).absolute().name
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(
                f"`push_to_hub` is True, but the Hub has no repository called {name!r}, after `{setting}`: set "
                "`hub_model_id` to 'name' or 'owner/name' of letters, digits, '-', '_' and '.'."
            ) from error

    def check_whole_micro_batches(self, name: str) -> None:
        """Raises `ValueError` where a number of images is set that is no multiple of `per_device_train_batch_size`.

        Args:
            name: Of the setting.
        """
        images, micro_batch = vars(self)[name], self.per_device_train_batch_size
        if images is not None and images % micro_batch:
            raise ValueError(
                f"`{name}` ({images}) must be a multiple of `per_device_train_batch_size` ({micro_batch}): it holds "
                "whole micro-batches."
            )
