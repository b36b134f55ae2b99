"""`flowrl card OUTPUT`: write the card of a run again, from the facts that the run left beside it."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..run_folder.card import read_facts, write_card
from ..run_folder.checkpoints import fault, write_manifest
from ..run_folder.licence import licence_of


def card(arguments: list[str]) -> None:
    """Write `README.md` and `card.json` again; nothing is loaded, and the Hub is not asked.

    Raises `ValueError` for a folder without the facts of a card.
    """
    parser = argparse.ArgumentParser("flowrl card", description=__doc__.split(": ", 1)[1], allow_abbrev=False)
    parser.add_argument("output", type=Path, help="The folder of a run, its `output_dir`, or a checkpoint.")
    parser.add_argument("--license", help="The licence, such as 'apache-2.0'. Default: as it was.")
    parser.add_argument("--dataset", help="The prompts on the Hub. Default: as they were.")
    parser.add_argument("--hub_model_id", help="Where the weights will be on the Hub. Default: as it was.")
    args = parser.parse_args(arguments)
    facts = read_facts(args.output)
    named = {"license": args.license} if args.license else None
    said: dict[str, Any] = {"dataset": args.dataset, "repository": args.hub_model_id}
    said["licence"] = named or facts.licence or licence_of(facts.base_model, offline=True)
    whole_checkpoint = fault(args.output) is None  # whose manifest lists its card
    write_card(args.output, replace(facts, **{name: value for name, value in said.items() if value is not None}))
    if whole_checkpoint:
        write_manifest(args.output)
    print(f"{args.output / 'README.md'} is written.")
