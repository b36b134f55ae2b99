"""The SD3 family draws what the stock pipeline draws."""

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from peft import LoraConfig

from flowrl_trainers import FlowPipeline

from .helpers import seeds
from .tiny import tiny_sd3
from .tolerances import assert_same_pictures

PROMPTS = ["a red circle", "a green square and a blue triangle"]


def stock_pictures(pipeline: StableDiffusion3Pipeline, steps: int, **settings) -> torch.Tensor:
    return pipeline(PROMPTS, num_inference_steps=steps, generator=seeds(2), output_type="pt", **settings).images


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("size", [{"height": 32, "width": 32}, {"height": 32, "width": 48}])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize(
    "scheduler", [{"shift": 3.0}, {"use_dynamic_shifting": True, "shift": 1.0}], ids=["static", "dynamic"]
)
def test_parity_with_the_stock_pipeline(scheduler, guidance_scale, size, steps):
    pipeline = tiny_sd3(**scheduler)
    settings = {"guidance_scale": guidance_scale, "max_sequence_length": 8, **size}
    flow = FlowPipeline.from_pipeline(pipeline, **settings)
    ours, stock = flow.sample(PROMPTS, steps, generator=seeds(2)), stock_pictures(pipeline, steps, **settings)
    assert ours.shape == (2, 3, size["height"], size["width"])
    assert stock.std() > 0.05  # there is something to compare
    assert_same_pictures(ours, stock, flow, steps)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_parity_of_the_shipped_pipeline(shared_shapes, guidance_scale):
    settings = {"guidance_scale": guidance_scale, "max_sequence_length": 8}
    flow = FlowPipeline.from_pipeline(shared_shapes, **settings)
    ours = flow.sample(PROMPTS, 20, generator=seeds(2))
    assert_same_pictures(ours, stock_pictures(shared_shapes, 20, **settings), flow, 20)


def test_a_negative_prompt_is_that_of_the_stock_pipeline(tiny_pipeline):
    flow = FlowPipeline.from_pipeline(tiny_pipeline, guidance_scale=4.0, negative_prompt="a cross")
    stock = stock_pictures(tiny_pipeline, 4, guidance_scale=4.0, negative_prompt=["a cross"] * 2)
    assert_same_pictures(flow.sample(PROMPTS, 4, generator=seeds(2)), stock, flow, 4)
    assert (stock - stock_pictures(tiny_pipeline, 4, guidance_scale=4.0)).abs().max() > 1e-3


def test_the_picture_of_a_seed_is_the_same_alone_and_in_a_batch(shared_shapes):
    flow = FlowPipeline.from_pipeline(shared_shapes, guidance_scale=1.0, max_sequence_length=8)
    prompts = [PROMPTS[i % 2] for i in range(8)]
    together = flow.sample(prompts, 4, generator=seeds(8))
    for i in (0, 3, 7):
        alone = flow.sample([prompts[i]], 4, generator=[seeds(8)[i]])
        assert_same_pictures(together[i : i + 1], alone, flow, 4)


def test_uniform_spacing_is_the_shifted_uniform_grid_without_the_level_near_zero(tiny_pipeline):
    flow = FlowPipeline.from_pipeline(tiny_pipeline)
    torch.testing.assert_close(flow.sigmas(4, "uniform"), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    torch.testing.assert_close(flow.sigmas(4)[-2:], torch.tensor([0.0089, 0.0]), atol=1e-4, rtol=0)


def test_sigmas_leave_the_scheduler_of_the_pipeline_alone(tiny_pipeline):
    before = tiny_pipeline.scheduler.sigmas.clone()
    FlowPipeline.from_pipeline(tiny_pipeline).sigmas(7)
    assert torch.equal(tiny_pipeline.scheduler.sigmas, before)


def test_without_guidance_the_velocity_is_the_conditional_branch(tiny_pipeline):
    guided = FlowPipeline.from_pipeline(tiny_pipeline, guidance_scale=5.0)
    plain = FlowPipeline.from_pipeline(tiny_pipeline, guidance_scale=1.0)
    latents, sigma = guided.initial_latents(2, torch.Generator().manual_seed(0)), torch.tensor([0.7, 0.2])
    conditioning = guided.encode_prompts(PROMPTS)
    v, v_plain = (f.velocity(f.transformer, latents, sigma, conditioning, guidance=False) for f in (guided, plain))
    assert torch.equal(v, v_plain)
    assert "negative_prompt_embeds" not in plain.encode_prompts(PROMPTS)
    assert not torch.allclose(guided.velocity(guided.transformer, latents, sigma, conditioning, guidance=True), v)


def test_gradients_reach_the_latents_through_decode_unclamped(tiny_pipeline):
    """The directional derivative against a central difference in double precision."""
    flow = FlowPipeline.from_pipeline(tiny_pipeline)
    tiny_pipeline.vae.double()
    x = torch.randn(1, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
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


def test_a_saved_lora_is_read_by_the_stock_pipeline_with_its_alpha(tmp_path, tiny_pipeline):
    flow = FlowPipeline.from_pipeline(tiny_pipeline, guidance_scale=1.0)
    flow.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=12, target_modules=flow.lora_target_modules, init_lora_weights=False)
    )
    tuned = flow.sample(PROMPTS, 4, generator=seeds(2))
    flow.save_lora(tmp_path)
    fresh = tiny_sd3()
    base = stock_pictures(fresh, 4, guidance_scale=1.0)
    fresh.load_lora_weights(str(tmp_path))
    loaded = stock_pictures(fresh, 4, guidance_scale=1.0)
    assert (loaded - base).abs().max() > 1e-2
    assert_same_pictures(loaded, tuned, flow, 4)


