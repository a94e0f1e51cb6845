"""Sampling: a slide's features in, several draws of every spot's expression out."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from scipy.special import ndtri
from torch import Tensor
from tqdm import tqdm

from hinge.diffusion.randomness import NUM_FREQUENCIES, SlideNoise, spot_normals, spot_uniforms
from hinge.diffusion.scheduler import MaskedDiffusionScheduler
from hinge.models.hinge import HingeModel
from hinge.models.subset import GeneSubset
from hinge.utils.errors import DataError

# float64 numbers of a slide's noise, which every batch needs again: half a gigabyte
MOST_NUMBERS_KEPT = 1 << 26

ORDERS = ("random", "dependence", "confidence")


@dataclass
class Draws:
    """Draws of some spots.

    Attributes
    ----------
    values
        (K, n, G) float32, one slice a draw.
    expected
        (n, G) float32: the value head's mean in the first pass, in which only observed genes are visible. It is
        E[expression | features], without the Monte-Carlo error of a mean of draws.
    """

    values: np.ndarray
    expected: np.ndarray


class HingePipeline(DiffusionPipeline):
    """A denoiser and a scheduler that sample together.

    Parameters
    ----------
    model
        With its backbone attached.
    scheduler
        As used in training.
    """

    def __init__(self, model: HingeModel, scheduler: MaskedDiffusionScheduler):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)

    @torch.inference_mode()
    def __call__(
        self,
        features: Tensor | np.ndarray,
        gene_ids: Tensor,
        spots: list[str],
        num_draws: int = 20,
        num_inference_steps: int = 20,
        seed: int = 0,
        batch_size: int = 256,
        first_draw: int = 0,
        slide: str | None = None,
        positions: np.ndarray | None = None,
        observed: np.ndarray | None = None,
        library_size: np.ndarray | None = None,
        slide_effect: tuple[np.ndarray, np.ndarray] | None = None,
        order: str = "random",
        remasking: int = 0,
        remasking_share: float = 0.1,
        temperature: float = 1.0,
        progress: bool = True,
    ) -> Draws:
        """Draw expression profiles.

        Parameters
        ----------
        features
            (n, d) features of the unaugmented patch of each spot.
        gene_ids
            (G,) vocabulary ids of the panel.
        spots
            Names of the n spots; with `seed` and the number of the draw they fix the randomness.
        num_draws
            K.
        num_inference_steps
            Reverse steps, at most the scheduler's T.
        seed
            Any integer.
        batch_size
            Spot-draws in one forward pass; it does not change the result beyond rounding.
        first_draw
            Number of the first draw, to add draws to earlier ones.
        slide, positions
            Name of the slide the spots are on, and where (n, 2), in units of the spot pitch. With them the spots of
            a draw agree: one order of revealing, one slide shift, and noise that is smooth over the slide as far as
            that of training slides was. Without, every spot is drawn as if it were alone.
        observed
            (n, G) measured values in the model's units, NaN where nothing was measured. They pass through to the
            bit and condition the rest.
        library_size
            (n,) counts over all genes, NaN where not known. What a model that takes a library size is not told, it draws.
        slide_effect
            Mean and root as `slide_effect()` gives them, where `features` are only some of the slide's spots; None:
            from these spots, if any value is observed.
        order
            In which order genes are revealed: `"random"`; `"dependence"`, those first that tell most about the rest
            by the model's factors; `"confidence"`, those first whose value is least uncertain.
        remasking, remasking_share
            Passes at the end that each mask a random share of the drawn genes again and draw them anew given all
            others.
        temperature
            What the normal numbers behind the values are multiplied with; 1 is the model's own spread.
        progress
            Show a bar over spot-draws (only in a terminal).

        Returns
        -------
        Draws
            In the units the model was trained in.

        Raises
        ------
        ValueError
            An order that does not exist.
        DataError
            Observed values of another shape, or infinite.
        """
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}")
        if (slide is None) != (positions is None):
            raise ValueError("a slide's name and its spots' positions come together")
        features = torch.as_tensor(np.asarray(features), dtype=torch.float32, device=self.model.feature_mean.device)
        gene_ids = gene_ids.to(features.device)
        num_spots, num_genes = len(features), len(gene_ids)
        if observed is not None:
            observed = np.asarray(observed, dtype=np.float32)
            if observed.shape != (num_spots, num_genes) or np.isinf(observed).any():
                raise DataError(
                    f"observed values must be finite or NaN and of shape {(num_spots, num_genes)}, "
                    f"these are of shape {observed.shape}"
                )
            if slide_effect is None and slide is not None:
                slide_effect = self.slide_effect(features, observed, library_size)
        noise = _Noise(self.model, seed, spots, slide, positions, num_genes, num_inference_steps, slide_effect)
        fixed_order = self._order(order, num_genes)
        values = np.zeros((num_draws, num_spots, num_genes), dtype=np.float32)
        expected = np.zeros((num_spots, num_genes))
        bar = tqdm(total=num_spots * num_draws, desc="draws", unit="draw", disable=None if progress else True)
        with bar:
            for spot_index, draw_index in _batches(num_spots, num_draws, batch_size):
                drawn, means = self._draw(
                    features,
                    gene_ids,
                    noise,
                    spot_index,
                    first_draw + draw_index,
                    observed,
                    library_size,
                    num_inference_steps,
                    order,
                    fixed_order,
                    (remasking, remasking_share, temperature),
                )
                values[draw_index, spot_index] = drawn
                np.add.at(expected, spot_index, means / num_draws)
                bar.update(len(spot_index))
        return Draws(values, expected.astype(np.float32))

    @torch.inference_mode()
    def slide_effect(
        self, features: Tensor | np.ndarray, observed: np.ndarray, library_size: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """What measured values say of their slide's shift U·a: the posterior of a, a standard normal before.

        The mean over spots of a measured gene's residuals is (U·a) of that gene plus noise with the covariance that
        factors and genes have within a slide, divided by the number of spots.

        Parameters
        ----------
        features
            (n, d) of all spots of one slide.
        observed
            (n, G) measured values, NaN where nothing was measured.
        library_size
            (n,) counts over all genes, NaN where not known.

        Returns
        -------
        tuple
            Mean (R,) and root (R, R) of the covariance; None without a gene path or without measured values.
        """
        model, path = self.model, self.model.gene_factor_model
        genes = np.flatnonzero(~np.isnan(observed).all(axis=0))
        if path is None or len(genes) == 0:
            return None
        device = model.feature_mean.device
        condition = model.standardise(torch.as_tensor(np.asarray(features), dtype=torch.float32, device=device))
        if model.library_size_model is not None:
            known = model.library_size_model.typical(condition)
            if library_size is not None:
                given = torch.as_tensor(np.asarray(library_size), dtype=torch.float32, device=device)
                known = torch.where(given.isnan(), known, given)
            condition = model.with_library_size(condition, known)
        located = (path.offset + path.mean(condition)).double().cpu().numpy()
        residual = (observed - located)[:, genes]
        measured = ~np.isnan(residual)
        # each gene in whichever spots it was measured; of two genes, the spots that have both are in both means
        weights = measured / measured.sum(axis=0)
        loadings = path.loadings.double().cpu().numpy()[genes]
        within = loadings @ loadings.T + np.diag(path.log_noise.double().exp().cpu().numpy()[genes])
        covariance = within * (weights.T @ weights)
        slide_loadings = path.slide_loadings.double().cpu().numpy()[genes]
        solved = np.linalg.solve(covariance, slide_loadings)
        posterior = np.linalg.inv(np.eye(slide_loadings.shape[1]) + slide_loadings.T @ solved)
        mean = posterior @ (solved.T @ np.nansum(weights * np.nan_to_num(residual), axis=0))
        return mean, np.linalg.cholesky(posterior)

    def _order(self, order: str, num_genes: int) -> np.ndarray | None:
        """Numbers (G,) in (0, 1) by which genes are revealed, the smallest first; None where spots or draws differ.

        By dependence: greedily the gene that leaves least variance in all others under the factor model (pivots of
        a Cholesky decomposition of ΛΛᵀ + Ψ by explained variance).
        """
        path = self.model.gene_factor_model
        if order != "dependence" or path is None:
            return None
        loadings = path.loadings.double().cpu().numpy()
        covariance = loadings @ loadings.T + np.diag(path.log_noise.double().exp().cpu().numpy())
        rank = np.zeros(num_genes)
        left = np.ones(num_genes, dtype=bool)
        for place in range(num_genes):
            explained = (covariance**2).sum(axis=0) / np.maximum(np.diag(covariance), 1e-12)
            gene = int(np.where(left, explained, -np.inf).argmax())
            rank[gene], left[gene] = place, False
            column = covariance[:, gene].copy()
            covariance -= np.outer(column, column) / max(column[gene], 1e-12)
        return (rank + 0.5) / num_genes

    def _draw(
        self,
        features,
        gene_ids,
        noise,
        spot_index,
        draw_index,
        observed,
        library_size,
        num_steps,
        order,
        fixed_order,
        options,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Values and first-pass means (B, G) of spot-draws."""
        remasking, remasking_share, temperature = options
        scheduler, model = self.scheduler, self.model
        device, num_genes = features.device, len(gene_ids)
        scheduler.set_timesteps(num_steps)
        total = scheduler.config.num_train_timesteps
        numbers = noise.of(spot_index, draw_index)

        def tensor(array: np.ndarray, dtype=torch.float32) -> Tensor:
            return torch.tensor(np.asarray(array), device=device, dtype=dtype)

        _, first, row_of = np.unique(spot_index, return_index=True, return_inverse=True)
        first_row = torch.from_numpy(first).to(device)
        standardised = model.standardise(features[tensor(spot_index, torch.int64)])
        order_numbers = numbers.order if fixed_order is None else np.broadcast_to(fixed_order, numbers.order.shape)
        fill, shift = tensor(numbers.fill), tensor(numbers.shift)
        typical_shift = None if noise.typical_shift is None else tensor(noise.typical_shift)
        values = torch.zeros(len(spot_index), num_genes, device=device)
        known = torch.zeros_like(values)
        if observed is not None:
            measured = observed[spot_index]
            known = tensor(~np.isnan(measured))
            values = tensor(np.nan_to_num(measured))
            # measured genes come first in the order: the schedule then counts them as revealed
            order_numbers = np.where(np.isnan(measured), order_numbers, order_numbers * 1e-9)
        rank = tensor(order_numbers, torch.float64)
        library_sizes = typical_library_size = None
        typical = standardised
        if model.library_size_model is not None:
            library_sizes = model.library_size_model(
                standardised, tensor(numbers.library_size), tensor(numbers.slide_library_size)
            )
            typical_library_size = model.library_size_model.typical(standardised)
            if library_size is not None:
                known_library_size = tensor(np.asarray(library_size)[spot_index])
                library_sizes = torch.where(known_library_size.isnan(), library_sizes, known_library_size)
                typical_library_size = torch.where(known_library_size.isnan(), typical_library_size, known_library_size)
            typical = model.with_library_size(standardised, typical_library_size)
            standardised = model.with_library_size(standardised, library_sizes)

        # the latest timestep at which no more genes are visible than a spot has measured
        kept = num_genes - scheduler.num_masked(np.arange(total + 1), num_genes)
        latest = torch.from_numpy(total - np.searchsorted(kept[::-1], known.sum(1).cpu().numpy(), side="right") + 1)
        latest = latest.clamp(1, total)

        def run(visible, timestep, next_visible, rows=slice(None), condition=standardised, subset=None) -> Tensor:
            """Tokens (B, P + n, D) of some rows."""
            inputs = (scheduler.fill_masked(values, visible, fill), visible, timestep.to(device), condition)
            return model.tokens(
                *(part[rows] for part in inputs), gene_ids, next_visible=next_visible[rows], subset=subset
            )

        def needed(next_visible: Tensor) -> GeneSubset | None:
            return GeneSubset.of(next_visible) if model.drops_masked else None

        def head(h: Tensor, visible: Tensor, subset: GeneSubset | None):
            filled = scheduler.fill_masked(values, visible, fill)
            return model.read_out(h, filled, visible, standardised, shift, library_sizes, subset)

        def expectation(h: Tensor, rows: Tensor):
            """The head's output for some rows, in the middle of what their slide's shift and library size may be."""
            output, _ = model.read_out(
                h,
                scheduler.fill_masked(values, visible, fill)[rows],
                visible[rows],
                typical[rows],
                typical_shift,
                None if typical_library_size is None else typical_library_size[rows],
            )
            return output

        def sample(h: Tensor, visible: Tensor, numbers: _Numbers, number: int, subset: GeneSubset | None) -> Tensor:
            """Values (B, G) that genes with tokens would take if they were revealed together in this step."""
            output, left = head(h, visible, subset)
            normal = tensor(numbers.value)
            if left is not None:
                normal = model.gene_factor_model.innovation(left, tensor(numbers.factors[:, number]), normal)
            uniform = torch.special.ndtr(normal.double() * temperature).clamp(1e-12, 1 - 1e-12)
            return output.icdf(uniform).float()

        visible = known
        means = None
        # nothing that differs between a spot's draws enters the first pass, but for noise in place of masked values
        # and, where the condition looks ahead, what the coming step reveals
        shared = scheduler.config.fill != "noise" and model.config.condition_on_visible != "next"
        for number, timestep in enumerate(scheduler.timesteps.tolist()):
            subset = None
            end = torch.full((len(values),), scheduler.previous_timestep(timestep), dtype=torch.int64)
            at = torch.minimum(torch.full_like(latest, timestep), latest)
            if means is None:
                rows = first_row if shared else torch.arange(len(values), device=device)
                h = run(visible, at, torch.maximum(visible, scheduler.visible_at(end, rank)), rows, typical)
                means = torch.where(known[rows] > 0, values[rows], expectation(h, rows).mean.float())
                if shared:
                    back = torch.from_numpy(row_of).to(device)
                    h, means = h[back], means[back]
                # the first pass of the draws is not that of the expectation where each has a library size of its own; whether
                # it has tokens of all genes must not depend on which spots are in the batch
                if library_sizes is not None and (
                    model.drops_masked or not torch.equal(library_sizes, typical_library_size)
                ):
                    coming = torch.maximum(visible, scheduler.visible_at(end, rank))
                    subset = None if order == "confidence" else needed(coming)
                    h = run(visible, at, coming, subset=subset)
                if order == "confidence":
                    spread = head(h, visible, None)[0].stddev
                    rank = torch.where(known > 0, rank, (spread.argsort(1).argsort(1) + 0.5).double() / num_genes)
                next_visible = torch.maximum(visible, scheduler.visible_at(end, rank))
            else:
                next_visible = torch.maximum(visible, scheduler.visible_at(end, rank))
                if torch.equal(next_visible, visible):
                    continue
                subset = needed(next_visible)
                h = run(visible, at, next_visible, subset=subset)
            drawn = sample(h, visible, numbers, number, subset)
            values = torch.where((next_visible - visible) > 0, drawn, values)
            visible = next_visible
        for number in range(remasking):
            again = tensor(noise.correction(spot_index, draw_index, number) < remasking_share) * (1 - known)
            visible = 1 - again
            share = again.mean(1).cpu().numpy()
            at = torch.from_numpy(np.searchsorted(scheduler.masked_share(np.arange(total + 1), num_genes), share))
            h = run(visible, at.clamp(1, total), torch.ones_like(visible))
            fresh = noise.of(spot_index, draw_index, number + 1)
            drawn = sample(h, visible, fresh, 0, None)
            values = torch.where(again > 0, drawn, values)
        return values.cpu().numpy(), means.cpu().numpy()


