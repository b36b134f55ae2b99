"""What a run leaves on the Hub, with the real client against a server on loopback, and the card."""

import time

import pytest
import torch
import yaml
from huggingface_hub.hf_api import future_compatible

from flowrl_trainers.run_folder import CardFacts, before_after, model_card

from .helpers import make_trainer
from .hub_server import run_against, serve
from .tiny import tiny_sd3

PUSH = """
import os
import sys
import torch
from datasets import Dataset
from peft import LoraConfig
from flowrl_trainers import AdjointMatchingConfig, AdjointMatchingTrainer
from flowrl_trainers.shapes import load_pipeline, prompts

torch.set_num_threads(int(os.environ.get("FLOWRL_TEST_THREADS", "1")))
args = AdjointMatchingConfig(
    output_dir=sys.argv[1], push_to_hub=True, hub_token="hf_of_a_test", hub_model_id="somebody/red-shapes",
    hub_strategy=sys.argv[2], max_steps=1, save_steps=1, num_inference_steps=2, adjoint_steps=2,
    per_device_train_batch_size=2, guidance_scale=1.0, max_sequence_length=8, use_cpu=True, report_to="tensorboard",
    disable_tqdm=True, log_images=2,
)
trainer = AdjointMatchingTrainer(
    load_pipeline(), "shapes", args, prompts("train"), prompts("held_out").select(range(4)), "checker",
    peft_config=LoraConfig(r=2, lora_alpha=6)
)
trainer.train()
trainer.evaluate()
trainer.push_to_hub(dataset_name="somebody/prompts")
"""

LOAD = """
import re
import numpy as np
from huggingface_hub import ModelCard, hf_hub_download
from PIL import Image
from flowrl_trainers.run_folder.licence import licence_of

card = ModelCard.load("somebody/red-shapes")
(code,) = re.findall("^```python$(.*?)^```$", card.text, flags=re.DOTALL | re.MULTILINE)
assert 'pipe.load_lora_weights("somebody/red-shapes")' in code, code
exec(code)
assert pipe.get_active_adapters() == ["default_0"], pipe.get_active_adapters()
config = pipe.transformer.peft_config["default_0"]
assert (config.r, config.lora_alpha) == (2, 6), config
first = hf_hub_download("somebody/red-shapes", card.data["widget"][0]["output"]["url"])
difference = np.abs(np.asarray(Image.open(first), float) - np.asarray(image, float)).max()
assert difference <= 1, difference
license = {"license": "other", "license_name": "a-licence"}
license |= {"license_link": "https://huggingface.co/somebody/base/blob/main/LICENSE.md"}
assert licence_of("somebody/base") == license, licence_of("somebody/base")
assert licence_of("somebody/base", offline=True) == license  # it is in the cache now
assert licence_of("somebody/nothing") == {}
print("loaded")
"""
BASE = b"---\nlicense: other\nlicense_name: a-licence\nlicense_link: LICENSE.md\n---\n# A base model\n"


def test_a_run_is_pushed_and_loads_from_there(tmp_path):
    """The code of the card, from the Hub, draws the first picture of the gallery; no file holds the token."""
    with serve() as hub:
        hub.files["somebody/base"] = {"README.md": BASE}
        pushed = run_against(PUSH, hub.address, tmp_path / "home", str(tmp_path / "run"), "checkpoint")
        assert pushed.returncode == 0, pushed.stderr
        files = hub.files["somebody/red-shapes"]
        assert {
            "README.md",
            "config.yaml",
            "metrics.json",
            "pytorch_lora_weights.safetensors",
            "samples/step-000001.png",
        } <= set(files)
        assert {
            "last-checkpoint/manifest.json",
            "last-checkpoint/training_state_0.pt",
            "last-checkpoint/optimizer.pt",
        } <= set(files)
        assert not any(b"hf_of_a_test" in content for content in files.values())
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert any("events.out" in path.name for path in written)
        assert not [path for path in written if b"hf_of_a_test" in path.read_bytes()]
        assert not any(name.endswith("training_args.bin") for name in files)
        card = files["README.md"].decode()
        head = yaml.safe_load(card.split("---")[1])
        assert head["library_name"] == "diffusers"
        assert head["pipeline_tag"] == "text-to-image"
        assert head["datasets"] == ["somebody/prompts"]
        assert "(samples/step-000001.png)" in card
        assert [message for _, message in hub.commits][-1] == "End of training"
        loaded = run_against(LOAD, hub.address, tmp_path / "another home")
        assert loaded.returncode == 0, loaded.stderr
        assert "loaded" in loaded.stdout


# ---- the card -------------------------------------------------------------------------------------------------------


