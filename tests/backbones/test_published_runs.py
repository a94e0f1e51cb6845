"""Published files of scGPT, scGPT-spatial and Tahoe-x1: reading, refusing, converting, a run from them to scores."""

import json
import shutil
import typing
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
import yaml
from helpers.backbones import published_folder
from helpers.runs import tiny_settings
from safetensors.torch import load_file, save_file

from hinge.backbones import CellFMConfig, CellFMModel, load_backbone, read_config
from hinge.backbones.hgnc import GeneNames
from hinge.backbones.loading import MODELS, recognise
from hinge.backbones.published_cellfm import published_names as cellfm_names
from hinge.config import BackboneConfig
from hinge.utils.errors import ConfigError, HingeError, WeightsError

FOLDERS = {
    "scgpt_checkpoint": "scgpt",
    "scgpt_checkpoint_impl": "scgpt",
    "scgpt_checkpoint_torch": "scgpt",
    "scgpt_spatial_checkpoint": "scgpt",
    "tahoe_3b_checkpoint": "tahoe",
    "tahoe_70m_checkpoint": "tahoe",
}


FAST = ("scgpt_checkpoint_impl", "tahoe_3b_checkpoint")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.full) for name in FOLDERS]
)
def test_published_folders(backbones, tmp_path, name, call_cli):
    """Every tensor goes somewhere, a file in the folder is the folder, and a converted folder is the same model."""
    kind, folder = FOLDERS[name], backbones / name
    assert recognise(folder) == kind
    model = load_backbone(folder)
    file = next(path for path in folder.iterdir() if path.suffix in (".pt", ".safetensors"))
    assert load_backbone(file).digest() == model.digest()
    done = call_cli("convert", kind, folder, tmp_path / "converted")
    assert done.code == 0, done.err
    again = load_backbone(tmp_path / "converted")
    assert again.digest() == model.digest() and type(again) is type(model)
    assert again.config.read_vocabulary().id_of == model.config.read_vocabulary().id_of
    assert again.config.licence == {"scgpt": "mit", "tahoe": "apache-2.0"}[kind]
    assert again.config.attention == read_config(folder).attention
    assert type(model).from_pretrained(tmp_path / "converted").digest() == model.digest()
    half = tmp_path / "half"
    assert call_cli("convert", kind, folder, half, "--dtype", "bf16").code == 0
    assert load_backbone(half).dtype == torch.bfloat16
    vocabulary, tokens = model.config.read_vocabulary(), json.loads((folder / "vocab.json").read_text())
    genes = {token: number for token, number in tokens.items() if not token.startswith("<")}
    assert vocabulary.id_of == genes
    assert vocabulary.match(["NOT-A-GENE", *list(genes)[:1]], "new").ids[0] == model.config.vocab_size


def test_all_spellings_of_the_attention_are_one_model(backbones):
    first, second = (load_backbone(backbones / name) for name in ("scgpt_checkpoint", "scgpt_checkpoint_impl"))
    third = load_backbone(backbones / "scgpt_checkpoint_torch")
    assert first.digest() == second.digest() and third.config.attention == "full"
    shared = first.state_dict()
    assert all(torch.equal(tensor, shared[name]) for name, tensor in third.state_dict().items())
    with pytest.raises(ConfigError, match=r"no flag of masked genes.*attention full"):
        load_backbone(backbones / "scgpt_checkpoint_torch", attention="generative")


def edited(backbones, name, tmp_path, change):
    """Return a copy of a published folder whose tensors `change` edits in place."""
    folder = shutil.copytree(backbones / name, tmp_path / name)
    for path in folder.iterdir():
        path.chmod(0o644)
    folder.chmod(0o755)
    if (folder / "best_model.pt").exists():
        state = torch.load(folder / "best_model.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "best_model.pt")
    else:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["scgpt_checkpoint", "scgpt_spatial_checkpoint", "tahoe_70m_checkpoint"])