@dataclass
class _Numbers:
    """Random numbers of spot-draws (B, …), see `hinge.diffusion.randomness`; all standard normal but `order` and `shift`."""

    order: np.ndarray
    value: np.ndarray
    factors: np.ndarray
    fill: np.ndarray
    shift: np.ndarray
    library_size: np.ndarray
    slide_library_size: np.ndarray


class _Noise:
    """Makes the numbers of any spot-draws of one call."""

    def __init__(self, model: HingeModel, seed, spots, slide, positions, num_genes, num_steps, slide_effect=None):
        self.seed, self.spots, self.slide, self.num_genes, self.num_steps = seed, spots, slide, num_genes, num_steps
        self.positions = None if positions is None else np.asarray(positions, dtype=np.float64)
        path, library_size = model.gene_factor_model, model.library_size_model
        self.num_factors, self.loadings, self.range, self.scale = 0, np.zeros((num_genes, 0)), 1.0, 1.0
        # columns: genes, library size, then the factors of every step
        share = np.zeros(num_genes + 1)
        if path is not None:
            self.num_factors = path.loadings.shape[1]
            self.loadings = path.slide_loadings.double().cpu().numpy()
            self.range, self.scale = float(path.spatial_range), float(path.spatial_scale)
            share[:num_genes] = path.spatial_share.double().cpu().numpy()
            share = np.concatenate([share, np.tile(path.factor_spatial_share.double().cpu().numpy(), num_steps)])
        if library_size is not None:
            share[num_genes] = float(library_size.spatial_share)
        self.share = share if positions is not None else np.zeros_like(share)
        self.mean, self.root = np.zeros(self.loadings.shape[1]), np.eye(self.loadings.shape[1])
        self.typical_shift = None
        if slide_effect is not None:
            self.mean, self.root = slide_effect
            self.typical_shift = self.loadings @ self.mean
        self._slides: dict[tuple[int, int], SlideNoise] = {}

    def _slide(self, spot: int, draw: int, again: int) -> SlideNoise:
        seed = self.seed if not again else f"{self.seed} again {again}"
        if self.slide is None:  # a spot on its own is a slide of one spot
            return SlideNoise(seed, self.spots[spot], draw, len(self.share), self.range)
        if (draw, again) not in self._slides:
            if len(self._slides) * 2 * NUM_FREQUENCIES * len(self.share) > MOST_NUMBERS_KEPT:
                self._slides.clear()
            self._slides[draw, again] = SlideNoise(seed, self.slide, draw, len(self.share), self.range)
        return self._slides[draw, again]

    def of(self, spot_index: np.ndarray, draw_index: np.ndarray, again: int = 0) -> _Numbers:
        genes = self.num_genes
        seed = self.seed if not again else f"{self.seed} again {again}"
        pairs = [(self.spots[spot], int(draw)) for spot, draw in zip(spot_index, draw_index, strict=True)]
        own = np.stack([spot_uniforms(seed, spot, draw, genes) for spot, draw in pairs])
        further = 1 + self.num_factors * self.num_steps
        normal = np.hstack([ndtri(own[:, 1]), [spot_normals(seed, spot, draw, further) for spot, draw in pairs]])
        order, shift, slide_library_size = own[:, 0].copy(), np.zeros((len(own), genes)), np.zeros(len(own))
        for draw in np.unique(draw_index):
            rows = np.flatnonzero(draw_index == draw)
            groups = [rows] if self.slide is not None else [[row] for row in rows]
            for group in groups:
                slide = self._slide(int(spot_index[group[0]]), int(draw), again)
                shift[group] = self.loadings @ (self.mean + self.root @ slide.normal[: len(self.mean)])
                slide_library_size[group] = slide.normal[genes]
                if self.slide is not None:
                    order[group] = slide.order[:genes]
                if self.share.any():
                    field = self.scale * slide.field(self.positions[spot_index[group]])
                    normal[group] = np.sqrt(self.share) * field + np.sqrt(1 - self.share) * normal[group]
        factors = normal[:, genes + 1 :].reshape(len(own), self.num_steps, self.num_factors)
        return _Numbers(
            order, normal[:, :genes], factors, ndtri(own[:, 2]), shift, normal[:, genes], slide_library_size
        )

    def correction(self, spot_index: np.ndarray, draw_index: np.ndarray, number: int) -> np.ndarray:
        """Uniform numbers (B, G): which genes are masked again."""
        return self.of(spot_index, draw_index, number + 1).order


def _batches(num_spots: int, num_draws: int, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Spot and draw numbers, all draws of a spot next to each other, cut into batches."""
    for start in range(0, num_spots * num_draws, batch_size):
        flat = np.arange(start, min(start + batch_size, num_spots * num_draws))
        yield flat // num_draws, flat % num_draws
