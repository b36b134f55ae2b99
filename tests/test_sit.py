"""SiT: its original checkpoints convert exactly, and the family draws what `SiTPipeline` draws."""

import argparse
import math
import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import save_file

from flowrl_trainers import FlowPipeline
from flowrl_trainers.cli.convert_sit import convert_sit
from flowrl_trainers.sit import SiTPipeline, SiTTransformer2DModel, convert_checkpoint, load_transformer

from .helpers import TRAINERS, check_update, make_trainer, seeds
from .tiny_sit import (
    CHANNELS,
    CLASS_PROMPTS,
    CLASSES,
    DEPTH,
    GRID,
    HEADS,
    NAMES,
    PATCH,
    SIZE,
    D,
    original_checkpoint,
    sin_cos_table,
    tiny_sit,
    tiny_vae,
)
from .tolerances import assert_same_pictures, of_velocities, rounding, terms

# ---- the original code, in plain torch functions --------------------------------------------------------------------


def original_forward(
    state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
    """data - noise at x = t data + (1 - t) noise, for t in [0, 1]."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(value: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]
        )

    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = linear(
        "t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1)))
    )
    c = F.silu(time + state["y_embedder.embedding_table.weight"][y])
    h = (
        F.conv2d(x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH).flatten(2).mT
        + state["pos_embed"]
    )
    for i in range(DEPTH):
        b = f"blocks.{i}"
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = linear(f"{b}.adaLN_modulation.1", c).chunk(6, dim=1)
        q, k, v = (
            linear(f"{b}.attn.qkv", norm(h, shift_1, scale_1))
            .reshape(len(x), -1, 3, HEADS, D // HEADS)
            .permute(2, 0, 3, 1, 4)
        )
        attention = (q @ k.mT / math.sqrt(D // HEADS)).softmax(-1) @ v
        h = h + gate_1[:, None] * linear(f"{b}.attn.proj", attention.transpose(1, 2).flatten(2))
        inner = F.gelu(linear(f"{b}.mlp.fc1", norm(h, shift_2, scale_2)), approximate="tanh")
        h = h + gate_2[:, None] * linear(f"{b}.mlp.fc2", inner)
    h = linear("final_layer.linear", norm(h, *linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)))
    h = h.reshape(len(x), GRID, GRID, PATCH, PATCH, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, SIZE, SIZE)[:, :CHANNELS]


# ---- tiny pipelines -------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "tiny.pt"
    torch.save(original_checkpoint(), path)
    return path


@pytest.fixture
def tiny(checkpoint) -> SiTPipeline:
    return tiny_sit(checkpoint)


def drawn(pipeline: SiTPipeline, **settings) -> torch.Tensor:
    return pipeline(CLASS_PROMPTS, num_inference_steps=4, generator=seeds(2), output_type="pt", **settings).images


# ---- conversion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_a_converted_checkpoint_computes_what_the_original_code_computes(tmp_path, learn_sigma):
    """At timestep 1000 sigma it is minus the original velocity at t = 1 - sigma, for every class and for no class (the
    last row).
    """
    state = original_checkpoint(learn_sigma)
    save_file(state, tmp_path / "tiny.safetensors")
    model = load_transformer(tmp_path / "tiny.safetensors", num_attention_heads=HEADS)
    x, sigma = (
        torch.randn(6, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1)),
        torch.tensor([1, 0.9, 0.5, 0.3, 0.01, 0]),
    )
    y = torch.arange(CLASSES + 1)
    with torch.no_grad():
        velocity = model(x, 1000 * sigma, y).sample
        original = original_forward(state, x, 1 - sigma, y)
    assert original.std() > 0.3  # there is something to compare
    torch.testing.assert_close(velocity, -original, atol=rounding(terms(model)), rtol=0)


def test_a_converted_checkpoint_has_the_epsilon_of_the_original_norms(tmp_path):
    """Hidden states of about 0.01 make an epsilon of 1e-6 count in every norm: 1e-5 would change the output by
    percents.
    """
    state = original_checkpoint()
    for name in state:
        if "x_embedder" in name or "attn.proj" in name or "mlp.fc2" in name or name == "pos_embed":
            state[name] = 0.01 * state[name]
    torch.save(state, tmp_path / "small.pt")
    model = load_transformer(tmp_path / "small.pt", num_attention_heads=HEADS)
    x, y = torch.randn(2, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3])
    with torch.no_grad():
        velocity = model(x, torch.tensor([700.0, 200.0]), y).sample
    torch.testing.assert_close(
        velocity, -original_forward(state, x, torch.tensor([0.3, 0.8]), y), atol=1e-5, rtol=1e-5
    )


def test_a_fresh_network_has_the_position_embeddings_of_the_original_code():
    model = SiTTransformer2DModel(SIZE, PATCH, CHANNELS, DEPTH, HEADS, D // HEADS)
    torch.testing.assert_close(model.pos_embed.pos_embed, sin_cos_table(), atol=1e-6, rtol=0)


def test_what_training_saved_gives_its_moving_average(tmp_path, checkpoint):
    state = original_checkpoint()
    other = {name: value + 1 for name, value in state.items()}
    torch.save(
        {"model": other, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)},
        tmp_path / "0050000.pt",
    )
    torch.save({"model": other}, tmp_path / "model.pt")
    average, plain, model = (
        load_transformer(tmp_path / name, HEADS).state_dict() for name in ("0050000.pt", "tiny.pt", "model.pt")
    )
    assert all(torch.equal(average[name], plain[name]) for name in plain)
    assert not torch.equal(model["class_embedder.weight"], plain["class_embedder.weight"])


def test_gradient_checkpointing_leaves_gradients_as_they_are(tiny):
    model, x = (
        tiny.transformer.train(),
        torch.randn(2, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1)),
    )

    def gradient() -> torch.Tensor:
        loss = model(x, torch.tensor([700.0, 200.0]), torch.tensor([0, 3])).sample.square().mean()
        return torch.autograd.grad(loss, model.transformer_blocks[0].attn.to_q.weight)[0]

    without = gradient()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), without)


def test_the_command_writes_a_pipeline_that_loads(tmp_path, checkpoint, capsys):
    tiny_vae().save_pretrained(tmp_path / "vae")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    out = tmp_path / "out"
    convert_sit([str(checkpoint), str(out), "--vae", str(tmp_path / "vae"), "--class_names",
                 str(tmp_path / "names.txt"),
                 "--num_attention_heads", str(HEADS)])  # fmt: skip
    assert "SiT of 2 blocks, width 24, patches of 2, 5 classes, pictures of 16 x 16 pixels" in capsys.readouterr().out
    flow = FlowPipeline.from_pretrained(out, guidance_scale=2.0)
    assert flow.sample(["Carassius auratus"], 2).shape == (1, 3, 16, 16)


# ---- the pipeline and its family ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [{"height": 16, "width": 16}, {"height": 8, "width": 16}])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_parity_with_the_pipeline(tiny, guidance_scale, size):
    settings = {"guidance_scale": guidance_scale, **size}
    flow = FlowPipeline.from_pipeline(tiny, **settings)
    ours, stock = flow.sample(CLASS_PROMPTS, 4, generator=seeds(2)), drawn(tiny, **settings)
    assert ours.shape == (2, 3, size["height"], size["width"])
    assert stock.std() > 0.05
    assert_same_pictures(ours, stock, flow, 4)


def test_sampling_is_the_euler_ode_of_the_original_code_on_a_uniform_grid(tiny):
    """In its time, t from 0 to 1, with guidance on all channels."""
    state, y, x = (
        original_checkpoint(),
        torch.tensor([0, 4]),
        torch.cat([torch.randn(1, CHANNELS, SIZE, SIZE, generator=g) for g in seeds(2)]),
    )
    for step in range(4):
        t = torch.full((2,), step / 4)
        v, null = original_forward(state, x, t, y), original_forward(state, x, t, torch.full((2,), CLASSES))
        x = x + (null + 3.0 * (v - null)) / 4
    latents = tiny(
        CLASS_PROMPTS, num_inference_steps=4, guidance_scale=3.0, generator=seeds(2), output_type="latent"
    ).images
    torch.testing.assert_close(latents, x, atol=1e-4, rtol=1e-5)


def test_a_saved_pipeline_draws_the_same_when_loaded(tmp_path, tiny):
    tiny.save_pretrained(tmp_path)
    loaded = SiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == tiny.labels
    assert torch.equal(drawn(loaded), drawn(tiny))
    flow = FlowPipeline.from_pretrained(tmp_path)
    assert torch.equal(
        flow.sample(CLASS_PROMPTS, 4, generator=seeds(2)),
        FlowPipeline.from_pipeline(tiny).sample(CLASS_PROMPTS, 4, generator=seeds(2)),
    )


def test_a_repository_of_the_hub_is_fetched_without_code(tmp_path, tiny, monkeypatch):
    """diffusers' own `download` refuses a component of a library that it does not know."""
    tiny.save_pretrained(tmp_path)
    asked = {}

    def fetch(name: str, **told) -> str:
        asked.update(told, name=name)
        return str(tmp_path)

    monkeypatch.setattr("flowrl_trainers.sit.pipeline.snapshot_download", fetch)
    loaded = SiTPipeline.from_pretrained("somebody/sit", revision="main")
    assert loaded.labels == tiny.labels
    assert asked["name"] == "somebody/sit"
    assert asked["revision"] == "main"
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in asked["allow_patterns"])