def test_loading_is_strict(backbones, tmp_path, name):
    """The published code drops what does not fit without a word."""
    key = "linear1.weight"

    def first(state):
        return next(each for each in state if each.endswith(key))

    def drop(state):
        del state[first(state)]

    def reshape(state):
        state[first(state)] = state[first(state)][:-1].clone()

    def add(state):
        state["bn.weight"] = torch.ones(3)

    for number, (change, message) in enumerate(
        [
            (drop, "lacks 1 tensors"),
            (reshape, "has the shape"),
            (add, r"1 tensors that the model does not use: bn\.weight"),
        ]
    ):
        folder = edited(backbones, name, tmp_path / str(number), change)
        with pytest.raises(WeightsError, match=message):
            load_backbone(folder)
        if number:
            continue
        for damaged in ("vocab.json", "args.json", "model_config.yml", "collator_config.yml"):
            if (folder / damaged).exists():
                whole = shutil.copytree(backbones / name, tmp_path / damaged, copy_function=shutil.copyfile)
                (whole / damaged).write_text("{" if damaged.endswith("json") else "a: [")
                with pytest.raises(HingeError, match="cannot be read"):
                    load_backbone(whole)
                (whole / damaged).write_text("[1]")
                with pytest.raises(HingeError, match="must hold keys and values"):
                    load_backbone(whole)


def test_settings_that_change_the_model_are_refused(backbones, tmp_path):
    folder = shutil.copytree(backbones / "tahoe_70m_checkpoint", tmp_path / "tahoe", copy_function=shutil.copyfile)
    content = yaml.safe_load((folder / "model_config.yml").read_text())
    for change, message in [
        ({"use_glu": True}, "use_glu is True"),
        ({"norm_scheme": "post"}, "norm_scheme is 'post'"),
        ({"vocab_size": content["vocab_size"] + 1}, f"vocab_size is {content['vocab_size'] + 1} and the weights have"),
        ({"n_layers": content["n_layers"] + 1}, f"n_layers is {content['n_layers'] + 1} and the weights have"),
        ({"transformer_activation": "silu"}, "none of relu"),
    ]:
        (folder / "model_config.yml").write_text(yaml.safe_dump({**content, **change}))
        with pytest.raises(WeightsError, match=message):
            load_backbone(folder)
    folder = shutil.copytree(backbones / "scgpt_checkpoint", tmp_path / "scgpt", copy_function=shutil.copyfile)
    content = json.loads((folder / "args.json").read_text())
    for change, message in [
        ({"input_emb_style": "category"}, "input_emb_style is 'category'"),
        ({"nheads": "four"}, "nheads must be a whole number"),
        ({"nlayers": content["nlayers"] + 1}, f"nlayers is {content['nlayers'] + 1} and the weights have"),
        ({"nheads": content["embsize"] + 1}, "not divisible"),
    ]:
        (folder / "args.json").write_text(json.dumps({**content, **change}))
        with pytest.raises(WeightsError, match=message):
            load_backbone(folder)
    with pytest.raises(ConfigError, match="which has no masked_input"):
        load_backbone(backbones / "scgpt_checkpoint", masked_input="mask_token")
    with pytest.raises(ConfigError, match="attention must be generative or full"):
        load_backbone(backbones / "scgpt_checkpoint", attention="both")


def test_vocabularies_that_do_not_belong_are_refused(backbones, tmp_path):
    folder = shutil.copytree(backbones / "scgpt_checkpoint", tmp_path / "scgpt", copy_function=shutil.copyfile)
    tokens = json.loads((folder / "vocab.json").read_text())
    rows = len(tokens)
    for change, message in [
        ({**tokens, "MORE": rows}, "does not belong to these weights"),
        ({**tokens, "TWICE": 0}, "have the same id 0"),
        ({**tokens, "HALF": 0.5}, "needs a whole number"),
    ]:
        (folder / "vocab.json").write_text(json.dumps(change))
        with pytest.raises(WeightsError, match=message):
            load_backbone(folder)
    # the published code appends special tokens that the file lacks
    (folder / "vocab.json").write_text(json.dumps({token: k for token, k in tokens.items() if token[0] != "<"}))
    config = read_config(folder)
    appended = [config.token_id(token) for token in ("<pad>", "<cls>", "<eoc>")]
    assert appended == list(range(rows - 3, rows))


