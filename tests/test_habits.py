"""What users do by habit or by slip works, or is answered by one sentence that names it and the mend."""

import pytest
import torch
from datasets import Dataset
from peft import LoHaConfig, LoKrConfig, LoraConfig
from transformers import TrainingArguments

from flowrl_trainers import ACFlowConfig, FlowRLConfig, TAFSGRPOTrainer, VGGFlowConfig, VGGFlowTrainer
from flowrl_trainers.sampling.buffer import Record

from .helpers import CAPTIONS, TRAINERS, adjoint_matching, make_trainer, redness
from .tiny import tiny_sd3


@pytest.mark.parametrize("config", [TrainingArguments, FlowRLConfig, ACFlowConfig])
def test_a_configuration_of_something_else_is_refused(tmp_path, config):
    args = config(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(
        TypeError, match=f"^`args` is a {config.__name__}: pass a `TAFSGRPOConfig`, which has the settings"
    ):
        TAFSGRPOTrainer(tiny_sd3(), redness, args, Dataset.from_dict({"prompt": CAPTIONS}))


def test_a_dictionary_is_no_configuration(tmp_path):
    with pytest.raises(TypeError, match=r"^`args` is a dict: pass a `TAFSGRPOConfig`"):
        TAFSGRPOTrainer(tiny_sd3(), redness, {"max_steps": 1}, Dataset.from_dict({"prompt": CAPTIONS}))


@pytest.mark.parametrize(("config", "kind"), [
    (LoKrConfig(r=2), "LoKrConfig"), (LoHaConfig(r=2), "LoHaConfig"), ({"r": 2}, "dict"), ("lora", "str"),
])  # fmt: skip
def test_an_adapter_of_another_kind_is_refused(tmp_path, tiny_pipeline, config, kind):
    with pytest.raises(TypeError, match=f"^`peft_config` is a {kind}: pass a `peft.LoraConfig`, the kind of adapter"):
        adjoint_matching(tmp_path, tiny_pipeline, lora=config)


def test_a_compiled_transformer_is_refused_in_words_of_compilation(tmp_path, tiny_pipeline):
    tiny_pipeline.transformer = torch.compile(tiny_pipeline.transformer)
    with pytest.raises(ValueError, match=r"^The pipeline's transformer is compiled \(`torch.compile`\)"):
        adjoint_matching(tmp_path, tiny_pipeline)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_2", "tokenizer"])
def test_a_pipeline_without_a_part_is_refused(tmp_path, tiny_pipeline, part):
    setattr(tiny_pipeline, part, None)
    tiny_pipeline.register_modules(**{part: None})
    with pytest.raises(ValueError, match=f"^The pipeline's `{part}` is None, which training needs: load the pipeline"):
        adjoint_matching(tmp_path, tiny_pipeline)


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "TAFSGRPOTrainer"])  # which refuses dropout
def test_the_users_pipeline_draws_the_same_picture_twice_after_training(tmp_path, name):
    """Dropout in the adapter is for updates alone: two pictures of one seed differed by 0.015."""
    pipeline = tiny_sd3()
    pipeline.transformer.add_adapter(
        LoraConfig(r=2, lora_dropout=0.5, target_modules=["attn.to_q"], init_lora_weights=False)
    )
    make_trainer(name, tmp_path, pipeline, lora=False, max_steps=1).train()

    def picture() -> torch.Tensor:
        settings = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "pt", "max_sequence_length": 8}
        return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **settings).images

    first = picture()
    assert torch.equal(first, picture())
    pipeline.transformer.train()
    assert not torch.equal(first, picture())  # what it would be with dropout


def test_the_pipeline_is_in_evaluation_mode_also_after_an_error(tmp_path, tiny_pipeline):
    calls = []

    def breaks(images, prompts, **columns):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return images.mean(dim=(1, 2, 3))

    t = make_trainer("TAFSGRPOTrainer", tmp_path, tiny_pipeline, reward=breaks, max_steps=5)
    with pytest.raises(KeyboardInterrupt):
        t.train()
    assert not tiny_pipeline.transformer.training
    spent = t.seconds_so_far()["training"]
    assert 0 < spent == t.seconds_so_far()["training"]  # the clock stands


def test_a_name_that_no_evaluation_reports_is_refused_before_training(tmp_path, tiny_pipeline):
    held_out = Dataset.from_dict({"prompt": ["a cat"]})
    settings = dict(
        eval_dataset=held_out, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True,
    )  # fmt: skip
    for metric in ("rewards/black", "reward"):
        with pytest.raises(ValueError, match=f"`metric_for_best_model` is '{metric}', which evaluations do not have"):
            adjoint_matching(tmp_path, tiny_pipeline, metric_for_best_model=metric, **settings)
    t = adjoint_matching(tmp_path, tiny_pipeline, metric_for_best_model="eval_clarity", **settings)
    with pytest.raises(ValueError, match="`metric_for_best_model` is 'eval_clarity', which evaluations do not have"):
        t.train()
    assert t.state.global_step == 0


def test_the_best_without_evaluations_is_refused(tmp_path, tiny_pipeline):
    with pytest.raises(ValueError, match="`save_strategy` is 'best', but `eval_strategy` is 'no'"):
        adjoint_matching(tmp_path, tiny_pipeline, save_strategy="best", metric_for_best_model="reward/redness")


def test_predict_is_answered(tmp_path, tiny_pipeline):
    with pytest.raises(TypeError, match="`predict` has nothing to predict here: call `evaluate"):
        adjoint_matching(tmp_path, tiny_pipeline).predict(Dataset.from_dict({"prompt": ["a cat"]}))


def test_gradients_that_are_switched_off_are_named(tmp_path, tiny_pipeline):
    t = adjoint_matching(tmp_path, tiny_pipeline)
    with torch.no_grad(), pytest.raises(ValueError, match=r"^Gradients are switched off in this process"):
        t.train()
    t.train()


def test_a_value_network_beside_the_setting_none_is_refused(tmp_path):
    args = VGGFlowConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", value_network="none")
    rows = Dataset.from_dict({"prompt": CAPTIONS * 2})
    with pytest.raises(
        ValueError, match=r"`value_network` is passed, but `args.value_network` is 'none': leave out one of them"
    ):
        VGGFlowTrainer(tiny_sd3(), redness, args, rows, value_network=torch.nn.Linear(1, 1))


def test_a_method_that_names_another_class_of_records_is_refused(tmp_path, tiny_pipeline):
    """A checkpoint of it could not be read again."""
    t = adjoint_matching(tmp_path, tiny_pipeline)
    t.record_class = Record
    with pytest.raises(
        TypeError,
        match=r"`AdjointMatchingTrainer.prepare` returns a AdjointMatchingRecord, but its `record_class` is Record",
    ):
        t.train()


def test_an_evaluation_without_pictures_leaves_none_of_an_earlier_one(tmp_path, tiny_pipeline):
    held_out = Dataset.from_dict({"prompt": ["a cat"]})
    t = adjoint_matching(tmp_path, tiny_pipeline, eval_dataset=held_out)
    t.evaluate()
    t.save_model()
    assert ".png" in (tmp_path / "README.md").read_text(encoding="utf-8")
    t.args.log_images = 0
    t.evaluate()
    t.save_model()
    assert ".png" not in (tmp_path / "README.md").read_text(encoding="utf-8")
