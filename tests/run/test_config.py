"""A run's configuration: overrides, paths, and one sentence for every mistake."""

import os
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from hinge.config import check_config, load_config, save_config
from hinge.utils.errors import ConfigError

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def minimal() -> dict:
    return {"output": "run", "data": {"path": "slides", "train": ["a"], "test": ["b"], "pretrain": ["c"]}}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "configs" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(minimal()))
    return path


def failure(path, *overrides) -> str:
    with pytest.raises(ConfigError) as raised:
        load_config(path, list(overrides))
    message = str(raised.value)
    assert "\n" not in message
    assert "validation error" not in message and "pydantic" not in message and "class" not in message
    return message


# --- what is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_load(path):
    config = load_config(path)
    assert set(config.data.train).isdisjoint(config.data.test)
    assert config.output.parent == path.parents[1] / "runs"


def test_there_are_shipped_configurations():
    assert "her2st.yaml" in [path.name for path in CONFIGS]


def test_overrides_change_what_they_name_and_nothing_else(config_file):
    plain = load_config(config_file).model_dump()
    changed = load_config(
        config_file,
        [
            "training.epochs=3",
            "transform=log1p_cp10k",
            "data.test=[d, e]",
            "backbone.pretrain.learning_rate=1e-2",
        ],
    ).model_dump()
    assert (changed["training"].pop("epochs"), plain["training"].pop("epochs")) == (3, 40)
    assert (changed.pop("transform"), plain.pop("transform")) == ("log1p_cp10k", "log2p1")
    assert (changed["data"].pop("test"), plain["data"].pop("test")) == (["d", "e"], ["b"])
    # YAML reads 1e-2 as text
    assert changed["backbone"]["pretrain"].pop("learning_rate") == 0.01
    assert plain["backbone"]["pretrain"].pop("learning_rate") == 0.001
    assert changed == plain


def test_an_override_may_hold_equals_signs_and_null(config_file):
    config = load_config(config_file, ["output=a=b", "training.epochs=null", "training.steps=5"])
    assert config.output.name == "a=b"
    assert (config.training.epochs, config.training.steps) == (None, 5)


def test_paths_in_the_file_are_relative_to_it_and_overrides_to_the_working_directory(
    config_file, tmp_path, monkeypatch
):
    there = tmp_path / "elsewhere"
    there.mkdir()
    monkeypatch.chdir(there)
    content = minimal()
    content["features"] = {"folder": "../features"}
    content["backbone"] = {"path": "weights"}
    content["panel"] = {"method": "file", "file": "genes.txt"}
    config_file.write_text(yaml.safe_dump(content))
    relative = os.path.relpath(config_file, there)
    config = load_config(relative, ["data.path=here", "features={folder: given}"])
    beside = config_file.parent
    assert config.output == beside / "run"
    assert config.backbone.path == beside / "weights"
    assert config.panel.file == beside / "genes.txt"
    assert config.data.path == there / "here"
    assert config.features.folder == there / "given"


