"""Reading and writing a `HingeModel`: the config and the trained weights, without the backbone."""

import hashlib
import json
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate.utils import convert_file_size_to_int
from safetensors.torch import load_file, save_file
from torch import Tensor

from hinge.backbones import ExpressionBackbone, load_backbone
from hinge.models.library_size import LibrarySizeModel
from hinge.utils import checksums, hub
from hinge.utils.errors import WeightsError, one_line
from hinge.utils.files import atomic_path
from hinge.utils.licences import check_licence, recorded_licence
from hinge.utils.weights import check_weights

if TYPE_CHECKING:
    from hinge.models.hinge import HingeModel

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
# options of diffusers that change how weights are read, but not what is read
HARMLESS_WHEN_LOADING = ("low_cpu_mem_usage", "use_safetensors", "disable_mmap")
# methods of `diffusers.ModelMixin` that a HingeModel cannot have: its frozen backbone is outside the module registry,
# which they walk through, and its attention has no other implementation
NOT_OFFERED = {
    "enable_group_offload": "move the model with .to(device)",
    "enable_layerwise_casting": "cast the model with .to(torch.bfloat16)",
    "enable_parallelism": "several processes share the work under `accelerate launch`",
    "compile_repeated_blocks": "its layers have their own kernels",
    "dequantize": "its weights are never quantized",
    **dict.fromkeys(
        (
            "set_attention_backend",
            "reset_attention_backend",
            "set_use_npu_flash_attention",
            "set_use_xla_flash_attention",
            "set_use_memory_efficient_attention_xformers",
        ),
        "its attention is that of its backbone",
    ),
}
# names of version 0.1
RENAMED_OPTIONS = {"gene_path": "gene_factors", "depth": "library_size"}
RENAMED_TENSORS = {"path.": "gene_factor_model.", "depth_path.": "library_size_model."}


def refused(verb: str, reason: str) -> Callable[..., NoReturn]:
    """Return a method that raises one sentence instead of what `diffusers.ModelMixin` does."""

    def method(self, *arguments, **options):
        raise NotImplementedError(f"HingeModel.{verb} is not offered: {reason}")

    return method


def refuse_options(method: str, options: dict[str, Any], harmless: Collection[str] = ()) -> None:
    """Raise for an option that is neither in `harmless` nor left at None or False.

    Raises
    ------
    ValueError
        It names the method and the option.
    """
    if options.get("use_safetensors") is False:
        raise ValueError(f"HingeModel.{method} reads safetensors only: leave use_safetensors at True")
    for name, value in options.items():
        if name not in harmless and value is not None and value is not False:
            raise ValueError(f"HingeModel.{method} does not take {name}={value!r}")


def save(model: "HingeModel", folder: str | Path, max_shard_size: int | str = "10GB") -> None:
    """Write config and trained weights into a folder, which appears only when it is complete."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.trained_state().items()}
    size = sum(tensor.nbytes for tensor in weights.values())
    if size > convert_file_size_to_int(max_shard_size):
        raise ValueError(f"the weights are one file of {size:,} bytes, more than max_shard_size {max_shard_size}")
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        model.save_config(temporary)
        save_file(weights, temporary / WEIGHTS_NAME, metadata={"format": "pt"})


def _push(model: "HingeModel", repository: str, private: bool, with_backbone: bool, allow_licence: bool) -> str:
    """Upload what `save` writes, and the backbone if wanted; see `HingeModel.push_to_hub`."""
    if with_backbone or model.config.tuning != "frozen":
        check_licence("the model", recorded_licence(model.backbone.config.to_dict()), allow_licence)

    def write(folder: Path) -> None:
        save(model, folder)
        if with_backbone:
            model.backbone.save_pretrained(folder / "backbone")

    return hub.upload_saved(write, repository, private)


def save_pretrained(
    self: "HingeModel",
    save_directory: str | Path,
    is_main_process: bool = True,
    safe_serialization: bool = True,
    max_shard_size: int | str = "10GB",
    push_to_hub: bool = False,
    repo_id: str | None = None,
    private: bool = True,
    allow_licence: bool = False,
    **options: Any,
) -> None:
    """Write what was trained, one safetensors file, and the config with the backbone's digest; not the backbone.

    The arguments are those of diffusers; a ValueError names one that is not supported.
    """
    if not safe_serialization:
        raise ValueError("HingeModel.save_pretrained writes safetensors only: leave safe_serialization at True")
    refuse_options("save_pretrained", options)
    if push_to_hub and repo_id is None:
        raise ValueError("push_to_hub=True needs repo_id='owner/name'")
    if is_main_process:
        save(self, save_directory, max_shard_size)
        if push_to_hub and repo_id is not None:
            self.push_to_hub(repo_id, private, allow_licence=allow_licence)


def push_to_hub(
    self: "HingeModel", repo_id: str, private: bool = True, with_backbone: bool = False, allow_licence: bool = False
) -> str:
    """Upload what `save_pretrained` writes to `owner/name` on the Hugging Face Hub and return the address.

    `with_backbone` uploads the backbone too. If its licence forbids sharing the uploaded weights, a ConfigError is
    raised unless `allow_licence` states that its authors gave permission.
    """
    return _push(self, repo_id, private, with_backbone, allow_licence)


def _with_new_names(config: dict[str, Any], weights: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and weights with the names of this version, and warn where those of version 0.1 were found."""
    old = [name for name in RENAMED_OPTIONS if name in config]
    config = {RENAMED_OPTIONS.get(name, name): value for name, value in config.items()}
    config.pop("feature_noise", None)  # had an effect in training only
    prefixes = tuple(RENAMED_TENSORS)
    old += [prefix for prefix in prefixes if any(name.startswith(prefix) for name in weights)]
    for prefix, new in RENAMED_TENSORS.items():
        weights = {
            new + name.removeprefix(prefix) if name.startswith(prefix) else name: tensor
            for name, tensor in weights.items()
        }
    if old:
        new_names = RENAMED_OPTIONS | RENAMED_TENSORS
        pairs = ", ".join(f"{name.rstrip('.')} is now {new_names[name].rstrip('.')}" for name in old)
        warnings.warn(
            f"this model was saved by hinge 0.1 ({pairs}); save it again, the next version will not read it",
            DeprecationWarning,
            stacklevel=4,
        )
    return config, weights


