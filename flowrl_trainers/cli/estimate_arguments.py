"""The settings of `flowrl estimate`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers.hf_argparser import HfArg

from ..trainers.config_checks import Range, check_fields
from .arguments import as_list


@dataclass
class EstimateArguments:
    """What an estimate is asked beside the settings of the run."""

    gpu: Literal["t4", "l4", "rtx4090", "a100", "h100", "h200"] | None = HfArg(
        default=None, help="The GPU whose memory and speed the run is compared with. Default: none."
    )
    num_processes: Annotated[int, Range(at_least=1)] = HfArg(
        default=1, help="The number of processes of the run, one per GPU; what is printed is the cost of one."
    )
    accelerate_config: Literal["ddp", "fsdp2"] = HfArg(
        default="ddp",
        help="Whether each process has the network whole ('ddp'), or its share of it ('fsdp2', with `num_processes`); "
        "of a file of your own, what it resembles.",
    )
    latent_rewards: list[str] = HfArg(
        default_factory=list,
        help="Those of the run's rewards that see latents, for which nothing is decoded; what you name as "
        "'module.function' is not imported here. Default: none.",
    )
    json: bool = HfArg(default=False, help="Whether to print JSON in place of a table.")

    def __post_init__(self) -> None:
        self.latent_rewards = as_list(self.latent_rewards)
        check_fields(self)
        if self.accelerate_config == "fsdp2" and self.num_processes == 1:
            raise ValueError(
                "`accelerate_config` is 'fsdp2', which shares the network among processes, but `num_processes` is 1: "
                "give their number, or leave `accelerate_config` out."
            )