def test_a_saved_lora_is_read_by_a_fresh_pipeline_with_its_alpha(tmp_path, tiny):
    tiny.save_pretrained(tmp_path / "base")
    flow = FlowPipeline.from_pipeline(tiny, guidance_scale=2.0)
    flow.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=12, target_modules=flow.lora_target_modules, init_lora_weights=False)
    )
    tuned = flow.sample(CLASS_PROMPTS, 4, generator=seeds(2))
    flow.save_lora(tmp_path / "lora")
    fresh = SiTPipeline.from_pretrained(tmp_path / "base")
    fresh.set_progress_bar_config(disable=True)
    base = drawn(fresh, guidance_scale=2.0)
    fresh.load_lora_weights(str(tmp_path / "lora"))
    loaded = drawn(fresh, guidance_scale=2.0)
    assert (loaded - base).abs().max() > 1e-2
    assert_same_pictures(loaded, tuned, flow, 4)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_update_changes_the_adapter_alone_and_the_loader_reads_it(tmp_path, checkpoint, trainer):
    def draw(pipeline: SiTPipeline, flow: FlowPipeline) -> torch.Tensor:
        return drawn(pipeline, **flow.call_arguments())

    check_update(
        tmp_path,
        trainer,
        lambda: tiny_sit(checkpoint),
        draw,
        [*CLASS_PROMPTS, "tench", "volcano"],
        {"height": SIZE, "width": 2 * SIZE},
    )


