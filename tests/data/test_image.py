import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image, ImageFile, TiffImagePlugin

from hinge.data import SlideImage, slide_image
from hinge.utils.errors import DataError


def smooth_pixels(width=300, height=200):
    """Channels that are linear in x and in y: resampling must not change them."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 250 / width, y * 250 / height, np.full(x.shape, 80.0)], axis=-1).astype(np.uint8)


@pytest.fixture
def flat(tmp_path):
    Image.fromarray(smooth_pixels()).save(tmp_path / "flat.png")
    with SlideImage(tmp_path / "flat.png") as opened:
        yield opened


@pytest.fixture
def pyramid(tmp_path):
    """Tiled TIFF whose two levels differ in their blue channel, 0.5 µm/px."""
    pixels = smooth_pixels(1024, 768)
    half = pixels[::2, ::2].copy()
    half[..., 2] = 160
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as writer:
        options = {"tile": (128, 128), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
        writer.write(pixels, resolution=(20_000, 20_000), **options)
        writer.write(half, resolution=(10_000, 10_000), subfiletype=1, **options)
    with SlideImage(tmp_path / "pyramid.tif") as opened:
        yield opened


def test_own_resolution_is_an_exact_crop(flat):
    region = flat.read_region((100, 80), size_um=16, size_px=32, um_per_px=0.5)
    np.testing.assert_array_equal(region, smooth_pixels()[64:96, 84:116])
    # 11.2 / 0.35 is 32.000000000000004
    region = flat.read_region((100.3, 79.8), size_um=11.2, size_px=32, um_per_px=0.35)
    np.testing.assert_array_equal(region, smooth_pixels()[64:96, 84:116])


@pytest.mark.parametrize("size_px", [16, 48, 64, 100])
def test_other_resolutions_show_the_same_place(flat, size_px):
    region = flat.read_region((150, 100), size_um=64, size_px=size_px, um_per_px=1.0)
    assert region.shape == (size_px, size_px, 3) and region.dtype == np.uint8
    center = (np.arange(size_px) + 0.5) * 64 / size_px
    np.testing.assert_allclose(region[size_px // 2, :, 0], (118 + center - 0.5) * 250 / 300, atol=1.5)
    np.testing.assert_allclose(region[:, size_px // 2, 1], (68 + center - 0.5) * 250 / 200, atol=1.5)


def test_strong_reduction_averages_instead_of_picking_pixels(tmp_path):
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[::2] = 200
    Image.fromarray(pixels).save(tmp_path / "stripes.png")
    with SlideImage(tmp_path / "stripes.png") as opened:
        region = opened.read_region((128, 128), size_um=128, size_px=8, um_per_px=1.0)
    np.testing.assert_allclose(region, 100, atol=3)


def test_outside_is_white_and_inside_is_untouched(flat):
    region = flat.read_region((0, 0), size_um=40, size_px=40, um_per_px=1.0)
    assert (region[:20] == 255).all() and (region[:, :20] == 255).all()
    np.testing.assert_array_equal(region[20:, 20:], smooth_pixels()[:20, :20])
    region = flat.read_region((300, 200), size_um=40, size_px=40, um_per_px=1.0)
    np.testing.assert_array_equal(region[:20, :20], smooth_pixels()[-20:, -20:])
    assert (region[20:] == 255).all()
    assert (flat.read_region((-500, 90), size_um=40, size_px=20, um_per_px=1.0) == 255).all()


def test_region_larger_than_the_image(flat):
    region = flat.read_region((150, 100), size_um=900, size_px=90, um_per_px=1.0)
    assert (region[[0, -1]] == 255).all() and (region[:, [0, -1]] == 255).all()
    assert (region[40:50, 35:55, 2] < 90).all()


def test_a_region_that_is_no_patch_is_refused_before_it_is_read(flat):
    with pytest.raises(DataError, match=r"500 µm at 0\.01 µm per pixel is 50\d\d\d pixels wide in .*flat"):
        flat.read_region((150, 100), size_um=500, size_px=224, um_per_px=0.01)


def test_pyramid_reads_the_level_at_or_finer_than_asked(pyramid):
    assert pyramid.dimensions == (1024, 768)
    assert pyramid.um_per_px == pytest.approx(0.5)
    fine = pyramid.read_region((512, 384), size_um=32, size_px=64, um_per_px=0.5)
    np.testing.assert_array_equal(fine, smooth_pixels(1024, 768)[352:416, 480:544])
    between = pyramid.read_region((512, 384), size_um=48, size_px=64, um_per_px=0.5)
    assert (between[..., 2] == 80).all()
    coarse = pyramid.read_region((512, 384), size_um=64, size_px=64, um_per_px=0.5)
    assert (coarse[..., 2] == 160).all()
    np.testing.assert_array_equal(coarse[..., :2], smooth_pixels(1024, 768)[::2, ::2][160:224, 224:288, :2])
    coarser = pyramid.read_region((512, 384), size_um=128, size_px=32, um_per_px=0.5)
    assert (coarser[..., 2] == 160).all()
    np.testing.assert_allclose(coarser[16, :, 0].astype(float), np.arange(388, 644, 8) * 250 / 1024, atol=2)


def test_pyramid_outside_is_white(pyramid):
    region = pyramid.read_region((0, 768), size_um=32, size_px=64, um_per_px=0.5)
    assert (region[:, :32] == 255).all() and (region[32:] == 255).all()
    np.testing.assert_array_equal(region[:32, 32:], smooth_pixels(1024, 768)[-32:, :32])


def test_threads_see_what_one_reader_sees(tmp_path):
    Image.fromarray(smooth_pixels()).save(tmp_path / "flat.png")
    centers = [(x, y) for x in range(0, 300, 20) for y in range(0, 200, 20)]

    def read(opened, center):
        return opened.read_region(center, size_um=50, size_px=24, um_per_px=1.0)

    with SlideImage(tmp_path / "flat.png") as one, SlideImage(tmp_path / "flat.png") as shared:
        expected = [read(one, center) for center in centers]
        with ThreadPoolExecutor(4) as pool:
            regions = list(pool.map(lambda center: read(shared, center), centers))
    np.testing.assert_array_equal(regions, expected)


@pytest.mark.parametrize("decoded_before", [False, True])
def test_thumbnail(flat, pyramid, decoded_before):
    for opened, shape in ((flat, (67, 100, 3)), (pyramid, (75, 100, 3))):
        if decoded_before:
            opened.read_region((9, 9), size_um=4, size_px=4, um_per_px=1.0)
        thumbnail = opened.thumbnail(100)
        assert thumbnail.shape == shape and thumbnail.dtype == np.uint8
        assert (np.diff(thumbnail[30, :, 0].astype(int)) > 0).all()
    assert flat.thumbnail(5000).shape == (200, 300, 3)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_other_8_bit_modes_become_rgb(tmp_path, mode):
    Image.new("RGB", (40, 30), (255, 255, 255)).convert(mode).save(tmp_path / "a.tif")
    with SlideImage(tmp_path / "a.tif") as opened:
        assert (opened.read_region((20, 15), size_um=8, size_px=8, um_per_px=1.0) == 255).all()


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(tmp_path / "a.png")
    with SlideImage(tmp_path / "a.png") as opened:
        assert (opened.read_region((20, 15), size_um=8, size_px=8, um_per_px=1.0) == 255).all()
        assert (opened.thumbnail(20) == 255).all()


def test_resolution_of_a_plain_tiff_and_of_implausible_tags(tmp_path):
    picture = Image.fromarray(smooth_pixels())
    picture.save(tmp_path / "cm.tif", resolution_unit="cm", x_resolution=25_000, y_resolution=25_000)
    picture.save(tmp_path / "screen.tif", dpi=(72, 72))
    picture.save(tmp_path / "none.png")
    for name, expected in (("cm.tif", 0.4), ("screen.tif", None), ("none.png", None)):
        with SlideImage(tmp_path / name) as opened:
            assert opened.um_per_px == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("kept", [0.5, 0.98])
def test_a_truncated_image_is_an_error_not_grey_pixels(tmp_path, suffix, kept):
    whole, file = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    data = whole.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for read in (
        lambda opened: opened.read_region((150, 20), size_um=8, size_px=8, um_per_px=1.0),
        lambda opened: opened.thumbnail(50),
    ):
        with pytest.raises(DataError, match=rf"cut\.{suffix} is damaged"), SlideImage(file) as opened:
            read(opened)


def test_a_truncated_pyramid_is_an_error(pyramid, tmp_path):
    data = pyramid.path.read_bytes()
    # tifffile writes each level's directory before its tiles: the second level's tiles are lost
    (tmp_path / "cut.tif").write_bytes(data[: int(len(data) * 0.9)])
    with pytest.raises(DataError, match="damaged"), SlideImage(tmp_path / "cut.tif") as opened:
        opened.read_region((1000, 740), size_um=1024, size_px=64, um_per_px=1.0)


def test_what_is_no_image(tmp_path):
    with pytest.raises(DataError, match=r"there is no image file .*gone\.png"):
        SlideImage(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match="not an image"):
        SlideImage(tmp_path / "text.png")
    (tmp_path / "empty.tif").touch()
    with pytest.raises(DataError, match="not an image"):
        SlideImage(tmp_path / "empty.tif")
    Image.new("I;16", (20, 20)).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match="8 bits a channel"):
        SlideImage(tmp_path / "deep.tif")


def test_size_limit_is_our_own(tmp_path, monkeypatch):
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with SlideImage(tmp_path / "a.png") as opened:
        assert opened.read_region((30, 25), size_um=4, size_px=4, um_per_px=1.0).max() == 0
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.setattr(slide_image, "MAX_DECODED_PIXELS", 2999)
    with pytest.raises(DataError, match=r"has 60 x 50 pixels.* at most 2,999: convert it to a tiled"):
        SlideImage(tmp_path / "a.png")


@pytest.mark.real
def test_real_slide_image(her2st):
    (file,) = her2st.glob("data/ST-imgs/C/C2/*.jpg")
    with SlideImage(file) as opened:
        assert opened.dimensions == (9274, 9911)
        assert max(opened.thumbnail(600).shape) == 600
        tissue = opened.read_region((6045, 3776), size_um=154, size_px=224, um_per_px=0.6875)
        glass = opened.read_region((1000, 1000), size_um=154, size_px=224, um_per_px=0.6875)
    assert tissue.std() > 3 * glass.std()


# --- pyramids of arrays ---------------------------------------------------------------------------------


def write_ome_tiff(path, planar=False, pixels=None, **metadata):
    """Two levels that differ in their blue channel, the second in a SubIFD, as Bio-Formats and QuPath write it."""
    pixels = smooth_pixels(1024, 768) if pixels is None else pixels
    half = pixels[::2, ::2].copy()
    half[..., 2] = 160
    options = {"tile": (128, 128), "photometric": "minisblack" if planar else "rgb"}
    if planar:
        pixels, half = (np.moveaxis(each, -1, 0) for each in (pixels, half))
    metadata = {"axes": "CYX" if planar else "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", **metadata}
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(pixels, subifds=1, metadata=metadata, **options)
        writer.write(half, subfiletype=1, **options)
    return path


def write_ome_zarr(path, version="0.4"):
    pixels = np.moveaxis(smooth_pixels(1024, 768), -1, 0)
    half = pixels[:, ::2, ::2].copy()
    half[2] = 160
    group = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    for name, level in (("0", pixels), ("1", half)):
        group.create_array(name, data=level, chunks=(3, 128, 128))
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx")]
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [{"type": "scale", "scale": [1, 0.5 * 2**level, 0.5 * 2**level]}],
        }
        for level in (0, 1)
    ]
    scales = [{"version": version, "axes": axes, "datasets": datasets}]
    group.attrs.update(
        {"multiscales": scales} if version == "0.4" else {"ome": {"version": "0.5", "multiscales": scales}}
    )
    return path


@pytest.fixture(params=["ome-tiff", "ome-tiff planar", "ome-zarr 0.4", "ome-zarr 0.5"])
def arrays(request, tmp_path):
    kind, _, detail = request.param.partition(" ")
    if kind == "ome-tiff":
        path = write_ome_tiff(tmp_path / "slide.ome.tif", planar=bool(detail))
    else:
        path = write_ome_zarr(tmp_path / "slide.zarr", detail)
    with SlideImage(path) as opened:
        yield opened


def test_array_pyramids_read_like_other_pyramids(arrays):
    full = smooth_pixels(1024, 768)
    assert arrays.dimensions == (1024, 768) and arrays.um_per_px == pytest.approx(0.5)
    fine = arrays.read_region((512, 384), size_um=32, size_px=64, um_per_px=0.5)
    np.testing.assert_array_equal(fine, full[352:416, 480:544])
    coarse = arrays.read_region((512, 384), size_um=64, size_px=64, um_per_px=0.5)
    assert (coarse[..., 2] == 160).all()
    np.testing.assert_array_equal(coarse[..., :2], full[::2, ::2][160:224, 224:288, :2])
    corner = arrays.read_region((0, 768), size_um=32, size_px=64, um_per_px=0.5)
    assert (corner[:, :32] == 255).all() and (corner[32:] == 255).all()
    np.testing.assert_array_equal(corner[:32, 32:], full[-32:, :32])
    assert (arrays.read_region((-900, -900), size_um=32, size_px=64, um_per_px=0.5) == 255).all()


def test_thumbnails_of_array_pyramids(arrays):
    small = arrays.thumbnail(100)
    assert small.shape == (75, 100, 3) and (abs(small[..., 2].astype(int) - 160) <= 1).all()
    np.testing.assert_allclose(small[40, :, 0], (np.arange(100) + 0.5) * 2.5, atol=3)
    assert arrays.thumbnail(5000).shape == (768, 1024, 3)


def test_array_pyramids_that_are_no_slide(tmp_path):
    path = write_ome_tiff(tmp_path / "deep.ome.tif", pixels=smooth_pixels().astype(np.uint16))
    with pytest.raises(DataError, match=r"deep\.ome\.tif has pixels of type uint16; an image with 8 bits a channel"):
        SlideImage(path)
    tifffile.imwrite(tmp_path / "five.ome.tif", np.zeros((5, 64, 64), np.uint8), metadata={"axes": "CYX"})
    with pytest.raises(DataError, match=r"five\.ome\.tif has 5 channels, and an RGB image is needed"):
        SlideImage(tmp_path / "five.ome.tif")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder is a folder but not an OME-Zarr image"):
        SlideImage(tmp_path / "folder")
    path = write_ome_zarr(tmp_path / "broken.zarr")
    shutil.rmtree(path / "1")
    with pytest.raises(DataError, match=r"broken\.zarr is damaged or not an image"):
        SlideImage(path)
    path = write_ome_tiff(tmp_path / "cut.ome.tif")
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(DataError, match=r"cut\.ome\.tif is damaged or not an image"), SlideImage(path) as opened:
        opened.read_region((500, 700), size_um=200, size_px=64, um_per_px=0.5)


def test_grey_ome_tiff_is_shown_grey(tmp_path):
    grey = smooth_pixels()[..., 0]
    tifffile.imwrite(tmp_path / "grey.ome.tif", grey, metadata={"axes": "YX"})
    with SlideImage(tmp_path / "grey.ome.tif") as opened:
        region = opened.read_region((100, 80), size_um=32, size_px=32, um_per_px=1.0)
        assert opened.um_per_px is None
    np.testing.assert_array_equal(region, grey[64:96, 84:116, None].repeat(3, axis=2))


def test_names_of_images():
    names = {"a.svs": "a", "b.1.ome.tif": "b.1", "c.OME.TIFF": "c", "d.TIF": "d", "e.h5ad": "", "f.zarr": ""}
    assert {name: slide_image.image_name(Path(name)) for name in names} == names


@pytest.mark.parametrize("compression", [None, "lzw", "jpeg"])
def test_an_image_beyond_pillows_limit(tmp_path, monkeypatch, compression):
    """Pillow applies its limit when a TIFF is opened and again when it is decoded."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # twice as many are an error
    path = tmp_path / "large.tif"
    tifffile.imwrite(path, smooth_pixels(), photometric="rgb", compression=compression, rowsperstrip=16)
    with SlideImage(path) as image:
        small, region = image.thumbnail(100), image.read_pixels(90, 60, 40, 30)
        assert small.shape == (67, 100, 3)
    np.testing.assert_allclose(region.astype(int), smooth_pixels()[60:90, 90:130], atol=4)
    assert Image.MAX_IMAGE_PIXELS == 10_000


@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
def test_a_large_striped_tiff_is_not_decoded_whole_for_its_thumbnail(tmp_path, monkeypatch, compression):
    path = tmp_path / "striped.tif"
    tifffile.imwrite(path, smooth_pixels(), photometric="rgb", compression=compression, rowsperstrip=16)
    with SlideImage(path) as image:
        wanted = image.thumbnail(60)
    monkeypatch.setattr(slide_image, "DECODED_FOR_THUMBNAIL", 1000)
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with SlideImage(path) as image:
        np.testing.assert_allclose(image.thumbnail(60).astype(int), wanted, atol=2)
