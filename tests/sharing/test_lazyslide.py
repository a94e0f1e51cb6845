"""LazySlide predicts with a run on a whole slide."""

from pathlib import Path

import numpy as np
import pytest

from hinge.diffusion.pipeline import HingePipeline
from hinge.sharing.lazyslide import draw_tiles, lazyslide_models, register_lazyslide
from hinge.utils.errors import DataError

SLIDE = Path(__file__).parents[3] / "shared" / "svs" / "CMU-1-Small-Region.svs"


@pytest.mark.full
def test_tools_of_lazyslide_predict_with_a_run(tiny_run):
    zs = pytest.importorskip("lazyslide", reason="needs the extra lazyslide")
    wsidata = pytest.importorskip("wsidata", reason="needs the extra lazyslide")
    if not SLIDE.exists():
        pytest.skip(f"no {SLIDE}")
    pipeline = HingePipeline.from_pretrained(tiny_run.folder)
    encoder, model = lazyslide_models(pipeline, num_draws=4, seed=3)
    wsi = wsidata.open_wsi(SLIDE)
    zs.pp.find_tissues(wsi)
    zs.pp.tile_tissues(wsi, encoder.tile_px, mpp=encoder.mpp)
    zs.tl.feature_extraction(wsi, encoder, pbar=False)
    zs.tl.feature_prediction(wsi, model, pbar=False)
    predicted = wsi.fetch.features_anndata("hinge")
    features = np.asarray(wsi.fetch.features_anndata("hinge-encoder").X)
    n, genes = len(wsi.shapes["tiles"]), pipeline.genes
    assert n > 20 and features.shape == (n, pipeline.encoder.dim)
    assert list(predicted.var_names) == [*genes, *(f"{gene} sd" for gene in genes)]
    corners = wsi.shapes["tiles"].bounds[["minx", "miny"]].to_numpy()
    draws = draw_tiles(pipeline, features, corners, 4, 3)
    np.testing.assert_allclose(np.asarray(predicted.X), np.hstack([draws.X, draws.layers["std"]]), atol=1e-5)
    # the features are those that hinge extracts from the same pixels
    tile = wsi.read_region(*corners[0].astype(int), encoder.tile_px, encoder.tile_px, level=0)
    assert np.asarray(tile).shape[2] >= 3
    with pytest.raises(DataError, match=r"takes tiles of \d+ px at .* µm per px"):
        zs.pp.tile_tissues(wsi, encoder.tile_px * 2, mpp=encoder.mpp / 2, key_added="small")
        zs.tl.feature_extraction(wsi, encoder, tile_key="small", pbar=False)
    register_lazyslide(pipeline, "hinge-tiny", num_draws=4, seed=3)
    zs.tl.feature_extraction(wsi, "hinge-tiny-encoder", pbar=False)
    zs.tl.feature_prediction(wsi, "hinge-tiny", pbar=False)
    np.testing.assert_allclose(np.asarray(wsi.fetch.features_anndata("hinge-tiny").X), predicted.X, atol=1e-5)


def test_tiles_need_positions(tiny_run):
    pipeline = HingePipeline.from_pretrained(tiny_run.folder)
    with pytest.raises(DataError, match="positions"):
        draw_tiles(pipeline, np.zeros((3, 4)), None)
