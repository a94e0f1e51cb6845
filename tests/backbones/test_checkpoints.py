"""Published weights into ours and back, at little memory; the published sizes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.memory import peak_of
from helpers.mindspore import content_of, value
from helpers.runs import finish
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hinge.backbones import CellFMConfig, CellFMModel, load_backbone
from hinge.backbones.mindspore import read_mindspore
from hinge.backbones.published_cellfm import export_cellfm, published_names, read_published
from hinge.backbones.state_files import open_state
from hinge.backbones.vocabulary import GeneVocabulary
from hinge.config import load_config
from hinge.data import read_slide, select_panel, simulate_slides
from hinge.data.draws import read_draws
from hinge.models import HingeModel
from hinge.run.run import Run
from hinge.sharing.convert import RELEASED_DIFFUSION, convert_cellfm, convert_hinge, export_hinge_folder
from hinge.sharing.released_hinge import RELEASED_MODEL, import_hinge, write_hinge
from hinge.utils.errors import ConfigError, DataError, WeightsError
from hinge.utils.files import read_json


def small(**options) -> CellFMModel:
    torch.manual_seed(0)
    settings = {
        "num_genes": 30,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_value_bins": 8,
    }
    return CellFMModel(CellFMConfig(**{**settings, **options})).eval()


def write_mindspore(path: Path, state: dict[str, torch.Tensor], dtype: str = "Float32") -> Path:
    path.write_bytes(b"".join(value(name, list(t.shape), dtype, content_of(t)) for name, t in state.items()))
    return path


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# -- recognising and round trips -----------------------------------------------------------------------------


@pytest.fixture(params=["ckpt", "pth", "wrapped.pth", "old.pth", "safetensors", "folder"])
def saved(request, tmp_path) -> tuple[CellFMModel, Path, int | None]:
    """A model, one of the files that may hold it, and the number of heads to give."""
    model = small()
    state, path = export_cellfm(model), tmp_path / f"weights.{request.param}"
    match request.param:
        case "ckpt":
            write_mindspore(path, {**export_cellfm(model, "mindspore"), "moment1.gene_emb": state["gene_emb"]})
        case "pth":
            torch.save(state, path)
        case "wrapped.pth":  # as a fine-tuned model of the torch port, with a head of its own
            state = {f"module.extractor.net.{name}": tensor for name, tensor in state.items()}
            torch.save({"epoch": 3, "model": {**state, "module.classifier.weight": torch.ones(2)}}, path)
        case "old.pth":
            torch.save(state, path, _use_new_zipfile_serialization=False)
        case "safetensors":
            save_file(state, path)
        case "folder":
            model.save_pretrained(path)
    return model, path, None if request.param == "folder" else 4


def test_every_kind_of_file_is_recognised_and_sized(saved):
    model, path, heads = saved
    loaded = CellFMModel.from_pretrained(path, num_attention_heads=heads)
    assert loaded.digest() == model.digest()
    mine, theirs = (config.to_dict() for config in (model.config, loaded.config))
    # the tensors give the number of embeddings only, a multiple of 8
    for unknown in ("architectures", "dtype", "num_genes", "_name_or_path"):
        mine.pop(unknown, None), theirs.pop(unknown, None)
    assert mine == theirs
    assert loaded.config.num_embeddings == model.config.num_embeddings
    assert not loaded.training
    half = CellFMModel.from_pretrained(path, num_attention_heads=heads, dtype="bfloat16")
    for name, tensor in model.state_dict().items():
        assert torch.equal(half.state_dict()[name], tensor.bfloat16()), name


def test_import_export_import_is_exact(saved, tmp_path):
    _, path, heads = saved
    first = CellFMModel.from_pretrained(path, num_attention_heads=heads)
    for dialect in ("cellfm", "mindspore"):
        exported = export_cellfm(first, dialect)
        again = tmp_path / f"again.{dialect}"
        if dialect == "mindspore":
            write_mindspore(again, exported)
        else:
            torch.save(exported, again)
        second = CellFMModel.from_pretrained(again, num_attention_heads=4)
        assert second.digest() == first.digest()
        assert same(export_cellfm(second, dialect), exported)


@pytest.mark.parametrize("name", ["cellfm_mindspore_tiny.ckpt", "cellfm_800m_style", "cellfm_80m_style"])
def test_round_trip_of_the_recordings(parity, name, tmp_path):
    if name.endswith(".ckpt"):
        dialect, state = "mindspore", read_mindspore(parity / name)
    else:
        recorded = load_file(parity / f"{name}.safetensors")
        dialect, state = "cellfm", {key[6:]: tensor for key, tensor in recorded.items() if key.startswith("state.")}
    path = tmp_path / "state.pth"
    torch.save(state, path)
    model = CellFMModel.from_pretrained(path, num_attention_heads=4)
    # the torch port has technical tokens in both generations, only the older one uses them
    assert model.config.technical_tokens == (name == "cellfm_80m_style")
    assert model.config.zero_input == ("token" if name == "cellfm_80m_style" else "pad")
    exported = export_cellfm(model, dialect)
    unused = {key for key in state if key.startswith("ST_") and not model.config.technical_tokens}
    assert same(exported, {key: tensor for key, tensor in state.items() if key not in unused})


def test_defaults_are_what_the_weights_were_trained_with(parity, tmp_path):
    cellfm = CellFMModel.from_pretrained(parity / "cellfm_mindspore_tiny.ckpt", num_attention_heads=4).config
    assert (cellfm.negative_slope, cellfm.layer_norm_eps, cellfm.masked_input) == (0.2, 1e-7, "mask_token")
    path = parity / "hinge_reference_init.safetensors"
    hinge = CellFMModel.from_pretrained(path, num_attention_heads=4)
    assert (hinge.config.negative_slope, hinge.config.layer_norm_eps) == (0.01, 1e-6)
    assert hinge.config.masked_input == "value_plus_zero_token"
    assert not hinge.mask_token.any()  # theirs has none
    ours = small()
    ours.save_pretrained(tmp_path / "ours")
    changed = CellFMModel.from_pretrained(tmp_path / "ours", negative_slope=0.01)
    assert changed.config.negative_slope == changed.gene_decoder.negative_slope == 0.01
    assert CellFMModel.from_pretrained(tmp_path / "ours").config.negative_slope == 0.2


def test_published_width_has_48_heads(tmp_path):
    state = export_cellfm(small(hidden_size=1536, num_hidden_layers=2, num_attention_heads=48, num_genes=7))
    torch.save(state, tmp_path / "wide.pth")
    config = read_published(tmp_path / "wide.pth").config
    assert (config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]) == (1536, 48, 2)


# -- refusing ------------------------------------------------------------------------------------------------


def without(state: dict, *names: str) -> dict:
    return {name: tensor for name, tensor in state.items() if name not in names}


BAD_STATES = {
    "nothing of it": (lambda s: {"weight": torch.ones(3)}, "holds no CellFM: it has no tensor gene_emb"),
    "no value encoder": (lambda s: without(s, "value_enc.value_enc.w1.weight"), "value encoder"),
    "a tensor less": (
        lambda s: without(s, "encoder.1.ffn.u_proj.weight", "zero_emb"),
        "a part of a CellFM of 3 layers: 2 tensors are missing, the first of them zero_emb",
    ),
    "a layer less": (lambda s: {k: v for k, v in s.items() if "encoder.1." not in k}, r"its layers are \[0, 2\]"),
    "rows": (lambda s: {**s, "gene_emb": torch.ones(30, 16)}, "30 gene embeddings; a CellFM has a multiple of 8"),
    "shape": (lambda s: {**s, "value_dec.w1.weight": torch.ones(16, 15)}, r"value_dec.w1.weight has the shape"),
    "type": (lambda s: {**s, "zero_emb": torch.ones(1, 1, 16, dtype=torch.int32)}, "zero_emb holds no floating-point"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_incomplete_states_are_refused(tmp_path, case):
    change, message = BAD_STATES[case]
    torch.save(change(export_cellfm(small())), tmp_path / "bad.pth")
    for call in (
        lambda: CellFMModel.from_pretrained(tmp_path / "bad.pth", num_attention_heads=4),
        lambda: convert_cellfm(tmp_path / "bad.pth", tmp_path / "out", num_attention_heads=4),
    ):
        with pytest.raises(WeightsError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_refused(tmp_path):
    torch.save(export_cellfm(small()), tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10" + bytes(20))
    (tmp_path / "text.ckpt").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, message in {
        "cut.pth": "not a readable torch state dict",
        "cut.safetensors": "not a complete safetensors file",
        "text.ckpt": "at byte 0",
        "list.pth": "it holds no dictionary of tensors",
        "missing.ckpt": "there is no file",
        "missing": "config.json is missing",
    }.items():
        with pytest.raises(WeightsError, match=message) as caught:
            CellFMModel.from_pretrained(tmp_path / name)
        assert "\n" not in str(caught.value)


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: str):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("archive", [True, False])
def test_nothing_is_unpickled(tmp_path, archive):
    path = tmp_path / "trap.pth"
    torch.save({"gene_emb": Trap(str(tmp_path / "sprung"))}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(WeightsError, match="not a readable torch state dict"):
        CellFMModel.from_pretrained(path)
    assert not (tmp_path / "sprung").exists()


def test_heads_must_be_given_and_fit(tmp_path):
    torch.save(export_cellfm(small()), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="width 16, and the number of attention heads cannot be inferred"):
        CellFMModel.from_pretrained(tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="not divisible by 5 heads"):
        CellFMModel.from_pretrained(tmp_path / "w.pth", num_attention_heads=5)
    with pytest.raises(WeightsError, match="masked_input must be one of"):
        CellFMModel.from_pretrained(tmp_path / "w.pth", num_attention_heads=4, masked_input="nothing")


# -- converting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_conversion(saved, tmp_path, dtype):
    model, path, heads = saved
    if heads is None:
        with pytest.raises(WeightsError, match="holds no CellFM"):
            convert_cellfm(path, tmp_path / "out", dtype)
        return
    out = convert_cellfm(path, tmp_path / "out", dtype, num_attention_heads=heads)
    assert sorted(file.name for file in out.iterdir()) == ["checksums.json", "config.json", "model.safetensors"]
    to = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    loaded = CellFMModel.from_pretrained(out)
    assert loaded.dtype == to
    assert same(dict(loaded.state_dict()), {name: tensor.to(to) for name, tensor in model.state_dict().items()})
    with safe_open(out / "model.safetensors", "pt") as content:
        assert content.metadata() == {"format": "pt", "converted_from": path.name}
    first = (out / "model.safetensors").read_bytes()
    assert int.from_bytes(first[:8], "little") % 8 == 0
    again = convert_cellfm(path, tmp_path / "again", dtype, num_attention_heads=heads)
    assert (again / "model.safetensors").read_bytes() == first
    with pytest.raises(ConfigError, match="exists already"):
        convert_cellfm(path, out, dtype, num_attention_heads=heads)


def test_conversion_of_a_hinge_checkpoints_backbone(parity, tmp_path):
    path = parity / "hinge_reference_random.safetensors"
    out = convert_cellfm(path, tmp_path / "out", num_attention_heads=4)
    loaded, direct = CellFMModel.from_pretrained(out), CellFMModel.from_pretrained(path, num_attention_heads=4)
    assert loaded.digest() == direct.digest()
    assert loaded.config.layer_norm_eps == 1e-6


def test_a_changed_byte_of_a_converted_backbone_is_found(tmp_path):
    torch.save(export_cellfm(small()), tmp_path / "w.pth")
    out = convert_cellfm(tmp_path / "w.pth", tmp_path / "out", num_attention_heads=4)
    load_backbone(out)
    for name in ("model.safetensors", "config.json"):
        content = (out / name).read_bytes()
        at = len(content) - 40  # a weight, or the value of a setting
        (out / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(DataError, match=f"{name} was changed or damaged after hinge convert wrote it"):
            load_backbone(out)
        (out / name).write_bytes(content)
    load_backbone(out)


def test_conversion_refuses(tmp_path):
    state = export_cellfm(small())
    state["gene_emb"][3, 2] = 1e6
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="gene_emb has weights beyond the range of float16"):
        convert_cellfm(tmp_path / "w.pth", tmp_path / "out", "fp16", num_attention_heads=4)
    with pytest.raises(ConfigError, match="fp32, bf16, fp16, not 'int8'"):
        convert_cellfm(tmp_path / "w.pth", tmp_path / "out", "int8", num_attention_heads=4)
    (tmp_path / "genes.csv").write_text("\n".join(f"G{k}" for k in range(40)))
    with pytest.raises(WeightsError, match="does not belong to these weights: its 40 genes need 48 embeddings"):
        convert_cellfm(tmp_path / "w.pth", tmp_path / "out", "fp32", tmp_path / "genes.csv", 4)
    (tmp_path / "genes.csv").write_text("".join(f"G{k},{k}\n" for k in range(1, 30) if k != 7))
    with pytest.raises(WeightsError, match=r"has gaps \(28 ids up to 29\)"):
        convert_cellfm(tmp_path / "w.pth", tmp_path / "out", "fp32", tmp_path / "genes.csv", 4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["genes.csv", "w.pth"]


def test_names_of_a_vocabulary_go_along(tmp_path):
    torch.save(export_cellfm(small()), tmp_path / "w.pth")
    genes = [f"G{k}" for k in range(28)]
    (tmp_path / "genes.csv").write_text("\n".join(["symbol", *genes]))
    out = convert_cellfm(tmp_path / "w.pth", tmp_path / "out", "fp32", tmp_path / "genes.csv", 4)
    config = CellFMModel.from_pretrained(out).config
    assert (config.gene_names, config.num_genes, config.num_embeddings) == (genes, 28, 32)


# -- memory --------------------------------------------------------------------------------------------------

WIDTH, ROWS, LAYERS = 768, 20_000, 20  # 111 million numbers, 442 MB in float32; the largest tensor has 61 MB


@pytest.fixture(scope="module", params=["ckpt", "pth", "safetensors"])
def big(request, tmp_path_factory) -> Path:
    """A checkpoint of the middle size, each tensor a repeated pattern."""
    path = tmp_path_factory.mktemp("big") / f"big.{request.param}"
    with torch.device("meta"):
        model = CellFMModel(
            CellFMConfig(num_genes=ROWS - 1, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8)
        )
    dialect = "mindspore" if request.param == "ckpt" else "cellfm"
    pattern = torch.from_numpy(np.random.default_rng(0).standard_normal(1 << 16, dtype=np.float32))
    state = {}
    for ours, theirs in published_names(LAYERS, False, dialect).items():
        shape = model.state_dict()[ours].shape
        for name in theirs:
            part = (shape[0] // len(theirs), *shape[1:])
            state[name] = torch.from_numpy(np.resize(pattern.numpy(), part))
    if request.param == "ckpt":
        with open(path, "wb") as file:
            for name, tensor in state.items():
                file.write(value(name, list(tensor.shape), "Float32", content_of(tensor)))
    elif request.param == "pth":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    return path


@pytest.mark.full
def test_loading_and_converting_need_little_memory(big, tmp_path):
    state = open_state(big)
    total = sum(int(np.prod(shape)) for shape in state.shapes.values())
    convert = peak_of(lambda: convert_cellfm(big, tmp_path / "out", "bf16", num_attention_heads=8))
    load = peak_of(lambda: CellFMModel.from_pretrained(big, num_attention_heads=8, dtype=torch.bfloat16))
    # less than the file, which is never in memory as a whole, and for loading the model besides; how many pages of
    # the file stay mapped differs between machines
    assert convert < 4 * total
    assert load < 2 * total + 4 * total
    converted = CellFMModel.from_pretrained(tmp_path / "out")
    expected = state.read("encoder.5.attn.v_proj.weight").bfloat16()
    assert torch.equal(converted.layers[5].retention.qkvu.weight[2 * WIDTH : 3 * WIDTH], expected)


# -- the published size --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_800m() -> CellFMModel:
    with torch.device("meta"):
        return CellFMModel(CellFMConfig())


def test_800m_names_shapes_and_count(published_800m):
    """Every parameter of the 800M model under its published name: 27,856 × 1536 embeddings, 40 layers."""
    width, bins = 1536, 256
    expected = {
        "gene_emb": (27856, width),
        "cls_token": (1, 1, width),
        "zero_emb": (1, 1, width),
        "value_enc.mask_emb": (1, 1, width),
        "value_enc.value_enc.w1.weight": (bins, 1),
        "value_enc.value_enc.w3.weight": (bins, bins),
        "value_enc.value_enc.table.weight": (width, bins),
        "value_enc.value_enc.a": (1, 1),
        "value_dec.w1.weight": (width, width),
        "value_dec.w2.weight": (1, width),
        "cellwise_dec.map.weight": (width, width),
    }
    for k in range(40):
        for name in [*(f"attn.{x}_proj.weight" for x in "qkvuo"), *(f"ffn.{x}_proj.weight" for x in "uvo")]:
            expected[f"encoder.{k}.{name}"] = (width, width)
        for n in "12":
            expected[f"encoder.{k}.post_norm{n}.gamma"] = (width,)
            expected[f"encoder.{k}.post_norm{n}.beta"] = (width,)
    found = {}
    for ours, theirs in published_names(40, False, "mindspore").items():
        rows, *rest = published_800m.state_dict()[ours].shape
        found |= {name: (rows // len(theirs), *rest) for name in theirs}
    assert found == expected
    count = sum(int(np.prod(shape)) for shape in expected.values())
    assert count == sum(parameter.numel() for parameter in published_800m.parameters()) == 803_191_041


def test_trainable_shares_at_800m(published_800m):
    frozen = sum(parameter.numel() for parameter in published_800m.parameters())
    trainable = {}
    for rank in (8, 32, None):
        with torch.device("meta"):
            model = HingeModel(
                feature_dim=1536, num_genes=200, hidden_size=1536, num_layers=40, head="point", modulation_rank=rank
            )
        trainable[rank] = sum(parameter.numel() for parameter in model.parameters())
        if rank is not None:
            share = trainable[rank] / frozen
            assert share < 0.05, (rank, share)
    modulation = sum(parameter.numel() for parameter in model.modulation.parameters())
    assert round(modulation / 1e6) == 571  # 566 M in the 40 layers, and what comes before the decoder
    assert round(40 * 6 * 1536 * 1536 / 1e6) == 566


# -- in a run ------------------------------------------------------------------------------------------------

RELEASED = ROOT / "configs" / "paper" / "released.yaml"


@pytest.fixture(scope="module")
def tissue(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    simulate_slides(folder, n_slides=3, grid=(5, 5), n_genes=30, um_per_px=2.0)
    return folder


@pytest.fixture(scope="module")
def panel(tissue) -> list[str]:
    return select_panel([read_slide(tissue, name) for name in ("sim0", "sim1")], "hmhvg", 12).genes


@pytest.fixture(scope="module")
def published(tissue, panel, tmp_path_factory) -> tuple[Path, Path]:
    """A MindSpore checkpoint, and its vocabulary: two genes of the panel are missing, one is in lower case."""
    folder = tmp_path_factory.mktemp("published")
    slide = read_slide(tissue, "sim0")
    genes = [gene for gene in slide.var_names if gene not in panel[3:5]]
    genes = [gene.lower() if gene == panel[0] else gene for gene in genes]
    model = small(num_genes=len(genes), hidden_size=16, num_hidden_layers=2)
    checkpoint = write_mindspore(folder / "weights.ckpt", export_cellfm(model, "mindspore"))
    (folder / "genes.csv").write_text("\n".join(["symbol", *genes]))
    return checkpoint, folder / "genes.csv"


def released_run(tissue: Path, output: Path, *overrides: str) -> Run:
    """The released configuration on tiny slides and weights; only sizes differ."""
    small_scale = [
        f"output={output}",
        f"data={{path: {tissue}, train: [sim0, sim1], test: [sim2]}}",
        "panel.genes=12",
        "features={encoder: stain-texture, views: 8, standardise_slide: false}",
        "training.epochs=null",
        "training.steps=2",
        "training.batch_size=8",
        "training.precision='no'",
        "sampling={draws: 2, steps: 3}",
    ]
    return Run(load_config(RELEASED, [*small_scale, *overrides]))


def test_the_released_configuration_says_what_the_released_code_does():
    config = load_config(RELEASED)
    standardise = {"standardise_features": config.features.standardise_slide}
    assert RELEASED_MODEL.items() <= (config.model.model_dump() | standardise).items()
    assert RELEASED_DIFFUSION.items() <= config.diffusion.model_dump().items()
    assert (config.training.loss_on, config.training.weighting) == ("revealed", "gene")
    assert config.backbone.constants() == {
        "masked_input": "value_plus_zero_token",
        "negative_slope": 0.01,
        "layer_norm_eps": 1e-6,
    }
    # epochs 20 and 35 of 40
    assert (config.training.schedule, config.training.learning_rate, config.training.warmup_steps) == ("step", 1e-4, 0)


@pytest.mark.full
def test_released_configuration_on_published_weights(tissue, panel, published, tmp_path, caplog):
    checkpoint, vocabulary = published
    backbone = convert_cellfm(checkpoint, tmp_path / "backbone", num_attention_heads=4)
    run = released_run(
        tissue, tmp_path / "run", f"backbone.path={backbone}", f"backbone.vocabulary={vocabulary}", "model.gate=linear"
    )
    with caplog.at_level("INFO", logger="hinge"):
        run.train()
    # two genes are not in the vocabulary; one is there in lower case and keeps the slide's name in the panel
    assert run.panel().genes == [gene for gene in panel if gene not in panel[3:5]]
    report = read_json(run.paths.genes)
    assert report["panel"]["dropped"] == report["panel"]["missing"] == panel[3:5]
    assert report["panel"]["harmonised"] == {panel[0]: panel[0].lower()}
    assert report["slides"]["sim1"]["mapped"] == report["slides"]["sim1"]["genes"] - 2
    assert f"10 of 12 genes map: 9 by symbol, 1 by case; 2 not in the vocabulary: {panel[3]}, {panel[4]}" in caplog.text
    assert "2 dropped from the panel" in caplog.text
    model = run.pipeline().model
    frozen = sum(parameter.numel() for parameter in model.backbone.parameters())
    assert f"{model.num_parameters(only_trainable=True):,} trainable parameters, {frozen:,} frozen" in caplog.text
    known = GeneVocabulary.load(vocabulary)
    assert run.gene_ids(model.backbone).tolist() == known.match(run.panel().genes).ids.tolist()
    assert (model.backbone.config.negative_slope, model.config.gate) == (0.01, "linear")
    assert read_draws(run.sample("sim2")).shape == (25, 10)

    # what was trained leaves as the authors' checkpoint and comes back as the same model
    written = export_hinge_folder(run.folder, tmp_path / "model.pth")
    again = import_hinge(written, num_attention_heads=4, gate="linear")
    assert again.gene_ids.tolist() == run.gene_ids(model.backbone).tolist()
    weights, trained = again.model.state_dict(), model.state_dict()
    assert all(torch.equal(weights[name], trained[name]) for name in trained if not name.startswith("feature_"))


@pytest.mark.full
def test_an_imported_model_draws(tissue, published, panel, tmp_path):
    checkpoint, vocabulary = published
    known = [gene for gene in panel if gene not in (panel[0], *panel[3:5])]
    ids = torch.from_numpy(GeneVocabulary.load(vocabulary).ids(known))
    backbone = convert_cellfm(checkpoint, tmp_path / "backbone", "fp32", vocabulary, 4)
    width = released_run(tissue, tmp_path / "other", f"backbone.path={backbone}").spots(["sim0"]).features.shape[2]
    constants = load_config(RELEASED).backbone.constants()
    model = HingeModel.from_backbone(
        CellFMModel.from_pretrained(backbone, **constants), width, len(known), gate="sigmoid", **RELEASED_MODEL
    )
    out = convert_hinge(
        write_hinge(model, ids, tmp_path / "authors.pth"), tmp_path / "out", "fp32", None, vocabulary, 4
    )
    run = released_run(tissue, out, f"backbone.path={out / 'backbone'}")
    trained = files_of(out / "model")
    finish(run)
    assert files_of(out / "model") == trained  # nothing was trained again
    assert run.panel().genes == known
    assert list(read_draws(run.paths.samples("sim2")).var_names) == known
    again = torch.load(export_hinge_folder(out, tmp_path / "again.pth"), weights_only=True)["model"]
    first = torch.load(tmp_path / "authors.pth", weights_only=True)["model"]
    assert same(again, first)


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.full
def test_new_genes_get_embeddings_of_their_own(tissue, panel, published, tmp_path):
    checkpoint, vocabulary = published
    backbone = convert_cellfm(checkpoint, tmp_path / "backbone", "bf16", vocabulary, 4)
    run = released_run(tissue, tmp_path / "run", f"backbone.path={backbone}", "backbone.unknown_genes=new")
    run.train()
    assert run.panel().genes == panel
    assert read_json(run.paths.genes)["panel"]["new"] == panel[3:5]
    original, extended = CellFMModel.from_pretrained(backbone), run.backbone()
    last = original.config.num_genes
    ids = run.gene_ids(extended).tolist()
    assert [ids[3], ids[4]] == [last + 1, last + 2]
    rows, before = extended.gene_embedding.weight.float(), original.gene_embedding.weight.float()
    assert torch.equal(rows[: last + 1], before[: last + 1])
    # drawn like the trained ones, also where a row of padding was there before, and each time the same
    assert 0.2 < rows[last + 1 : last + 3].std() / before[1 : last + 1].std() < 2
    assert not torch.equal(rows[last + 1], rows[last + 2])
    assert run.backbone().digest() == extended.digest() != original.digest()
    assert read_draws(run.sample("sim2")).shape == (25, 12)
    with pytest.raises(WeightsError, match="no embedding for the new genes"):
        original.gene_embedding = torch.nn.Embedding.from_pretrained(original.gene_embedding.weight[: last + 1])
        run.gene_ids(original)


def test_a_run_needs_the_genes_of_its_weights(tissue, published, tmp_path):
    checkpoint, _ = published
    backbone = convert_cellfm(checkpoint, tmp_path / "backbone", num_attention_heads=4)
    run = released_run(tissue, tmp_path / "run", f"backbone.path={backbone}")
    with pytest.raises(WeightsError, match=r"brings no gene vocabulary; name its file as backbone\.vocabulary"):
        run.train()
    assert not run.folder.exists()
    (tmp_path / "genes.csv").write_text("\n".join(f"G{k}" for k in range(60)))
    run = released_run(
        tissue, tmp_path / "run", f"backbone.path={backbone}", f"backbone.vocabulary={tmp_path / 'genes.csv'}"
    )
    with pytest.raises(WeightsError, match="does not belong to these weights"):
        run.train()
    with pytest.raises(ConfigError, match="backbone: masked_input is for given weights and needs path"):
        load_config(RELEASED, ["backbone.path=null", "data.pretrain=[C1]"])


# -- the command line ----------------------------------------------------------------------------------------


def test_convert_commands(call_cli, published, parity, tmp_path):
    checkpoint, vocabulary = published
    out = tmp_path / "cellfm"
    options = ("--dtype", "bf16", "--heads", 4, "--vocabulary", vocabulary)
    code, printed, _ = call_cli("convert", "cellfm", checkpoint, out, *options)
    assert (code, printed) == (0, f"backbone: {out}\n")
    assert CellFMModel.from_pretrained(out).dtype == torch.bfloat16
    recording = parity / "hinge_reference_random.safetensors"
    assert call_cli("convert", "hinge", recording, tmp_path / "hinge", "--heads", 4, "--gate", "sigmoid")[0] == 0
    assert call_cli("convert", "to-authors", tmp_path / "hinge", tmp_path / "back.pth")[0] == 0
    state = {key[6:]: tensor for key, tensor in load_file(recording).items() if key.startswith("state.")}
    assert same(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state)


def test_convert_commands_refuse_in_one_sentence(call_cli, published, tmp_path):
    checkpoint = published[0]
    content = checkpoint.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pth").write_text("PK not weights")
    out, before = tmp_path / "out", sorted(tmp_path.iterdir())
    for arguments, says in (
        (("cellfm", tmp_path / "cut.ckpt", out, "--heads", 4), "at byte"),
        (("cellfm", tmp_path / "text.pth", out), "not a readable torch state dict"),
        (("cellfm", tmp_path / "none.ckpt", out), "there is no file"),
        (("cellfm", checkpoint, out), "--heads"),
        (("cellfm", checkpoint, out, "--heads", 4, "--dtype", "fp8"), "not 'fp8'"),
        (("cellfm", checkpoint, tmp_path, "--heads", 4), "exists already"),
        (("cellfm", checkpoint, out, "--heads", 4, "--vocabulary", checkpoint), "cannot read the gene vocabulary"),
        (("hinge", checkpoint, out, "--heads", 4), "contains CellFM only"),
        (("hinge", checkpoint, out, "--gate", "open"), "--gate must be sigmoid or linear"),
        (("to-authors", tmp_path, out), "neither the folder of a run"),
        (("to-authors", tmp_path, tmp_path), "is a folder"),
    ):
        code, printed, said = call_cli("convert", *arguments)
        assert (code, printed) == (2, ""), arguments
        assert said.startswith("hinge: ") and said.count("\n") == 1, said
        assert says in said, said
        assert sorted(tmp_path.iterdir()) == before