def test_home_and_absolute_paths(config_file, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere/home")
    content = minimal() | {"output": "~/run"}
    content["data"]["path"] = "/data/slides"
    config_file.write_text(yaml.safe_dump(content))
    config = load_config(config_file, ["features.folder=~/features"])
    assert config.output == Path("/somewhere/home/run")
    assert config.data.path == Path("/data/slides")
    assert config.features.folder == Path("/somewhere/home/features")


def test_a_saved_configuration_means_the_same_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = minimal() | {"training": {"learning_rate": 1e-5, "schedule": "constant", "epochs": 2}}
    config = check_config(content, "test")
    save_config(config, tmp_path / "deep" / "in" / "config.yaml")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    again = load_config(tmp_path / "deep" / "in" / "config.yaml")
    assert again == config
    assert again.data.path == tmp_path / "slides"


# --- mistakes ----------------------------------------------------------------------------------------

MISTAKES = {
    # override: parts of the sentence, the key first
    "bogus=1": ["bogus", "no such key", "output", "sampling"],
    "data.trian=[a]": ["data.trian", "no such key", "train, test"],
    "model.heads=point": ["model.heads", "no such key", "condition_on_visible"],
    "training.lr=1": ["training.lr", "no such key", "learning_rate", "validation_share"],
    "backbone.pretrain.lr=1": ["backbone.pretrain.lr", "no such key", "learning_rate", "evaluate_every"],
    "training.batch_size=many": ["training.batch_size", "integer", "'many'"],
    "training.batch_size=0": ["training.batch_size", "greater than or equal to 1", "not 0"],
    "training.steps=yes": ["training.steps", "it takes a number, not True"],
    "training.learning_rate=.inf": ["training.learning_rate", "a finite number"],
    "backbone.pretrain.learning_rate=on": ["backbone.pretrain.learning_rate", "it takes a number, not True"],
    "seed=4294967296": ["seed", "less than or equal to 4294967295"],
    "training.loss_on=everything": ["training.loss_on", "'masked' or 'revealed'", "'everything'"],
    "training.precision=fp16": ["training.precision", "fp16 is not offered", "choose bf16"],
    "backbone.pretrain.precision=fp16": ["backbone.pretrain.precision", "fp16 is not offered", "choose bf16"],
    "backbone.pretrain.batch_size=0": ["backbone.pretrain.batch_size", "greater than or equal to 1", "not 0"],
    "backbone.pretrain.steps=soon": ["backbone.pretrain.steps", "integer", "'soon'"],
    "backbone.pretrain=7": ["backbone.pretrain", "the keys steps", "not 7"],
    "backbone.num_attention_heads=3": ["backbone", "hidden_size 64", "multiple of num_attention_heads 3"],
    "data=everything": ["data", "the keys path", "not 'everything'"],
    "data.train=a": ["data.train", "list", "not 'a'"],
    "data.train=[]": ["data.train", "at least one"],
    "data.train=[1]": ["data.train.0", "string", "not 1"],
    "data.train=[a, a]": ["data", "train lists a more than once"],
    "data.test=[a]": ["data", "train and test both list a"],
    "data.pretrain=[b]": ["data", "pretrain and test both list b"],
    "training=": ["training", "the keys steps", "not None"],
    "training={1: 2}": ["training.1", "string"],
    "training.epochs=null": ["training.steps", "training.epochs"],
    "backbone.pretrain.steps=null": ["backbone.pretrain.steps", "integer", "not None"],
    "transform=log10": ["transform", "'log2p1' or 'log1p_cp10k'", "'log10'"],
    "features.views=3": ["features.views", "1 or 8", "not 3"],
    "features.patch_um=.nan": ["features.patch_um", "nan"],
    "diffusion.exponent=.inf": ["diffusion.exponent", "finite", "inf"],
    "panel.genes=2.5": ["panel.genes", "integer", "2.5"],
    "panel.method=file": ["panel.method file", "panel.file"],
    "seed=-1": ["seed", "greater than or equal to 0", "not -1"],
    "output=3": ["output", "a path", "not 3"],
    "sampling.steps=51": ["sampling.steps 51", "diffusion.num_train_timesteps 50"],
    "data.train.first=a": ["data.train.first", "train is not a section"],
    "training.epochs": ["'training.epochs'", "key=value"],
    "=1": ["'=1'", "key=value"],
    "data.train=[a": ["data.train", "not YAML", "'[a'"],
    "seed=2024-99-99": ["seed", "not YAML"],
    "output=!!python/name:os.system": ["output", "not YAML"],
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_wrong_value_is_one_sentence_that_names_the_key(config_file, override):
    message = failure(config_file, override)
    place = -1
    for part in MISTAKES[override]:
        place = message.find(part, place + 1)
        assert place >= 0, f"{part!r} is missing, or too early, in: {message}"


def test_the_same_mistakes_in_the_file_name_the_file(config_file):
    content = minimal() | {"training": {"lr": 1}}
    config_file.write_text(yaml.safe_dump(content))
    assert failure(config_file).startswith(f"{config_file}: training.lr: there is no such key")


@pytest.mark.parametrize("key", ["output", "data", "data.path", "data.train"])
def test_a_missing_key_says_what_it_takes(config_file, key):
    content = minimal()
    section = content["data"] if "." in key else content
    section.pop(key.rpartition(".")[2])
    config_file.write_text(yaml.safe_dump(content))
    assert f"{key}: is missing; it takes " in failure(config_file)


def test_a_long_wrong_value_is_not_repeated_in_full(config_file):
    assert len(failure(config_file, f"seed=[{', '.join('1' * 3000)}]")) < 400


def test_missing_and_unreadable_files(tmp_path):
    assert failure(tmp_path / "none.yaml") == f"there is no configuration file {tmp_path / 'none.yaml'}"
    assert str(tmp_path) in failure(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "output: [run",
        "a: b: c",
        "\tx: 1",
        "output: &a *b",
        "%nonsense",
        "- {",
        "x" * 10 + "\x00",
        "[" * 20_000,
    ],
)
def test_broken_yaml(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert str(path) in failure(path)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_bytes(b"\xff\xfe\x00\xd8 nonsense \x80")
    assert str(path) in failure(path)


@pytest.mark.parametrize("text", ["", "- a\n- b", "just words", "3"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    path = tmp_path / "list.yaml"
    path.write_text(text)
    assert "must hold keys and values" in failure(path)


def test_keys_that_are_no_words(config_file):
    config_file.write_text(yaml.safe_dump({1: 2, **minimal()}))
    assert "1" in failure(config_file)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:pathlib.Path.touch [{marker}]",
        "!!python/object/apply:os.mkdir ['{marker}']",
        "!!python/object/new:os.mkdir ['{marker}']",
        "!!python/name:os.system",
    ],
)
def test_yaml_tags_are_never_executed(config_file, tmp_path, tag):
    marker = tmp_path / "marker"
    value = tag.format(marker=marker)
    config_file.write_text(f"{yaml.safe_dump(minimal())}seed: {value}\n")
    assert "not readable YAML" in failure(config_file)
    config_file.write_text(yaml.safe_dump(minimal()))
    assert "not YAML" in failure(config_file, f"seed={value}")
    assert not marker.exists()


# --- the paper's settings ----------------------------------------------------------------------------

BACKBONES = sorted((ROOT / "configs" / "backbones").glob("*.yaml"))


@pytest.mark.parametrize("path", BACKBONES, ids=lambda path: path.name)
def test_there_is_a_configuration_for_every_backbone(path):
    config = load_config(path)
    assert config.output.name == config.backbone.path.name == path.stem
    assert config.model.modulation_rank == 32 and config.training.precision == "bf16"


PAPER = sorted((ROOT / "configs" / "paper").glob("*.yaml"))


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.name)
def test_the_paper_s_settings_load(path):
    config = load_config(path)
    assert config.output.parent == path.parents[2] / "runs"
    assert (config.training.epochs, config.training.batch_size, config.panel.genes) == (40, 32, 200)
    assert (config.features.encoder, config.features.views, config.model.head) == ("uni+conch", 8, "point")
    # five of forty epochs lightly masked, the rate × 0.2 at epochs 20 and 35, validation from epoch 15 on
    assert round(config.training.warm_start_share * 40) == 5
    rate = (config.training.schedule, config.training.learning_rate, config.training.warmup_steps)
    assert rate == ("step", 1e-4, 0)
    assert config.training.evaluate_from * 40 == 15


def test_there_is_a_paper_configuration_for_every_data_set():
    assert {"cscc", "her2st", "kidney", "released"} <= {path.stem for path in PAPER}
    sections = {path.stem: load_config(path).data for path in PAPER}
    sizes = {name: len(data.train) + len(data.test) for name, data in sections.items()}
    assert (sizes["cscc"], sizes["her2st"], sizes["kidney"]) == (12, 36, 23)


def test_the_paper_s_sections_are_in_hest(hest):
    import csv

    with (hest / "HEST_v1_1_0.csv").open(encoding="utf-8-sig") as file:
        patients = {row["id"]: (row["organ"], row["patient"]) for row in csv.DictReader(file)}
    for name, organ in (("cscc", "Skin"), ("her2st", "Breast"), ("kidney", "Kidney")):
        data = load_config(PAPER[0].parent / f"{name}.yaml").data
        assert {patients[sample][0] for sample in [*data.train, *data.test]} == {organ}
        # no slide is in training and test
        assert {patients[sample] for sample in data.train}.isdisjoint(patients[sample] for sample in data.test)
