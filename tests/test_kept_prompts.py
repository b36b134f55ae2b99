"""`cache_encoded_prompts`: what text encoders make of prompts is read from the disk by the next run."""

import pytest
import torch

from flowrl_trainers.pipelines.stable_diffusion_3 import StableDiffusion3FlowPipeline

from .helpers import make_trainer
from .tiny import tiny_sd3
from .tiny_families import FAMILIES, tiny
from .tiny_sit import NAMES, original_checkpoint, tiny_sit

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("circle", "square", "cross")] * 2


def encoded(folder, pipeline, **settings):
    """The conditioning of all prompts, and how often a text encoder was called to make it."""
    calls = []
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and part is not None:
            part.register_forward_pre_hook(lambda *_: calls.append(1))
    settings = {"cache_encoded_prompts": True, "max_steps": -1} | settings
    t = make_trainer("AdjointMatchingTrainer", folder, pipeline, dataset=PROMPTS, **settings)
    return t.conditioning(PROMPTS, torch.device("cpu")), len(calls)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(first[name].dtype == second[name].dtype for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)


MODELS = {"stable diffusion 3": (tiny_sd3, {"guidance_scale": 3.0})} | {
    name: (lambda name=name: tiny(name), {"height": 32, "width": 32, "guidance_scale": None} | settings)
    for name, (_, settings) in FAMILIES.items()
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("model", ["stable diffusion 3", *SLOW])
def test_a_second_run_encodes_nothing_and_reads_the_same_bits(tmp_path, assets, model):
    made, settings = MODELS[model]
    first, calls = encoded(tmp_path / "first", made(), **settings)
    second, none = encoded(tmp_path / "second", made(), **settings, embedding_memory_gib=0.0)
    fresh, as_many = encoded(tmp_path / "third", made(), **settings, cache_encoded_prompts=False)
    assert (none, as_many) == (0, calls)
    assert calls > 0
    assert_equal(first, fresh)
    assert_equal(second, fresh)
    for file in assets.rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    again, as_many = encoded(tmp_path / "fourth", made(), **settings)
    assert as_many == calls
    assert_equal(again, fresh)


def test_a_negative_prompt_takes_the_room_of_one(tmp_path, assets):
    encoded(tmp_path / "plain", tiny_sd3())
    plain = sum(file.stat().st_size for file in assets.rglob("*.safetensors"))
    found, _ = encoded(tmp_path / "guided", tiny_sd3(), guidance_scale=3.0)
    guided = sum(file.stat().st_size for file in assets.rglob("*.safetensors")) - plain
    assert len(found["negative_prompt_embeds"]) == len(PROMPTS)
    assert guided < 1.3 * plain  # nine prompts, and one negative one


def other_weights(pipeline):
    with torch.no_grad():
        next(pipeline.text_encoder_2.parameters()).add_(0.01)


def other_configuration(pipeline):
    pipeline.text_encoder.config.hidden_act = "gelu"


def other_padding(pipeline):
    pipeline.tokenizer.pad_token = pipeline.tokenizer.bos_token


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (other_weights, {}),
        (other_configuration, {}),
        (other_padding, {}),
        (None, {"guidance_scale": 3.0}),
        (None, {"guidance_scale": 3.0, "negative_prompt": "blurred"}),
        (None, {"max_sequence_length": 4}),
    ],
)
def test_what_is_encoded_in_another_way_is_encoded_anew(tmp_path, assets, change, settings):
    encoded(tmp_path / "first", tiny_sd3(), guidance_scale=3.0 if "negative_prompt" in settings else 1.0)
    pipeline, alike = tiny_sd3(), tiny_sd3()
    for changed in (pipeline, alike):
        if change is not None:
            change(changed)
    found, calls = encoded(tmp_path / "second", pipeline, **settings)
    fresh, as_many = encoded(tmp_path / "third", alike, **settings, cache_encoded_prompts=False)
    assert calls == as_many
    assert_equal(found, fresh)


def test_a_model_whose_encoding_nobody_knows_is_refused(tmp_path, assets, monkeypatch):
    monkeypatch.setattr(StableDiffusion3FlowPipeline, "encoding_facts", lambda self: None)
    with pytest.raises(
        ValueError, match=r"True, but StableDiffusion3FlowPipeline does not say what .*, or leave it out"
    ):
        encoded(tmp_path, tiny_sd3())
    torch.save(original_checkpoint(), tmp_path / "sit.pt")
    with pytest.raises(
        ValueError, match=r"`cache_encoded_prompts` is True, but this model has no text encoders: leav"
    ):
        make_trainer(
            "AdjointMatchingTrainer", tmp_path, tiny_sit(tmp_path / "sit.pt"), dataset=NAMES, cache_encoded_prompts=True,
            max_sequence_length=None,
        )  # fmt: skip
