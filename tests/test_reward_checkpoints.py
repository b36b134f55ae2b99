"""Where the rewards by name find their weights: which are loaded, that no code is run, and what a missing or wrong
file is told.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from flowrl_trainers.rewards import AestheticReward, CLIPScore, HPSv2, ImageReward, PickScore, as_rewards, loading
from flowrl_trainers.rewards.convert_image_reward import convert_checkpoint
from flowrl_trainers.rewards.hpsv2 import vit_h_14

from .tiny_rewards import PROMPTS, clip_config, waves, write_clip


def test_a_revision_is_the_one_that_is_loaded(tmp_path, monkeypatch):
    """A cache as huggingface_hub keeps it, with two commits."""
    repository = tmp_path / "models--someone--clip"
    for ref, commit, seed in [("main", "a" * 40, 0), ("old", "b" * 40, 1)]:
        write_clip(repository / "snapshots" / commit, seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, commit in [("old", "b" * 40), (None, "a" * 40)]:
        here = CLIPScore(repository / "snapshots" / commit)(waves((28, 28)), PROMPTS)
        torch.testing.assert_close(CLIPScore("someone/clip", revision=revision)(waves((28, 28)), PROMPTS), here)


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hpsv2", "aesthetic"])
def test_what_is_not_in_the_cache_of_a_machine_offline_is_said_in_one_sentence(name, monkeypatch):
    with pytest.raises(
        ValueError,
        match=r"^Checkpoint '\S+/\S+' is not in the local cache and HF_HUB_OFFLINE forbids "
        r".* pass a folder with [^\n]*\.$",
    ):
        as_rewards(name)
    monkeypatch.setattr(loading, "is_offline_mode", lambda: False)
    with pytest.raises(
        ValueError,
        match=r"^Checkpoint '\S+/\S+' could not be had .* if it is gated "
        r"accept its terms there and run `hf auth login`",
    ):
        as_rewards(name)


def test_wrong_folders_are_refused_in_one_sentence(tmp_path, clip):
    for make_one, sentence in [
        (
            lambda: CLIPScore("/nowhere"),
            r"There is no folder '/nowhere': pass one with config.json and model.safetensors, or the name",
        ),
        (
            lambda: CLIPScore(tmp_path),
            r"The folder '.*' is no checkpoint that this reward can read: "
            r"it needs config.json and model.safetensors\.",
        ),
        (
            lambda: PickScore(clip, tmp_path),
            r"The folder '.*' is no checkpoint that this reward can read: it needs tokenizer.json",
        ),
        (
            lambda: HPSv2(clip, clip),
            r"The folder '.*' is no checkpoint that this reward can read: it needs HPS_v2.1_compressed.pt\.",
        ),
        (
            lambda: ImageReward(tmp_path),
            r"The folder '.*' is no .*: it needs config.json and model.safetensors as `flowrl convert_image_reward`",
        ),
        (
            lambda: AestheticReward(clip),
            r"Checkpoint '.*' has no 'layers.0.bias', a weight of AestheticPredictor: pass a checkpoint of this",
        ),
    ]:
        with pytest.raises(ValueError, match=sentence):
            make_one()


def test_damaged_and_other_weights_are_refused_in_one_sentence(tmp_path, clip):
    sentence = "was cut off, or is of another architecture than CLIPModel expects: get it again, or pass another"
    for name in ("cut", "other", "processor"):
        shutil.copytree(clip, tmp_path / name)
    weights = load_file(clip / "model.safetensors")
    (tmp_path / "cut" / "model.safetensors").unlink()
    for size in (1000, 0):
        torch.save(weights, tmp_path / "cut" / "pytorch_model.bin")
        with open(tmp_path / "cut" / "pytorch_model.bin", "r+b") as file:
            file.truncate(size)
        with pytest.raises(ValueError, match=sentence):
            CLIPScore(tmp_path / "cut")
    weights["text_projection.weight"] = weights["text_projection.weight"][:, 1:].contiguous()
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=sentence):
        CLIPScore(tmp_path / "other")
    settings = json.loads((clip / "preprocessor_config.json").read_text())
    (tmp_path / "processor" / "preprocessor_config.json").write_text(json.dumps({"size": settings["size"]}))
    with pytest.raises(ValueError, match=r"it needs preprocessor_config\.json with image_mean and image_std"):
        CLIPScore(tmp_path / "processor")


def test_a_wrong_hpsv2_file_is_refused_in_one_sentence(tmp_path, hps):
    folder, network = hps
    with pytest.raises(
        ValueError,
        match=r"has \d+ missing, unknown or differently shaped weights, '\S+' among them: pass the official HPS_v2.1",
    ):
        HPSv2(folder, folder)
    tensors = network.state_dict()
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save(
        {
            "state_dict": {name: t for name, t in tensors.items() if name != "visual.proj"}
            | {"head.weight": torch.zeros(2)}
        },
        file,
    )
    with pytest.raises(
        ValueError, match=r"has 2 missing, unknown or differently shaped weights, 'head.weight' among them"
    ):
        HPSv2(tmp_path, folder, architecture=clip_config("gelu"))
    torch.save(tensors, file)
    whole = file.read_bytes()
    for content in [whole, whole[: len(whole) // 2], b"<html>404</html>"]:
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"HPS_v2.1_compressed.pt' holds no `state_dict` of plain tensors: download"
        ):
            HPSv2(tmp_path, folder, architecture=clip_config("gelu"))


class Code:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_code_in_a_checkpoint_is_not_run(tmp_path, hps, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Code()}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(ValueError, match="holds no dictionary of plain tensors"):
        convert_checkpoint(tmp_path / "HPS_v2.1_compressed.pt", tmp_path / "out")
    with pytest.raises(ValueError, match="holds no `state_dict` of plain tensors"):
        HPSv2(tmp_path, hps[0])
    assert not Path("executed").exists()


def test_the_default_architecture_of_hpsv2_is_open_clips_vit_h_14():
    """Its `model_configs/ViT-H-14.json`; GELU, since no `quick_gelu` is set; 986.11 million parameters, as its model
    table says.
    """
    with torch.device("meta"):
        model = CLIPModel(vit_h_14())
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers, text.max_position_embeddings) == (
        1024,
        16,
        24,
        77,
    )
    assert (
        vision.hidden_size,
        vision.num_attention_heads,
        vision.num_hidden_layers,
        vision.patch_size,
        vision.image_size,
    ) == (
        1280,
        16,
        32,
        14,
        224,
    )
    assert (text.vocab_size, model.config.projection_dim, text.hidden_act, vision.hidden_act) == (
        49408,
        1024,
        "gelu",
        "gelu",
    )
    assert sum(p.numel() for p in model.parameters()) == 986_109_441
