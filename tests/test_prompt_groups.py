"""Groups, rollouts and how they are dealt to processes."""

from collections import Counter

import pytest
import torch

from flowrl_trainers.sampling.draws import keyed_generator, keyed_seed
from flowrl_trainers.sampling.prompt_groups import ImageKey, PromptGroupSampler


def sampler(num_processes: int = 1, **settings) -> PromptGroupSampler:
    defaults = dict(
        num_prompts=10,
        num_generations=2,
        images_per_update=8,
        updates_per_rollout=1,
        repeats=1,
        num_processes=num_processes,
        seed=0,
    )
    return PromptGroupSampler(**(defaults | settings))


def shares(
    images: list[ImageKey], num_processes: int, updates_per_rollout: int, repeats: int
) -> list[list[list[ImageKey]]]:
    """[rollout][process] -> images, as a data loader of one process's share per batch deals them out in turn."""
    size = 8 * updates_per_rollout // num_processes
    batches = [images[i : i + size] for i in range(0, len(images), size)]
    per_rollout = num_processes * repeats
    return [batches[i : i + num_processes] for i in range(0, len(batches), per_rollout)]


def test_an_epoch_takes_every_prompt_at_most_once_in_whole_groups():
    images = list(sampler())
    assert len(images) == len(sampler()) == 16  # two rollouts of four prompts, two prompts left over
    counts = Counter(i.row for i in images)
    assert set(counts.values()) == {2}
    assert len(counts) == 8
    assert {i.rollout for i in images} == {0, 1}
    assert all({i.image for i in images if i.row == row} == {0, 1} for row in counts)


def test_the_order_is_a_function_of_seed_and_epoch():
    first, again, other = sampler(), sampler(), sampler(seed=1)
    assert list(first) == list(again)
    assert list(first) == list(first)  # no hidden state
    assert [i.row for i in first] != [i.row for i in other]
    again.set_epoch(1)
    assert [i.row for i in first] != [i.row for i in again]
    assert {i.rollout for i in again} == {2, 3}


@pytest.mark.parametrize("updates_per_rollout", [1, 2])
def test_every_update_has_the_same_images_for_any_number_of_processes(updates_per_rollout):
    """Also the same micro-batches of two: process p's m-th is the (4 / P p + m)-th of the update."""
    settings = {"updates_per_rollout": updates_per_rollout, "num_prompts": 20}
    reference = None
    for num_processes in (1, 2, 4):
        updates = []
        for rollout in shares(list(sampler(num_processes, **settings)), num_processes, updates_per_rollout, 1):
            for update in range(updates_per_rollout):
                share = 8 // num_processes
                updates.append([i for process in rollout for i in process[update * share : (update + 1) * share]])
        reference = reference or updates
        assert updates == reference
        assert all(set(Counter(i.row for i in update).values()) == {2} for update in updates)


def test_a_rollout_is_repeated_for_every_micro_step_in_which_it_is_used():
    once, thrice = list(sampler(2)), list(sampler(2, repeats=3))
    assert thrice == [*once[:8] * 3, *once[8:] * 3]
    assert len(sampler(2, repeats=3)) == len(thrice)


def test_keyed_draws_differ_in_every_part_of_their_key_and_repeat():
    keys = [
        (0, ImageKey(0, 0, 0), "a"),
        (1, ImageKey(0, 0, 0), "a"),
        (0, ImageKey(1, 0, 0), "a"),
        (0, ImageKey(0, 1, 0), "a"),
        (0, ImageKey(0, 0, 1), "a"),
        (0, ImageKey(0, 0, 0), "b"),
    ]
    draws = [torch.randn(4, generator=keyed_generator(*key)) for key in keys]
    for i, draw in enumerate(draws):
        assert torch.equal(draw, torch.randn(4, generator=keyed_generator(*keys[i])))
        assert all(not torch.equal(draw, other) for other in draws[:i])
    assert 0 <= keyed_seed(*keys[0]) < 2**32