def test_a_folder_is_loaded_also_where_the_pipeline_has_no_t5(tmp_path, shared_shapes):
    shared_shapes.save_pretrained(tmp_path)
    flow = FlowPipeline.from_pretrained(tmp_path, guidance_scale=1.0, max_sequence_length=8)
    same = FlowPipeline.from_pipeline(shared_shapes, guidance_scale=1.0, max_sequence_length=8)
    assert torch.equal(flow.sample(PROMPTS, 2, generator=seeds(2)), same.sample(PROMPTS, 2, generator=seeds(2)))


# ---- one clear sentence each ----------------------------------------------------------------------------------------


def test_refuses_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"is no diffusers pipeline, but an empty folder: pass a Hub id or a folder that holds a `model_index\.json`",
    ):
        FlowPipeline.from_pretrained(tmp_path)


def test_refuses_a_name_that_the_hub_cannot_tell_of():
    """Tests run offline: the sentence must not call a missing connection a missing pipeline."""
    with pytest.raises(ValueError, match="'nobody/no-model' is no folder, and the Hub cannot be reached"):
        FlowPipeline.from_pretrained("nobody/no-model")


def test_refuses_a_pipeline_of_an_unknown_family(tmp_path):
    ddpm = DDPMPipeline(UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4,
                                   down_block_types=("DownBlock2D",) * 2,
                                    up_block_types=("UpBlock2D",) * 2), DDPMScheduler())  # fmt: skip
    with pytest.raises(ValueError, match="DDPMPipeline is not a supported family"):
        FlowPipeline.from_pipeline(ddpm)
    ddpm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a DDPMPipeline, which is not a supported family"):
        FlowPipeline.from_pretrained(tmp_path)


def test_refuses_a_scheduler_that_is_not_flow_matching(tiny_pipeline):
    tiny_pipeline.register_modules(scheduler=DDPMScheduler())
    with pytest.raises(
        ValueError, match="scheduler is DDPMScheduler, which is not the Euler sampler of flow matching"
    ):
        FlowPipeline.from_pipeline(tiny_pipeline)


def test_refuses_what_is_no_pipeline():
    with pytest.raises(ValueError, match="`model` is a Linear: pass a Hub id"):
        FlowPipeline.from_pipeline(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(("size", "sentence"), [
    ({"height": 30}, r"`height` \(30\) must be a multiple of 4 pixels and at most 128"),
    ({"width": 132}, r"`width` \(132\) must be a multiple of 4 pixels and at most 128"),
    ({"max_sequence_length": 600}, r"`max_sequence_length` \(600\) must be between 1 and 512"),
    ({"num_frames": 3}, "StableDiffusion3Pipeline has no setting `num_frames`: it takes `height`"),
])  # fmt: skip
def test_refuses_wrong_settings(tiny_pipeline, size, sentence):
    with pytest.raises(ValueError, match=sentence):
        FlowPipeline.from_pipeline(tiny_pipeline, **size)


def test_refuses_an_unknown_spacing(tiny_pipeline):
    with pytest.raises(ValueError, match="`spacing` is 'karras': choose 'pipeline' or 'uniform'"):
        FlowPipeline.from_pipeline(tiny_pipeline).sigmas(4, "karras")


def test_from_pipeline_takes_the_scheduler_from_the_pipeline_as_it_is(tiny_pipeline):
    tiny_pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))
    assert FlowPipeline.from_pipeline(tiny_pipeline).sigmas(4, "uniform")[1] == 0.75
