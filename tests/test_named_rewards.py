"""Rewards by name on tiny random checkpoints of the real architectures, each against a computation of its own.

The published checkpoints are far too large for a test; what is held here is everything around their numbers: layout, preprocessing,
tokens, scale and gradient.
"""

import asyncio
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from flowrl_trainers.cli.convert_image_reward import convert_image_reward
from flowrl_trainers.rewards import NAMED_REWARDS, AestheticReward, CLIPScore, HPSv2, ImageReward, PickScore, as_rewards, loading
from flowrl_trainers.rewards.convert_image_reward import blip_large, convert_checkpoint, from_official
from flowrl_trainers.rewards.hpsv2 import vit_h_14
from flowrl_trainers.rewards.image_reward import ImageRewardModel
from flowrl_trainers.rewards.preprocessing import resize_and_crop, resize_and_pad
from flowrl_trainers.shapes.models import new_tokenizer

from .tiny_image_reward import official_checkpoint, official_score, official_shapes, tiny_blip, write_tokenizer

SIZE, CONTEXT, WIDTH, VISION_WIDTH, JOINT = 28, 10, 32, 48, 24
LEVEL = 1 / 255
PROMPTS = ["a red circle", "a blue square and a green cross", "a circle that is red, large, round, lonely and much too long a story"]
SIZES = [(28, 28), (50, 71), (71, 50), (64, 64), (20, 25)]  # as it is, landscape, portrait, square, too small


def pictures(size: tuple[int, int], amplitude: float = 0.3) -> torch.Tensor:
    """Three pictures (3, 3, H, W) of waves, in whole levels of 255, within 0.5 ± amplitude."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij")
    waves = [torch.sin(5 * (1 + c) * x + 7 * (1 + b) * y + b * c) for b in range(3) for c in range(3)]
    return ((0.5 + amplitude * torch.stack(waves).reshape(3, 3, *size)) * 255).round() / 255


def to_pillow(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray((x.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()) for x in images]


def resized_by_pillow(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pillow's bicubic kernel on floats, which it neither rounds nor clips."""
    channels = [Image.fromarray(c.numpy()).resize((width, height), Image.Resampling.BICUBIC) for x in images for c in x]
    return torch.from_numpy(np.stack(channels)).reshape(len(images), 3, height, width)


def vision_settings(hidden_act: str) -> dict:
    return {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 4 * VISION_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 7,
        "projection_dim": JOINT,
        "hidden_act": hidden_act,
    }


def clip_config(hidden_act: str = "quick_gelu") -> CLIPConfig:
    tokenizer = new_tokenizer()
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": JOINT,
        "hidden_act": hidden_act,
    }
    return CLIPConfig(text_config=text, vision_config=vision_settings(hidden_act), projection_dim=JOINT)


def write_processor(folder: Path) -> None:
    new_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)