def test_convert_refuses(backbones, tmp_path, call_cli):
    for arguments, message in [
        (("scgpt", backbones / "tahoe_3b_checkpoint"), "holds a tahoe; use hinge convert tahoe"),
        (("tahoe", backbones / "scgpt_checkpoint"), "holds a scgpt; use hinge convert scgpt"),
        (("scgpt", tmp_path / "nothing"), "there is no"),
        (("scgpt", backbones / "scgpt_checkpoint_torch", "--attention", "generative"), "no flag of masked genes"),
        (("scgpt", backbones / "scgpt_checkpoint", "--dtype", "int8"), "dtype must be"),
    ]:
        kind, folder, *options = arguments
        done = call_cli("convert", kind, folder, tmp_path / "out", *options)
        assert done.code == 2 and message in done.err, done.err
        assert not (tmp_path / "out").exists()


RUNS = [
    ("scgpt_generative", None),
    ("scgpt_encoder", "full"),
    ("scgpt_spatial", None),
    ("tahoe_generative", None),
    ("tahoe_full", None),
]


@pytest.mark.full
@pytest.mark.parametrize(("name", "attention"), RUNS)
def test_a_run_from_published_files_to_scores(backbones, tiny_slides, tmp_path, call_cli, name, attention):
    """Genes are matched by symbol, or by Ensembl id through HGNC's table; draws are in the run's transform."""
    genes = list(anndata.read_h5ad(tiny_slides / "sim0.h5ad").var_names)
    ensembl = name.startswith("tahoe")
    ids = [f"ENSG{number:011d}" for number in range(len(genes))]
    path = backbones / f"{name}.safetensors"
    folder = published_folder(path, tmp_path / "published", ids if ensembl else genes)
    settings = tiny_settings(tiny_slides, tmp_path / "run", backbone__path=str(folder), data__pretrain=[])
    settings["backbone"] = {"path": str(folder)} | ({} if attention is None else {"attention": attention})
    if ensembl:
        (tmp_path / "run.yaml").write_text(json.dumps(settings))
        refused = call_cli("run", "--config", tmp_path / "run.yaml")
        assert refused.code == 2 and "backbone.gene_names" in refused.err
        rows = [f"{gene}\t{number}\tApproved" for gene, number in zip(genes, ids, strict=True)]
        (tmp_path / "hgnc.tsv").write_text("\n".join(["symbol\tensembl_gene_id\tstatus", *rows]))
        assert GeneNames(tmp_path / "hgnc.tsv").ensembl(genes[0]) == ids[0]
        settings["backbone"]["gene_names"] = str(tmp_path / "hgnc.tsv")
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    done = call_cli("run", "--config", tmp_path / "run.yaml")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "genes.json").read_text())["panel"]
    # the vocabulary of a recording may be too small for all 40 genes of the slides
    assert report["mapped"] == 20 - len(report["missing"]) > 10
    draws = anndata.read_h5ad(tmp_path / "run" / "samples" / "sim2.h5ad")
    counts = np.exp2(draws.layers["draw_000"]) - 1
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())["rows"]
    assert any(row["method"] == "hinge" for row in scores)
    # the same command again finds everything finished, and the pipeline opens with the backbone where it lies
    before = (tmp_path / "run" / "samples" / "sim2.h5ad").read_bytes()
    assert call_cli("sample", tmp_path / "run", "--slide", "sim2", "--output", tmp_path / "again.h5ad").code == 0
    again = anndata.read_h5ad(tmp_path / "again.h5ad")
    np.testing.assert_array_equal(again.X, draws.X)
    assert (tmp_path / "run" / "samples" / "sim2.h5ad").read_bytes() == before


CONFIGS = Path(__file__).parents[2] / "configs" / "backbones"
CONFIG_FOR = {
    "cellfm-800m": None,
    "scgpt-human": "scgpt_generative",
    "scgpt-spatial": "scgpt_spatial",
    "tahoe-70m": "tahoe_generative",
}