def facts(**changes) -> CardFacts:
    values = dict(
        name="sd35-red", method="Adjoint Matching", paper={"title": "A paper", "id": "2605.06583"},
        tags=["adjoint-matching"], base_model="stabilityai/stable-diffusion-3.5-medium", has_adapter=True,
        rewards={"redness": 1.0}, settings={"updates": 3}, sampling={"guidance_scale": 4.5, "num_inference_steps": 20},
        rows={"base": {"reward/redness": 0.1}, "tuned": {"reward/redness": 0.4}},
    )  # fmt: skip
    return CardFacts(**(values | changes))


def test_the_card_names_base_model_tags_and_numbers():
    card = model_card(facts())
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "stabilityai/stable-diffusion-3.5-medium"
    assert head["base_model_relation"] == "adapter"
    assert head["tags"] == [
        "text-to-image", "diffusers", "flow-matching", "flowrl-trainers", "adjoint-matching", "lora",
        "reward-model:redness",
    ]  # fmt: skip
    assert "| | base | tuned | tuned - base |" in card
    assert "| reward/redness | 0.100 | 0.400 | +0.300 |" in card
    assert 'DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")' in card
    assert 'pipe(prompt="your prompt", guidance_scale=4.5, num_inference_steps=20).images[0]' in card


def test_the_card_explains_how_far_the_velocity_moved_where_it_says_so():
    sentence = "velocity_norm_ratio_0 to _3 are its length beside that of the base model"
    moved = {"base": {"reward/redness": 0.1}, "tuned": {"velocity_distance": 0.2, "velocity_norm_ratio_0": 1.1}}
    assert sentence in model_card(facts(rows=moved))
    assert sentence not in model_card(facts())


def test_the_card_tells_weights_and_what_is_lowered():
    card = model_card(facts(rewards={"pickscore": 1.0, "aesthetic": 0.5, "jpeg": -1.0}))
    assert "to raise `pickscore` and `aesthetic` (weight 0.5) and to lower `jpeg` with flowrl-trainers" in card


def test_the_card_of_a_full_fine_tuning_loads_the_transformer():
    card = model_card(facts(has_adapter=False, repository="me/red"))
    assert "load_lora_weights" not in card
    assert 'from_pretrained("me/red", subfolder="transformer")' in card
    head = yaml.safe_load(card.split("---")[1])
    assert "lora" not in head["tags"]
    assert head["base_model_relation"] == "finetune"


def test_the_margin_of_a_sheet_has_room_for_long_labels():
    sheet, boxes = before_after(
        ["a prompt"], {"base": torch.ones(1, 3, 32, 32), "a label of thirty letters, say": torch.ones(1, 3, 32, 32)}
    )
    left, top, _, bottom = boxes["a label of thirty letters, say"][0]
    margin = sheet.crop((0, top, left - 3, bottom)).convert("L")  # without the frame
    inked = [x for x in range(margin.width) if min(margin.getpixel((x, y)) for y in range(margin.height)) < 128]
    assert 150 < max(inked) < margin.width - 4


@pytest.mark.parametrize("count", [1, 5])
def test_the_sheet_holds_every_picture_where_it_says(count):
    base, tuned = torch.rand(count, 3, 32, 32), torch.rand(count, 3, 32, 32)
    sheet, boxes = before_after([f"prompt {i}" for i in range(count)], {"base": base, "tuned": tuned})
    for images, places in ((base, boxes["base"]), (tuned, boxes["tuned"])):
        for image, box in zip(images, places, strict=True):
            small = sheet.crop(box).resize((32, 32), 0)
            expected = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).flatten().tolist()
            assert list(small.tobytes()) == expected


def test_pushes_are_made_one_by_one_and_one_that_fails_is_said(tmp_path, tiny_pipeline, caplog, monkeypatch):
    at_once, running = [], []

    @future_compatible
    def refuse(self, *, run_as_future=False, **kwargs):
        running.append(1)
        at_once.append(len(running))
        time.sleep(0.2)
        running.pop()
        raise OSError("401: the token was revoked")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", refuse)
    t = make_trainer("AdjointMatchingTrainer", tmp_path, tiny_pipeline, hub_strategy="checkpoint")
    t.hub_model_id, t.push_in_progress = "somebody/red", None  # as `push_to_hub` sets them
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "manifest.json").write_text("{}")
    t._push_from_first_process(tmp_path / "checkpoint-1")
    t.push_in_progress.wait_until_done()
    assert at_once == [1, 1]
    assert caplog.text.count("The push of step 0 failed (401: the token was revoked): push when training is over") == 2


def test_a_hub_that_is_away_is_said_before_training(tmp_path, tiny_pipeline):
    with pytest.raises(
        ValueError, match=r"The Hub gives this run no repository .*: log in by `hf auth login` and unset"
    ):
        make_trainer("AdjointMatchingTrainer", tmp_path, tiny_pipeline, push_to_hub=True)
    t = make_trainer("AdjointMatchingTrainer", tmp_path, tiny_sd3())
    with pytest.raises(ValueError, match="The Hub gives this run no repository"):
        t.push_to_hub()
