"""`attention_backend`: the kernel of attention, while the trainer works and not after."""

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from .helpers import make_trainer
from .tiny import tiny_sd3
from .tiny_families import tiny_flux_2_klein


def backend():
    return _AttentionBackendRegistry.get_active_backend()[0].value


def test_attention_is_computed_by_the_kernel_while_the_trainer_works(tmp_path):
    before, seen, adapters = backend(), [], []
    for name in (None, "_native_math"):
        t = make_trainer(
            "ACFlowTrainer", tmp_path / str(name), tiny_flux_2_klein(), attention_backend=name, critic="none", max_steps=1,
            max_sequence_length=64, height=32, width=32,
        )  # fmt: skip
        t.model.transformer.register_forward_pre_hook(lambda *_: seen.append(backend()))
        t.train()
        assert set(seen) == {name or before}
        assert backend() == before
        seen.clear()
        adapters.append(torch.cat([p.detach().flatten() for p in t.trained_parameters()]))
    assert not torch.equal(*adapters)
    assert float((adapters[0] - adapters[1]).norm()) < 0.1 * float(adapters[0].norm())  # AdamW magnifies roundings


@pytest.mark.parametrize(
    ("pipeline", "name", "sentence"),
    [
        (tiny_sd3, "flsh", r"`attention_backend` \('flsh'\) is none of diffusers' \(did you mean 'flash'\?\)"),
        (tiny_sd3, "native", r"has no effect on SD3Transformer2DModel"),
        (tiny_flux_2_klein, "flash", r"`attention_backend` \('flash'\) cannot compute attention and its gradient in"),
    ],
)
def test_what_cannot_compute_is_refused(tmp_path, pipeline, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_trainer("ACFlowTrainer", tmp_path, pipeline(), attention_backend=name)
