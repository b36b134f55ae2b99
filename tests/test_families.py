"""Every family draws what its stock pipeline draws, and trains."""

import itertools
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from diffusers import DPMSolverMultistepScheduler, WanPipeline
from peft import LoraConfig

import flowrl_trainers
from flowrl_trainers import FlowPipeline
from flowrl_trainers.pipelines.checkpoints import CHECKPOINTS, table
from flowrl_trainers.sampling.conditioning import ConditioningCache

from .helpers import TRAINERS, check_update, make_trainer, redness, seeds
from .tiny_families import (
    FAMILIES,
    GUIDANCE,
    PROMPTS,
    stock,
    tiny,
    tiny_chroma,
    tiny_cogview_4,
    tiny_flux,
    tiny_flux_2_klein,
    tiny_sana,
)
from .tolerances import assert_same_pictures, of_velocities

SIZES = {"square": {"height": 32, "width": 32}, "not square": {"height": 32, "width": 64}}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("family", "guidance"), [(f, g) for f, cases in GUIDANCE.items() for g in cases])
def test_parity_with_the_stock_pipeline(family, guidance, size):
    pipeline = tiny(family)
    flow = FlowPipeline.from_pipeline(pipeline, **FAMILIES[family][1], **guidance, **size)
    ours, theirs = flow.sample(PROMPTS, 4, generator=seeds(2)), stock(family, pipeline, flow)
    assert ours.shape == (2, 3, size["height"], size["width"])
    assert theirs.std() > 0.05  # there is something to compare
    assert_same_pictures(ours, theirs, flow, 4)


@pytest.mark.parametrize("family", [f for f, cases in GUIDANCE.items() if len(cases) == 2])
def test_guidance_makes_a_difference(family):
    pipeline, (first, second) = tiny(family), GUIDANCE[family]
    drawn = [
        FlowPipeline.from_pipeline(pipeline, height=32, width=32, **FAMILIES[family][1], **g).sample(
            PROMPTS, 4, generator=seeds(2)
        )
        for g in (first, second)
    ]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4  # parity is held to 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_different_length_get_the_velocities_of_each_alone(family):
    """Also where they were encoded apart, as the cache of a run may do."""
    flow = FlowPipeline.from_pipeline(tiny(family), height=32, width=32, **FAMILIES[family][1], **GUIDANCE[family][-1])
    latents, sigma = flow.initial_latents(2, seeds(2)), torch.tensor([0.8, 0.3])
    rows = [(latents[i : i + 1], sigma[i : i + 1], flow.encode_prompts([PROMPTS[i]])) for i in range(2)]
    alone = [flow.velocity(flow.transformer, *row, guidance=True) for row in rows]
    cache = ConditioningCache(flow, batch_size=1)
    cache.encode(PROMPTS, torch.device("cpu"), show_progress=False)
    assert any((first != second).any() for first, second in cache(PROMPTS, torch.device("cpu")).values())
    for conditioning in (flow.encode_prompts(PROMPTS), cache(PROMPTS, torch.device("cpu"))):
        together = flow.velocity(flow.transformer, latents, sigma, conditioning, guidance=True)
        torch.testing.assert_close(together, torch.cat(alone), atol=of_velocities(flow), rtol=1e-5)
    features, mask = flow.prompt_features(conditioning)
    assert features.shape[:2] == mask.shape
    assert mask.dtype == torch.bool


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_latents_through_decode(family):
    """The derivative along the gradient, where single precision of the output matters least, against a central
    difference.
    """
    pipeline = tiny(family)
    flow = FlowPipeline.from_pipeline(pipeline, height=32, width=64, **FAMILIES[family][1])
    pipeline.vae.double()
    x = flow.initial_latents(1, seeds(1)).double().requires_grad_()

    def brightness(latents: torch.Tensor) -> torch.Tensor:
        return flow.decode(latents).double().square().sum()

    (gradient,) = torch.autograd.grad(brightness(x), x)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        numeric = (brightness(x + 1e-3 * direction) - brightness(x - 1e-3 * direction)) / 2e-3
    assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=5e-3)
    with torch.no_grad():
        for parameter in list(pipeline.vae.decoder.parameters())[-2:]:  # of the last layer
            parameter.mul_(50)
    assert flow.decode(x.detach()).max() > 1.5  # nothing clamps
    assert gradient.abs().amin() > 0 or (gradient != 0).float().mean() > 0.99  # every part of the packing is reached


