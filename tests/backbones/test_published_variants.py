"""Forms in which published files of scGPT, scGPT-spatial and Tahoe-x1 occur: the same model, or one sentence."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hinge.backbones import load_backbone
from hinge.utils.errors import WeightsError

SCGPT, SPATIAL = "scgpt_checkpoint", "scgpt_spatial_checkpoint"
TAHOE = ("tahoe_70m_checkpoint", "tahoe_3b_checkpoint")


class Published:
    """A copy of a published folder, whose files are changed.

    Parameters
    ----------
    source, folder
        The folder, and where the copy is written.
    """

    def __init__(self, source: Path, folder: Path):
        self.folder = Path(shutil.copytree(source, folder, copy_function=shutil.copyfile))
        self.folder.chmod(0o755)
        self.file = next(path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors"))
        pickled = self.file.suffix == ".pt"
        self.state = dict(torch.load(self.file, weights_only=True) if pickled else load_file(self.file))

    def save(self, state=None, name=None, **options) -> None:
        """Write weights in place of those of the folder, in the format of the name."""
        state, name = self.state if state is None else state, name or self.file.name
        self.file.unlink(missing_ok=True)
        if name.endswith(".safetensors"):
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, self.folder / name)
        else:
            torch.save(state, self.folder / name, **options)

    def shard(self) -> None:
        """Write the weights as three files and an index."""
        keys, home = list(self.state), {}
        for part in range(3):
            name = f"model-{part + 1:05d}-of-00003.safetensors"
            save_file({key: self.state[key].contiguous() for key in keys[part::3]}, self.folder / name)
            home |= dict.fromkeys(keys[part::3], name)
        (self.folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
        self.file.unlink(missing_ok=True)

    def settings(self, name: str, drop: tuple[str, ...] = (), **changes) -> None:
        """Change keys of a file of settings; `a__b` is the key b of the section a."""
        path = self.folder / name
        content = yaml.safe_load(path.read_text())  # JSON is YAML
        for key, value in changes.items():
            *sections, last = key.split("__")
            node = content
            for section in sections:
                node = node[section]
            node[last] = value
        content = {key: value for key, value in content.items() if key not in drop}
        path.write_text(json.dumps(content) if name.endswith("json") else yaml.safe_dump(content))

    def setting(self, key: str):
        """Return a number of args.json or model_config.yml."""
        path = next(path for path in self.folder.iterdir() if path.name in ("args.json", "model_config.yml"))
        return yaml.safe_load(path.read_text())[key]

    def renamed(self, change) -> dict[str, torch.Tensor]:
        """Return the weights under other names."""
        return {change(key): tensor for key, tensor in self.state.items()}

    def cast(self, change) -> dict[str, torch.Tensor]:
        """Return the weights in types that `change` tells of their names."""
        return {key: tensor.to(change(key)) for key, tensor in self.state.items()}


SAME_WEIGHTS = {
    "module.": lambda p: p.save(p.renamed(lambda key: f"module.{key}")),
    "_orig_mod.module.": lambda p: p.save(p.renamed(lambda key: f"_orig_mod.module.{key}")),
    "float16": lambda p: p.save(p.cast(lambda key: torch.float16)),
    "bfloat16": lambda p: p.save(p.cast(lambda key: torch.bfloat16)),
    "float64": lambda p: p.save(p.cast(lambda key: torch.float64)),
    "pytorch_model.bin": lambda p: p.save(name="pytorch_model.bin"),
    "model.pt": lambda p: p.save(name="model.pt"),
    "safetensors": lambda p: p.save(name="weights.safetensors"),
    "shards": lambda p: p.shard(),
    "trainer": lambda p: p.save(
        {
            "epoch": 3,
            "model_state_dict": p.state,
            "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]},
            "args": argparse.Namespace(lr=1e-3),
        },
        "checkpoint.pt",
    ),
    "composer": lambda p: p.save({"state": {"model": p.state, "optimizers": {}}, "rng": []}, "latest.pt"),
    "before torch 1.6": lambda p: p.save(name="old.pt", _use_new_zipfile_serialization=False),
    "parameters": lambda p: p.save({key: torch.nn.Parameter(each) for key, each in p.state.items()}, "model.pt"),
    "config.json of another program": lambda p: (p.folder / "config.json").write_text('{"model_type": "bert"}'),
}


@pytest.mark.parametrize("form", SAME_WEIGHTS)
@pytest.mark.parametrize("name", [SCGPT, TAHOE[0]])
def test_the_same_weights_in_another_form(backbones, tmp_path, name, form):
    published = Published(backbones / name, tmp_path / "published")
    SAME_WEIGHTS[form](published)
    model, expected = load_backbone(published.folder), load_backbone(backbones / name)
    tolerance = {"float16": 1e-3, "bfloat16": 1e-2}.get(form, 0)
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key].float(), tensor, atol=tolerance, rtol=tolerance)
    assert model.config.tokens == expected.config.tokens


def test_norms_in_float32_beside_products_in_half_precision(backbones, tmp_path):
    """The model takes the type that holds all of them; the first tensor of the file is an embedding."""
    published = Published(backbones / SCGPT, tmp_path / "published")
    published.save(published.cast(lambda key: torch.float32 if "norm" in key else torch.float16))
    model, expected = load_backbone(published.folder), load_backbone(backbones / SCGPT)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.layers[0].norm1.weight, expected.layers[0].norm1.weight)


def test_layers_may_be_spelled_differently(backbones, tmp_path):
    published = Published(backbones / SCGPT, tmp_path / "published")
    published.save(published.renamed(lambda key: key.replace(".layers.1.self_attn.", ".layers.1.self_attn._impl.")))
    assert load_backbone(published.folder).digest() == load_backbone(backbones / SCGPT).digest()


def replace_gene(published: Published, token: str) -> None:
    """Give the row of a gene to another token."""
    path = published.folder / "vocab.json"
    tokens = json.loads(path.read_text())
    gene = next(name for name in tokens if not name.startswith("<"))
    path.write_text(json.dumps({token if name == gene else name: number for name, number in tokens.items()}))


SAME_SETTINGS = {
    SCGPT: {
        "sizes of the tensors": lambda p: p.settings("args.json", drop=("embsize", "d_hid", "nlayers")),
        "defaults": lambda p: p.settings("args.json", drop=("n_bins", "pad_value", "mask_value", "input_emb_style")),
        "whole floats": lambda p: p.settings("args.json", embsize=float(p.setting("embsize"))),
        "nhead": lambda p: p.settings("args.json", drop=("nheads",), nhead=p.setting("nheads")),
        "other special tokens": lambda p: replace_gene(p, "<mask>"),
    },
    TAHOE[0]: {
        "sizes of the tensors": lambda p: p.settings("model_config.yml", drop=("vocab_size", "d_model", "n_layers")),
        "expansion": lambda p: p.settings("model_config.yml", drop=("expansion_ratio",)),
        "hidden layers of the decoder": lambda p: p.settings("model_config.yml", expression_decoder__n_layers=None),
        "no norm": lambda p: p.settings("model_config.yml", drop=("norm_config",)),
        "yaml": lambda p: (p.folder / "model_config.yml").rename(p.folder / "model_config.yaml"),
    },
}


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in SAME_SETTINGS.items() for form in forms])
def test_the_same_settings_in_another_form(backbones, tmp_path, name, form):
    published = Published(backbones / name, tmp_path / "published")
    SAME_SETTINGS[name][form](published)
    model, expected = load_backbone(published.folder), load_backbone(backbones / name)
    assert model.digest() == expected.digest()
    different = {key for key, value in expected.config.to_dict().items() if model.config.to_dict()[key] != value}
    assert different <= {"tokens"}


def without(part):
    return lambda p: p.save({key: tensor for key, tensor in p.state.items() if part not in key})


def with_tensor(name):
    return lambda p: p.save({**p.state, name: torch.ones(2, 3)})


def means(*rows):
    return lambda p: (p.folder / "all_dict_mean_std.csv").write_text("\n".join(rows))


REFUSED = {
    SCGPT: [
        (without("Wqkv.bias"), r"lacks \d+ tensors"),
        (without("mvc_decoder"), r"lacks \d+ tensors"),
        (without("layers.0."), r"lacks transformer_encoder\.layers\.0$"),
        (with_tensor("batch_encoder.embedding.weight"), "does not use: batch_encoder"),
        (with_tensor("decoder.zero_logit.0.weight"), "does not use: decoder.zero_logit"),
        (lambda p: p.save({**p.state, **p.renamed(lambda key: key.replace("Wqkv", "_impl.Wqkv"))}), "does not use"),
        (lambda p: p.save({"weights": p.state}), "holds no tensors, but 'weights'"),
        (lambda p: p.save({"model": p.state, "scheduler": Path("x")}), "objects other than tensors"),
        (lambda p: (p.save(name="a.pt"), p.save(name="b.pt")), "holds 2 files of weights: name the one of the scGPT"),
        (lambda p: (p.folder / "vocab.json").unlink(), "holds no vocab.json"),
        (lambda p: (p.folder / "args.json").unlink(), "args.json of scGPT"),
        (lambda p: p.file.unlink(), "it has no file of weights"),
        (lambda p: (p.folder / "vocab.json").write_text('["<pad>"]'), "must hold keys and values, not list"),
        (lambda p: p.settings("args.json", drop=("nheads",)), "nheads must be a whole number"),
        (lambda p: p.settings("args.json", embsize=8 + p.setting("embsize")), "embsize is .* and the weights have"),
        (lambda p: p.settings("args.json", d_hid=8 + p.setting("d_hid")), "d_hid is .* and the weights have"),
        (lambda p: p.settings("args.json", input_style="log1p"), "input_style is 'log1p', and only 'binned'"),
        (lambda p: p.settings("args.json", pre_norm=True), "pre_norm is True"),
    ],
    SPATIAL: [
        (without("experts.1."), r"lacks decoder\.moe\.experts\.1$"),
        (means(",mean", "0,1.5", "0,2.5"), "has the row label 0 twice"),
        (means(",mean", "0,-2"), "a mean of at least 0"),
        (means(",mean", "9999,2"), "id below"),
        (means(",avg", "0,2"), "in the column mean"),
    ],
    TAHOE[1]: [
        (lambda p: (p.shard(), p.save(name="model.safetensors")), "in several files"),
        (with_tensor("model.gene_encoder.esm.weight"), "does not use: model.gene_encoder.esm"),
        (lambda p: p.settings("model_config.yml", attn_config__use_attn_mask="no"), "must be true or false, not 'no'"),
        (lambda p: p.settings("model_config.yml", attn_config__kv_n_heads=1), "kv_n_heads is 1, and only"),
        (lambda p: p.settings("model_config.yml", expansion_ratio=2.5), "not that of the weights"),
        (lambda p: p.settings("model_config.yml", drop=("n_heads",)), "n_heads must be a whole number"),
        (lambda p: p.settings("model_config.yml", norm_config__norm_type="rmsnorm"), "norm_type is 'rmsnorm'"),
        (lambda p: p.settings("collator_config.yml", do_binning=False), "do_binning is False"),
        (lambda p: p.settings("collator_config.yml", right_binning=True), "right_binning is True"),
        (lambda p: p.settings("collator_config.yml", pad_token_id=5), "is not the id of <pad>"),
        (lambda p: (p.folder / "collator_config.yml").unlink(), "holds no collator_config.yml"),
    ],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_compute_something_else_is_refused(backbones, tmp_path, name):
    for number, (change, message) in enumerate(REFUSED[name]):
        published = Published(backbones / name, tmp_path / str(number))
        change(published)
        with pytest.raises(WeightsError, match=message) as error:
            load_backbone(published.folder)
        assert "\n" not in str(error.value) and "\\" not in str(error.value)


def test_means_of_genes_with_other_columns(backbones, tmp_path):
    published = Published(backbones / SPATIAL, tmp_path / "published")
    means("id,std,mean", "2.0,9,1.5", "0,9,", "1,9,0")(published)
    found = load_backbone(published.folder).config.gene_means
    assert found[:4] == [None, None, 1.5, None]


@pytest.mark.parametrize("name", TAHOE)
def test_genes_by_versioned_ids_and_in_lower_case(backbones, tmp_path, name):
    """A gene is found with or without the version of its id, on either side."""
    published = Published(backbones / name, tmp_path / "published")
    tokens = json.loads((published.folder / "vocab.json").read_text())
    content = {(f"{token}.{number}" if token[0] == "E" else token): number for token, number in tokens.items()}
    (published.folder / "vocab.json").write_text(json.dumps(content))
    genes = [token for token in tokens if token[0] == "E"][:3]
    for folder in (published.folder, backbones / name):
        vocabulary = load_backbone(folder).config.read_vocabulary()
        for asked in (genes, [f"{gene}.12" for gene in genes], [gene.lower() for gene in genes]):
            assert vocabulary.match(asked).ids.tolist() == [tokens[gene] for gene in genes]
    symbols = load_backbone(backbones / SCGPT).config.read_vocabulary()
    first, second = list(symbols.id_of)[:2]
    expected = [symbols.id_of[first], symbols.id_of[second]]
    assert symbols.match([first.lower(), second.capitalize()]).ids.tolist() == expected
