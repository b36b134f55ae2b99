"""`flowrl convert_image_reward`: what it writes is what the reward reads, at full size too, and wrong files are
refused.
"""

from pathlib import Path

import pytest
import torch

from flowrl_trainers.cli.convert_image_reward import convert_image_reward
from flowrl_trainers.rewards import ImageReward, as_rewards
from flowrl_trainers.rewards.convert_image_reward import blip_large, convert_checkpoint, from_official
from flowrl_trainers.rewards.image_reward import ImageRewardModel

from .tiny_image_reward import official_checkpoint, official_shapes, tiny_blip
from .tiny_rewards import PROMPTS, waves


def test_image_reward_by_name_asks_for_its_conversion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^Checkpoint 'image-reward' is not in the local cache .* config.json and "
        r"model.safetensors as `flowrl convert_image_reward` writes",
    ):
        as_rewards("image_reward")


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"mlp.layers.7.bias": None}, r"The ImageReward checkpoint has 1 missing, .* 'layers.7.bias' among them: pass the official ImageReward.pt"),
    ({"blip.text_encoder.pooler.dense.bias": torch.zeros(32)}, "has 1 missing, unknown .* 'text_encoder.pooler.dense.bias' among them"),
    ({"blip.visual_encoder.pos_embed": torch.zeros(1, 16, 48)}, "has 1 missing, unknown or differently shaped .* 'vision_model.embeddings.position"),
    ({"epoch": 3}, "holds no dictionary of plain tensors: download ImageReward.pt again from THUDM/ImageReward"),
], ids=["missing", "unknown", "shape", "no_tensor"])  # fmt: skip
def test_a_wrong_image_reward_file_is_refused_in_one_sentence(tmp_path, changes, sentence):
    tensors = official_checkpoint() | changes
    torch.save({name: t for name, t in tensors.items() if t is not None}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=sentence):
        convert_checkpoint(tmp_path / "ImageReward.pt", tmp_path / "out", tiny_blip())
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_reward_file_is_refused_in_one_sentence(tmp_path):
    file = tmp_path / "ImageReward.pt"
    with pytest.raises(
        ValueError,
        match=r"ImageReward.pt' is no file: pass the ImageReward.pt of THUDM/ImageReward on the Hugging Face Hub",
    ):
        convert_checkpoint(file, tmp_path / "out")
    torch.save(official_checkpoint(), file)
    whole = file.read_bytes()
    for content in [whole[: len(whole) // 2], b"<html>404</html>", b""]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"ImageReward.pt' holds no dictionary of plain tensors: download"):
            convert_checkpoint(file, tmp_path / "out")


def test_the_command_writes_what_the_name_reads(tmp_path, image_reward, monkeypatch, capsys):
    """`flowrl convert_image_reward ImageReward.pt`, its architecture made tiny, then the reward's default in the same
    folder.
    """
    folder, _ = image_reward
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="differently shaped weights"):  # the published architecture
        convert_image_reward([str(folder / "ImageReward.pt")])
    monkeypatch.setattr("flowrl_trainers.rewards.convert_image_reward.blip_large", tiny_blip)
    convert_image_reward([str(folder / "ImageReward.pt")])
    assert (
        "image-reward/: ImageReward of 0 million parameters.\nUse it by the name `image_reward` in this folder."
        in capsys.readouterr().out
    )
    assert {path.name for path in Path("image-reward").iterdir()} == {"config.json", "model.safetensors"}
    images = waves((28, 28))
    torch.testing.assert_close(
        ImageReward(tokenizer=folder)(images, PROMPTS), ImageReward(folder, folder)(images, PROMPTS), rtol=0, atol=0
    )
    convert_image_reward([str(folder / "ImageReward.pt"), "elsewhere"])
    assert 'Use it by `ImageReward("elsewhere")`.' in capsys.readouterr().out


def test_the_default_architecture_of_image_reward_is_the_official_one():
    """Every tensor of its official code at full size has a place of its shape and none is missing. ViT-L/16 without a
    classifier has 303.30 million parameters (timm's table, less 1.025 of the classifier), BERT-base without pooler and
    token types but with two more words 108.89, cross attention to 1024 channels 12 times 2.76, the head 0.93. Heads
    and epsilons: BLIP's vit.py and med_config.json.
    """
    with torch.device("meta"):
        model = ImageRewardModel(blip_large())
        official = {name: torch.empty(shape) for name, shape in official_shapes(blip_large()).items()}
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    assert {name: t.shape for name, t in from_official(official).items()} == shapes
    assert (
        sum(p.numel() for p in model.parameters())
        == 303_301_632 + 108_891_648 + 12 * 2_757_120 + 927_969
        == 446_206_689
    )
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.num_attention_heads, vision.image_size, vision.layer_norm_eps, vision.hidden_act) == (
        16,
        224,
        1e-6,
        "gelu",
    )
    assert (text.num_attention_heads, text.encoder_hidden_size, text.layer_norm_eps, text.hidden_act) == (
        12,
        1024,
        1e-12,
        "gelu",
    )
    assert (text.hidden_dropout_prob, text.attention_probs_dropout_prob, vision.attention_dropout) == (0, 0, 0)
