"""A folder that is no whole pipeline is answered by one sentence, in Python and on the command line."""

import shutil
from pathlib import Path

import pytest
import torch

from flowrl_trainers import FlowPipeline
from flowrl_trainers.cli import main

from .helpers import make_trainer, seeds
from .tiny import tiny_sd3

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_sd3().save_pretrained(folder)
    return folder


def cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


def alone(folder: Path) -> None:
    shutil.copytree(folder / "transformer", folder / "alone")
    for path in folder.iterdir():
        if path.name != "alone":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(folder / "alone", folder, dirs_exist_ok=True)


def lora(folder: Path) -> None:
    empty(folder)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def single_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")


DAMAGES = {
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "has no folder `vae`, which its `model_index.json` names: download"),
    "cut off": (lambda f: cut(f / "transformer" / WEIGHTS, -100), rf"transformer/{WEIGHTS} was cut off or damaged: it"),
    "cut off early": (lambda f: cut(f / "vae" / WEIGHTS, 50), rf"vae/{WEIGHTS} was cut off or damaged: download or"),
    "cut off text": (lambda f: cut(f / "text_encoder" / "model.safetensors", -1), "text_encoder/model.safetensors was"),
    "no bytes": (lambda f: cut(f / "vae" / WEIGHTS, 0), rf"vae/{WEIGHTS} was cut off or damaged: download or save"),
    "no weights": (lambda f: (f / "vae" / WEIGHTS).unlink(), r"cannot be loaded \(OSError: .*vae\): .* with a `variant`"),
    "index": (lambda f: cut(f / "model_index.json", 20), r"model_index.json is not valid JSON \(.*\): download or save"),
    "no class": (lambda f: (f / "model_index.json").write_text("{}"), "model_index.json names no `_class_name`"),
    "code of its own": (
        lambda f: (f / "model_index.json").write_text('{"_class_name": ["pipeline", "Mine"]}'),
        r"holds a \['pipeline', 'Mine'\], which is not a supported family",
    ),
    "a list": (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json holds a list where an object"),
    "config": (lambda f: cut(f / "transformer" / "config.json", 9), "transformer/config.json is not valid JSON"),
    "empty": (empty, "is no diffusers pipeline, but an empty folder: pass a Hub id or a folder that holds"),
    "transformer": (alone, "is no diffusers pipeline, but the folder of one network: pass that of the whole pipeline"),
    "lora": (lora, "is no diffusers pipeline, but the folder of a LoRA: pass its base model"),
    "single file": (single_file, "is no diffusers pipeline, but a single file: load it by `from_single_file`"),
}  # fmt: skip


@pytest.fixture
def broken(tmp_path, whole):
    def make(damage: str) -> Path:
        shutil.copytree(whole, tmp_path / "model")
        DAMAGES[damage][0](tmp_path / "model")
        return tmp_path / "model"

    return make


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_is_no_whole_pipeline_is_refused_by_name(tmp_path, broken, damage):
    with pytest.raises(ValueError, match=DAMAGES[damage][1]) as caught:
        make_trainer("TAFSGRPOTrainer", tmp_path / "run", str(broken(damage)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["no vae", "cut off text", "no weights", "lora"])
@pytest.mark.parametrize("command", ["tafs_grpo", "evaluate"])
def test_the_command_line_says_the_same_sentence(tmp_path, broken, damage, command, monkeypatch, capsys):
    for module, name in (("quiet", "hush"), ("memory", "keep_freed_memory")):  # settings of the whole process
        monkeypatch.setattr(f"flowrl_trainers.cli.{module}.{name}", lambda: None)
    rest = {
        "tafs_grpo": ["--reward_funcs", "shapes", "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"],
        "evaluate": ["--adapter", "somebody/adapter", "--rewards", "shapes", "--out", str(tmp_path / "out")],
    }[command]
    model = broken(damage)
    assert main([command, "--model", str(model), "--dataset", "shapes", *rest]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("flowrl: ")
    with pytest.raises(ValueError, match=DAMAGES[damage][1]) as caught:
        FlowPipeline.from_pretrained(model)
    assert last == f"flowrl: {caught.value}"


def test_a_folder_with_files_of_a_variant_alone_is_loaded(tmp_path, whole):
    pipeline = tiny_sd3()
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "transformer" / WEIGHTS).exists()
    pictures = [FlowPipeline.from_pretrained(folder).sample(["a cat"], 2, seeds(1)) for folder in (tmp_path, whole)]
    assert torch.equal(*pictures)