def _with_genes_of_slides(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights whose prior of slide levels says which slides have each gene, and has a place for tokens.

    Before, all slides had all genes, there were no tokens, and the variance of counting was not told apart.
    """
    prefix = "slide_prior."
    sections, population = weights.get(f"{prefix}patient_sections"), weights.get(f"{prefix}population")
    if sections is None or population is None:
        return weights
    if sections.ndim == 1:
        sections = sections[:, None].repeat(1, len(population) + 1)
    return {
        f"{prefix}measured_share": torch.ones_like(population),
        f"{prefix}training_counting": torch.zeros_like(population),
        f"{prefix}token_effects": population.new_zeros(0, len(population) + 1),
        f"{prefix}token_shares": population.new_zeros(0),
        **weights,
        f"{prefix}patient_sections": sections,
    }


def _with_library_sizes(weights: dict[str, Tensor], num_genes: int) -> dict[str, Tensor]:
    """Return weights whose library sizes have normally distributed residuals and change no value, as all had before."""
    prefix = "library_size_model."
    if f"{prefix}scale" not in weights:
        return weights
    names = ("quantile_excess", "expected_change", "location_excess")
    usual = LibrarySizeModel(1, num_genes).state_dict()
    return {f"{prefix}{name}": usual[name] for name in names} | weights


def load(cls: type["HingeModel"], folder: str | Path, backbone: ExpressionBackbone | None = None) -> "HingeModel":
    """Return the model that `save` wrote; arguments and errors as those of `HingeModel.from_pretrained`."""
    folder = checksums.verified(hub.find(folder, "model"))
    try:
        config = json.loads((folder / cls.config_name).read_text())
        weights = load_file(folder / WEIGHTS_NAME)
    except FileNotFoundError as error:
        missing = Path(error.filename or "").name
        raise WeightsError(f"{folder} holds no hinge model: {missing} is missing") from error
    except Exception as error:
        raise WeightsError(f"the hinge model in {folder} is damaged: {error}") from error
    if backbone is None:
        beside = next((each / "backbone" for each in (folder, folder.parent) if (each / "backbone").is_dir()), None)
        if beside is None:
            raise WeightsError(f"there is no backbone beside the model in {folder}; give the one it was trained on")
        backbone = load_backbone(beside)
    try:
        config, weights = _with_new_names(config, weights)
        weights = _with_library_sizes(_with_genes_of_slides(weights), config["num_genes"])
        panel = config.pop("panel_digest", None)
        model = _build(cls, config, sum(tensor.numel() for tensor in weights.values()))
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, OverflowError, OSError) as error:
        raise WeightsError(f"{folder / cls.config_name} describes no hinge model: {one_line(error)}") from error
    model.register_to_config(panel_digest=panel)
    model = model.attach_backbone(backbone, check=True)
    try:
        unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:
        raise WeightsError(f"the weights in {folder} do not fit its config.json: {error}") from error
    check_weights(weights, folder / WEIGHTS_NAME, model.state_dict())
    wrong = sorted(unexpected) or sorted(model.trained_state().keys() - weights.keys())
    if wrong:
        what = "have one that the model has not" if unexpected else "lack one"
        raise WeightsError(f"the weights in {folder} do not fit its config.json: they {what}, {wrong[0]}")
    return model


def genes_digest(genes: Sequence[str]) -> str:
    """Return the SHA-256 of a panel, the genes in their order: `panel_digest` in the config of a model."""
    return hashlib.sha256("\n".join(genes).encode()).hexdigest()


def _build(cls: type["HingeModel"], config: dict[str, Any], stored: int) -> "HingeModel":
    """Return the model of a config that may be damaged, if it is not larger than the number of stored weights."""
    if not isinstance(config.get("backbone_digest"), str | None):
        raise ValueError("its backbone_digest is no text")
    if config.get("num_layers", 0) > stored:
        raise ValueError(f"it announces {config['num_layers']:,} layers")
    # without storage first: a damaged config announces any size
    with torch.device("meta"):
        announced = sum(tensor.numel() for tensor in cls.from_config(config).state_dict().values())
    if announced > stored:
        raise ValueError(f"it is that of {announced:,} weights, and there are {stored:,}")
    return cls.from_config(config)