def write_clip(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    CLIPModel(clip_config()).save_pretrained(folder)
    write_processor(folder)
    return folder


class Block(nn.Module):
    """One layer of open_clip's transformers, whose parameters carry open_clip's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, VISION_WIDTH, 7, stride=7, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(VISION_WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(17, VISION_WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(VISION_WIDTH), nn.LayerNorm(VISION_WIDTH)
        self.transformer = Transformer(VISION_WIDTH, heads=4, layers=3)
        self.proj = nn.Parameter(torch.randn(VISION_WIDTH, JOINT))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """open_clip's `CLIP`, by its published description: pre-norm transformers, GELU, causal text read at its end token."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.visual = Visual()
        self.token_embedding = nn.Embedding(vocabulary, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(CONTEXT, WIDTH))
        self.transformer = Transformer(WIDTH, heads=2, layers=2)
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, JOINT))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def encode_text(self, tokens):
        mask = torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, mask))
        return x[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"), seed=0)


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """A checkpoint as `HPS_v2.1_compressed.pt` is laid out, and the network that it was written from."""
    folder = tmp_path_factory.mktemp("hps")
    torch.manual_seed(1)
    network = OpenCLIP(len(new_tokenizer())).eval().requires_grad_(False)
    for parameter in network.parameters():  # biases and norms at 0 and 1 would hide that they were mixed up
        parameter += 0.1 * torch.randn_like(parameter)
    torch.save({"epoch": 1, "state_dict": network.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    write_processor(folder)
    return folder, network


@pytest.fixture(scope="module")
def aesthetic(tmp_path_factory):
    """A checkpoint as on the Hub: the tower, LAION's layers as `layers.N`, a configuration of a type that transformers does not know."""
    folder = tmp_path_factory.mktemp("aesthetic")
    torch.manual_seed(2)
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision_settings("quick_gelu"))).eval().requires_grad_(False)
    widths = [JOINT, 1024, 128, 64, 16, 1]
    layers = [(torch.randn(b, a) / a**0.5, torch.randn(b)) for a, b in pairwise(widths)]
    tensors = tower.state_dict()
    for number, (weight, bias) in zip((0, 2, 4, 6, 7), layers, strict=True):
        tensors |= {f"layers.{number}.weight": weight, f"layers.{number}.bias": bias}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = tower.config.to_dict() | {"model_type": "aesthetics_predictor", "architectures": ["AestheticsPredictorV2Linear"]}
    (folder / "config.json").write_text(json.dumps(config))
    write_processor(folder)
    return folder, tower, layers


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    """The tensors of a checkpoint as `ImageReward.pt` is laid out, and the folder that it was converted to."""
    tensors, folder = official_checkpoint(), tmp_path_factory.mktemp("image_reward")
    torch.save(tensors, folder / "ImageReward.pt")
    convert_checkpoint(folder / "ImageReward.pt", folder, tiny_blip())
    write_tokenizer(folder)
    return folder, tensors


@pytest.fixture
def make(clip, hps, image_reward, aesthetic):
    """Each differentiable reward by name, in a dtype."""
    return {
        "clip_score": lambda dtype: CLIPScore(clip, dtype=dtype),
        "pickscore": lambda dtype: PickScore(clip, clip, dtype=dtype),
        "hpsv2": lambda dtype: HPSv2(hps[0], hps[0], dtype=dtype, architecture=clip_config("gelu")),
        "image_reward": lambda dtype: ImageReward(image_reward[0], image_reward[0], dtype=dtype),
        "aesthetic": lambda dtype: AestheticReward(aesthetic[0], dtype=dtype),
    }


@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_bicubic_as_pillow_defines_it(size):
    """Shorter side to 28 and centre, or longer side to 28 and black: Pillow's kernel in floats, 1e-5 apart at most."""
    images, (height, width) = pictures(size), size
    shorter, longer = SIZE / min(size), SIZE / max(size)
    cropped = resized_by_pillow(images, int(height * shorter), int(width * shorter))
    top, left = (cropped.shape[2] - SIZE) // 2, (cropped.shape[3] - SIZE) // 2
    torch.testing.assert_close(resize_and_crop(images, SIZE), cropped[..., top : top + SIZE, left : left + SIZE], atol=1e-5, rtol=0)

    padded, inside = torch.zeros(3, 3, SIZE, SIZE), resized_by_pillow(images, round(height * longer), round(width * longer))
    top, left = (SIZE - inside.shape[2]) // 2, (SIZE - inside.shape[3]) // 2
    padded[..., top : top + inside.shape[2], left : left + inside.shape[3]] = inside
    torch.testing.assert_close(resize_and_pad(images, SIZE), padded, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_the_librarys_processor(clip, size):
    """Pillow rounds to 8 bits after each pass: half a level, and half a level times at most 1.3 of bicubic weights, so 1.15 levels.

    Without resizing the two agree to rounding. Waves of 0.5 ± 0.3 keep the kernel's overshoot within range, where Pillow clips nothing.
    """
    images, reward = pictures(size), CLIPScore(clip)
    theirs = CLIPImageProcessorPil.from_pretrained(clip)(to_pillow(images), return_tensors="pt").pixel_values
    apart = ((reward.pixels(images) - theirs) * reward.std).abs().max()
    assert apart <= (1e-6 if size == (SIZE, SIZE) else 1.15 * LEVEL)


@pytest.mark.parametrize("size", SIZES)
def test_clip_score_and_pickscore_are_what_transformers_computes(clip, size):
    """`CLIPModel.forward` is exp(logit_scale) cos: the same to rounding on the same pixels, and 4e-4 apart at most as measured when
    Pillow resizes, whose rounding the test above bounds.
    """
    images, model = pictures(size), CLIPModel.from_pretrained(clip)
    theirs = CLIPImageProcessorPil.from_pretrained(clip)(to_pillow(images), return_tensors="pt").pixel_values
    tokens = new_tokenizer()(PROMPTS, padding=True, truncation=True, max_length=CONTEXT, return_tensors="pt")
    for pixels, tolerance in [(CLIPScore(clip).pixels(images), 1e-6), (theirs, 1e-3)]:
        with torch.no_grad():
            logits = model(**tokens, pixel_values=pixels).logits_per_image.diagonal()
            scale = float(model.logit_scale.exp())
        torch.testing.assert_close(CLIPScore(clip)(images, PROMPTS), logits / scale, atol=tolerance, rtol=0)
        torch.testing.assert_close(PickScore(clip, clip)(images, PROMPTS), logits, atol=tolerance * scale, rtol=0)
    assert (logits / scale).std() > 0.01  # ten times the larger tolerance


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_is_what_open_clip_computes(hps, size):
    """The checkpoint's own network on tokens padded with 0 to the whole context, and on pictures padded with black (mean subtracted after)."""
    folder, network = hps
    images, (height, width) = pictures(size), size
    inside = resized_by_pillow(images, round(height * SIZE / max(size)), round(width * SIZE / max(size)))
    vertical, horizontal = SIZE - inside.shape[2], SIZE - inside.shape[3]
    left, top = horizontal // 2, vertical // 2
    square = nn.functional.pad(inside, (left, horizontal - left, top, vertical - top))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    tokens = torch.zeros(3, CONTEXT, dtype=torch.long)
    for row, prompt in zip(tokens, PROMPTS, strict=True):
        ids = torch.tensor(new_tokenizer()(prompt, truncation=True, max_length=CONTEXT).input_ids)
        row[: len(ids)] = ids
    expected = torch.cosine_similarity(network.visual((square - mean[:, None, None]) / std[:, None, None]), network.encode_text(tokens))
    reward = HPSv2(folder, folder, architecture=clip_config("gelu"))
    torch.testing.assert_close(reward(images, PROMPTS), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01  # a thousand times the tolerance


@pytest.mark.parametrize("size", SIZES)
def test_image_reward_is_what_its_official_code_computes(image_reward, size):
    """The official computation of one picture and one prompt at a time, unpadded, in float64: the same to rounding, which it would not be
    with transformers' default epsilon (1e-5 for 1e-6 moves it by 6e-4) or heads; where pictures are resized, 1.6e-5 apart at most as
    measured, as Pillow resizes in float32.
    """
    folder, tensors = image_reward
    tensors = {name: t.double() for name, t in tensors.items()}
    images, (height, width) = pictures(size), size
    pixels = resized_by_pillow(images, SIZE * height // min(size), SIZE * width // min(size)).double()
    top, left = (pixels.shape[2] - SIZE) // 2, (pixels.shape[3] - SIZE) // 2
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (pixels[..., top : top + SIZE, left : left + SIZE] - mean[:, None, None]) / std[:, None, None]
    ids = [torch.tensor(AutoTokenizer.from_pretrained(folder)(p, truncation=True, max_length=35).input_ids) for p in PROMPTS]
    expected = torch.stack([official_score(tensors, x, i) for x, i in zip(pixels, ids, strict=True)])
    scores = ImageReward(folder, folder, dtype=torch.float64)(images.double(), PROMPTS)
    torch.testing.assert_close(scores, expected, atol=1e-10 if size == (SIZE, SIZE) else 1e-4, rtol=0)
    assert [len(i) for i in ids] == [12, 27, 35]  # the last is cut
    assert torch.stack([official_score(tensors, x, ids[0]) for x in pixels]).std() > 1  # of one prompt: ten thousand times the tolerance


@pytest.mark.parametrize("size", SIZES)
def test_aesthetic_is_the_linear_layers_over_the_unit_embedding(aesthetic, size):
    """To rounding of float32 on a picture of the right size; 2.1e-4 apart at most, as measured, when Pillow resizes and rounds."""
    folder, tower, layers = aesthetic
    images = pictures(size)
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(to_pillow(images), return_tensors="pt").pixel_values
    x = tower(pixels).image_embeds
    x = x / x.norm(dim=-1, keepdim=True)
    for weight, bias in layers:
        x = x @ weight.T + bias
    scores = AestheticReward(folder)(images, PROMPTS)
    torch.testing.assert_close(scores, x[:, 0], atol=1e-5 if size == (SIZE, SIZE) else 1e-3, rtol=0)
    assert scores.std() > 5e-3  # five times the larger tolerance


@pytest.mark.parametrize("name", [name for name, reward in NAMED_REWARDS.items() if reward.differentiable and name != "shapes"])
def test_gradient_is_that_of_finite_differences(make, name):
    """In float64, across the resize and for pixels beyond [0, 1]: central differences of step 1e-4 err by about 1e-8."""
    reward, x = make[name](torch.float64), pictures((40, 52), amplitude=0.7).double()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, PROMPTS).sum(), x)
    with torch.no_grad():
        numeric = (reward(x + 1e-4 * direction, PROMPTS) - reward(x - 1e-4 * direction, PROMPTS)).sum() / 2e-4
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-5)
    assert float(x.detach().min()) < 0 < 1 < float(x.detach().max())
    outside = (x < 0) | (x > 1)
    assert float(gradient[outside].abs().max()) > 0  # nothing is clipped


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hpsv2", "image_reward", "aesthetic"])
def test_dtype_is_that_of_the_weights_and_scores_stay_float32(make, name):
    images, reward = pictures((40, 52)), make[name](torch.bfloat16)
    scores, exact = reward(images, PROMPTS), make[name](torch.float32)(images, PROMPTS)
    assert {p.dtype for p in reward.model.parameters()} == {torch.bfloat16}
    assert scores.dtype == torch.float32
    # bfloat16 has 8 bits: 0.4 % per operation, some of it on cosines of a random network that are themselves near 0.
    torch.testing.assert_close(scores, exact, atol=0.05 * float(exact.abs().max()), rtol=0)


def test_a_revision_is_the_one_that_is_loaded(tmp_path, monkeypatch):
    """A cache as huggingface_hub keeps it, with two commits."""
    repository = tmp_path / "models--someone--clip"
    for ref, commit, seed in [("main", "a" * 40, 0), ("old", "b" * 40, 1)]:
        write_clip(repository / "snapshots" / commit, seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, commit in [("old", "b" * 40), (None, "a" * 40)]:
        here = CLIPScore(repository / "snapshots" / commit)(pictures((28, 28)), PROMPTS)
        torch.testing.assert_close(CLIPScore("someone/clip", revision=revision)(pictures((28, 28)), PROMPTS), here)


@pytest.mark.parametrize("amplitude", [0.0, 0.3, 0.7])
def test_jpeg_rewards_are_the_size_of_pillows_file(tmp_path, amplitude):
    images = pictures((40, 52), amplitude).clamp(0, 1)
    sizes = []
    for number, picture in enumerate(to_pillow(images)):
        picture.save(tmp_path / f"{number}.jpg", quality=95)
        sizes.append((tmp_path / f"{number}.jpg").stat().st_size / 1000)
    more, less = as_rewards(["jpeg_incompressibility", "jpeg_compressibility"])
    assert more(images, PROMPTS) == sizes
    assert less(images, PROMPTS) == [-s for s in sizes]


def test_names_are_those_of_the_classes():
    assert {name: reward.name for name, reward in NAMED_REWARDS.items() if name != "shapes"} == {
        n: n for n in NAMED_REWARDS if n != "shapes"
    }
    assert {name for name, reward in NAMED_REWARDS.items() if not reward.differentiable} == {
        "checker",
        "jpeg_compressibility",
        "jpeg_incompressibility",
    }


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "hpsv2", "aesthetic"])
def test_what_is_not_in_the_cache_of_a_machine_offline_is_said_in_one_sentence(name, monkeypatch):
    with pytest.raises(
        ValueError, match=r"^Checkpoint '\S+/\S+' is not in the local cache and HF_HUB_OFFLINE forbids .* pass a folder with [^\n]*\.$"
    ):
        as_rewards(name)
    monkeypatch.setattr(loading, "is_offline_mode", lambda: False)
    with pytest.raises(
        ValueError, match=r"^Checkpoint '\S+/\S+' could not be had .* if it is gated accept its terms there and run `hf auth login`"
    ):
        as_rewards(name)