def test_the_card_shows_a_class_and_no_task_that_is_not_its_own(tmp_path, tiny):
    flow = FlowPipeline.from_pipeline(tiny)
    assert tiny.class_labels([flow.example_prompt]).tolist() == [0]
    assert flow.task is None


def test_classes_in_one_batch_do_not_mix(tiny):
    flow = FlowPipeline.from_pipeline(tiny, guidance_scale=4.0)
    latents, sigma = flow.initial_latents(2, torch.Generator().manual_seed(0)), torch.tensor([0.7, 0.2])
    conditioning = flow.encode_prompts(CLASS_PROMPTS)
    together = flow.velocity(flow.transformer, latents, sigma, conditioning, guidance=True)
    for i in range(2):
        own = {name: value[i : i + 1] for name, value in conditioning.items()}
        alone = flow.velocity(flow.transformer, latents[i : i + 1], sigma[i : i + 1], own, guidance=True)
        torch.testing.assert_close(together[i : i + 1], alone, atol=of_velocities(flow), rtol=0)


def test_weights_learn_through_the_conditional_branch_alone(tiny):
    """With guidance s, v = (1 - s) v_null + s v; without a gradient to the latents v_null is a constant, so the
    gradient is s that of v.
    """
    flow, weight = FlowPipeline.from_pipeline(tiny, guidance_scale=3.0), tiny.transformer.proj_out.weight
    latents, sigma = flow.initial_latents(2, torch.Generator().manual_seed(0)), torch.tensor([0.7, 0.2])
    conditioning = flow.encode_prompts(CLASS_PROMPTS)
    guided, plain = (
        torch.autograd.grad(flow.velocity(flow.transformer, latents, sigma, conditioning, guidance=on).sum(), weight)[
            0
        ]
        for on in (True, False)
    )
    torch.testing.assert_close(guided, 3.0 * plain)


