"""`flowrl` as a command: flags, YAML files, and one sentence for what is wrong."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flowrl_trainers.cli import main
from flowrl_trainers.cli.arguments import TRAINERS, RunArguments, parse
from flowrl_trainers.cli.launch import DDP, take_launch_arguments
from flowrl_trainers.cli.run import load_prompts, make_trainer
from flowrl_trainers.shapes import prompts
from flowrl_trainers.trainers import FlowRLConfig

from .forked import flowrl

YAML = {
    "model": "shapes", "dataset": "shapes", "eval_dataset": "held_out.txt", "reward_funcs": ["shapes"],
    "eval_reward_funcs": ["checker"], "lora_r": 4, "lora_alpha": 8, "max_steps": 2, "num_inference_steps": 3,
    "adjoint_steps": 2, "control_cost_order": 4, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 12,
    "guidance_scale": 1.0, "max_sequence_length": 8, "use_cpu": True, "save_steps": 1,
}  # fmt: skip

BRIGHTNESS = """
from flowrl_trainers.rewards import differentiable


@differentiable
def brightness(images, prompts, **columns):
    return images.mean(dim=(1, 2, 3))
"""


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The exit status of a wrong command and what it says, in this process: a process of its own takes ten seconds."""
    monkeypatch.chdir(tmp_path)
    for module, name in (("quiet", "hush"), ("memory", "keep_freed_memory")):  # settings of the whole process
        monkeypatch.setattr(f"flowrl_trainers.cli.{module}.{name}", lambda: None)

    def run(*arguments: str) -> tuple[int, str]:
        status = main(list(arguments))
        return status, capsys.readouterr().err

    return run


def write_yaml(folder: Path, **changes) -> str:
    path = folder / "run.yaml"
    (folder / "held_out.txt").write_text("\n".join(prompts("held_out")["prompt"][:12]))
    path.write_text(yaml.safe_dump(YAML | changes))
    return str(path)


def test_a_run_from_a_yaml_file_with_flags_over_it(tmp_path):
    config = write_yaml(tmp_path, license="cc0-1.0")
    result = flowrl(tmp_path, "adjoint_matching", "--config", config, "--output_dir", "out", "--max_steps", "1")
    assert result.returncode == 0, result.stderr
    out = tmp_path / "out"
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert kept["max_steps"] == 1
    assert kept["control_cost_order"] == "4"
    assert kept["lora_alpha"] == 8
    assert {
        "README.md",
        "config.yaml",
        "metrics.json",
        "pytorch_lora_weights.safetensors",
        "samples",
        "checkpoint-1",
    } <= {p.name for p in out.iterdir()}
    card = (out / "README.md").read_text()
    assert "The tuned model is in out/: README.md there tells how to use it." in result.stdout
    assert "| base |" in card
    assert "\nlicense: cc0-1.0\n" in card
    assert "flowrl adjoint_matching --config config.yaml --output_dir another-folder" in card

    resumed = flowrl(
        tmp_path,
        "adjoint_matching",
        "--config",
        write_yaml(tmp_path),
        "--output_dir",
        "out",
        "--resume_from_checkpoint",
        "true",
    )
    assert resumed.returncode == 0, resumed.stderr
    assert (out / "checkpoint-2" / "manifest.json").exists()


