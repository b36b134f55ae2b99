"""Reward gradients through an `AutoencoderTiny`, and how far they are from those through the model's own decoder."""

import shutil

import pytest
import torch

from flowrl_trainers import VGGFlowConfig, VGGFlowTrainer

from .helpers import CAPTIONS, make_trainer, redness, update_rows
from .tiny import tiny_autoencoder, tiny_sd3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny_autoencoder")
    tiny_autoencoder().save_pretrained(path)
    return path


def gradient_through(decode, latents):
    x = latents.clone().requires_grad_()
    return torch.autograd.grad(redness(images=decode(x), prompts=[]).sum(), x)[0]


def test_the_gradient_is_that_of_the_tiny_decoder_and_its_cosine_is_logged_once(tmp_path, folder, monkeypatch):
    """Against autograd by hand through both decoders, on the latents that the first rollout drew; the second rollout
    does not decode by the model's own.
    """
    t = make_trainer("AdjointMatchingTrainer", tmp_path, reward_decoder=str(folder))
    tiny = tiny_autoencoder()
    drawn, decoded, prepare, decode = [], [], t.prepare, t.flow.decode
    monkeypatch.setattr(t, "prepare", lambda rollout: drawn.append((rollout, len(decoded))) or prepare(rollout))
    monkeypatch.setattr(t.flow, "decode", lambda x: decoded.append(len(x)) or decode(x))
    t.train()
    first, second = update_rows(t)
    ((batch,), before), (_, after) = drawn
    assert (before, after, len(decoded)) == (0, 1, 1)  # the probe takes the tiny one
    latents = batch.record.final
    ours, full = (
        gradient_through(d, latents) for d in (lambda x: tiny.decode(x, return_dict=False)[0] / 2 + 0.5, decode)
    )
    scores, gradient = t.scorer.score_with_gradient(latents, batch.examples)
    torch.testing.assert_close(gradient, ours)
    torch.testing.assert_close(scores[:, 0], redness(images=tiny.decode(latents).sample / 2 + 0.5, prompts=[]))
    cosine = (ours * full).flatten(1).sum(dim=1) / (ours.flatten(1).norm(dim=1) * full.flatten(1).norm(dim=1))
    assert first["reward_decoder_cosine"] == pytest.approx(float(cosine.mean()), abs=1e-5)
    assert abs(first["reward_decoder_cosine"]) < 0.9
    assert "reward_decoder_cosine" not in second
    assert t.card_settings()["reward decoder"] == str(folder)


def vgg_flow(folder, decoder, **settings) -> VGGFlowTrainer:
    config = VGGFlowConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, num_inference_steps=3, guidance_scale=1.0,
        max_sequence_length=8, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1,
        value_network="none", timestep_bins=2, control_to_velocity_ratio=0.3, **settings,
    )  # fmt: skip
    return VGGFlowTrainer(tiny_sd3(), redness, config, CAPTIONS, reward_decoder=decoder)


def test_an_object_is_copied_and_belongs_to_the_identity(tmp_path):
    given = tiny_autoencoder().half()
    trainers = [vgg_flow(tmp_path, decoder) for decoder in (given, tiny_autoencoder(seed=1), None)]
    assert given.dtype == torch.float16
    assert all(parameter.requires_grad for parameter in given.parameters())
    first, second, none = (t._identity()["reward decoder"] for t in trainers)
    assert none is None
    assert first != second
    trainers[0].train()
    assert -1 <= update_rows(trainers[0])[0]["reward_decoder_cosine"] < 0.9


def test_wrong_decoders_are_refused(tmp_path, folder):
    tiny_sd3().vae.save_pretrained(tmp_path / "full")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    shutil.copytree(folder, tmp_path / "cut")
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    for source, error, sentence in (
        ("no/such/folder", ValueError, r"`reward_decoder` \('no/such/folder'\) cannot be loaded: pass the Hub id or"),
        (str(tmp_path / "full"), ValueError, r"`reward_decoder` \('.*full'\) is a AutoencoderKL: pass the Hub id"),
        (str(tmp_path / "other"), ValueError, r"`reward_decoder` \('.*other'\) is a model without a `_class_name`"),
        (str(tmp_path / "cut"), ValueError, r"`reward_decoder` \('.*cut'\) cannot be loaded: pass the Hub id or"),
    ):
        with pytest.raises(error, match=sentence):
            vgg_flow(tmp_path, None, reward_decoder=source)
    for decoder, error, sentence in (
        (tiny_autoencoder(latent_channels=16), ValueError, r"decodes latents of 16 channels, but .* \(4, 16, 16\)"),
        (
            tiny_autoencoder(levels=3),
            ValueError,
            r"makes pictures of \(64, 64\) pixels where the model's have \(32, 32\)",
        ),
        (tiny_sd3().vae, TypeError, "`reward_decoder` is a AutoencoderKL: pass an `AutoencoderTiny` of diffusers"),
    ):
        with pytest.raises(error, match=sentence):
            vgg_flow(tmp_path, decoder)
    with pytest.raises(
        ValueError, match=r"`reward_decoder` is passed, but `args.reward_decoder` is '.*': leave out one"
    ):
        vgg_flow(tmp_path, tiny_autoencoder(), reward_decoder=str(folder))