def test_the_prompt_of_a_critic_is_the_embedding_of_the_class(tiny):
    flow = FlowPipeline.from_pipeline(tiny)
    features, mask = flow.prompt_features(flow.encode_prompts(CLASS_PROMPTS))
    assert torch.equal(features[:, 0], original_checkpoint()["y_embedder.embedding_table.weight"][[0, 4]])
    assert mask.tolist() == [[True], [True]]
    assert not features.requires_grad


def test_both_spacings_are_the_uniform_grid(tiny):
    flow = FlowPipeline.from_pipeline(tiny)
    for spacing in ("pipeline", "uniform"):
        torch.testing.assert_close(flow.sigmas(4, spacing), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]))


def test_gradients_reach_the_latents_through_decode_unclamped(tiny):
    """The directional derivative against a central difference in double precision."""
    flow = FlowPipeline.from_pipeline(tiny)
    tiny.vae.double()
    x = torch.randn(
        1, CHANNELS, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def brightness(latents: torch.Tensor) -> torch.Tensor:
        return flow.decode(latents).double().square().sum()

    (gradient,) = torch.autograd.grad(brightness(x), x)
    with torch.no_grad():
        numeric = (brightness(x + 1e-2 * direction) - brightness(x - 1e-2 * direction)) / 2e-2
    # decode returns float32, so the difference carries rounding of about 1e-4.
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=2e-3)
    assert flow.decode(20 * x).max() > 1
    assert flow.images(20 * x).max() == 1


