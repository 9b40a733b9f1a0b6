"""Reading a config: defaults < YAML < overrides, and one-line errors."""

import os
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ecar_dist.config.read import config_from_dict, config_to_yaml, load_config
from ecar_dist.errors import ConfigError


def test_numbers_in_exponent_notation_are_numbers(path):
    config = load_config(path, ["optim.final_learning_rate=2e-5"])
    assert (config.optim.learning_rate, config.optim.final_learning_rate) == (1e-4, 2e-5)
    assert config.train.total_samples == 10_000


def test_overrides_win_over_the_file_and_the_file_over_defaults(path):
    config = load_config(path, ["train.total_samples=512", "flow.context.tau=0.5"])
    assert config.train.total_samples == 512
    assert config.flow.context.tau == 0.5
    assert config.optim.betas == (0.9, 0.95)


def test_a_config_is_frozen(path):
    with pytest.raises(ValidationError):
        load_config(path).run.name = "b"


def test_the_resolved_config_reads_back_equal(path, tmp_path):
    config = load_config(path, ["flow.num_stages=2", "flow.gamma=-0.2"])
    (tmp_path / "again.yaml").write_text(config_to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch.microbatch=3", "unknown config key batch.microbatch; did you mean batch.micro_batch_size?"),
        ("flow.context.tua=1", "unknown config key flow.context.tua; did you mean flow.context.tau?"),
        ("trian.total_samples=1", "unknown config key trian; did you mean train?"),
        ("run.name=a/b", "run.name='a/b'"),
        ("train.total_samples=soon", "train.total_samples='soon'"),
        ("deepspeed.zero_stage=4", "deepspeed.zero_stage=4: input should be 0, 1, 2 or 3"),
        ("batch.global_batch_size=100", "32 x 1 = 32; set batch.global_batch_size=96 or 128"),
        ("flow.ends=[0.5, 0.4, 1.0]", "flow.ends=[0.5, 0.4, 1.0]"),
        ("flow.ends=[0.5, 1.0]", "flow.ends has 2 values, flow.num_stages=3"),
        ("flow.ends=[0.3, 0.6, 0.9]", "flow.ends=[0.3, 0.6, 0.9]"),
        ("flow.gamma=-0.5", "flow.gamma=-0.5 is outside [-0.3333, 0)"),
        ("flow.gamma=0", "flow.gamma=0.0 is outside [-0.3333, 0)"),
        ("data.latent_size=30", "= 2 x 4 = 8;"),
        ("flow.context.tau=0", "set flow.context.tau=0.3"),
        ("flow.context.mode=gamma_relaxed", "tau=0.3 and gamma=-0.3333;"),
        ("model.kind=dit", "model.kind=dit has one stage, got flow.num_stages=3; set it to 1"),
        ("model.kind=mar", "model.kind=mar has one stage, got flow.num_stages=3; set it to 1"),
        ("model.kind=var", "model.kind='var': input should be 'ecar', 'dit', 'pyramid', 'mar', 'par', "),
        ("model.flow_depth=0", "model.flow_depth=0"),
        ("deepspeed.raw.train_batch_size=8", "derived from batch.*"),
        ("deepspeed.raw.gradient_clipping=1", "raw.gradient_clipping would clip twice; set optim.clip_grad_norm"),
        ("optim.warmup_samples=20000", "exceed train.total_samples=10000"),
        ("vae.kind=kl", "needs vae.path"),
        ("no-equals", "must look like section.field=value"),
    ],
)
def test_an_error_is_one_line_with_key_and_values(path, override, said):
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["run: [", "run: {name: a}\nrun: {name: b}", "- a", "run: !!python/object:os.system {}"]
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_config(tmp_path / "bad.yaml")


def test_a_missing_file_and_a_missing_key(tmp_path):
    with pytest.raises(ConfigError, match="cannot read config"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"config key vae is required|config key data is required"):
        config_from_dict({"run": {"name": "a"}, "train": {"total_samples": 1}})


def test_yaml_is_loaded_safely(path):
    assert yaml.safe_load(config_to_yaml(load_config(path)))["run"]["name"] == "a"


def test_the_last_override_wins(path):
    assert load_config(path, ["run.seed=1", "run.seed=2"]).run.seed == 2


def test_a_key_given_twice_is_named(path):
    path.write_text(path.read_text() + "optim: {weight_decay: 0}\n")
    with pytest.raises(ConfigError, match=r"line 6 .*'optim' is given twice"):
        load_config(path)


