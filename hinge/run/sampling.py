"""The sampling stage: draws of the expression of a slide's spots."""

import contextlib
import logging
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from anndata import AnnData

from hinge.config import SamplingConfig
from hinge.data.bulk import Bulk
from hinge.data.draws import draws_of_slide, same_draws, write_draws
from hinge.data.observed import observed_digest, read_observed
from hinge.data.slide import slide_name
from hinge.diffusion import HingePipeline, SamplingSettings, SlideInputs
from hinge.diffusion.defaults import DEFAULT_BATCH_SIZE
from hinge.diffusion.evidence import log_evidence, slide_evidence
from hinge.diffusion.pipeline import PRECISIONS
from hinge.diffusion.sampler import spots_per_part
from hinge.diffusion.slide_effect import SlideEvidence
from hinge.run.paths import OUTSIDE_SUFFIX
from hinge.run.preparation import Preparation
from hinge.training.loop import make_accelerator
from hinge.utils.errors import ConfigError, DataError
from hinge.utils.files import arrays_digest
from hinge.utils.locks import lock_file
from hinge.utils.resumable import ResumableArrays, remove_leftovers
from hinge.utils.threads import release_memory

logger = logging.getLogger(__name__)


def load_pipeline(inputs: Preparation) -> HingePipeline:
    """Return the trained model and its scheduler, ready to sample, in float32.

    Raises
    ------
    DataError
        The run has not been trained, or its panel is not that of the model.
    """
    inputs.paths.require_model()
    pipeline = HingePipeline.from_pretrained(inputs.paths.folder, torch_dtype=PRECISIONS["no"])
    if pipeline.genes != inputs.panel().genes:
        raise DataError(
            f"{inputs.paths.panel} names other genes, or in another order, than the model was trained with "
            f"({inputs.paths.index}): restore it"
        )
    return pipeline


def sampling_settings(
    config: SamplingConfig,
    draws: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
) -> SamplingSettings:
    """Return how a run is sampled; what is None is as configured."""
    return SamplingSettings(
        num_draws=draws or config.draws,
        num_inference_steps=steps or config.steps,
        seed=config.seed if seed is None else seed,
        batch_size=batch_size or DEFAULT_BATCH_SIZE,
        spatially_correlated=config.spatially_correlated,
        remasking=config.remasking,
    )


def sample_slide(
    inputs: Preparation,
    slide: AnnData,
    output: Path | None = None,
    draws: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    observed: Path | None = None,
    genes: list[str] | None = None,
    allow: Collection[str] = (),
    patient: str | None = None,
    bulk: Bulk | None = None,
    bulk_sd: float | None = None,
    library_size: float | str | None = None,
    pipeline: HingePipeline | None = None,
    condition: Mapping[str, str] | None = None,
) -> Path:
    """Draw the expression of a slide's spots and return the file; see `Run.sample`."""
    config, diffusion = inputs.config.sampling, inputs.config.diffusion
    settings = sampling_settings(config, draws, steps, seed, batch_size)
    if settings.num_inference_steps > diffusion.num_train_timesteps:
        raise ConfigError(
            f"{settings.num_inference_steps} steps cannot be taken, the run has diffusion.num_train_timesteps "
            f"{diffusion.num_train_timesteps}"
        )
    name = slide_name(slide) if genes is None else f"{slide_name(slide)}{OUTSIDE_SUFFIX}"
    output = output or inputs.paths.samples(name)
    pipeline = (pipeline or load_pipeline(inputs)).to(PRECISIONS[config.precision])
    outside = None if genes is None else pipeline.outside_genes(genes)
    encoder, digest = inputs.encoder, "" if observed is None else observed_digest(observed)
    categories = pipeline.categories(slide, condition)
    given_slide = (patient, bulk, bulk_sd, library_size, pipeline.settings.shares, pipeline.tokens, categories)
    evidence, known = slide_evidence(pipeline.model, slide, pipeline.genes, *given_slide)
    about = pipeline.provenance(settings, encoder.name, encoder.digest, digest, outside.genes if outside else None)
    about = known | about
    drawn = [*pipeline.genes, *(outside.genes if outside else [])]
    if output.exists() and same_draws(output, about, slide, drawn):
        remove_leftovers(output)
        logger.info("%s is finished", output)
        return output
    inputs.check_to_sample(slide, allow)
    with lock_file(output):
        accelerator = make_accelerator(inputs.config.training)
        spots = _spots(inputs, slide, observed, evidence, accelerator, categories)
        pipeline.to(accelerator.device)
        log_evidence(pipeline.model, slide, about)
        spots = pipeline.with_slide_effect(spots)
        release_memory()  # of the image, and of what loaded the model
        unfinished = _draw(pipeline, spots, settings, about, output, accelerator)
        release_memory()
        if accelerator.is_main_process:
            values, expected = unfinished.read()
            if outside is not None:
                values, expected = outside.append(values, expected, spots.spots, settings)
            levels, novelty = spots.levels(settings), spots.novelty()
            write_draws(output, draws_of_slide(values, expected, slide, drawn, about, levels, novelty))
            unfinished.remove()
            logger.info("wrote %s (%d draws of %d spots)", output, settings.num_draws, slide.n_obs)
        accelerator.wait_for_everyone()
        return output


def _spots(
    inputs: Preparation,
    slide: AnnData,
    observed: Path | None,
    evidence: SlideEvidence,
    accelerator: Accelerator,
    categories: Mapping[str, str | None],
) -> SlideInputs:
    """Return what the draws of a slide depend on, beside the model and the settings."""
    measured = library_size = None
    if observed is not None:
        measured, library_size = read_observed(observed, slide, inputs.panel().genes, inputs.config.transform)
    with accelerator.main_process_first():
        path = inputs.features(slide)
    conditions = inputs.conditions(slide, path, categories)[:, 0]
    return SlideInputs.of_slide(slide, conditions, measured, library_size, evidence)


def _draw(
    pipeline: HingePipeline,
    spots: SlideInputs,
    settings: SamplingSettings,
    about: dict[str, Any],
    output: Path,
    accelerator: Accelerator,
) -> ResumableArrays:
    """Draw the missing parts of a slide, each process its share; a part that is written is not drawn again."""
    num_spots, num_genes = len(spots), len(pipeline.settings.genes)
    conditions = {"features": spots.features, "place": spots.positions, "names": np.array(spots.spots)}
    unfinished = ResumableArrays(
        output,
        {**about, "conditions": arrays_digest(conditions)},
        {
            "values": ((settings.num_draws, num_spots, num_genes), np.float32, 1),
            "expected": ((num_spots, num_genes), np.float32, 0),
        },
        num_spots,
        spots_per_part(settings),
    )
    if accelerator.is_main_process:
        unfinished.prepare()
    accelerator.wait_for_everyone()
    missing = unfinished.missing()
    accelerator.wait_for_everyone()  # or a quick process would finish a part before another one looks
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    parts = pipeline.draw_parts(spots, settings, [part for _, part in mine], accelerator.is_main_process)
    kept = unfinished.kept() if accelerator.num_processes == 1 else contextlib.nullcontext()
    # a part is written while the next one is drawn
    with kept, ThreadPoolExecutor(1, thread_name_prefix="writing of draws") as writer:
        written: Future[None] | None = None
        for (number, _), (part, draws) in zip(mine, parts, strict=True):
            if written is not None:
                written.result()
            written = writer.submit(unfinished.write, number, part, draws.values, draws.expected)
        if written is not None:
            written.result()
    accelerator.wait_for_everyone()
    return unfinished
