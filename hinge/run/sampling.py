"""The sampling stage: draws of the expression of a slide's spots."""

import contextlib
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from anndata import AnnData
from tqdm import tqdm

from hinge.data.draws import same_draws, write_draws
from hinge.data.neighbourhood import spot_positions
from hinge.data.observed import read_observed
from hinge.data.slide import slide_name
from hinge.diffusion import HingePipeline, MaskedDiffusionScheduler
from hinge.models import HingeModel
from hinge.run.preparation import Preparation
from hinge.training.loop import make_accelerator
from hinge.utils.errors import ConfigError, DataError, WeightsError, one_line
from hinge.utils.files import arrays_digest, file_digest, read_json
from hinge.utils.locks import lock_file
from hinge.utils.memory import with_less_memory
from hinge.utils.resumable import ResumableArrays

logger = logging.getLogger(__name__)

# batches in a part of a slide's draws: what is drawn again if sampling is killed
BATCHES_IN_A_PART = 8


def load_pipeline(inputs: Preparation) -> HingePipeline:
    """Return the trained model and its scheduler, ready to sample.

    Raises
    ------
    DataError
        The run has not been trained.
    """
    folder = inputs.paths.model
    if not inputs.paths.has_model:
        raise DataError(f"{inputs.paths.folder} holds no trained model; run hinge train first")
    path = folder / "scheduler_config.json"
    try:
        scheduler = MaskedDiffusionScheduler.from_config(read_json(path))
    except (TypeError, ValueError, AttributeError, OSError) as error:
        raise WeightsError(f"{path} describes no scheduler: {one_line(error)}") from error
    backbone = inputs.backbone()
    model = HingeModel.from_pretrained(folder, backbone)
    backbone.float()  # draws are made in float32, whatever the weights are stored in
    return HingePipeline(model, scheduler)


@dataclass
class _Conditions:
    """What the draws of a slide depend on, beside the model and the settings."""

    spots: list[str]
    features: np.ndarray
    positions: np.ndarray | None
    measured: np.ndarray | None
    library_size: np.ndarray | None
    digest: str


def sample_slide(
    inputs: Preparation,
    slide: AnnData,
    output: Path | None = None,
    draws: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    observed: Path | None = None,
) -> Path:
    """Draw the expression of a slide's spots and return the file; see `Run.sample`."""
    settings, diffusion = inputs.config.sampling, inputs.config.diffusion
    draws, steps = draws or settings.draws, steps or settings.steps
    if steps > diffusion.num_train_timesteps:
        raise ConfigError(
            f"{steps} steps cannot be taken, the run has diffusion.num_train_timesteps {diffusion.num_train_timesteps}"
        )
    seed = settings.seed if seed is None else seed
    output = output or inputs.paths.samples(slide_name(slide))
    pipeline = load_pipeline(inputs)
    about = _provenance(inputs, pipeline, draws=draws, steps=steps, seed=seed, observed=observed)
    if output.exists() and same_draws(output, about, slide):
        logger.info("%s is finished", output)
        return output
    with lock_file(output):
        accelerator = make_accelerator(inputs.config.training)
        conditions = _conditions(inputs, slide, observed, accelerator)
        unfinished = _draw(
            inputs,
            pipeline,
            slide_name(slide),
            conditions,
            about,
            output,
            batch_size or settings.batch_size,
            accelerator,
        )
        if accelerator.is_main_process:
            values, expected = unfinished.read()
            write_draws(output, values, expected, slide, inputs.panel().genes, about)
            unfinished.remove()
            logger.info("wrote %s (%d draws of %d spots)", output, draws, slide.n_obs)
        accelerator.wait_for_everyone()
        return output


def _provenance(
    inputs: Preparation, pipeline: HingePipeline, draws: int, steps: int, seed: int, observed: Path | None
) -> dict[str, Any]:
    """Return everything that the draws of a slide depend on, as they are stored with them."""
    settings = inputs.config.sampling
    return {
        "transform": inputs.config.transform,
        "seed": seed,
        "draws": draws,
        "steps": steps,
        "observed": "" if observed is None else file_digest(observed),
        **{key: getattr(settings, key) for key in ("spatially_correlated", "remasking", "precision")},
        "order": "random",
        "temperature": 1.0,
        "model_digest": pipeline.model.digest(),
        "backbone_digest": pipeline.model.config.backbone_digest,
        "encoder": inputs.encoder.name,
        "encoder_digest": inputs.encoder.digest,
    }


def _conditions(inputs: Preparation, slide: AnnData, observed: Path | None, accelerator: Accelerator) -> _Conditions:
    config, name = inputs.config, slide_name(slide)
    measured = library_size = None
    if observed is not None:
        measured, library_size = read_observed(observed, slide, inputs.panel().genes, config.transform)
    with accelerator.main_process_first():
        path = inputs.features(slide)
    features = inputs.conditions(slide, path)[:, 0]
    spots = [f"{name}/{barcode}" for barcode in slide.obs_names]
    return _Conditions(
        spots,
        features,
        spot_positions(slide.obsm["spatial"]) if config.sampling.spatially_correlated else None,
        measured,
        library_size,
        arrays_digest({"features": features, "place": slide.obsm["spatial"], "names": np.array(spots)}),
    )


def _draw(
    inputs: Preparation,
    pipeline: HingePipeline,
    name: str,
    conditions: _Conditions,
    about: dict[str, Any],
    output: Path,
    batch_size: int,
    accelerator: Accelerator,
) -> ResumableArrays:
    """Draw the missing parts of a slide, each process its share; a part that is written is not drawn again."""
    settings, num_genes = inputs.config.sampling, len(inputs.panel().genes)
    gene_ids = inputs.gene_ids(pipeline.model.backbone)
    if settings.precision == "bf16":
        pipeline.model.backbone.to(torch.bfloat16)
    pipeline.model.to(accelerator.device)
    given, effect = conditions, None
    if given.measured is not None and settings.spatially_correlated:
        effect = pipeline.slide_effect(given.features, given.measured, given.library_size)
    draws, num_spots = about["draws"], len(given.spots)
    unfinished = ResumableArrays(
        output,
        {**about, "conditions": given.digest},
        {
            "values": ((draws, num_spots, num_genes), np.float32, 1),
            "expected": ((num_spots, num_genes), np.float32, 0),
        },
        num_spots,
        max(1, BATCHES_IN_A_PART * batch_size // draws),
    )
    if accelerator.is_main_process:
        unfinished.prepare()
    accelerator.wait_for_everyone()
    missing = unfinished.missing()
    accelerator.wait_for_everyone()  # or a quick process would finish a part before another one looks
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    silent = None if accelerator.is_main_process else True
    bar = tqdm(total=sum(part.stop - part.start for _, part in mine), unit="spot", disable=silent)
    with bar, unfinished.kept() if accelerator.num_processes == 1 else contextlib.nullcontext():
        for number, part in mine:
            draw = partial(
                pipeline,
                given.features[part],
                gene_ids,
                given.spots[part],
                num_draws=draws,
                num_inference_steps=about["steps"],
                seed=about["seed"],
                slide=None if given.positions is None else name,
                positions=None if given.positions is None else given.positions[part],
                observed=None if given.measured is None else given.measured[part],
                library_size=None if given.library_size is None else given.library_size[part],
                slide_effect=effect,
                remasking=settings.remasking,
                progress=False,
            )
            result, batch_size = with_less_memory(batch_size, lambda size, draw=draw: draw(batch_size=size))
            unfinished.write(number, part, result.values, result.expected)
            bar.update(part.stop - part.start)
    accelerator.wait_for_everyone()
    return unfinished
