"""`flowrl score FOLDER --rewards NAME ...`: score pictures that exist, and show the best and the worst."""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from ..rewards import Reward, as_rewards
from ..rewards.named import refuse_all_but_pictures
from ..run_folder.score_sheets import SHOWN, draw_histograms, picture_rows
from ..run_folder.text_files import write_json, write_text
from ..sampling.scoring import call_rewards
from ..trainers.input_checks import check_columns, writable_folder
from .device import device_of
from .evaluate import CONTEXT
from .named_reward import named_reward
from .picture_files import NamedPicture, find_pictures

WRITTEN = "table.md, table.json, histogram.png and pictures.png"
SHEETS = ("histogram.png", "pictures.png")


def score(arguments: list[str]) -> None:
    """Score, print the summary and write the files. Raises `ValueError` if an argument is wrong."""
    parser = argparse.ArgumentParser("flowrl score", description=__doc__.split(": ", 1)[1], allow_abbrev=False)
    parser.add_argument("FOLDER", help="A folder with pictures, or a data set of the Hub with a column 'image'.")
    parser.add_argument(
        "--rewards", nargs="+", required=True, help="Known rewards such as 'ocr', or functions as 'module.function'."
    )
    parser.add_argument(
        "--prompts",
        help="A file (.jsonl, .csv, .txt, ...) with a row per picture, matched by a column 'file_name' where there is "
        "one, else in the order of the pictures' names. Default: the names of the files.",
    )
    parser.add_argument("--prompt_column", help="The column with the prompts. Default: 'prompt'.")
    parser.add_argument("--split", help="The split of a data set. Default: 'train'.")
    parser.add_argument("--batch_size", type=int, default=8, help="The pictures of one size scored at a time.")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="Where the rewards compute."
    )
    parser.add_argument("--out", default="flowrl-scores", help=f"The folder for {WRITTEN}.")
    args = parser.parse_args(arguments)
    if args.batch_size < 1:
        raise ValueError(f"`batch_size` ({args.batch_size}) must be at least 1.")
    _refuse_idle(args)
    device, folder = device_of(args.device), Path(args.out)
    sheets = [folder / name for name in SHEETS]  # of an earlier call, where the folder lies among the pictures
    pictures = find_pictures(
        args.FOLDER, args.prompts, args.prompt_column or "prompt", args.split or "train", leave_out=sheets
    )
    rewards = as_rewards([named_reward(name) for name in args.rewards], "rewards")
    refuse_all_but_pictures(rewards, "rewards")
    rows = [p.example.columns | {"prompt": p.example.prompt} for p in pictures]
    check_columns(rewards, Dataset.from_list(rows), "prompts")
    writable_folder(folder, "out")
    for picture in pictures:  # one that cannot be read would cost the scores of those before it
        picture.load()
    for reward in rewards:
        reward.to(device)
    scores = torch.cat(list(_scores(rewards, pictures, args.batch_size, device)))
    by_reward = {reward.name: column.tolist() for reward, column in zip(rewards, scores.unbind(dim=1), strict=True)}
    summary = summary_table(by_reward)
    write_text(folder / "table.md", f"{summary}\n\n{_picture_table(pictures, by_reward)}\n")
    write_json(folder / "table.json", _json_rows(pictures, by_reward))
    draw_histograms(sheets[0], {name: _finite(values) for name, values in by_reward.items()})
    _best_and_worst(pictures, by_reward).save(sheets[1])
    print(f"\n{summary}\n\n{WRITTEN} are in {folder}/.")


def _refuse_idle(args: argparse.Namespace) -> None:
    """Raises `ValueError` for arguments that have no effect beside the others."""
    is_folder = Path(args.FOLDER).is_dir()
    for name, needs in (("prompts", is_folder), ("split", not is_folder)):
        if getattr(args, name) is not None and not needs:
            given = "a folder with pictures" if is_folder else "no folder"
            raise ValueError(
                f"`{name}` ({getattr(args, name)!r}) has no effect, as {args.FOLDER!r} is {given}: leave it out."
            )
    if args.prompt_column is not None and is_folder and args.prompts is None:
        raise ValueError(f"`prompt_column` ({args.prompt_column!r}) has no effect without `prompts`: leave it out.")


@torch.no_grad()
def _scores(
    rewards: list[Reward], pictures: list[NamedPicture], batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    """The scores (B, R) of neighbouring pictures of one size, batch by batch; a None is NaN, a fault infinite."""
    loaded = ((picture, picture.load()) for picture in pictures)
    for _, same_size in groupby(loaded, key=lambda pair: pair[1].size):
        while batch := list(islice(same_size, batch_size)):
            images = torch.stack([to_tensor(image) for _, image in batch]).to(device)
            yield call_rewards(rewards, images, [picture.example for picture, _ in batch], **CONTEXT).cpu()


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture as rewards see it: (3, H, W), float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def summary_table(by_reward: dict[str, list[float]]) -> str:
    """A row per reward in Markdown: how many pictures have a score, and how the scores are spread."""
    lines = ["| reward | scored | None | faults | mean | std | min | median | max |", "|---|" + "---:|" * 8]
    for name, values in by_reward.items():
        counts = [len(_finite(values)), sum(map(math.isnan, values)), sum(map(math.isinf, values))]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} | {' | '.join(_spread(_finite(values)))} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> list[str]:
    if not values:
        return [""] * 5
    numbers = (np.mean(values), np.std(values), min(values), statistics.median(values), max(values))
    return [f"{number:.4g}" for number in numbers]


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _picture_table(pictures: list[NamedPicture], by_reward: dict[str, list[float]]) -> str:
    lines = [f"| picture | {' | '.join(by_reward)} | prompt |", "|---|" + "---:|" * len(by_reward) + "---|"]
    for i, picture in enumerate(pictures):
        cells = [_cell(values[i]) for values in by_reward.values()]
        prompt = " ".join(picture.example.prompt.split()).replace("|", "\\|")
        lines.append(f"| {picture.name} | {' | '.join(cells)} | {prompt} |")
    return "\n".join(lines)


def _cell(value: float) -> str:
    return "" if math.isnan(value) else "fault" if math.isinf(value) else f"{value:.4g}"


def _json_rows(pictures: list[NamedPicture], by_reward: dict[str, list[float]]) -> list[dict[str, object]]:
    return [
        {"picture": picture.name, "prompt": picture.example.prompt}
        | {name: values[i] for name, values in by_reward.items()}
        for i, picture in enumerate(pictures)
    ]


def _best_and_worst(pictures: list[NamedPicture], by_reward: dict[str, list[float]]) -> Image.Image:
    """A sheet with two rows per reward, from its best picture down and from its worst up."""
    rows: dict[str, list[tuple[Image.Image, str]]] = {}
    for name, values in by_reward.items():
        order = sorted((i for i, value in enumerate(values) if math.isfinite(value)), key=lambda i: -values[i])
        for label, chosen in (("best", order[:SHOWN]), ("worst", order[::-1][:SHOWN])):
            captions = [f"{values[i]:.4g}: {pictures[i].example.prompt}" for i in chosen]
            rows[f"{name}, {label}"] = [(pictures[i].load(), c) for i, c in zip(chosen, captions, strict=True)]
    return picture_rows(rows)