@pytest.mark.parametrize("content", [b"run: {name: a\x07}\n", b"\xff\xfe\x00bad", b"run: {[1, 2]: 3}\n"])
def test_bytes_that_are_not_text_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def refusal(path, *overrides):
    """The one-line error for a config that is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 900
    return str(caught.value)


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "added",
    [
        "deepspeed:\n  raw:\n" + "".join(f"    {line}\n" for line in ALIASES.splitlines()),
        f"model: {{kind: {'[' * 3000}",
        f"optim: {{weight_decay: {'9' * 400}}}\n",
        f"optim: {{weight_decay: {'9' * 5000}}}\n",
        "optim: {weight_decay: !!int abc}\n",
        'optim: {weight_decay: !!float ""}\n',
        "optim: {weight_decay: !!timestamp 2020-01-01}\n",
        "optim: {weight_decay: 2024-13-45}\n",
        "optim: {weight_decay: !!binary aGFsbG8=}\n",
        "optim: {weight_decay: !!set {a}}\n",
        "optim: {weight_decay: .nan}\n",
        "optim: {weight_decay: -.inf}\n",
        "deepspeed: {raw: {zero_optimization: 5}}\n",
        "deepspeed: {raw: {bf16: true}}\n",
        "deepspeed: {raw: [1]}\n",
        "deepspeed: {raw: {a: .nan}}\n",
        '"a\\nb": 1\n',
        '"a\\e[31mb": 1\n',
        'log: {"a\\nb": 1}\n',
        'checkpoint: {dir: "a\\0b"}\n',
        'checkpoint: {dir: "a\\ud800b"}\n',
        f"{'k' * 5000}: 1\n",
        f"? {'k' * 1_000_000}\n: 1\n",
        f"log: {{every_steps: {'x' * 5000}}}\n",
        "mixture: 5\n",
        "sample: 5\n",
        "batch: [1]\n",
    ],
)
def test_a_hostile_or_mistyped_config_is_one_line(path, added):
    text = path.read_text().replace("optim: {learning_rate: 1e-4}\n", "")
    path.write_text(text + added)
    refusal(path)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "large"])
def test_only_plain_files_of_a_few_bytes_are_read(tmp_path, kind):
    place = tmp_path / "config.yaml"
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "device":
        place = Path("/dev/zero")
    elif kind == "folder":
        place.mkdir()
    else:
        with place.open("wb") as file:
            file.truncate(40 << 30)
    assert str(place) in refusal(place)


@pytest.mark.parametrize("key", ["run.dir", "data.latents", "deepspeed.raw.a"])
def test_text_that_turns_a_line_around_is_refused(path, key):
    said = refusal(path, f"{key}=a\u202eb")
    assert f"{key} has the character U+202E" in said


def test_an_empty_file_is_refused_as_empty(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert "empty.yaml is empty" in refusal(tmp_path / "empty.yaml")


@pytest.mark.parametrize(
    ("before", "after", "key", "found"),
    [
        ("num_classes", "num_clases", "data.num_classes", "data.num_clases"),
        ("train:", "trian:", "train", "trian"),
        ("name:", "nmae:", "run.name", "run.nmae"),
    ],
)
def test_a_typo_in_a_required_key_is_found(path, before, after, key, found):
    path.write_text(path.read_text().replace(before, after))
    said = refusal(path)
    assert f"config key {key} is required" in said
    assert f"{found} is not a config key" in said


def test_a_missing_key_without_a_similar_one(path):
    path.write_text(path.read_text().replace("num_classes: 10", "lanes: 1, zzz: 2"))
    assert "data.num_classes is required and has no default" in refusal(path)


def test_the_rule_for_run_name_is_in_words_not_a_pattern(path):
    said = refusal(path, "run.name=my run")
    assert "run.name='my run': letters, digits" in said
    assert "[" not in said


@pytest.mark.parametrize("word", ["off", "1", "1e3", "2024-01-02", "yes", "null", "012"])
def test_an_override_of_a_text_knob_is_text(path, word):
    assert load_config(path, [f"run.name={word}"]).run.name == word
    assert load_config(path, [f"run.name='{word}'"]).run.name == word


def test_an_override_can_set_a_text_knob_to_null(path):
    for word in ("null", "~", ""):
        assert load_config(path, ["vae.path=x", f"vae.path={word}"]).vae.path is None
    assert load_config(path, ["vae.path='null'"]).vae.path == "null"
    assert load_config(path, ["checkpoint.dir=[a]"]).checkpoint.dir == "[a]"
    assert load_config(path, ["data.latents=", "data.mixture=[{latents: 1a, weight: 1}]"]).data.mixture[0].weight == 1


@pytest.mark.parametrize(
    "override",
    [
        f"flow.ends={'[' * 3000}",
        f"deepspeed.raw.{'a.' * 3000}b=1",
        f"optim.weight_decay={'9' * 5000}",
        "optim.weight_decay=!!int abc",
        "run.name=a\nb",
        "run.dir=a\x1bb",
        "checkpoint.dir=\udcff",
        f"deepspeed.raw=[{'x,' * 30000}]",
        f"{'x' * 9000}",
        "run=5",
        "run.name.x=5",
        "a\nb=1",
    ],
)
def test_overrides_are_read_by_the_same_rules(path, override):
    refusal(path, override)


def test_a_number_for_a_text_knob_in_the_file_asks_for_quotes(path):
    path.write_text(path.read_text().replace("name: a", "name: 1"))
    assert "put it in quotes" in refusal(path)


@pytest.mark.parametrize("key", ["data.mixture.0.weigth", "data.cache.threds"])
def test_an_unknown_key_below_a_list_or_a_section(path, key):
    leaf = key.rpartition(".")[2]
    if "mixture" in key:
        said = refusal(path, "data.latents=", f"data.mixture=[{{latents: x, weight: 1, {leaf}: 1}}]")
    else:
        said = refusal(path, f"{key}=1")
    assert f"unknown config key {key}; did you mean " in said