@pytest.mark.parametrize("family", FAMILIES)
def test_grids_leave_the_pipeline_alone_and_end_well(family):
    pipeline = tiny(family)
    flow, before = FlowPipeline.from_pipeline(pipeline, **FAMILIES[family][1]), pipeline.scheduler.sigmas.clone()
    for spacing in ("pipeline", "uniform"):
        grid = flow.sigmas(5, spacing)
        assert grid[0] == 1
        assert grid[-1] == 0
        assert (grid.diff() < 0).all()
    assert grid[-2] > 0.05
    assert torch.equal(pipeline.scheduler.sigmas, before)


# Every family with adjoint matching, whose gradient passes through all parts of it, and every other trainer with a
# family; the others are slow tests.
QUICK = {(family, "AdjointMatchingTrainer") for family in FAMILIES} | set(zip(FAMILIES, TRAINERS, strict=False))


@pytest.mark.parametrize(
    ("family", "trainer"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.slow])
        for pair in itertools.product(FAMILIES, TRAINERS)
    ],
)
def test_an_update_changes_the_adapter_alone_and_the_stock_loader_reads_it(tmp_path, family, trainer):
    prompts = [*PROMPTS, "a blue cross", "a red diamond"]
    settings = {"height": 32, "width": 32} | FAMILIES[family][1]
    check_update(
        tmp_path,
        trainer,
        lambda: tiny(family),
        lambda pipeline, flow: stock(family, pipeline, flow),
        prompts,
        settings,
    )


# ---- rules of checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda: tiny_flux(guidance_embeds=False), r"`guidance_scale` \(3.0\) has no effect on this model"),
    (lambda: tiny_flux_2_klein(is_distilled=True), r"`guidance_scale` \(3.0\) has no effect on a distilled model"),
])  # fmt: skip
def test_guidance_that_would_be_ignored_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        FlowPipeline.from_pipeline(make(), guidance_scale=3.0)


@pytest.mark.parametrize(
    ("family", "settings"), [("flux", {}), ("sana", {"guidance_scale": 1.0}), ("z image", {"guidance_scale": 0.0})]
)
def test_a_negative_prompt_that_would_be_ignored_is_refused(family, settings):
    with pytest.raises(ValueError, match=r"`negative_prompt` \('a cross'\) has no effect without guidance"):
        FlowPipeline.from_pipeline(tiny(family), negative_prompt="a cross", **settings)


def test_a_known_checkpoint_is_advised_on(tmp_path, caplog):
    pipeline = tiny_flux_2_klein(is_distilled=True)
    pipeline.register_to_config(_name_or_path="black-forest-labs/FLUX.2-klein-4B")
    flow = FlowPipeline.from_pipeline(pipeline, height=32, width=32, max_sequence_length=64)
    assert flow.advice(4) == []
    (sentence,) = flow.advice(20)
    assert sentence.startswith(
        "black-forest-labs/FLUX.2-klein-4B is distilled to 4 steps, but `num_inference_steps` is 20"
    )
    config = flowrl_trainers.ACFlowConfig(
        output_dir=str(tmp_path), num_inference_steps=20, report_to="none", use_cpu=True
    )
    flowrl_trainers.ACFlowTrainer(flow, redness, config, Dataset.from_dict({"prompt": PROMPTS * 4}))
    assert sentence in caplog.text
    base = CHECKPOINTS["stabilityai/stable-diffusion-3.5-medium"]
    assert base.advice(20, 4.5) == []
    assert "its card advises 40 steps: with 4" in base.advice(4, 4.5)[0]
    assert "set 1" in CHECKPOINTS["black-forest-labs/FLUX.1-schnell"].advice(4, 3.5)[0]


def test_the_table_of_the_docs_is_the_one_that_warns():
    assert table() in (Path(__file__).parent.parent / "docs" / "models.md").read_text()


def test_sanas_solver_is_replaced_with_its_own_shift(caplog):
    pipeline = tiny_sana()
    euler = FlowPipeline.from_pipeline(pipeline, height=32, width=32).sigmas(6)
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    pipeline.register_modules(scheduler=solver)
    assert torch.equal(FlowPipeline.from_pipeline(pipeline, height=32, width=32).sigmas(6), euler)
    assert pipeline.scheduler is solver
    assert "Sana's DPM-Solver is replaced by the Euler sampler of flow matching with its shift, 3" in caplog.text


def test_the_card_of_sana_has_code_that_sets_the_solver():
    pipeline = tiny_sana()
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.5)
    pipeline.register_modules(scheduler=solver)
    code = FlowPipeline.from_pipeline(pipeline, height=32, width=32).scheduler_code(renoises=False)
    exec(code, {"pipe": pipeline})
    assert pipeline.scheduler.shift == 2.5


