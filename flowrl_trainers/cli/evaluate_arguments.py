"""The settings of `flowrl evaluate`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers.hf_argparser import HfArg

from ..trainers.config_checks import Range, check_fields
from .arguments import as_list


@dataclass
class EvaluateArguments:
    """Model, adapters, rewards, prompts and sampling of an evaluation."""

    model: str = HfArg(
        help="The base pipeline: a Hub id, a folder, or 'shapes' for the small one that ships with the package."
    )
    adapter: list[str] = HfArg(help="The adapters, one or more: folders or Hub ids that `load_lora_weights` reads.")
    rewards: list[str] = HfArg(help="The rewards to measure, named as `reward_funcs` of a run.")
    dataset: str = HfArg(
        default="shapes",
        help="The prompts, named as `dataset` of a run: a file, a data set of the Hub, a folder, or 'shapes'.",
    )
    dataset_config: str | None = HfArg(default=None, help="The configuration of the data set, where it has several.")
    prompt_column: str = HfArg(default="prompt", help="The column that holds the prompts, such as 'caption'.")
    split: str | None = HfArg(
        default=None, help="The split of the prompts. Default: 'held_out', and the whole of a file."
    )
    trained: list[str] = HfArg(
        default_factory=list,
        help="Those of the rewards that the adapters were trained on, to tell a hacked one. Default: none.",
    )
    pictures_per_prompt: Annotated[int, Range(at_least=1)] = HfArg(
        default=4, help="The pictures of each prompt; diversity needs two."
    )
    num_inference_steps: Annotated[int, Range(at_least=1)] = HfArg(default=20, help="The number of sampler steps.")
    guidance_scale: Annotated[float, Range(at_least=0)] | None = HfArg(
        default=None, help="The guidance scale; 1 is off, 0 for Z-Image. Default: the pipeline's own."
    )
    guidance_in_one_call: bool | None = HfArg(
        default=None,
        help="Whether both branches of guidance are computed in one call of twice the batch: faster, with twice the "
        "activations, and the same but for rounding. Default: the pipeline's own, mostly not.",
    )
    negative_prompt: str | None = HfArg(
        default=None, help="What guidance leads away from. Default: the pipeline's own."
    )
    height: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None, help="The height of pictures in pixels. Default: the pipeline's own."
    )
    width: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None, help="The width of pictures in pixels. Default: the pipeline's own."
    )
    max_sequence_length: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None, help="The number of prompt tokens. Default: the pipeline's own."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(
        default="float32", help="The precision of the networks: float32, bfloat16 or float16."
    )
    use_cpu: bool = HfArg(default=False, help="Whether to draw on the CPU where there is a GPU as well.")
    batch_size: Annotated[int, Range(at_least=1)] = HfArg(default=16, help="The pictures drawn at a time.")
    decode_batch_size: Annotated[int, Range(at_least=1)] | None = HfArg(
        default=None,
        help="The pictures decoded and scored at a time. Default: `batch_size`, decoded a megapixel at a time.",
    )
    seed: int = HfArg(default=42, help="The seed of all pictures. Default: the one of a run's evaluation.")
    out: str = HfArg(default="flowrl-evaluation", help="The folder for table.md, table.json and pictures.png.")

    def __post_init__(self) -> None:
        self.adapter, self.rewards, self.trained = as_list(self.adapter), as_list(self.rewards), as_list(self.trained)
        check_fields(self)
