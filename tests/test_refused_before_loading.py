"""What needs no model to be refused is refused before one is loaded, in Python as on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoHaConfig, LoraConfig
from torch import nn

import flowrl_trainers
from flowrl_trainers.cli import main
from flowrl_trainers.pipelines import families
from flowrl_trainers.rewards import differentiable

from .helpers import CAPTIONS, make_trainer, redness
from .tiny import tiny_autoencoder, tiny_sd3

NO_LORA: dict[str, Any] = {"peft_config": None}
SMALL_STEPS = (
    "`quantization` is 'int8', but all weights would be trained, and small steps of quantised ones are lost: "
)
NO_COPY = (
    "`frozen_copy` ('as_loaded') has no effect with a LoRA, whose base model is the network itself: leave it out."
)
# A trainer, settings of its configuration, arguments beside it, flags of the command line beside the settings (None where
# they cannot say it), and the sentence.
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str] | None, str]] = {
    "quantization": ("ACFlow", {"quantization": "int8"}, NO_LORA, ["--lora_r", "0"], SMALL_STEPS),
    "frozen_copy": ("ACFlow", {"frozen_copy": "as_loaded"}, {}, [], NO_COPY),
    "merge_adapter": (
        "ACFlow", {"merge_adapter": True}, NO_LORA, ["--lora_r", "0"],
        "`merge_adapter` is True, but no adapter is trained: leave it out",
    ),
    "merge_adapter, quantization": (
        "ACFlow", {"merge_adapter": True, "quantization": "int8"}, {}, [],
        "`merge_adapter` is True with `quantization` ('int8'), and nothing can be added to quantised weights: leave",
    ),
    "another adapter": (
        "ACFlow", {}, {"peft_config": LoHaConfig()}, None, "`peft_config` is a LoHaConfig: pass a `peft.LoraConfig`",
    ),
    "bias": (
        "ACFlow", {}, {"peft_config": LoraConfig(bias="all")}, None,
        "`peft_config.bias` ('all') changes the base model itself",
    ),
    "start": (
        "ACFlow", {}, {"peft_config": LoraConfig(init_lora_weights="olora")},
        ["--lora_config", '{"init_lora_weights": "olora"}'],
        "`peft_config.init_lora_weights` ('olora') changes the base model itself",
    ),
    "dropout": (
        "TAFSGRPO", {}, {"peft_config": LoraConfig(lora_dropout=0.5)}, ["--lora_dropout", "0.5"],
        "`lora_dropout` (0.5) must be 0: the rollout could not be replayed",
    ),
    "branches": (
        "TAFSGRPO", {"guidance_in_one_call": True}, {}, [],
        "`guidance_in_one_call` (True) does not suit TAFS-GRPO",
    ),
    "critic": (
        "ACFlow", {"critic": "none"}, {"critic": nn.Linear(1, 1)}, None,
        "`critic` is passed, but `args.critic` is 'none': set it to 'module', or leave `critic` out.",
    ),
    "no critic": (
        "ACFlow", {"critic": "module"}, {}, [], "`args.critic` is 'module', but no `critic` is passed: pass one",
    ),
    "value network": (
        "VGGFlow", {"value_network": "none"}, {"value_network": nn.Linear(1, 1)}, None,
        "`value_network` is passed, but `args.value_network` is 'none': leave out one of them.",
    ),
    "two decoders": (
        "VGGFlow", {"reward_decoder": "nobody/tiny"}, {"reward_decoder": tiny_autoencoder()}, None,
        "`reward_decoder` is passed, but `args.reward_decoder` is 'nobody/tiny': leave out one of them.",
    ),
    "no decoder": (
        "VGGFlow", {"reward_decoder": "no/such/decoder"}, {}, [], "`reward_decoder` ('no/such/decoder') cannot be loaded",
    ),
    "nothing to resume": (
        "VGGFlow", {"resume_from_checkpoint": "true"}, {}, [], "holds no complete checkpoint to resume from: resume from",
    ),
    "no checkpoint": (
        "VGGFlow", {"resume_from_checkpoint": "no/checkpoint"}, {}, [], "no/checkpoint is incomplete: there is no such",
    ),
}  # fmt: skip
IN_TRAIN = ("nothing to resume", "no checkpoint")  # in Python, whose trainer exists before `train` is told of them
COMMANDS = {"ACFlow": "ac_flow", "TAFSGRPO": "tafs_grpo", "VGGFlow": "vgg_flow"}
SHORT = {"per_device_train_batch_size": 2, "num_generations": 2, "use_cpu": True, "report_to": "none"}

judge = differentiable(redness.function)


@pytest.fixture
def loads(tmp_path, monkeypatch):
    """The models that were loaded."""
    found: list[str] = []

    def load(name: Any, *arguments: Any) -> None:
        found.append(str(name))
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(families, "load", load)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize("what", [what for what in REFUSED if what not in IN_TRAIN])
def test_in_python(tmp_path, loads, what):
    name, settings, arguments, _, sentence = REFUSED[what]
    trainer = getattr(flowrl_trainers, f"{name}Trainer")

    def make() -> None:
        config = trainer.config_class(output_dir=str(tmp_path / "run"), **SHORT | settings)
        trainer("a/model", redness, config, CAPTIONS, **{"peft_config": LoraConfig()} | arguments)

    with pytest.raises((ValueError, TypeError)) as refused:
        make()
    assert sentence in str(refused.value)
    assert loads == []


@pytest.mark.parametrize("what", [what for what, (*_, flags, _) in REFUSED.items() if flags is not None])
def test_on_the_command_line(tmp_path, monkeypatch, capsys, loads, what):
    name, settings, _, flags, sentence = REFUSED[what]
    for module, function in (("quiet", "hush"), ("memory", "keep_freed_memory")):  # settings of the whole process
        monkeypatch.setattr(f"flowrl_trainers.cli.{module}.{function}", lambda: None)
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    lines = {"model": "a/model", "dataset": "prompts.txt", "reward_funcs": [f"{__name__}.judge"], "output_dir": "run"}
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in (lines | SHORT | settings).items())
    Path("run.yaml").write_text(text)
    assert main([COMMANDS[name], "--config", "run.yaml", *flags]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert loads == []


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        (
            "no/such/folder",
            "The adapter 'no/such/folder' cannot be loaded: there is no such folder, and an id of the Hub",
        ),
        ("nowhere", "The adapter 'nowhere' cannot be loaded: there is no such folder"),
        ("full", "The adapter 'full' cannot be loaded: the folder holds no weights of a LoRA; pass that of a run"),
    ],
)
def test_an_adapter_that_is_none(tmp_path, capsys, loads, adapter, sentence):
    (tmp_path / "full" / "transformer").mkdir(parents=True)
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    command = ["--model", "a/model", "--rewards", "jpeg_compressibility", "--dataset", "prompts.txt", "--use_cpu"]
    assert main(["evaluate", *command, "--adapter", adapter]) == 2
    assert sentence in capsys.readouterr().err
    assert loads == []
    with pytest.raises(AssertionError, match="a model is loaded"):
        main(["evaluate", *command, "--adapter", "user/name"])


def test_where_nothing_is_wrong_the_model_is_loaded(tmp_path, loads):
    config = flowrl_trainers.ACFlowConfig(output_dir=str(tmp_path / "run"), **SHORT)
    with pytest.raises(AssertionError, match="a model is loaded"):
        flowrl_trainers.ACFlowTrainer("a/model", redness, config, CAPTIONS, peft_config=LoraConfig())
    assert loads == ["a/model"]


def test_what_only_the_pipeline_tells_is_still_refused(tmp_path):
    """One that carries an adapter is trained further without a `peft_config`."""
    pipeline = tiny_sd3()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"]))
    with pytest.raises(ValueError, match=r"`frozen_copy` \('as_loaded'\) has no effect with a LoRA"):
        make_trainer("ACFlowTrainer", tmp_path, pipeline, lora=False, frozen_copy="as_loaded")
    with pytest.raises(ValueError, match="`merge_adapter` is True, but no adapter is trained"):
        make_trainer("ACFlowTrainer", tmp_path, lora=False, merge_adapter=True)