@pytest.mark.parametrize("family", ["flux schnell", "cogview 4", "aura flow"])
def test_a_shift_that_was_set_is_kept(family):
    pipeline = tiny(family)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_dynamic_shifting=False)
    pipeline.scheduler.set_shift(5.0)
    flow = FlowPipeline.from_pipeline(pipeline, **FAMILIES[family][1], height=32, width=32)
    assert_same_pictures(flow.sample(PROMPTS, 4, generator=seeds(2)), stock(family, pipeline, flow), flow, 4)
    assert flow.scheduler_code(renoises=False) == "pipe.scheduler.set_shift(5)"  # for the card
    lines = flow.scheduler_code(renoises=True)
    exec(lines, {"pipe": pipeline})
    assert (pipeline.scheduler.shift, pipeline.scheduler.config.stochastic_sampling) == (5.0, True)


@pytest.mark.parametrize("family", ["flux", "flux 2", "qwen image", "chroma", "sana"])
def test_weights_that_are_stored_in_eight_bits_are_fed_what_they_compute_in(family):
    pipeline = tiny(family)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(p.dtype == torch.float8_e4m3fn for p in pipeline.transformer.parameters())
    flow = FlowPipeline.from_pipeline(pipeline, **FAMILIES[family][1], height=32, width=32)
    assert_same_pictures(flow.sample(PROMPTS, 4, generator=seeds(2)), stock(family, pipeline, flow), flow, 4)


def test_tiles_of_qwen_images_decoder_are_those_of_the_stock_pipeline():
    pipeline = tiny("qwen image")
    pipeline.vae.enable_tiling(
        tile_sample_min_height=16, tile_sample_min_width=16, tile_sample_stride_height=8, tile_sample_stride_width=8
    )
    flow = FlowPipeline.from_pipeline(pipeline, **FAMILIES["qwen image"][1], height=32, width=32)
    ours = flow.sample(PROMPTS, 4, generator=seeds(2))
    assert_same_pictures(ours, stock("qwen image", pipeline, flow), flow, 4)
    with pytest.raises(ValueError, match="Tiles of Qwen-Image's autoencoder have no gradient"):
        flow.decode(flow.initial_latents(1))
    pipeline.vae.disable_tiling()
    assert (flow.sample(PROMPTS, 4, generator=seeds(2)) - ours).abs().max() > 1e-3
    pipeline.vae.enable_tiling()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.mul_(100)
    loud = flow.images(flow.initial_latents(1))
    assert (loud.min(), loud.max()) == (0, 1)
    pipeline.vae.disable_tiling()
    pipeline.vae.enable_slicing()
    assert flow.decode(flow.initial_latents(2)).shape == (2, 3, 32, 32)


def test_aura_flow_decodes_in_single_precision_as_the_stock_pipeline():
    pipeline = tiny("aura flow")
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.vae.to(torch.float16)
    flow = FlowPipeline.from_pipeline(pipeline, height=32, width=32)
    flow.decode(flow.initial_latents(1))
    assert pipeline.vae.dtype == torch.float32


def test_a_lora_in_a_text_encoder_is_refused(tmp_path):
    pipeline = tiny("flux schnell")
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    config = flowrl_trainers.ACFlowConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(
        ValueError,
        match="A text encoder of the pipeline carries a LoRA, which training would use and its file would not keep",
    ):
        flowrl_trainers.ACFlowTrainer(
            pipeline, redness, config, Dataset.from_dict({"prompt": PROMPTS * 4}), peft_config=LoraConfig(r=2)
        )


@pytest.mark.parametrize(
    "shift", [{}, {"time_shift_type": "exponential"}, {"use_dynamic_shifting": False, "shift": 3.0}]
)
def test_cogviews_network_is_told_the_time_before_the_shift(shift):
    """The stock pipeline hands its scheduler whole numbers from 1000 down to 1, and the same to the network."""
    flow = FlowPipeline.from_pipeline(tiny_cogview_4(**shift), height=32, width=64)
    sigmas = flow.sigmas(4)
    assert sigmas[1] != pytest.approx(0.667, abs=0.02)
    torch.testing.assert_close(
        1000 * flow.unshifted(sigmas), torch.tensor([1000.0, 667.0, 334.0, 1.0, 0.0]), atol=1e-3, rtol=0
    )


def test_chroma_is_not_trained_without_its_mask(tmp_path):
    config = flowrl_trainers.ACFlowConfig(
        output_dir=str(tmp_path), activation_checkpointing=True, height=32, width=32, max_sequence_length=64,
        report_to="none", use_cpu=True,
    )  # fmt: skip
    judged = []

    def judge(images, prompts, **columns):
        judged.append(len(images))
        return [0.0] * len(images)

    rows = Dataset.from_dict({"prompt": PROMPTS * 4})
    trainer = flowrl_trainers.ACFlowTrainer(tiny_chroma(), judge, config, rows, peft_config=LoraConfig(r=2))
    with pytest.raises(
        ValueError, match="`activation_checkpointing` is True, with which diffusers drops Chroma's attention mask"
    ):
        trainer.train()
    assert not judged  # not even the probe has drawn a picture


