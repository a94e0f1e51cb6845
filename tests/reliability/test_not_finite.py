"""A NaN in any file of weights that a command loads is refused: the network and its numbers, tensor by tensor."""

import shutil
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import timm
import torch
from helpers.backbones import published_folder
from safetensors.torch import load_file, save_file

from hinge.backbones import CellFMConfig, CellFMModel
from hinge.backbones.published_cellfm import export_cellfm
from hinge.diffusion.gaussian import Denoiser, NoiseSchedule
from hinge.encoders import load_encoder
from hinge.models import HingeModel
from hinge.sharing.convert import convert_cellfm, convert_hinge, convert_transformer
from hinge.sharing.released_hinge import RELEASED_MODEL, write_hinge
from hinge.tasks.regressor import GeneRegressor, load_regressor
from hinge.utils.errors import WeightsError
from hinge.utils.files import write_json

pytestmark = pytest.mark.full

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def damaged(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors with a NaN, then with an infinity, in each of those that are floating-point."""
    for name, tensor in tensors.items():
        for bad in (float("nan"), float("-inf")) if tensor.is_floating_point() and tensor.numel() else ():
            changed = tensor.clone()
            changed.view(-1)[tensor.numel() // 2] = bad
            yield {**tensors, name: changed}


def refuses(read: Callable[[], object], save: Callable[[dict], None], tensors: dict[str, torch.Tensor]) -> None:
    """Check that what can be read is refused with each damage, and that the message says why."""
    save(tensors)
    read()
    tried = 0
    for changed in damaged(tensors):
        save(changed)
        with pytest.raises(WeightsError, match="not finite"):
            read()
        tried += 1
    assert tried >= 2


@pytest.mark.parametrize("kind", ["NAME@FILE.safetensors", "NAME@FILE.pth", "folder"])
def test_an_encoder(tmp_path, kind):
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    file = tmp_path / ("weights.pth" if kind.endswith("pth") else "model.safetensors")
    if kind == "folder":
        size = {"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
        content = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": size}
        write_json(tmp_path / "config.json", content)
    save = (lambda tensors: torch.save(tensors, file)) if file.suffix == ".pth" else lambda t: save_file(t, file)
    name = str(tmp_path) if kind == "folder" else f"test_vit@{file}"
    refuses(lambda: load_encoder(name, device="cpu"), save, network.state_dict())


def small_model(head: str = "point", **options) -> HingeModel:
    torch.manual_seed(0)
    backbone = CellFMModel(CellFMConfig(num_genes=4, num_value_bins=8, **SIZE))
    return HingeModel.from_backbone(backbone, 3, 4, head=head, start="random", **options).eval()


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", Denoiser.WEIGHTS_NAME])
def test_a_denoiser(tmp_path, file):
    model = small_model()
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    Denoiser(model, NoiseSchedule("flow-matching"), torch.arange(1, 5), values).save_pretrained(tmp_path / "denoiser")
    path = tmp_path / "denoiser" / file
    about = {"schedule": "flow-matching"} if file == Denoiser.WEIGHTS_NAME else {"format": "pt"}
    refuses(
        lambda: Denoiser.from_pretrained(path.parent, model.backbone),
        lambda tensors: save_file(tensors, path, metadata=about),
        load_file(path),
    )


def test_a_head_of_finetuning(tmp_path):
    head = GeneRegressor(load_encoder("stain-texture", device="cpu"), 3).head()
    write_json(tmp_path / "model.json", {"encoder": "stain-texture", "genes": ["a", "b", "c"], "tune": "linear"})
    refuses(
        lambda: load_regressor(tmp_path, "cpu"),
        lambda tensors: save_file(tensors, tmp_path / "head.safetensors"),
        {name: tensor.detach().contiguous() for name, tensor in head.items()},
    )


def test_what_is_converted(tmp_path):
    """A conversion that is refused leaves nothing, and does not exit with numbers that are not finite."""
    out = tmp_path / "out"

    def fresh(convert: Callable[[], object]) -> Callable[[], None]:
        def once() -> None:
            convert()
            shutil.rmtree(out)

        return once

    model = small_model(transform=None, **{k: v for k, v in RELEASED_MODEL.items() if k not in ("head", "start")})
    published, authors = tmp_path / "cellfm.pth", tmp_path / "authors.pth"
    state = {name: tensor.detach().clone() for name, tensor in export_cellfm(model.backbone).items()}
    refuses(
        fresh(lambda: convert_cellfm(published, out, num_attention_heads=2)),
        lambda tensors: torch.save(tensors, published),
        state,
    )
    write_hinge(model, torch.arange(1, 5), authors)
    state = torch.load(authors, weights_only=True)["model"]
    refuses(
        fresh(lambda: convert_hinge(authors, out, num_attention_heads=2, gate="linear")),
        lambda tensors: torch.save({"model": tensors}, authors),
        state,
    )
    assert not out.exists()


@pytest.mark.parametrize("kind", ["scgpt", "tahoe"])
def test_published_transformers(backbones, tmp_path, kind):
    folder = published_folder(backbones / f"{kind}_generative.safetensors", tmp_path / "published")
    path = next(file for file in folder.iterdir() if file.suffix in (".pt", ".safetensors"))
    whole = torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)
    used = {name: tensor for name, tensor in whole.items() if tensor.is_floating_point()}

    def save(tensors: dict) -> None:
        torch.save({**whole, **tensors}, path) if path.suffix == ".pt" else save_file({**whole, **tensors}, path)

    def read() -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        convert_transformer(kind, folder, tmp_path / "out")

    refuses(read, save, used)
