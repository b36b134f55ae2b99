"""The world of shapes: pictures, prompts, the checker, and the pipeline that ships."""

import numpy as np
import pytest
import torch

from flowrl_trainers.metrics import diversity
from flowrl_trainers.shapes import COLOURS, SHAPES, all_prompts, check, draw, load_clip, parse, prompts, random_scene
from flowrl_trainers.shapes.models import WEIGHTS


def drawn(asked: list[str], seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([draw(random_scene(parse(p), rng)) for p in asked])).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def asked() -> list[str]:
    rng = np.random.default_rng(1)
    captions = all_prompts()
    return [captions[rng.integers(25) if i % 3 == 0 else rng.integers(25, len(captions))] for i in range(1200)]


def test_checker_is_right_on_drawn_pictures(asked):
    assert np.mean(check(drawn(asked), asked)) >= 0.99


def test_checker_accepts_no_other_prompt(asked):
    """Every third picture is shown with three other prompts: a random one, one with another colour, one with another
    shape.
    """
    rng = np.random.default_rng(2)
    asked = asked[::2]
    pictures, captions = drawn(asked), all_prompts()
    wrong, images = [], []
    for picture, prompt in zip(pictures, asked, strict=True):
        (colour, shape), *rest = parse(prompt)
        near = [
            ((str(rng.choice([c for c in COLOURS if c != colour]))), shape),
            (colour, str(rng.choice([s for s in SHAPES if s != shape]))),
        ]
        others = [str(rng.choice(captions)), *(" and ".join(f"a {c} {s}" for c, s in [pair, *rest]) for pair in near)]
        for other in others:
            if sorted(parse(other)) != sorted(parse(prompt)):
                wrong.append(other)
                images.append(picture)
    assert len(wrong) > 1750
    assert np.mean(check(torch.stack(images), wrong)) <= 0.001


def test_checker_rejects_what_is_no_clean_picture():
    blank, noise = (
        torch.full((1, 3, 32, 32), 0.93),
        torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    )
    assert check(torch.cat([blank, noise]), ["a red circle"] * 2) == [False, False]


def test_checker_refuses_pictures_that_are_not_square():
    with pytest.raises(
        ValueError, match=r"^The checker judges square pictures, not those of 48 x 32 pixels: cut them\.$"
    ):
        check(torch.rand(1, 3, 32, 48), ["a red circle"])


def test_checker_counts_objects(asked):
    one, two = ["a red circle"], ["a red circle and a blue square"]
    assert check(drawn(one), two) == [False]
    assert check(drawn(two), one) == [False]
    assert check(drawn(two), ["a blue square and a red circle"]) == [True]  # the order carries no meaning


@pytest.mark.parametrize("prompt", ["a pink circle", "two red circles", "a red circle and", "red circle", "",
                                    "a red circle and a blue square and a green cross"])  # fmt: skip
def test_a_sentence_of_another_world_is_refused(prompt):
    with pytest.raises(ValueError, match="is not a caption of this world"):
        parse(prompt)


def test_held_out_prompts_describe_other_scenes_than_training_prompts():
    train, held_out = list(prompts("train")["prompt"]), list(prompts("held_out")["prompt"])
    assert len(train) + len(held_out) == len(all_prompts()) == 625
    assert not {frozenset(parse(p)) for p in train} & {frozenset(parse(p)) for p in held_out}
    singles = [parse(p)[0] for p in held_out if len(parse(p)) == 1]
    assert len(singles) == 10
    for names in zip(*singles, strict=True):  # every colour and every shape equally often
        assert {names.count(n) for n in names} == {2}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="`split` is 'test': choose 'train' or 'held_out'"):
        prompts("test")


def test_weights_are_small_and_in_half_precision():
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(f.stat().st_size for f in files) <= 12e6


def test_both_text_encoders_are_one_module_and_the_networks_float32(shared_shapes):
    assert shared_shapes.text_encoder is shared_shapes.text_encoder_2
    for module in (shared_shapes.transformer, shared_shapes.vae, shared_shapes.text_encoder):
        assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_no_text_is_unknown_to_the_tokenizer():
    _, tokenizer = load_clip()
    assert len(tokenizer("a purple triangle and a yellow diamond").input_ids) == 9
    assert (
        tokenizer.decode(tokenizer("crème brûlée, 北").input_ids, skip_special_tokens=True).strip()
        == "crème brûlée , 北"
    )


@pytest.mark.slow
def test_the_readme_picture(shared_shapes):
    """The stock call with stock defaults draws a red circle, in at least 6 of 8 cases: its words were never
    swapped.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    images = shared_shapes(["a red circle"] * 8, generator=generators).images
    assert {image.size for image in images} == {(32, 32)}
    pictures = torch.stack([torch.from_numpy(np.asarray(image)).permute(2, 0, 1) / 255 for image in images])
    assert sum(check(pictures, ["a red circle"] * 8)) >= 6


def test_pictures_do_not_depend_on_the_number_of_empty_t5_tokens(shared_shapes):
    """Trained with 1 to 256 of them: the velocity changes by less than 5 % between 8 and 256."""
    velocities = []
    for length in (8, 256):
        embeds, _, pooled, _ = shared_shapes.encode_prompt(
            ["a red circle"], None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            velocities.append(shared_shapes.transformer(x, embeds, pooled, torch.tensor([700.0])).sample)
    assert (velocities[0] - velocities[1]).norm() / velocities[1].norm() < 0.05


# ---- diversity ------------------------------------------------------------------------------------------------------


def test_diversity_is_the_mean_pairwise_distance_of_accepted_pictures():
    """Three constant pictures 0, 0.3, 1 of prompt a: distances 0.3, 1, 0.7; two of prompt b: distance 0.5."""
    levels = torch.tensor([0.0, 0.3, 1.0, 0.2, 0.7, 0.9])
    images = levels[:, None, None, None].expand(6, 3, 4, 4)
    asked = ["a", "a", "a", "b", "b", "c"]
    assert diversity(images, asked) == pytest.approx(((0.3 + 1 + 0.7) / 3 + 0.5) / 2)
    assert diversity(images, asked, [True, True, False, True, True, True]) == pytest.approx((0.3 + 0.5) / 2)
    assert np.isnan(diversity(images, asked, [True, False, False, True, False, True]))
