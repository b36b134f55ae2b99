"""What a run leaves on the Hub, with the real client against a server on loopback, and the card."""

import pytest
import torch
import yaml

from flowrl_trainers.run_folder import CardFacts, before_after, model_card

from .hub_server import run_against, serve

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
    per_device_train_batch_size=2, guidance_scale=1.0, max_sequence_length=8, use_cpu=True, report_to="none",
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
import sys
import torch
from flowrl_trainers.shapes import load_pipeline
pipe = load_pipeline()
pipe.set_progress_bar_config(disable=True)
pipe.load_lora_weights("somebody/red-shapes")
assert pipe.get_active_adapters() == ["default_0"], pipe.get_active_adapters()
config = pipe.transformer.peft_config["default_0"]
assert (config.r, config.lora_alpha) == (2, 6), config
print("loaded")
"""


def test_a_run_is_pushed_and_loads_from_there(tmp_path):
    with serve() as hub:
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
        assert not any(name.endswith("training_args.bin") for name in files)
        card = files["README.md"].decode()
        head = yaml.safe_load(card.split("---")[1])
        assert head["library_name"] == "diffusers"
        assert head["pipeline_tag"] == "text-to-image"
        assert head["datasets"] == ["somebody/prompts"]
        assert 'pipe.load_lora_weights("somebody/red-shapes")' in card
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
    assert set(head["tags"]) == {"text-to-image", "flow-matching", "flowrl-trainers", "adjoint-matching", "lora"}
    assert "| base | 0.100 |" in card
    assert "| tuned | 0.400 |" in card
    assert 'DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")' in card
    assert "guidance_scale=4.5, num_inference_steps=20" in card


def test_the_card_tells_weights_and_what_is_lowered():
    card = model_card(facts(rewards={"pickscore": 1.0, "aesthetic": 0.5, "jpeg": -1.0}))
    assert "to raise `pickscore` and `aesthetic` (weight 0.5) and to lower `jpeg` with flowrl-trainers" in card


def test_the_card_of_a_full_fine_tuning_loads_the_transformer():
    card = model_card(facts(has_adapter=False, repository="me/red"))
    assert "load_lora_weights" not in card
    assert 'from_pretrained("me/red", subfolder="transformer")' in card
    assert "lora" not in yaml.safe_load(card.split("---")[1])["tags"]


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