def test_what_a_run_leaves_as_configuration_can_be_run_again(tmp_path):
    (tmp_path / "judges.py").write_text(BRIGHTNESS)
    config = write_yaml(tmp_path, max_steps=1, reward_funcs=["judges.brightness", "shapes"])
    first = flowrl(tmp_path, "adjoint_matching", "--config", config, "--output_dir", "first")
    assert first.returncode == 0, first.stderr
    again = flowrl(tmp_path, "adjoint_matching", "--config", "first/config.yaml", "--output_dir", "again")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "first" / "config.yaml").read_text() == (tmp_path / "again" / "config.yaml").read_text()
    first, again = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("first", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_reward_is_imported_from_the_current_folder(tmp_path):
    (tmp_path / "judges.py").write_text(BRIGHTNESS)
    path = write_yaml(tmp_path, reward_funcs=["judges.brightness"], max_steps=1, eval_dataset=None)
    result = flowrl(tmp_path, "adjoint_matching", "--config", path, "--output_dir", "out")
    assert result.returncode == 0, result.stderr
    assert " brightness " in result.stdout
    assert "Nothing was measured on held-out prompts" in result.stdout


@pytest.mark.parametrize("method", TRAINERS)
def test_every_field_has_a_full_sentence_of_help(tmp_path, method):
    result = flowrl(tmp_path, method, "--help")
    assert result.returncode == 0
    ours = [f for c in (RunArguments, TRAINERS[method].config_class) for f in fields(c)]
    for name in ("num_generations", "lora_r", "reward_funcs", "learning_rate", *(f.name for f in ours)):
        assert f"--{name}" in result.stdout
    inherited = {f.name for f in fields(FlowRLConfig.__mro__[1])}
    for field in ours:
        if field.name not in inherited:
            assert field.metadata["help"].rstrip().endswith("."), field.name
            assert len(field.metadata["help"]) > 30, field.name


def test_env_prints_what_a_bug_report_needs():
    result = flowrl(Path(), "env")
    assert result.returncode == 0
    for package in ("Python", "flowrl-trainers", "torch", "trl", "diffusers", "devices"):
        assert f"{package}: " in result.stdout


def test_one_process_of_ddp_needs_no_launcher():
    for count, launcher in (("1", None), ("2", [*DDP, "--num_processes", "2"])):
        found = take_launch_arguments(["--seed", "3", "--accelerate_config", "ddp", "--num_processes", count])
        assert found == (launcher, ["--seed", "3"])


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["demo", "--adjoint_steps", "30"], "flowrl: `adjoint_steps` (30) must be between 1 and `num_inference_steps` (20)."),
    (["demo", "--no_such_field", "1"], "flowrl: 'no_such_field' in the command line is no setting of `flowrl demo`"),
    (["demo", "--trainer", "ppo"], "flowrl: `--trainer` is 'ppo': choose adjoint_matching, vgg_flow, ac_flow, diffusion_nft, tafs_grpo."),
    (["demo", "--reward_funcs", "checker"], "flowrl: Reward 'checker' is not differentiable, which AdjointMatchingTrainer needs"),
    (["demo", "--accelerate_config", "fsdp9"], "flowrl: `--accelerate_config` (fsdp9) is neither 'ddp' nor 'fsdp2' nor a file"),
    (["demo", "--num_processes", "2"], "flowrl: `--num_processes` needs `--accelerate_config ddp`"),
    (["demo", "--max_step", "3"], "flowrl: 'max_step' in the command line is no setting of `flowrl demo`"),
    (["demo", "--max_step=3"], "flowrl: 'max_step' in the command line is no setting of `flowrl demo`"),
    (["demo", "--trainer=ppo"], "flowrl: `--trainer` is 'ppo'"),
    (["adjoint_matching", "--config"], "flowrl: `--config` needs the name of a YAML file."),
    (["evaluate", "--config"], "flowrl: `--config` needs the name of a YAML file."),
    (["train"], "flowrl: there is no command 'train': choose adjoint_matching, vgg_flow, ac_flow, diffusion_nft, tafs_grpo, demo, estimate, evaluate, score, check_reward, card, export_comfyui, serve_reward, convert_sit, convert_image_reward, env."),
])  # fmt: skip
def test_wrong_arguments_get_one_sentence_and_status_2(refused, arguments, sentence):
    status, said = refused(*arguments)
    assert status == 2
    assert sentence in said


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"colour": "red"}, "flowrl: 'colour' in the YAML file is no setting of `flowrl adjoint_matching`"),
    ({"num_generations": 3}, "must be a multiple of `num_generations` (3), the images per prompt: make it 3."),
    ({"model": "no/such/folder"}, "'no/such/folder' is no diffusers pipeline: pass a Hub id or a folder"),
    ({"adjoint_steps": 1}, "opens its window at sigma"),
    ({"reward_funcs": ["judges.taste"]}, "The reward 'judges.taste' cannot be imported"),
    ({"dataset": "no/such/data"}, "The prompts 'no/such/data', split 'train', cannot be loaded"),
    ({"reward_funcs": []}, "`reward_funcs` is empty: name at least one reward."),
    ({"reward_funcs": "taste"}, "`reward_funcs` names 'taste', which is no known reward"),
    ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` (0) must be at least 1."),
    ({"lora_target_modules": ["no_such_layer"]}, "`peft_config` does not fit the transformer"),
    ({"eval_dataset": None, "eval_strategy": "steps", "eval_steps": 1}, "`eval_strategy` is 'steps', but there is no `eval_dataset`"),
    ({"reward_weights": [1, "heavy"]}, "`reward_weights` is [1, 'heavy']: name one number per reward."),
    ({"report_to": "notebook"}, "`report_to` names 'notebook', which is unknown or not installed"),
    ({"train_split": "validation"}, "have no split 'validation': choose 'train' or 'held_out'"),
])  # fmt: skip
def test_a_wrong_yaml_file_gets_one_sentence_and_status_2(tmp_path, refused, changes, sentence):
    status, said = refused("adjoint_matching", "--config", write_yaml(tmp_path, **changes), "--output_dir", "out")
    assert status == 2
    assert sentence in said


def test_the_column_of_the_prompts_may_have_another_name(tmp_path):
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "train.jsonl").write_text('{"caption": "a red circle"}\n{"caption": "a blue cross"}\n')
    assert load_prompts(str(tmp_path / "captions"), None, "train", "caption").column_names == ["prompt"]
    for column in ("text", "prompt"):
        with pytest.raises(
            ValueError, match=f"`prompt_column` is '{column}', but the columns are caption: name the one with prompts"
        ):
            load_prompts(str(tmp_path / "captions"), None, "train", column)
    with pytest.raises(ValueError, match="the prompts of shapes have one column, 'prompt'"):
        load_prompts("shapes", None, "train", "caption")
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "train.jsonl").write_text('{"prompt": "a", "caption": "a red circle", "answer": "yes"}\n')
    both = load_prompts(str(tmp_path / "both"), None, "train", "caption")
    assert both[0] == {"prompt": "a red circle", "answer": "yes"}


def test_the_card_names_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("flowrl_trainers.cli.run.load_prompts", lambda *told: prompts("train"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name, named in (("somebody/prompts", {"dataset": "somebody/prompts"}), ("mine", {})):
        told, config = parse(
            "ac_flow", TRAINERS["ac_flow"].config_class,
            ["--model", "shapes", "--dataset", name, "--reward_funcs", "checker", "--output_dir", "out",
             "--use_cpu", "true", "--max_steps", "1"], {},
        )  # fmt: skip
        told_for_card = make_trainer("ac_flow", told, config).told_for_card
        assert {name: value for name, value in told_for_card.items() if name != "command"} == named


def test_numbers_mean_what_they_look_like(tmp_path):
    path = tmp_path / "run.yaml"
    for text, weights in (("[1, 1e-2]", [1.0, 0.01]), ("0.5", [0.5]), ("1e-2", [0.01])):
        path.write_text(f"model: shapes\ndataset: shapes\nreward_weights: {text}\n")
        _, config = parse(
            "ac_flow", TRAINERS["ac_flow"].config_class, ["--config", str(path), "--output_dir", str(tmp_path)], {}
        )
        assert config.reward_weights == weights


def test_a_value_may_begin_with_a_minus(tmp_path):
    result = flowrl(
        tmp_path,
        "adjoint_matching",
        "--config=" + write_yaml(tmp_path, eval_dataset=None),
        "--target_reward=-1e9",
        "--output_dir=out",
    )
    assert result.returncode == 0, result.stderr
    assert "Warning: Training stops after 1 updates" in result.stderr


def test_a_fault_of_ours_keeps_its_traceback(tmp_path):
    """Only what we raise ourselves is a sentence to the user."""
    (tmp_path / "judges.py").write_text(
        "def broken(images, prompts, **columns):\n    return [None + 1 for _ in prompts]\n"
    )
    result = flowrl(
        tmp_path, "ac_flow", "--model", "shapes", "--dataset", "shapes", "--reward_funcs", "judges.broken",
        "--num_inference_steps", "2", "--num_generations", "2", "--max_steps", "1", "--per_device_train_batch_size",
        "2", "--use_cpu", "true", "--output_dir", "out",
    )  # fmt: skip
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_two_processes_from_the_command_line(tmp_path):
    result = flowrl(
        tmp_path, "adjoint_matching", "--config", write_yaml(tmp_path, max_steps=1, eval_dataset=None), "--output_dir",
        "out", "--accelerate_config", "ddp", "--num_processes", "2", "--ddp_backend", "gloo",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "checkpoint-1" / "training_state_1.pt").exists()  # the second process was there