def test_image_reward_by_name_asks_for_its_conversion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^Checkpoint 'image-reward' is not in the local cache .* config.json and model.safetensors as `flowrl convert_image_reward` writes",
    ):
        as_rewards("image_reward")


def test_wrong_folders_are_refused_in_one_sentence(tmp_path, clip):
    for make_one, sentence in [
        (lambda: CLIPScore("/nowhere"), r"There is no folder '/nowhere': pass one with config.json and model.safetensors, or the name"),
        (
            lambda: CLIPScore(tmp_path),
            r"The folder '.*' is no checkpoint that this reward can read: it needs config.json and model.safetensors\.",
        ),
        (lambda: PickScore(clip, tmp_path), r"The folder '.*' is no checkpoint that this reward can read: it needs tokenizer.json"),
        (lambda: HPSv2(clip, clip), r"The folder '.*' is no checkpoint that this reward can read: it needs HPS_v2.1_compressed.pt\."),
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


def test_a_wrong_hpsv2_file_is_refused_in_one_sentence(tmp_path, hps):
    folder, network = hps
    with pytest.raises(
        ValueError, match=r"has \d+ missing, unknown or differently shaped weights, '\S+' among them: pass the official HPS_v2.1"
    ):
        HPSv2(folder, folder)
    tensors = network.state_dict()
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": {name: t for name, t in tensors.items() if name != "visual.proj"} | {"head.weight": torch.zeros(2)}}, file)
    with pytest.raises(ValueError, match=r"has 2 missing, unknown or differently shaped weights, 'head.weight' among them"):
        HPSv2(tmp_path, folder, architecture=clip_config("gelu"))
    torch.save(tensors, file)
    whole = file.read_bytes()
    for content in [whole, whole[: len(whole) // 2], b"<html>404</html>"]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"HPS_v2.1_compressed.pt' holds no `state_dict` of plain tensors: download"):
            HPSv2(tmp_path, folder, architecture=clip_config("gelu"))


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
        ValueError, match=r"ImageReward.pt' is no file: pass the ImageReward.pt of THUDM/ImageReward on the Hugging Face Hub"
    ):
        convert_checkpoint(file, tmp_path / "out")
    torch.save(official_checkpoint(), file)
    whole = file.read_bytes()
    for content in [whole[: len(whole) // 2], b"<html>404</html>", b""]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"ImageReward.pt' holds no dictionary of plain tensors: download"):
            convert_checkpoint(file, tmp_path / "out")


def test_the_command_writes_what_the_name_reads(tmp_path, image_reward, monkeypatch, capsys):
    """`flowrl convert_image_reward ImageReward.pt`, its architecture made tiny, then the reward's default in the same folder."""
    folder, _ = image_reward
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="differently shaped weights"):  # the published architecture
        convert_image_reward([str(folder / "ImageReward.pt")])
    monkeypatch.setattr("flowrl_trainers.rewards.convert_image_reward.blip_large", tiny_blip)
    convert_image_reward([str(folder / "ImageReward.pt")])
    assert (
        "image-reward/: ImageReward of 0 million parameters.\nUse it by the name `image_reward` in this folder." in capsys.readouterr().out
    )
    assert {path.name for path in Path("image-reward").iterdir()} == {"config.json", "model.safetensors"}
    images = pictures((28, 28))
    torch.testing.assert_close(ImageReward(tokenizer=folder)(images, PROMPTS), ImageReward(folder, folder)(images, PROMPTS), rtol=0, atol=0)
    convert_image_reward([str(folder / "ImageReward.pt"), "elsewhere"])
    assert 'Use it by `ImageReward("elsewhere")`.' in capsys.readouterr().out


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
    """Its `model_configs/ViT-H-14.json`; GELU, since no `quick_gelu` is set; 986.11 million parameters, as its model table says."""
    with torch.device("meta"):
        model = CLIPModel(vit_h_14())
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers, text.max_position_embeddings) == (1024, 16, 24, 77)
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers, vision.patch_size, vision.image_size) == (
        1280,
        16,
        32,
        14,
        224,
    )
    assert (text.vocab_size, model.config.projection_dim, text.hidden_act, vision.hidden_act) == (49408, 1024, "gelu", "gelu")
    assert sum(p.numel() for p in model.parameters()) == 986_109_441


def test_the_default_architecture_of_image_reward_is_the_official_one():
    """Every tensor of its official code at full size has a place of its shape and none is missing. ViT-L/16 without a classifier has
    303.30 million parameters (timm's table, less 1.025 of the classifier), BERT-base without pooler and token types but with two more
    words 108.89, cross attention to 1024 channels 12 times 2.76, the head 0.93. Heads and epsilons: BLIP's vit.py and med_config.json.
    """
    with torch.device("meta"):
        model = ImageRewardModel(blip_large())
        official = {name: torch.empty(shape) for name, shape in official_shapes(blip_large()).items()}
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    assert {name: t.shape for name, t in from_official(official).items()} == shapes
    assert sum(p.numel() for p in model.parameters()) == 303_301_632 + 108_891_648 + 12 * 2_757_120 + 927_969 == 446_206_689
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.num_attention_heads, vision.image_size, vision.layer_norm_eps, vision.hidden_act) == (16, 224, 1e-6, "gelu")
    assert (text.num_attention_heads, text.encoder_hidden_size, text.layer_norm_eps, text.hidden_act) == (12, 1024, 1e-12, "gelu")
    assert (text.hidden_dropout_prob, text.attention_probs_dropout_prob, vision.attention_dropout) == (0, 0, 0)


def test_the_rewards_of_the_docs_are_rewards():
    page = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text()
    scope: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(block, scope)
    images = pictures((28, 28))
    rewards = as_rewards([scope["length_of_answer"], scope["judge"], scope["redness"], scope["Likeness"](images[0])])
    assert [r.differentiable for r in rewards] == [False, False, True, True]
    assert rewards[0](images, PROMPTS, answer=["a", "bc", ""]) == [1.0, 2.0, 0.0]
    assert asyncio.run(rewards[1](images, PROMPTS)) == [1.0] * 3
    assert rewards[2](images, PROMPTS).shape == (3,)
    assert float(rewards[3](images, PROMPTS)[0]) == 0
    assert all(f"| `{name}` | `{reward.__name__}` |" in page for name, reward in NAMED_REWARDS.items())