# ---- one clear sentence each ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "sentence"), [
    ("unicorn", r"'unicorn' is no class of this model: pass one of its 5 class names \(`pipeline.labels`\) or a number from 0 to 4"),
    ("crane", "'crane' is the name of the classes 1, 2: pass the number of one"),
    ("5", "Class 5 is out of range: this model has the classes 0 to 4"),
    (-1, "Class -1 is out of range"),
])  # fmt: skip
def test_refuses_classes_that_the_model_does_not_have(tiny, prompt, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny.class_labels(prompt)


def test_refuses_an_unknown_class_of_a_model_without_names(tiny):
    nameless = SiTPipeline(tiny.transformer, tiny.vae, tiny.scheduler)
    with pytest.raises(ValueError, match="'tench' is no class of this model: pass a number from 0 to 4"):
        FlowPipeline.from_pipeline(nameless).encode_prompts(["tench"])


def test_refuses_more_names_than_classes(tiny):
    with pytest.raises(ValueError, match="Class 5 is out of range: this model has the classes 0 to 4"):
        SiTPipeline(tiny.transformer, tiny.vae, tiny.scheduler, dict(enumerate([*NAMES, "one too many"])))


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"height": 18}, r"`height` \(18\) must be a multiple of 4 pixels and at most 16 for this model"),
    ({"width": 20}, r"`width` \(20\) must be a multiple of 4 pixels and at most 16 for this model"),
    ({"output_type": "jpeg"}, "`output_type` is 'jpeg': choose pil, np, pt, latent"),
    ({"generator": seeds(3)}, "`generator` is a list of 3 for 2 prompts: pass one for each, or a single one"),
])  # fmt: skip
def test_the_pipeline_refuses_wrong_arguments(tiny, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(CLASS_PROMPTS, num_inference_steps=1, **settings)


def test_the_family_refuses_a_size_without_position_embeddings(tiny):
    with pytest.raises(
        ValueError, match=r"`height` \(20\) must be a multiple of 4 pixels and at most 16 for this model"
    ):
        FlowPipeline.from_pipeline(tiny, height=20)


class Intruder:
    def __reduce__(self):
        return print, ("this must not be run",)


def test_refuses_a_file_that_could_run_code(tmp_path, capsys):
    torch.save({**original_checkpoint(), "extra": Intruder()}, tmp_path / "tiny.pt")
    with pytest.raises(
        ValueError,
        match="is no file of tensors alone, and reading what else is in it could run code, so it is refused",
    ):
        load_transformer(tmp_path / "tiny.pt", HEADS)
    assert capsys.readouterr().out == ""


def with_changes(**changes) -> dict[str, torch.Tensor]:
    return original_checkpoint() | changes


@pytest.mark.parametrize(("stored", "sentence"), [
    ({"weight": torch.zeros(2)}, "is not a checkpoint of SiT: it has no tensor 'x_embedder.proj.weight'"),
    ({"epoch": 3}, "is not a checkpoint of SiT: it holds no dictionary of tensors"),
    ([torch.zeros(2)], "is not a checkpoint of SiT: it holds no dictionary of tensors"),
    (with_changes(**{"blocks.0.attn.q_norm.weight": torch.ones(D // HEADS)}), r"it has a tensor 'blocks\.0\.attn\.q_norm\.weight', which SiT does not have"),
    (with_changes(pos_embed=torch.zeros(1, 15, D)), r"the tensor for 'pos_embed\.pos_embed' is \(1, 15, 24\) where SiT has \(1, 9, 24\)"),
    (with_changes(**{"x_embedder.proj.weight": torch.zeros(D, 16)}), r"'x_embedder\.proj\.weight' is \(24, 16\), but SiT has a convolution"),
], ids=["other", "no_tensors", "list", "extra", "positions", "linear"])  # fmt: skip
def test_refuses_a_checkpoint_that_is_not_sit(tmp_path, stored, sentence):
    torch.save(stored, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=sentence):
        load_transformer(tmp_path / "other.pt", HEADS)


@pytest.mark.parametrize("name", ["other.safetensors", "other.pt", "empty.pt"])
def test_refuses_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"" if name == "empty.pt" else b"this is no checkpoint")
    with pytest.raises(ValueError, match=r"is damaged or no file of tensors|is no file of tensors alone"):
        load_transformer(tmp_path / name)


def test_refuses_a_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"none\.pt' is no file: pass a `.pt` or `.safetensors` file"):
        load_transformer(tmp_path / "none.pt")


def test_refuses_to_guess_the_heads_of_a_width_that_is_not_official(checkpoint):
    for heads in (None, 5):
        with pytest.raises(
            ValueError, match=f"`num_attention_heads` is {heads}, but a network of width 24 needs a divisor of it"
        ):
            load_transformer(checkpoint, heads)


def test_refuses_an_autoencoder_that_does_not_fit(tmp_path, checkpoint):
    tiny_vae(latent_channels=16).save_pretrained(tmp_path / "vae")
    with pytest.raises(
        ValueError,
        match="has latents of 16 channels, but the checkpoint reads 4: pass the one that it was trained with",
    ):
        convert_checkpoint(checkpoint, tmp_path / "out", tmp_path / "vae", num_attention_heads=HEADS)
    for missing in (tmp_path / "missing", "nobody/no-autoencoder"):
        with pytest.raises(ValueError, match=f"The autoencoder '{re.escape(str(missing))}' cannot be loaded"):
            convert_checkpoint(checkpoint, tmp_path / "out", missing, num_attention_heads=HEADS)


def test_refuses_a_list_of_names_of_another_length(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"`class_names` has 3 names, but .* has 5 classes: name each"):
        convert_checkpoint(checkpoint, tmp_path / "out", class_names=NAMES[:3], num_attention_heads=HEADS)
    with pytest.raises(ValueError, match=r"`--class_names` .*none\.txt' cannot be read"):
        convert_sit([str(checkpoint), str(tmp_path / "out"), "--class_names", str(tmp_path / "none.txt")])
    (tmp_path / "latin.txt").write_bytes("Möwe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"`--class_names` .*latin\.txt' cannot be read: pass a text file in UTF-8"):
        convert_sit([str(checkpoint), str(tmp_path / "out"), "--class_names", str(tmp_path / "latin.txt")])


def test_a_critic_that_reads_the_class_is_refused_where_processes_share_the_network(tmp_path, tiny, monkeypatch):
    """Its embedding is a part of the network, which nobody may call by itself there."""
    settings = dict(critic="none", critic_warmup_max_steps=0, max_sequence_length=None)
    t = make_trainer("ACFlowTrainer", tmp_path, tiny, dataset=CLASS_PROMPTS * 4, **settings)
    monkeypatch.setattr(type(t.model), "is_sharded", True)
    for kind in ("convolutional", "module"):
        monkeypatch.setattr(t.args, "critic", kind)
        with pytest.raises(ValueError, match=rf"`critic` \('{kind}'\) reads what the network makes of a class"):
            t._make_critic()