def test_lumina_takes_no_more_tokens_than_its_network_has_positions():
    settings = {"height": 32, "width": 32}
    with pytest.raises(
        ValueError, match=r"`max_sequence_length` \(300\) must be between 1 and 299 tokens for this model"
    ):
        FlowPipeline.from_pipeline(tiny("lumina 2"), max_sequence_length=300, **settings)
    flow = FlowPipeline.from_pipeline(tiny("lumina 2"), max_sequence_length=299, guidance_scale=1.0, **settings)
    assert flow.sample(["a red circle " * 40], 1, generator=seeds(1)).isfinite().all()


def test_cogview_calls_its_network_once_per_length():
    flow = FlowPipeline.from_pipeline(
        tiny_cogview_4(), height=32, width=32, max_sequence_length=64, guidance_scale=1.0
    )
    calls = []
    flow.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    mixed = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    latents, sigma = flow.initial_latents(4, seeds(4)), torch.tensor([0.8, 0.3, 0.5, 0.9])
    together = flow.velocity(flow.transformer, latents, sigma, flow.encode_prompts(mixed), guidance=True)
    assert sorted(calls) == [1, 3]
    for i, prompt in enumerate(mixed):
        row = latents[i : i + 1], sigma[i : i + 1], flow.encode_prompts([prompt])
        alone = flow.velocity(flow.transformer, *row, guidance=True)
        torch.testing.assert_close(together[i : i + 1], alone, atol=of_velocities(flow), rtol=1e-5)


def test_video_is_refused():
    class Pipeline(WanPipeline):
        def __init__(self) -> None:
            pass

    Pipeline.__name__ = "WanPipeline"
    with pytest.raises(ValueError, match=r"WanPipeline is not a supported family .*SiTPipeline; video is not"):
        FlowPipeline.from_pipeline(Pipeline())


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_do_not_fit_are_refused(family):
    with pytest.raises(ValueError, match=r"`width` \(33\) must be a multiple of"):
        FlowPipeline.from_pipeline(tiny(family), width=33)
    with pytest.raises(ValueError, match=r"`max_sequence_length` \(0\) must be between 1 and"):
        FlowPipeline.from_pipeline(tiny(family), max_sequence_length=0)


@pytest.mark.parametrize("family", [f for f, cases in GUIDANCE.items() if len(cases) == 2])
def test_both_branches_in_one_call_say_what_two_calls_say(family):
    """Without gradients and for the Jacobian of the latents; weights learn through the conditional branch alone."""
    settings = {"height": 32, "width": 32} | FAMILIES[family][1] | GUIDANCE[family][-1]
    pipeline = tiny(family)
    two, one = (FlowPipeline.from_pipeline(pipeline, **settings, guidance_in_one_call=b) for b in (None, True))
    assert one.call_arguments() == two.call_arguments()
    latents, sigma, conditioning = (
        two.initial_latents(2, seeds(2)),
        torch.tensor([0.8, 0.3]),
        two.encode_prompts(PROMPTS),
    )
    sizes: list[int] = []
    pipeline.transformer.register_forward_hook(lambda module, args, out: sizes.append(len(out[0])))
    scale = settings["guidance_scale"]
    with torch.no_grad():
        expected, found = (f.velocity(f.transformer, latents, sigma, conditioning, guidance=True) for f in (two, one))
    assert sum(sizes) == 8
    torch.testing.assert_close(found, expected, atol=2 * scale * of_velocities(two), rtol=1e-5)
    sizes.clear()
    x = latents.clone().requires_grad_()
    gradients = [
        torch.autograd.grad(f.velocity(f.transformer, x, sigma, conditioning, guidance=True), x, latents)[0]
        for f in (two, one)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)
    sizes.clear()
    one.velocity(one.transformer, latents, sigma, conditioning, guidance=True)
    assert max(sizes) <= 2


def test_one_call_for_both_branches_needs_guidance_and_no_replay(tmp_path):
    with pytest.raises(ValueError, match=r"`guidance_in_one_call` \(True\) has no effect without guidance"):
        make_trainer("ACFlowTrainer", tmp_path, guidance_in_one_call=True)
    with pytest.raises(ValueError, match=r"`guidance_in_one_call` \(True\) does not suit TAFS-GRPO"):
        make_trainer("TAFSGRPOTrainer", tmp_path, guidance_scale=3.0, guidance_in_one_call=True)
