"""Wrong command lines and YAML files: each gets one sentence and exit status 2, before any model is loaded.

The model of every run here is a folder that does not exist: a sentence about anything else comes before it is looked
for.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import flowrl_trainers
from flowrl_trainers.cli import main
from flowrl_trainers.cli.arguments import parse
from flowrl_trainers.cli.run import _held_out

RUN = {
    "model": "no/such/folder", "dataset": "prompts.txt", "reward_funcs": ["jpeg_compressibility"],
    "output_dir": "out", "num_generations": 2, "per_device_train_batch_size": 2, "use_cpu": True,
}  # fmt: skip
EVALUATE = ["evaluate", "--model", "no/such/folder", "--adapter", "user/tuned", "--rewards", "jpeg_compressibility",
            "--dataset", "prompts.txt"]  # fmt: skip


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """What a command says that is refused, in this process and in a folder with a few prompt files."""
    monkeypatch.chdir(tmp_path)
    for module, name in (("quiet", "hush"), ("memory", "keep_freed_memory")):  # settings of the whole process
        monkeypatch.setattr(f"flowrl_trainers.cli.{module}.{name}", lambda: None)
    files = {
        "prompts.txt": b"a red circle\na blue square\n", "gap.txt": b"a red circle\n\na blue square\n",
        "latin.txt": "un caf\xe9\n".encode("latin-1"), "empty.txt": b"", "prompts.xlsx": b"PK",
        "prompts.csv": b"caption,n\na red circle,1\n", "comma.csv": b"prompt\na circle, red\n",
        "missing.csv": b"prompt,n\na,1\n,2\n", "broken.jsonl": b'{"prompt": "a"}\nrubbish\n', "broken.parquet": b"PAR",
        "self.csv": b"prompt,self\na,1\n",
        "broken.yaml": b"model: [shapes\n", "launch.yaml": b"model: shapes\nnum_processes: 2\n", "twice.yaml": b"model: shapes\nmax_steps: 1\nmax_steps: 2\n",
        "deep.yaml": b"model: shapes\nlora_config:\n  use_dora: true\n  use_dora: false\n", "list.yaml": b"- model\n",
        "nothing.yaml": b"", "latin.yaml": "model: caf\xe9\n".encode("latin-1"),
        "judges.py": b"def strict(images, prompts, answer, **columns):\n    return [0.0] * len(prompts)\n\n\n"
                     b"def unnamed(images):\n    return [0.0]\n\n\n"
                     b"from flowrl_trainers.rewards import groupwise\n"
                     b"rank = groupwise(lambda images, prompts, **columns: range(len(prompts)))\nrank.name = 'rank'\n"
                     b"from flowrl_trainers.rewards import FunctionReward\n"
                     b"inner = FunctionReward(lambda latents, prompts, **columns: 0, sees='latents', name='inner')\n",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)

    def run(*arguments: str) -> str:
        try:
            status = main(list(arguments))
        except SystemExit as stop:  # how argparse ends a command
            status = stop.code
        said = capsys.readouterr().err
        assert status == 2, said
        assert "Traceback" not in said
        return said

    return run


@pytest.mark.parametrize(("arguments", "sentence"), [
    # commands
    (["train"], "flowrl: there is no command 'train': choose adjoint_matching, "),
    (["ac-flow"], "flowrl: there is no command 'ac-flow' (did you mean 'ac_flow'?): choose"),
    (["evaluat"], "flowrl: there is no command 'evaluat' (did you mean 'evaluate'?): choose"),
    (["--verison"], "flowrl: there is no command '--verison'"),
    # names of flags
    (["ac_flow", "--max_step", "3"], "flowrl: 'max_step' in the command line is no setting of `flowrl ac_flow` (did you mean 'max_steps'?): see `flowrl ac_flow --help`."),
    (["ac_flow", "--max_step=3"], "flowrl: 'max_step' in the command line is no setting of `flowrl ac_flow` (did you"),
    (["ac_flow", "--colour", "red"], "flowrl: 'colour' in the command line is no setting of `flowrl ac_flow`: see"),
    (["ac_flow", "--colour", "red", "--sed", "1", "--lerning_rate=1"], "flowrl: 'colour' in the command line, 'sed' in the command line and 'lerning_rate' in the command line are no settings of `flowrl ac_flow` (did you mean 'seed' and 'learning_rate'?)"),
    (["ac_flow", "--adjoint_steps", "3"], "'adjoint_steps' in the command line is no setting of `flowrl ac_flow`"),
    (["ac_flow", "--hub_tokn", "secret"], "'hub_tokn' in the command line is no setting of `flowrl ac_flow` (did you mean 'hub_token'?): see"),
    (["ac_flow", "--confg", "run.yaml"], "'confg' in the command line is no setting of `flowrl ac_flow` (did you mean 'config'?)"),
    (["ac_flow", "--acelerate_config", "ddp"], "(did you mean 'accelerate_config'?)"),
    (["ac_flow", "--model", "m", "--dataset", "d", "loose"], "'loose' in the command line is no setting of `flowrl ac_flow`"),
    (["demo", "--trainr", "vgg_flow"], "(did you mean 'trainer'?)"),
    # values of flags
    (["ac_flow", "--dataset", "prompts.txt"], "flowrl: the following arguments are required: --model (see `flowrl ac_flow --help`)."),
    (["ac_flow", "--max_steps", "many"], "flowrl: argument --max_steps/--max-steps: invalid int value: 'many'"),
    (["ac_flow", "--max_steps"], "flowrl: argument --max_steps/--max-steps: expected one argument"),
    (["ac_flow", "--learning_rate", "fast"], "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
    (["ac_flow", "--use_cpu", "maybe"], "argument --use_cpu/--use-cpu: Truthy value expected: got maybe"),
    (["ac_flow", "--weighting", "cubic"], "argument --weighting: invalid choice: 'cubic'"),
    (["ac_flow", "--quantization", "int4"], "argument --quantization: invalid choice: 'int4'"),
    (["ac_flow", "--text_encoder_quantization", "fp4"], "argument --text_encoder_quantization/--text-encoder-quantization: invalid choice: 'fp4'"),
    (["ac_flow", "--frozen_copy", "bfloat16"], "argument --frozen_copy/--frozen-copy: invalid choice: 'bfloat16'"),
    (["ac_flow", "--offload_between_phases", "rewards"], "argument --offload_between_phases/--offload-between-phases: Truthy value expected: got rewards"),
    (["ac_flow", "--embedding_memory_gib", "8GB"], "argument --embedding_memory_gib/--embedding-memory-gib: invalid float value: '8GB'"),
    (["ac_flow", "--model", "m", "--dataset", "d", "--lora_config", "dora"], "flowrl: `lora_config` ('dora') is no JSON"),
    # files of settings
    (["ac_flow", "--config"], "flowrl: `--config` needs the name of a YAML file."),
    (["ac_flow", "--config", "--max_steps", "1"], "flowrl: `--config` needs the name of a YAML file."),
    (["ac_flow", "--config", "a.yaml", "--config", "b.yaml"], "flowrl: `--config` stands twice: write all settings into one file."),
    (["ac_flow", "--config", "none.yaml"], "flowrl: `--config` (none.yaml) cannot be read (No such file or directory): name a YAML file."),
    (["ac_flow", "--config", "."], "flowrl: `--config` (.) cannot be read (Is a directory)"),
    (["ac_flow", "--config=broken.yaml"], "flowrl: while parsing a flow sequence in \"broken.yaml\", line 1"),
    (["ac_flow", "--config=list.yaml"], "flowrl: `--config` (list.yaml) holds no settings"),
    (["ac_flow", "--config=nothing.yaml"], "flowrl: `--config` (nothing.yaml) holds no settings"),
    (["ac_flow", "--config=latin.yaml"], "flowrl: `--config` (latin.yaml) is not encoded as UTF-8: save the file as UTF-8."),
    (["ac_flow", "--config=twice.yaml"], "flowrl: twice.yaml sets 'max_steps' twice, in lines 2 and 3: keep one of them."),
    (["ac_flow", "--config=deep.yaml"], "flowrl: deep.yaml sets 'use_dora' twice, in lines 3 and 4: keep one of them."),
    # several processes, the demo, other commands
    (["ac_flow", "--num_processes", "2"], "flowrl: `--num_processes` needs `--accelerate_config ddp`"),
    (["ac_flow", "--accelerate_config", "ddp", "--num_processes", "0"], "flowrl: `--num_processes` ('0') must be a whole number from 1 on."),
    (["ac_flow", "--accelerate_config", "ddp", "--num_processes", "two"], "flowrl: `--num_processes` ('two') must be a whole number from 1 on."),
    (["ac_flow", "--accelerate_config", "ddp", "--num_processes"], "flowrl: `--num_processes` ('') must be a whole number"),
    (["ac_flow", "--config=launch.yaml"], "flowrl: 'num_processes' in the YAML file says how processes are started: give it on the command line, as `--num_processes`."),
    (["ac_flow", "--trainer", "vgg_flow"], "flowrl: 'trainer' in the command line is no setting of `flowrl ac_flow`: see"),
    (["env", "--verbose"], "flowrl env: error: unrecognized arguments: --verbose"),
    (["ac_flow", "--accelerate_config", "fsdp9"], "flowrl: `--accelerate_config` (fsdp9) is neither 'ddp' nor 'fsdp2' nor a file"),
    (["estimate", "ac_flow", "--accelerate_config", "fsdp9"], "argument --accelerate_config/--accelerate-config: invalid choice: 'fsdp9'"),
    (["estimate", "ac_flow", "--model", "m", "--dataset", "d", "--accelerate_config", "fsdp2"], "flowrl: `accelerate_config` is 'fsdp2', which shares the network among processes, but `num_processes` is 1"),
    (["demo", "--trainer", "ppo"], "flowrl: `--trainer` is 'ppo': choose adjoint_matching, vgg_flow, ac_flow, diffusion_nft, tafs_grpo."),
    (["demo", "--trainer"], "flowrl: `--trainer` is '': choose"),
    (["score", ".", "--rewards", "jpeg_compressibility", "--accelerate_config", "ddp", "--num_processes", "2"], "flowrl score: error: unrecognized arguments: --accelerate_config ddp --num_processes 2"),
    (["serve_reward", "shapes", "--accelerate_config", "ddp"], "flowrl serve_reward: error: unrecognized arguments: --accelerate_config ddp"),
    (["demo", "--resume_from_checkpoint", "true"], "flowrl: `resume_from_checkpoint` ('true') has no effect in a demo, which starts anew"),
    (["estimate", "ac_flow", "--num-processes=none"], "flowrl: `--num_processes` ('none') must be a whole number from 1 on."),
    (["demo", "--adjoint_steps", "30"], "flowrl: `adjoint_steps` (30) must be between 1 and `num_inference_steps` (20)."),
    ([*EVALUATE, "--pictures_per_prompt", "0"], "flowrl: `pictures_per_prompt` (0) must be at least 1."),
    ([*EVALUATE, "--dtype", "int8"], "flowrl: argument --dtype: invalid choice: 'int8'"),
    ([*EVALUATE, "--seeed", "1"], "flowrl: 'seeed' in the command line is no setting of `flowrl evaluate` (did you mean 'seed'?)"),
    ([*EVALUATE, "--trained", "taste"], "flowrl: `trained` names taste, which `rewards` does not: add it there."),
    ([*EVALUATE, "--adapter", "a", "a"], "flowrl: `adapter` has two of the same name"),
    ([*EVALUATE, "--rewards", "taste"], "flowrl: `rewards` names 'taste', which is no known reward"),
    ([*EVALUATE, "--rewards", "judges.strict"], "flowrl: Reward 'strict' needs the column 'answer', which `dataset` lacks"),
    ([*EVALUATE, "--rewards", "judges.rank"], "flowrl: `rewards` has 'rank', which is groupwise: it compares the pictures that training draws of a prompt"),
    (["check_reward", "judges.rank", "--dataset", "prompts.txt", "--prompts", "2"], "flowrl: `NAME` has 'rank', which is groupwise"),
    (["check_reward", "judges.inner", "--dataset", "prompts.txt", "--prompts", "2"], "flowrl: `NAME` has 'inner', which sees latents of a model, and here are pictures alone: name one that sees images."),
    (["serve_reward", "judges.rank"], "flowrl: `NAME` has 'rank', which is groupwise"),
    ([*EVALUATE, "--split", "held_out"], "flowrl: The prompts 'prompts.txt' have no split 'held_out', as a file is one split"),
    ([*EVALUATE, "--dataset", "gap.txt"], "flowrl: The prompt in line 2 of 'gap.txt' is missing or blank"),
    ([*EVALUATE], "flowrl: 'no/such/folder' is no diffusers pipeline"),
    (["score"], "flowrl score: error: the following arguments are required: FOLDER, --rewards"),
    (["score", "nowhere", "--rewards", "jpeg_compressibility"], "flowrl: 'nowhere' is no folder with pictures, and as a data set: The prompts 'nowhere', split 'train', cannot be loaded"),
    (["score", ".", "--rewards", "jpeg_compressibility"], "flowrl: The folder '.' has no pictures: it needs files with .png"),
    (["score", ".", "--rewards", "taste", "--batch_size", "0"], "flowrl: `batch_size` (0) must be at least 1."),
    (["check_reward"], "flowrl check_reward: error: the following arguments are required: NAME"),
    (["check_reward", "taste"], "flowrl: `NAME` names 'taste', which is no known reward"),
    (["check_reward", "shapes", "--pictures", "0"], "flowrl: `pictures` (0) must be at least 1."),
    (["check_reward", "shapes", "--prompts", "999"], "flowrl: `prompts` (999) is more than the "),
    (["check_reward", "shapes", "--model", "m"], "flowrl: `dataset` is missing: name prompts for 'm', such as a text file."),
    (["check_reward", "judges.strict", "--dataset", "prompts.txt", "--prompts", "2"], "flowrl: Reward 'strict' needs the column 'answer', which `dataset` lacks"),
    (["serve_reward"], "flowrl serve_reward: error: the following arguments are required: NAME"),
    (["serve_reward", "shapes", "--port", "70000"], "flowrl: `port` (70000) must be between 0 and 65535."),
    (["serve_reward", "taste"], "flowrl: `NAME` names 'taste', which is no known reward"),
    (["convert_sit", "none.pt"], "flowrl convert_sit: error: the following arguments are required: out"),
    (["convert_image_reward"], "flowrl convert_image_reward: error: the following arguments are required: checkpoint"),
])  # fmt: skip
def test_a_wrong_command_line_gets_one_sentence(refused, arguments, sentence):
    said = refused(*arguments)
    assert sentence in said
    assert "secret" not in said
    if said.startswith("flowrl: "):
        assert said.count("\n") == 1


@pytest.mark.parametrize(("changes", "sentence"), [
    ({}, "'no/such/folder' is no diffusers pipeline"),  # the others are answered before this
    # names
    ({"colour": "red", "max_step": 1}, "'colour' in the YAML file and 'max_step' in the YAML file are no settings of `flowrl ac_flow` (did you mean 'max_steps'?)"),
    ({"max-steps": 1}, "'max-steps' in the YAML file is no setting of `flowrl ac_flow` (did you mean 'max_steps'?)"),
    ({3: 4}, "'3' in the YAML file is no setting"),
    ({"help": "me"}, "'help' in the YAML file is no setting"),
    # prompts
    ({"dataset": "none.txt"}, "There is no file 'none.txt' with prompts"),
    ({"dataset": "prompts.xlsx"}, "The prompts 'prompts.xlsx' have an unknown suffix: save them as .txt, .csv, .tsv, .json, .jsonl or .parquet."),
    ({"dataset": "gap.txt"}, "The prompt in line 2 of 'gap.txt' is missing or blank"),
    ({"dataset": "missing.csv"}, "The prompt in row 2 of 'missing.csv' is missing or blank"),
    ({"dataset": "latin.txt"}, "The prompts 'latin.txt' are not encoded as UTF-8 in line 1: save the file as UTF-8."),
    ({"dataset": "empty.txt"}, "The prompts 'empty.txt' are empty"),
    ({"dataset": "comma.csv"}, "put a prompt that holds a separator into double quotes."),
    ({"dataset": "broken.jsonl"}, "The prompts 'broken.jsonl' cannot be read as .jsonl"),
    ({"dataset": "broken.parquet"}, "The prompts 'broken.parquet' cannot be read as .parquet"),
    ({"dataset": "self.csv"}, "`train_dataset` has a column 'self'"),
    ({"dataset": "prompts.csv"}, "`prompt_column` is 'prompt', but the columns are caption, n: name the one with prompts."),
    ({"dataset": "prompts.csv", "prompt_column": "text"}, "`prompt_column` is 'text', but the columns are caption, n"),
    ({"dataset_config": "small"}, "`dataset_config` is 'small', but the prompts 'prompts.txt' are a file: leave it out."),
    ({"train_split": "test"}, "The prompts 'prompts.txt' have no split 'test'"),
    ({"eval_split": "test"}, "give held-out prompts as a second file, `eval_dataset`."),
    ({"eval_dataset": "shapes"}, "`eval_dataset` is 'shapes': name its split with held-out prompts as `eval_split`."),
    ({"eval_dataset": "none.csv"}, "There is no file 'none.csv' with prompts"),
    ({"dataset": "no/such/data"}, "The prompts 'no/such/data', split 'train', cannot be loaded"),
    ({"dataset": 3}, "`dataset` (3) must be a string."),
    ({"dataset": "shapes", "train_split": "validation"}, "have no split 'validation': choose 'train' or 'held_out'"),
    ({"dataset": "shapes", "prompt_column": "text"}, "the prompts of shapes have one column, 'prompt'"),
    ({"per_device_train_batch_size": 8}, "`train_dataset` has 2 prompts but one rollout takes 4"),
    # rewards
    ({"reward_funcs": []}, "`reward_funcs` is empty: name at least one reward."),
    ({"reward_funcs": ["pickscore", "taste"]}, "`reward_funcs` names 'taste', which is no known reward"),
    ({"eval_reward_funcs": "taste"}, "`eval_reward_funcs` names 'taste', which is no known reward"),
    ({"reward_funcs": ["judges.none"]}, "The reward 'judges.none' cannot be imported"),
    *(({"reward_funcs": [name]}, f"The reward '{name}' is no 'module.function': write `rewards.black` for the function")
      for name in ("./judges.py", "./judges.py:narrow", ".narrow", "judges.")),
    ({"reward_funcs": ["judges.unnamed"]}, "Reward 'unnamed' must take `images, prompts, **columns` by name"),
    ({"reward_funcs": ["judges.strict"]}, "Reward 'strict' needs the column 'answer', which `train_dataset` lacks"),
    ({"reward_weights": [1, 2]}, "`reward_weights` has 2 numbers for 1 rewards"),
    ({"reward_weights": ["heavy"]}, "`reward_weights` is ['heavy']: name one number per reward."),
    # the adapter
    ({"lora_r": -1}, "`lora_r` (-1) must be at least 0."),
    ({"lora_dropout": 1.0}, "`lora_dropout` (1.0) must be at least 0 and below 1."),
    ({"lora_config": "use_dora"}, "`lora_config` ('use_dora') is no JSON"),
    ({"lora_config": [1]}, "`lora_config` ([1]) must be a dictionary, a string or None."),
    ({"lora_config": {"use_doora": True}}, "`lora_config` has 'use_doora', which is no field of `peft.LoraConfig` that shapes an adapter (did you mean 'use_dora'?)"),
    ({"lora_config": {"r": 4}}, "`lora_config` has 'r', which is the setting `lora_r`: set that."),
    ({"lora_config": {"use_dora": "yes"}}, "`lora_config.use_dora` ('yes') must be True or False."),
    ({"lora_config": {"task_type": "CAUSAL_LM"}}, "`lora_config` has 'task_type', which is no field"),
    ({"lora_config": {"use_dora": True}, "lora_r": 0}, "`lora_config` is set, but `lora_r` is 0"),
    ({"lora_config": {"layers_pattern": "blocks"}}, "`lora_config` describes no LoRA: "),
    # numbers and choices
    ({"num_inference_steps": 0}, "`num_inference_steps` (0) must be at least 1."),
    ({"guidance_scale": -1}, "`guidance_scale` (-1) must be at least 0, or None."),
    ({"guidance_scale": float("nan")}, "`guidance_scale` (nan) must be a finite number or None."),
    ({"temperature": 0}, "`temperature` (0) must be above 0"),
    ({"seed": 2**33}, "`seed` (8589934592) must be between 0 and 4294967295."),
    ({"max_steps": 0}, "`max_steps` (0) must be at least 1, or -1"),
    ({"max_steps": {"a": 1}}, "`max_steps` ({'a': 1}) must be"),
    ({"num_generations": 3}, "must be a multiple of `num_generations` (3)"),
    ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` (0) must be at least 1."),
    ({"weight_decay": -1}, "`weight_decay` (-1) must be at least 0."),
    ({"learning_rate": "fast"}, "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
    ({"weighting": "cubic"}, "`weighting` is 'cubic': choose"),
    # memory
    ({"quantization": "int4"}, "`quantization` is 'int4': choose 'nf4', 'int8', 'float8' or None"),
    ({"quantization": "nf4"}, "`quantization` is 'nf4', which diffusers loads on a GPU alone, and this run is on the CPU: take 'int8'."),
    ({"text_encoder_quantization": "nf4"}, "`text_encoder_quantization` is 'nf4', which diffusers loads on a GPU alone"),
    ({"text_encoder_quantization": 8}, "`text_encoder_quantization` is 8: choose"),
    ({"offload_between_phases": "rewards"}, "argument --offload_between_phases/--offload-between-phases: Truthy value expected: got rewards"),
    ({"embedding_memory_gib": -1}, "`embedding_memory_gib` (-1) must be at least 0"),
    ({"embedding_memory_gib": "8GB"}, "argument --embedding_memory_gib/--embedding-memory-gib: invalid float value: '8GB'"),
    ({"frozen_copy": "bfloat16"}, "`frozen_copy` is 'bfloat16': choose"),
    ({"eval_strategy": "steps", "eval_steps": 1}, "`eval_strategy` is 'steps', but there is no `eval_dataset`"),
    ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` (5.0) must be None"),
    ({"report_to": "notebook"}, "`report_to` names 'notebook', which is unknown or not installed"),
    ({"hub_token": ["secret"]}, "`hub_token` must be a string or None."),
    ({"metric_for_best_model": "reward/taste"}, "`metric_for_best_model` is 'reward/taste', which evaluations do not have"),
    ({"output_dir": "prompts.txt"}, "`output_dir` (prompts.txt) cannot be written to"),
    ({"env": ["A"]}, "`env` field should be a dict in the YAML file."),
])  # fmt: skip
def test_a_wrong_yaml_file_gets_one_sentence(refused, changes, sentence):
    Path("run.yaml").write_text(yaml.safe_dump(RUN | changes))
    said = refused("ac_flow", "--config", "run.yaml")
    assert said.startswith("flowrl: ")
    assert sentence in said
    assert "secret" not in said
    assert said.count("\n") == 1


def test_a_second_file_of_prompts_needs_neither_the_configuration_nor_the_column_of_the_first(refused):
    settings = {"dataset": "prompts.csv", "prompt_column": "caption", "eval_dataset": "prompts.txt"}
    Path("run.yaml").write_text(yaml.safe_dump(RUN | settings))
    args, _ = parse("ac_flow", flowrl_trainers.ACFlowConfig, ["--config", "run.yaml"], {})
    assert list(_held_out(args)["prompt"]) == ["a red circle", "a blue square"]
    args.dataset_config = "en"  # of a data set of the Hub
    assert len(_held_out(args)) == 2


# ---- what is no error, and what hides a secret ----------------------------------------------------------------------


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flowrl-trainers {flowrl_trainers.__version__}\n"


@pytest.mark.parametrize(("command", "goes_on"), [("ac_flow", True), ("evaluate", False)])
def test_ctrl_c_ends_in_one_sentence_and_status_130(monkeypatch, capsys, command, goes_on):
    def interrupted(command, arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("flowrl_trainers.cli._run", interrupted)
    assert main([command]) == 130
    said = capsys.readouterr().err
    assert said.startswith(f"flowrl: `flowrl {command}` was stopped by Ctrl-C")
    assert said.count("\n") == 1
    assert ("`--resume_from_checkpoint true`" in said) == goes_on


@dataclass
class ConfigOfAUser(flowrl_trainers.VGGFlowConfig):
    further_token: str | None = None


@pytest.mark.parametrize("config_class", [
    flowrl_trainers.FlowRLConfig, flowrl_trainers.AdjointMatchingConfig, flowrl_trainers.VGGFlowConfig,
    flowrl_trainers.ACFlowConfig, flowrl_trainers.TAFSGRPOConfig, ConfigOfAUser,
])  # fmt: skip
def test_tokens_are_hidden_where_a_config_is_shown(tmp_path, config_class):
    config = config_class(output_dir=str(tmp_path), hub_token="secret", num_generations=8, use_cpu=True)
    for text in (repr(config), str(config), f"{config}"):
        assert "secret" not in text
        assert "hub_token=<HUB_TOKEN>" in text
        assert "num_generations=8" in text
