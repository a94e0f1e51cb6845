import numpy as np
import pytest
from PIL import Image

from hinge.data import SlideImage, list_samples, read_slide, recognise_format
from hinge.data.tissue_detection import find_tissue, lay_spots, slide_from_image
from hinge.utils.errors import DataError

GLASS, STROMA, TUMOUR, INK = (236, 228, 238), (225, 170, 200), (130, 80, 150), (40, 140, 90)


def picture(path, shapes=(), size=(1000, 800), background=GLASS, noise=4, seed=0):
    """An image at 4 µm/px: rectangles (left, top, right, bottom, colour) on glass."""
    pixels = np.zeros((size[1], size[0], 3)) + background
    for left, top, right, bottom, colour in shapes:
        pixels[top:bottom, left:right] = colour
    pixels += np.random.default_rng(seed).normal(0, noise, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path


SECTION = [(200, 200, 700, 600, STROMA), (400, 300, 600, 500, TUMOUR)]


def mask_of(path, um_per_px=4.0):
    with SlideImage(path) as opened:
        return find_tissue(opened, um_per_px)


def covered(mask, left, top, right, bottom, size=(1000, 800)):
    scale = mask.shape[1] / size[0]
    return mask[round(top * scale) : round(bottom * scale), round(left * scale) : round(right * scale)].mean()


def test_tissue_is_found_with_its_pale_parts(tmp_path):
    mask = mask_of(picture(tmp_path / "a.png", SECTION))
    assert mask.shape == (320, 400) and mask.dtype == bool
    assert covered(mask, 210, 210, 690, 590) > 0.99
    assert mask.mean() == pytest.approx(500 * 400 / (1000 * 800), rel=0.05)


def test_ink_borders_dust_and_grey_shadows_are_no_tissue(tmp_path):
    extra = [(800, 100, 950, 300, INK), (0, 760, 1000, 800, (5, 5, 5)), (60, 60, 75, 75, TUMOUR)]
    extra += [(50, 400, 150, 600, (150, 150, 150))]
    mask = mask_of(picture(tmp_path / "a.png", [*SECTION, *extra]))
    for left, top, right, bottom, _ in extra:
        assert covered(mask, left, top, right, bottom) < 0.1
    assert covered(mask, 210, 210, 690, 590) > 0.99


def test_nothing_but_glass_and_nothing_but_tissue(tmp_path):
    assert not mask_of(picture(tmp_path / "glass.png")).any()
    assert not mask_of(picture(tmp_path / "flat.png", noise=0)).any()
    shapes = [(300, 0, 1000, 800, TUMOUR)]
    assert mask_of(picture(tmp_path / "full.png", shapes, background=(200, 130, 180))).all()
    assert mask_of(picture(tmp_path / "even.png", background=TUMOUR, noise=0)).all()


def test_a_small_hole_belongs_to_the_tissue_and_a_large_one_does_not(tmp_path):
    holes = [(300, 300, 320, 320, GLASS), (450, 350, 550, 450, GLASS)]
    mask = mask_of(picture(tmp_path / "a.png", [(200, 200, 700, 600, STROMA), *holes]))
    assert covered(mask, 300, 300, 320, 320) == 1 and covered(mask, 465, 365, 535, 435) == 0


def test_spots_are_laid_where_half_of_them_is_tissue():
    mask = np.zeros((80, 100), bool)
    mask[:, 43:] = True
    cells = lay_spots(mask, (1000, 800), pitch_px=100, diameter_px=60)
    # centres at 50, 150, ...; the one at 450 has 50 of its 60 px on tissue, that at 350 none
    assert cells[:, 0].min() == 4 and cells[:, 0].max() == 9 and len(cells) == 6 * 8


def test_an_image_alone_is_a_slide(tmp_path):
    path = picture(tmp_path / "biopsy.png", SECTION)
    slide = slide_from_image(path, 4.0, spot_pitch_um=200, spot_diameter_um=100)
    assert slide.n_vars == 0 and slide.n_obs == 80  # 500 x 400 px of tissue, a spot every 50
    x, y = slide.obsm["spatial"].T
    assert x.min() == 225 and x.max() == 675 and y.min() == 225 and y.max() == 575
    assert slide.obs_names[0] == "4x4" and slide.obs.loc["4x4"].tolist() == [4, 4]
    facts = slide.uns["hinge"]
    assert facts["name"] == "biopsy" and facts["source_format"] == "image" and facts["um_per_px"] == 4
    assert (facts["spot_pitch_um"], facts["spot_diameter_um"]) == (200, 100)
    assert slide.uns["spatial"]["biopsy"]["scalefactors"]["spot_diameter_fullres"] == 25


def test_reading_images_without_counts(tmp_path):
    for name in ("b.png", "a.png"):
        picture(tmp_path / name, SECTION)
    assert recognise_format(tmp_path) == "image" and list_samples(tmp_path) == ["a", "b"]
    for path, sample in ((tmp_path, "a"), (tmp_path / "a.png", None)):
        slide = read_slide(path, sample, um_per_px=4, require_counts=False, spot_pitch_um=400)
        assert slide.shape == (20, 0)
    with pytest.raises(DataError, match=r"is an image without counts: training and evaluation need counts"):
        read_slide(tmp_path, "a", um_per_px=4)
    with pytest.raises(DataError, match=r"a\.png has no resolution in its metadata: give --um-per-px"):
        read_slide(tmp_path, "a", require_counts=False)
    picture(tmp_path / "a.jpg", SECTION)
    with pytest.raises(DataError, match="has 2 images of a, not one"):
        read_slide(tmp_path, "a", um_per_px=4, require_counts=False)
    with pytest.raises(DataError, match=r"no tissue was found in .*glass\.png \(0\.0% of it looks stained\)"):
        slide_from_image(picture(tmp_path / "glass.png"), 4.0)


@pytest.mark.full
@pytest.mark.real
@pytest.mark.parametrize("sample", ["C2", "C3", "C4", "C5"])
def test_real_tissue_is_where_the_spots_were(her2st, sample):
    measured = read_slide(her2st, sample)
    facts = measured.uns["hinge"]
    with SlideImage(facts["image_path"]) as opened:
        mask = find_tissue(opened, facts["um_per_px"])
        scale = mask.shape[1] / opened.dimensions[0]
    x, y = (measured.obsm["spatial"] * scale).astype(int).T
    assert mask[y, x].mean() > 0.98
    slide = slide_from_image(facts["image_path"], facts["um_per_px"], 200, 100)
    assert slide.n_obs == pytest.approx(measured.n_obs, rel=0.1)
