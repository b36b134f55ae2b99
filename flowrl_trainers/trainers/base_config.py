"""`FlowRLConfig`: the settings that all trainers share."""

from dataclasses import dataclass, field

from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from transformers import SchedulerType, TrainingArguments
from transformers.integrations import get_available_reporting_integrations


@dataclass
class FlowRLConfig(TrainingArguments):
    r"""Settings shared by all trainers, beside those of `transformers.TrainingArguments`.

    `per_device_train_batch_size` counts images per device and micro-step. One update takes
    `per_device_train_batch_size * gradient_accumulation_steps * processes` images, which `num_generations` must
    divide. One rollout fills `steps_per_generation` micro-steps and is used `num_iterations` times.

    Different from `TrainingArguments`: `learning_rate` 1e-4, `lr_scheduler_type` "constant", `logging_steps` 1,
    `remove_unused_columns` False (other columns reach the rewards), `ddp_find_unused_parameters` False.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate schedule."})
    logging_steps: float = field(
        default=1, metadata={"help": "Log every this many updates; a number below 1 is a share of all updates."}
    )
    remove_unused_columns: bool | None = field(
        default=False,
        metadata={"help": "Must stay false: the other columns of the dataset are passed to the rewards."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={"help": "Whether DDP looks for parameters without gradients; every trained one has a gradient."},
    )
    greater_is_better: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a larger `metric_for_best_model` is better. Default: yes for rewards; else unless its name ends in 'loss'."
        },
    )

    # Sampling
    num_inference_steps: int = field(default=20, metadata={"help": "The number of sampler steps of a rollout."})
    eval_num_inference_steps: int | None = field(
        default=None,
        metadata={"help": "The number of sampler steps of an evaluation. Default: `num_inference_steps`."},
    )
    guidance_scale: float | None = field(
        default=None,
        metadata={
            "help": "The guidance scale of rollouts and evaluations; 1 is off, 0 for Z-Image. Default: the pipeline's own."
        },
    )
    negative_prompt: str | None = field(
        default=None,
        metadata={"help": "What guidance leads away from. Default: the pipeline's own, mostly the empty prompt."},
    )
    height: int | None = field(
        default=None, metadata={"help": "The height of images in pixels. Default: the pipeline's own."}
    )
    width: int | None = field(
        default=None, metadata={"help": "The width of images in pixels. Default: the pipeline's own."}
    )
    max_sequence_length: int | None = field(
        default=None,
        metadata={"help": "The number of prompt tokens of families that take it. Default: the pipeline's own."},
    )

    # Rollouts
    num_generations: int = field(
        default=1,
        metadata={"help": "The number of images per prompt in a rollout. Must divide the images per update."},
    )
    steps_per_generation: int | None = field(
        default=None,
        metadata={
            "help": "The number of micro-steps that one rollout fills, a multiple of `gradient_accumulation_steps`. "
            "Default: `gradient_accumulation_steps`, one update per rollout."
        },
    )
    num_iterations: int = field(default=1, metadata={"help": "How many times each rollout is used."})
    decode_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "The number of images decoded and scored at a time. Default: a batch, decoded a megapixel at a time, and scored so too "
            "where a gradient is taken."
        },
    )

    log_images: int = field(
        default=8,
        metadata={
            "help": "The number of held-out prompts whose pictures every evaluation writes into `samples/`; 0 for none."
        },
    )

    # Training
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "The decay of a moving average of the trained weights, which is evaluated and saved in their place; below 1. The "
            "average warms up as in diffusers' `EMAModel`. Default: no average."
        },
    )
    max_bad_sample_share: float = field(
        default=0.25,
        metadata={
            "help": "Samples whose reward, reward gradient or loss is not finite are left out; where they are more than this share of a "
            "rollout or micro-batch, the run stops. Between 0 and 1."
        },
    )
    target_reward: float | None = field(
        default=None,
        metadata={"help": "Training stops once the mean weighted reward of a rollout reaches this. Default: never."},
    )

    # Rewards
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "One weight per reward; the reward that is maximised is the weighted sum. Default: all 1."},
    )

    @property
    def images_per_update(self) -> int:
        """The images of one update, over all micro-steps and processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def micro_steps_per_rollout(self) -> int:
        """The micro-steps of one pass over a rollout."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def updates_per_rollout(self) -> int:
        """The updates of one pass over a rollout."""
        return self.micro_steps_per_rollout // self.gradient_accumulation_steps

    def refuse_unknown(self, **choices: tuple[str, ...]) -> None:
        """Raises `ValueError` for a setting that is none of its choices."""
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: choose {', '.join(map(repr, allowed))}.")

    def refuse_below(self, least: float, *names: str) -> None:
        """Raises `ValueError` for a setting below `least`."""
        for name in names:
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least {least}.")

    def refuse_not_positive(self, *names: str) -> None:
        """Raises `ValueError` for a setting that is given and not above 0."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` ({value}) must be above 0.")

    def __post_init__(self) -> None:
        if self.eval_strategy == "steps" and not self.eval_steps:
            raise ValueError(
                f"`eval_strategy` is 'steps', but `eval_steps` is {self.eval_steps}: say after how many updates to "
                "evaluate."
            )
        if self.greater_is_better is None and "reward/" in (self.metric_for_best_model or ""):
            self.greater_is_better = True  # also of a reward whose name ends in "loss"
        super().__post_init__()
        self.refuse_below(1, "num_inference_steps", "num_generations", "num_iterations", "gradient_accumulation_steps")
        self.refuse_below(1, "per_device_train_batch_size", "per_device_eval_batch_size")
        self.refuse_not_positive("decode_batch_size", "eval_num_inference_steps")
        for tracker in self.report_to:
            if tracker not in (known := get_available_reporting_integrations()):
                raise ValueError(
                    f"`report_to` names {tracker!r}, which is unknown or not installed: install it, or choose "
                    f"{', '.join(known) or 'none'}."
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
        if self.steps_per_generation is not None and (
            self.steps_per_generation < 1 or self.steps_per_generation % accumulation
        ):
            raise ValueError(
                f"`steps_per_generation` ({self.steps_per_generation}) must be a multiple of "
                f"`gradient_accumulation_steps` ({accumulation}): a rollout fills whole updates."
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"`ema_decay` ({self.ema_decay}) must be between 0 and 1.")
        if not 0 <= self.max_bad_sample_share <= 1:
            raise ValueError(f"`max_bad_sample_share` ({self.max_bad_sample_share}) must be between 0 and 1.")
        self.refuse_below(0, "log_images")
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
        for name in ("fsdp", "deepspeed", "fp16_full_eval", "bf16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` is not supported: the network must be whole, and in place before training starts."
                )
        if self.remove_unused_columns:
            raise ValueError(
                "`remove_unused_columns` must be False: the other columns of the dataset are passed to the rewards."
            )
        if self.ignore_data_skip:
            raise ValueError(
                "`ignore_data_skip` must be False: a resumed run goes on with the prompts where it stopped."
            )
        if "schedule_free" in str(self.optim).lower():
            raise ValueError(
                f"`optim` ({self.optim}) must be told when training and evaluation take turns, which is not "
                "supported: take AdamW."
            )
        if self.save_only_model and self.ema_decay is not None and self.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end` needs the moving average of a checkpoint, which `save_only_model` leaves "
                "out: choose one."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` must be False: it would change the images per update during training."
            )
        if (
            self.torch_compile or TorchDynamoPlugin().backend != DynamoBackend.NO
        ):  # which accelerate may have been told instead
            raise ValueError(
                "`torch_compile` must be False: it would compile updates alone, and not the rollouts they must agree "
                "with."
            )
        if self.enable_jit_checkpoint:
            raise ValueError(
                "`enable_jit_checkpoint` must be False: it saves in the middle of an update. Set `save_steps` instead."
            )
        if self.lr_scheduler_type == "constant" and (self.warmup_steps or self.lr_scheduler_kwargs):
            raise ValueError(
                "`lr_scheduler_type` 'constant' knows no warm-up and no options: take 'constant_with_warmup' or "
                "another."
            )
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy") and "mode" not in (
            self.lr_scheduler_kwargs or {}
        ):
            name = SchedulerType(self.lr_scheduler_type).value
            raise ValueError(
                f"`lr_scheduler_type` {name!r} takes less for better unless told: set `lr_scheduler_kwargs` to "
                "{'mode': 'max'} for a reward."
            )
        for name, plain, instead in (
            ("data_seed", None, "`seed` orders the prompts"),
            ("train_sampling_strategy", "random", "`seed` orders the prompts"),
            ("torch_empty_cache_steps", None, "memory stays with torch"),
            ("dataloader_num_workers", 0, "the rows of a rollout are read in the process itself"),
        ):
            if getattr(self, name) != plain:
                raise ValueError(f"`{name}` ({getattr(self, name)}) has no effect here, as {instead}: leave it out.")
