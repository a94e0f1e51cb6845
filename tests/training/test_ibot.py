"""Pre-training a histology encoder: augmentation, masks, schedules, the teacher, resuming, and that it learns."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT
from helpers.commands import call_hinge
from skimage.color import hed2rgb, rgb2hed

from hinge.data import read_slide, simulate_slides
from hinge.data.tissue_patches import TissuePatches
from hinge.encoders import extract_features, load_encoder
from hinge.tasks.pretrain_encoder import expression_clusters, load_pretraining
from hinge.training.augmentation import CROP_DRAWS, STAIN_DRAWS, Crops, jitter_stains, random_crops
from hinge.training.ibot import pretrain_histology
from hinge.training.ibot_config import IbotConfig, VitConfig
from hinge.training.ibot_model import Ibot, block_masks
from hinge.utils import checksums
from hinge.utils.errors import ConfigError, DataError, HingeError

VIT = {
    "architecture": "vit_tiny_patch16_224",
    "arguments": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "mean": (0.7, 0.6, 0.7),
    "std": (0.2, 0.2, 0.2),
}
TRAINING = {
    "steps": 6,
    "batch_size": 8,
    "outputs": 32,
    "hidden": 32,
    "bottleneck": 16,
    "local_crops": 2,
    "local_px": 16,
    "global_scale": (0.4, 1.0),
    "local_scale": (0.1, 0.4),
    "frozen_last_layer_steps": 2,
    "checkpoint_every": 3,
    "probe_spots": 40,
}


@pytest.fixture(scope="module")
def tissue(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tissue")
    simulate_slides(folder, n_slides=3, grid=(10, 10), n_genes=40, um_per_px=2.0)
    return folder


@pytest.fixture(scope="module")
def slides(tissue):
    return [read_slide(tissue, f"sim{number}") for number in range(3)]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- patches --------------------------------------------------------------------------------------------


def test_patches_lie_on_tissue_and_not_on_glass(tmp_path, write_slide):
    from PIL import Image

    path = write_slide("half", rows=12, columns=12)
    pixels = np.asarray(Image.open(path.with_suffix(".png"))).copy()
    pixels[:] = (170, 80, 160)  # stained
    pixels[:, pixels.shape[1] // 2 :] = 245  # glass
    Image.fromarray(pixels).save(path.with_suffix(".png"))
    slide = read_slide(path, "half")
    patches = TissuePatches([slide, slide], patch_um=100.0, patch_px=16)
    assert set(patches.slide) == {0, 1} and (patches.slide == 0).sum() == (patches.slide == 1).sum() > 10
    assert patches.coords[:, 0].max() < pixels.shape[1] / 2 + 10
    read = patches.read(np.arange(len(patches)))
    assert read.dtype == np.uint8 and read.shape == (len(patches), 16, 16, 3)
    # glass and what lies outside the image are white
    assert (read.reshape(len(read), -1).mean(axis=1) < (166 + 255) / 2).all()
    np.testing.assert_array_equal(patches.read(np.array([5, 2])), read[[5, 2]])
    moved = patches.read(np.array([5]), np.array([[0.5, 0.0]]))
    assert moved.shape == (1, 16, 16, 3)
    patches.close()
    slide.uns["hinge"].pop("image_path")
    with pytest.raises(DataError, match="half has no image"):
        TissuePatches([slide], 100.0, 16)


# --- augmentation ---------------------------------------------------------------------------------------


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_augmentation_keeps_range_and_depends_on_its_numbers_only():
    patches = uniform(4, 3, 40, 40, seed=1)
    kind = Crops(3, 24, (0.2, 0.8))
    places, stains = uniform(4, 3, CROP_DRAWS), uniform(4, 3, STAIN_DRAWS)
    crops = random_crops(patches, kind, places)
    jittered = jitter_stains(crops, 0.4, stains)
    for images in (crops, jittered):
        assert images.shape == (4, 3, 3, 24, 24) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
    # a patch alone is treated as in a batch
    torch.testing.assert_close(random_crops(patches[2:3], kind, places[2:3]), crops[2:3])
    torch.testing.assert_close(jitter_stains(crops[2:3], 0.4, stains[2:3]), jittered[2:3])
    assert torch.equal(random_crops(patches, kind, places), crops)
    assert not torch.allclose(random_crops(patches, kind, uniform(4, 3, CROP_DRAWS, seed=2)), crops, atol=0.1)


def test_whole_crops_are_the_symmetries_of_the_square():
    patch = uniform(1, 3, 16, 16, seed=1)
    symmetries = [torch.rot90(image, k, (1, 2)) for image in (patch[0], patch[0].flip(2)) for k in range(4)]
    found = []
    for quarter in range(4):
        for mirror in (0.1, 0.9):
            draws = torch.tensor([0.5, 0.5, 0.5, 0.5, (quarter + 0.5) / 4, mirror])
            crop = random_crops(patch, Crops(1, 16, (1.0, 1.0)), draws.view(1, 1, CROP_DRAWS))[0, 0]
            found += [k for k, image in enumerate(symmetries) if torch.allclose(crop, image, atol=1e-5)]
    assert sorted(found) == list(range(8))


def test_a_crop_holds_its_share_of_the_patch():
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    draws = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.0, 0.1]).view(1, 1, CROP_DRAWS)
    crop = random_crops(ramp, Crops(1, 16, (0.25, 0.5)), draws)[0, 0, 0]
    assert math.isclose(float(crop.amax() - crop.amin()), 0.5 * 15 / 16, abs_tol=0.03)
    assert math.isclose(float(crop.mean()), 0.5, abs_tol=0.01)


def test_stain_jitter_scales_stains():
    hed = np.zeros((4, 4, 3))
    hed[..., 0], hed[..., 1] = 0.08, 0.05
    image = torch.from_numpy(hed2rgb(hed)).to(torch.float32).permute(2, 0, 1)[None, None]
    same = jitter_stains(image, 0.0, uniform(1, 1, STAIN_DRAWS))
    torch.testing.assert_close(same, image, atol=1e-5, rtol=0)
    draws = torch.tensor([1.0, 0.5, 0.5, 0.5, 0.5, 0.5]).view(1, 1, STAIN_DRAWS)  # hematoxylin up, nothing else
    more = jitter_stains(image, 0.3, draws)[0, 0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(rgb2hed(more)[..., 0], 1.3 * 0.08, rtol=1e-3)
    np.testing.assert_allclose(rgb2hed(more)[..., 1], 0.05, rtol=1e-3)


# --- masks, schedules, teacher --------------------------------------------------------------------------


def test_block_masks():
    before = random.getstate()
    masks = block_masks(20, (8, 8), 0.5, (0.1, 0.5), torch.Generator().manual_seed(0))
    assert random.getstate() == before
    assert masks.shape == (20, 8, 8) and masks.dtype == torch.bool
    hidden = masks.flatten(1).float().mean(dim=1)
    assert (hidden > 0).sum() == 10 and hidden.max() <= 0.5 and 0.2 < hidden[hidden > 0].mean() < 0.4
    # blocks, not single tokens: most hidden tokens have a hidden neighbour to the right or below
    joined = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    assert joined > 0.9 * masks.sum()
    assert torch.equal(block_masks(20, (8, 8), 0.5, (0.1, 0.5), torch.Generator().manual_seed(0)), masks)
    assert not torch.equal(block_masks(20, (8, 8), 0.5, (0.1, 0.5), torch.Generator().manual_seed(1)), masks)
    assert block_masks(1, (4, 4), 0.1, (0.3, 0.5), torch.Generator().manual_seed(0)).any()


def test_schedules():
    config = IbotConfig(
        steps=101,
        weight_decay=0.04,
        weight_decay_end=0.4,
        teacher_momentum=0.9,
        teacher_temperature=0.07,
        teacher_temperature_start=0.04,
        teacher_temperature_steps=30,
    )
    decays = [config.weight_decay_at(step, 101) for step in (0, 50, 100)]
    assert decays == pytest.approx([0.04, 0.22, 0.4])
    assert [config.momentum_at(step, 101) for step in (0, 50, 100)] == pytest.approx([0.9, 0.95, 1.0])
    assert [config.temperature_at(step) for step in (0, 10, 30, 99)] == pytest.approx([0.04, 0.05, 0.07, 0.07])
    for wrong in ({"ema_decay": 0.9}, {"global_scale": (0.5, 0.2)}, {"local_scale": (0.0, 0.2)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            IbotConfig(**wrong)


def test_teacher_is_the_exact_moving_average():
    torch.manual_seed(0)
    model = Ibot(VitConfig(**VIT), IbotConfig(**TRAINING)).train()
    assert not model.teacher.training and model.student.training
    start = {name: tensor.clone() for name, tensor in model.teacher.named_parameters()}
    for (name, mine), theirs in zip(model.student.named_parameters(), model.teacher.parameters(), strict=True):
        assert torch.equal(mine, theirs) and not theirs.requires_grad, name
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter += torch.randn_like(parameter)
    model.teach(0.75)
    for (name, mine), theirs in zip(model.student.named_parameters(), model.teacher.parameters(), strict=True):
        torch.testing.assert_close(theirs, 0.75 * start[name] + 0.25 * mine, atol=1e-6, rtol=1e-6)


def test_losses_are_cross_entropies():
    """The class loss from its definition; the patch loss looks at masked tokens only."""
    torch.manual_seed(0)
    model = Ibot(VitConfig(**VIT, drop_path=0.0), IbotConfig(**TRAINING))
    large, small = uniform(2, 3, 3, 32, 32), uniform(1, 3, 3, 16, 16, seed=1)
    mask = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    mask[0, 1, :2, :2] = True
    losses = model(large, small, mask, 0.05)
    normal = [model._normalise(crop) for crop in (*large, *small)]
    hidden = [*mask, None]
    student = [model.student.class_head(model.student.tokens(x, m)[0]) for x, m in zip(normal, hidden, strict=True)]
    teacher = [model.teacher.class_head(model.teacher.tokens(x)[0]) for x in normal[:2]]
    terms = [
        -(torch.softmax(t / 0.05, 1) * torch.log_softmax(s / 0.1, 1)).sum(1).mean()
        for i, t in enumerate(teacher)
        for j, s in enumerate(student)
        if i != j
    ]
    torch.testing.assert_close(losses["class_loss"], sum(terms) / len(terms), atol=1e-4, rtol=1e-4)
    model = Ibot(VitConfig(**VIT, drop_path=0.0), IbotConfig(**TRAINING))
    first = model(large, small, mask, 0.05)["patch_loss"]
    assert first.item() > 0
    first.backward()
    assert model.student.vit.mask_token.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


# --- runs -----------------------------------------------------------------------------------------------


def train(slides, folder, labels=(), vit=None, **settings):
    return pretrain_histology(
        slides,
        VitConfig(**{**VIT, **(vit or {})}),
        IbotConfig(**{**TRAINING, **settings}),
        folder,
        probe_slides=slides if len(labels) else (),
        probe_labels=labels,
    )


@pytest.mark.full
def test_stopped_run_continues_to_the_same_bits(slides, tmp_path, monkeypatch):
    whole = train(slides, tmp_path / "whole")
    from hinge.training import loop

    save, calls = loop.save_checkpoint, []

    def stop_after_the_first(*arguments):
        save(*arguments)
        calls.append(1)
        raise HingeError("stopped")

    monkeypatch.setattr(loop, "save_checkpoint", stop_after_the_first)
    with pytest.raises(HingeError, match="stopped"):
        train(slides, tmp_path / "parts")
    assert not (tmp_path / "parts").exists() and len(calls) == 1
    monkeypatch.setattr(loop, "save_checkpoint", save)
    parts = train(slides, tmp_path / "parts", workers=0)
    assert parts.digest == whole.digest
    stored = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert stored[0] == stored[1]
    losses = [[record["loss"] for record in records(tmp_path / f"{name}-training")] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    # a worker process makes the same batches
    other = train(slides, tmp_path / "workers", workers=1)
    assert other.digest == whole.digest
    # finished work is recognised, and other settings are not mistaken for it
    shutil.rmtree(tmp_path / "whole-training")
    assert train(slides, tmp_path / "whole").digest == whole.digest and not (tmp_path / "whole-training").exists()
    with pytest.raises(ConfigError, match="pre-trained otherwise"):
        train(slides, tmp_path / "whole", steps=7)


def test_last_layer_is_frozen_at_first(slides, tmp_path):
    from safetensors.torch import load_file

    def prototypes(steps, frozen):
        folder = tmp_path / f"{steps}-{frozen}"
        train(slides, folder, steps=steps, frozen_last_layer_steps=frozen, checkpoint_every=1)
        return load_file(f"{folder}-training/latest.safetensors")["model.student.class_head.last_layer.weight_v"]

    torch.manual_seed(0)
    start = Ibot(VitConfig(**VIT), IbotConfig(**TRAINING)).student.class_head.last_layer.weight_v
    assert torch.equal(prototypes(2, 2), start)
    assert not torch.equal(prototypes(2, 1), start)


def test_without_small_crops(slides, tmp_path):
    train(slides, tmp_path / "vit", local_crops=0, steps=2)
    assert all(record["loss"] > 0 for record in records(tmp_path / "vit-training"))


@pytest.mark.parametrize("pooling", ["token", "avg"])
def test_folder_is_an_encoder(slides, tmp_path, pooling):
    encoder = train(slides, tmp_path / "vit", vit={"pooling": pooling, "patch_um": 150.0, "dtype": "float16"}, steps=1)
    loaded = load_encoder(str(tmp_path / "vit"), device="cpu")
    assert (loaded.dim, loaded.patch_px, loaded.patch_um) == (24, 32, 150.0)
    assert loaded.digest == encoder.digest
    assert (tmp_path / "vit" / "model.safetensors").stat().st_size < 2.2 * sum(
        p.numel() for p in loaded.module.parameters()
    ) + 4000
    patches = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    x = (torch.from_numpy(patches).permute(0, 3, 1, 2) / 255 - torch.tensor(VIT["mean"]).view(3, 1, 1)) / 0.2
    with torch.no_grad():
        tokens = loaded.module.forward_features(x)
    expected = tokens[:, 0] if pooling == "token" else tokens[:, 1:].mean(dim=1)
    np.testing.assert_allclose(loaded.encode(patches), expected.numpy(), atol=1e-5)
    written = extract_features(slides[0], loaded, tmp_path / "features.h5")
    assert written.is_file()
    # the same weights, pooled otherwise, are another encoder
    description = json.loads((tmp_path / "vit" / "config.json").read_text())
    description["model_args"] = {**description["model_args"], "global_pool": "avg", "fc_norm": False}
    if pooling == "avg":
        description["model_args"] |= {"global_pool": "token"}
    (tmp_path / "vit" / "config.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"config\.json was changed or damaged after hinge pretrain-histology wrote it"):
        load_encoder(str(tmp_path / "vit"), device="cpu")
    checksums.accept(tmp_path / "vit")  # an intended change
    assert load_encoder(str(tmp_path / "vit"), device="cpu").digest != loaded.digest


def test_a_changed_byte_of_an_encoder_is_found(slides, tmp_path):
    train(slides, tmp_path / "vit", steps=1)
    for name in ("model.safetensors", "config.json", "checksums.json"):
        path = tmp_path / "vit" / name
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        with pytest.raises(HingeError, match=rf"{name.replace('.', '[.]')} was changed or damaged"):
            load_encoder(str(tmp_path / "vit"), device="cpu")
        path.write_bytes(content)
    load_encoder(str(tmp_path / "vit"), device="cpu")


def test_what_cannot_be_pretrained(slides, tmp_path):
    with pytest.raises(ConfigError, match="timm cannot build resnet18"):
        train(slides, tmp_path / "a", vit={"architecture": "resnet18", "arguments": {}})
    with pytest.raises(ConfigError, match="no ViT with a class token"):
        train(slides, tmp_path / "a", vit={"pooling": "avg", "arguments": {**VIT["arguments"], "class_token": False}})
    with pytest.raises(ConfigError, match="local_px 20 must be a multiple"):
        train(slides, tmp_path / "b", local_px=20)
    with pytest.raises(DataError, match="all of one class"):
        train(slides, tmp_path / "c", labels=[np.zeros(slide.n_obs) for slide in slides])
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is no pre-trained encoder"):
        train(slides, tmp_path / "taken")
    assert (tmp_path / "taken" / "notes.txt").exists()


def test_expression_clusters_are_of_all_slides(slides):
    clusters = expression_clusters(slides, clusters=4)
    assert [len(labels) for labels in clusters] == [slide.n_obs for slide in slides]
    assert len(set.union(*(set(labels) for labels in clusters))) == 4
    again = expression_clusters(slides, clusters=4)
    assert all(np.array_equal(one, other) for one, other in zip(clusters, again, strict=True))


@pytest.mark.full
def test_command(tissue, tmp_path):
    settings = {
        "output": "vit",
        "data": {"path": str(tissue), "probe": ["sim0", "sim1"]},
        "vit": {**VIT, "mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2]},
        "training": {
            **{key: list(value) if isinstance(value, tuple) else value for key, value in TRAINING.items()},
            "steps": 2,
            "precision": "bf16",
            "tracker": "tensorboard",
        },
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    done = call_hinge("pretrain-histology", "--config", str(path), "seed=1")
    assert done.code == 0 and f"encoder: {tmp_path / 'vit'}" in done.out
    assert load_encoder(str(tmp_path / "vit"), device="cpu").dim == 24
    log = records(tmp_path / "vit-training")
    assert [record["step"] for record in log] == [0, 1, 2]
    assert {"knn_accuracy", "linear_accuracy", "chance"} <= log[0].keys() & log[2].keys()
    for override, says in (
        ("training.steps=0", "training.steps"),
        ("data.path=null", "give data.path"),
        ("vit.depth=3", "vit.depth: there is no such key"),
        ("training.ema_decay=0.9", "ema_decay"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_pretraining(path, [override])


@pytest.mark.parametrize("name", ["small", "vit_b16"])
def test_published_configurations_are_valid(name):
    config = load_pretraining(ROOT / "configs" / "pretrain" / f"{name}.yaml")
    assert config.training.num_steps(10_000) == config.training.steps
    with torch.device("meta"):
        from hinge.training.ibot_model import build_vit

        network = build_vit(config.vit)
    size = sum(parameter.numel() for parameter in network.parameters())
    if name == "small":
        assert 2 * size <= 12e6  # bytes in float16
    else:
        assert round(size / 1e6) == 86 and network.patch_embed.img_size == (224, 224)


@pytest.mark.full
def test_smoke_it_learns(slides, tmp_path):
    labels = [slide.obs["domain"].to_numpy(str) for slide in slides]
    vit = {**VIT, "arguments": {**VIT["arguments"], "embed_dim": 48, "depth": 3, "num_heads": 3}, "drop_path": 0.0}
    train(
        slides,
        tmp_path / "vit",
        labels,
        vit,
        steps=200,
        batch_size=32,
        learning_rate=5e-4,
        warmup_steps=20,
        teacher_momentum=0.996,
        teacher_temperature=0.04,
        outputs=128,
        hidden=128,
        bottleneck=32,
        frozen_last_layer_steps=20,
        evaluate_every=200,
        checkpoint_every=200,
        probe_spots=300,
    )
    log = records(tmp_path / "vit-training")
    losses = [record["loss"] for record in log if "loss" in record]
    assert np.mean(losses[-20:]) < 0.85 * np.mean(losses[:20])
    assert log[-1]["knn_accuracy"] >= log[0]["knn_accuracy"] + 0.02
    assert log[-1]["knn_accuracy"] > log[-1]["chance"] + 0.1


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tissue, tmp_path):
    import os
    import subprocess
    import sys

    root = ROOT
    training = {key: list(value) if isinstance(value, tuple) else value for key, value in TRAINING.items()}
    vit = {**VIT, "mean": [0.7, 0.6, 0.7], "std": [0.2, 0.2, 0.2], "drop_path": 0.0}
    settings = {"data": {"path": str(tissue)}, "vit": vit, "training": training}
    for processes in (1, 2):
        path = tmp_path / f"{processes}.yaml"
        path.write_text(yaml.safe_dump({"output": f"vit{processes}", **settings}))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        script = root / "scripts" / "pretrain_histology.py"
        done = subprocess.run(
            [*launch, script, "--config", path],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
    one, two = ([record["loss"] for record in records(tmp_path / f"vit{n}-training")] for n in (1, 2))
    np.testing.assert_allclose(two, one, rtol=1e-4)