@pytest.mark.full
@pytest.mark.parametrize("name", CONFIG_FOR)
def test_example_configurations(backbones, tiny_slides, tmp_path, call_cli, name):
    """Each example runs on a small model of its kind, after the conversion that its first lines show."""
    assert {path.stem for path in CONFIGS.iterdir()} == set(CONFIG_FOR)
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    convert = next(line for line in lines if line.startswith("# hinge convert")).split()[1:]
    genes = list(anndata.read_h5ad(tiny_slides / "sim0.h5ad").var_names)
    options = []
    if name == "cellfm-800m":
        size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_value_bins": 8}
        model = CellFMModel(CellFMConfig(num_genes=47, **size))
        published = {}
        for ours, theirs in cellfm_names(2, False, "cellfm").items():
            parts = model.state_dict()[ours].chunk(len(theirs))
            published |= {key: part.clone() for key, part in zip(theirs, parts, strict=True)}
        save_file(published, tmp_path / "weights.safetensors")
        table = ["symbol", *genes, *[f"OTHER{number}" for number in range(47 - len(genes))]]
        (tmp_path / "genes.csv").write_text("\n".join(table))
        files = {"CellFM_800M_weight.ckpt": "weights.safetensors", "expand_gene_info.csv": "genes.csv"}
        convert += ["--heads", "2"]
    else:
        ensembl = [f"ENSG{number:011d}" for number in range(len(genes))]
        names = ensembl if name == "tahoe-70m" else genes
        published_folder(backbones / f"{CONFIG_FOR[name]}.safetensors", tmp_path / "published", names)
        files = {convert[3]: "published"}
        if name == "tahoe-70m":
            rows = [f"{gene}\t{number}" for gene, number in zip(genes, ensembl, strict=True)]
            (tmp_path / "hgnc.tsv").write_text("\n".join(["symbol\tensembl_gene_id", *rows]))
            options.append(f"backbone.gene_names={tmp_path / 'hgnc.tsv'}")
    files[convert[4]] = "converted"
    command = [str(tmp_path / files[word]) if word in files else word for word in convert[1:]]
    done = call_cli(*command)
    assert done.code == 0, done.err
    small = ["panel.genes=20", "features.encoder=stain-texture", "training.steps=2", "training.batch_size=8"]
    slides = [f"data.path={tiny_slides}", "data.train=[sim0,sim1]", "data.test=[sim2]", f"output={tmp_path / 'run'}"]
    sampling = ["sampling.draws=2", "sampling.steps=2", f"backbone.path={tmp_path / 'converted'}"]
    done = call_cli("run", "--config", CONFIGS / f"{name}.yaml", *slides, *small, *sampling, *options)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["rows"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("architecture", "options"),
    [("scgpt", []), ("scgpt", ["backbone.attention=full"]), ("tahoe", []), ("tahoe", ["backbone.weights=random"])],
)
def test_a_run_that_pretrains_an_architecture(tiny_slides, tmp_path, call_cli, architecture, options):
    settings = tiny_settings(tiny_slides, tmp_path / "run", backbone__architecture=architecture)
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    done = call_cli("run", "--config", tmp_path / "run.yaml", *options)
    assert done.code == 0, done.err
    config = read_config(tmp_path / "run" / "backbone")
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == (architecture, 16, 2)
    assert config.attention == ("full" if "backbone.attention=full" in options else "generative")
    panel = json.loads((tmp_path / "run" / "panel.json").read_text())["genes"]
    assert config.read_vocabulary().genes == panel
    if not options:
        report = json.loads((tmp_path / "run" / "backbone-training" / "masked_genes.json").read_text())
        assert report["transform"] == "bins"
    # the configuration in the folder is that of the same run
    assert call_cli("run", "--config", tmp_path / "run" / "config.yaml").code == 0
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["rows"]


def test_settings_of_a_backbone_that_is_pretrained():
    names = typing.get_args(BackboneConfig.model_fields["architecture"].annotation)
    assert set(names) == set(MODELS)
    for given, message in [
        ({"path": "weights", "architecture": "scgpt"}, "does not go with path"),
        ({"attention": "full"}, "attention is for given weights"),
        ({"architecture": "tahoe", "pretrain": {"expression_prior": True}}, "tahoe has none"),
        ({"architecture": "scgpt", "masked_input": "mask_token"}, "masked_input is for given weights"),
        ({"architecture": "geneformer"}, "'cellfm', 'scgpt' or 'tahoe'"),
    ]:
        with pytest.raises(ValueError, match=message):
            BackboneConfig(**given)
    settings = BackboneConfig(architecture="scgpt", attention="full")
    assert BackboneConfig(**settings.model_dump()) == settings and not settings.pretrain.expression_prior
    assert BackboneConfig().pretrain.expression_prior
