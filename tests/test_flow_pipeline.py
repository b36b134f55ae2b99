"""What `FlowPipeline` asks of a subclass."""

import pytest

from flowrl_trainers import FlowPipeline


def positional(self, transformer, latents, sigma, conditioning, guidance): ...


def with_a_default(self, transformer, latents, sigma, conditioning, *, guidance=True): ...


def positional_with_a_default(self, transformer, latents, sigma, conditioning, guidance=True): ...


def without_guidance(self, transformer, latents, sigma, conditioning): ...


def under_any_keyword(self, transformer, latents, sigma, conditioning, **settings): ...


OLD_FORMS = [positional, with_a_default, positional_with_a_default, without_guidance, under_any_keyword]


@pytest.mark.parametrize("velocity", OLD_FORMS)
def test_a_velocity_that_may_be_called_without_guidance_is_refused_when_its_class_is_defined(velocity):
    with pytest.raises(TypeError) as error:
        type("Moons", (FlowPipeline,), {"velocity": velocity})
    assert str(error.value) == (
        "`Moons.velocity` must take `guidance` by keyword only and without a default: change its signature to "
        "`velocity(self, transformer, latents, sigma, conditioning, *, guidance)`."
    )


def test_the_signature_of_the_error_is_accepted_and_a_class_may_inherit_it():
    class Moons(FlowPipeline):
        def velocity(self, transformer, latents, sigma, conditioning, *, guidance):
            return latents

    class Shifted(Moons):
        def decode(self, latents):
            return latents

    assert Shifted.velocity is Moons.velocity


def test_a_velocity_with_a_default_is_refused_in_a_grandchild_too():
    class Moons(FlowPipeline):
        def velocity(self, transformer, latents, sigma, conditioning, *, guidance):
            return latents

    with pytest.raises(TypeError, match=r"`Shifted\.velocity` must take `guidance`"):

        class Shifted(Moons):
            def velocity(self, transformer, latents, sigma, conditioning, *, guidance=False):
                return latents
