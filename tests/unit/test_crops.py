import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines.data.crops import ENCODE_CROPS, Crop, CropConfig, random_crop
from pipelines.data.decode import UnusablePicture

WHOLE = CropConfig(scale_low=1, scale_high=1, flip=False)


def picture(height: int, width: int) -> np.ndarray:
    """Red grows to the right and green downwards, so that a crop shows where it was."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, 0 * x], axis=2).astype(np.uint8)


@pytest.mark.parametrize("config", [CropConfig(), ENCODE_CROPS, WHOLE])
@pytest.mark.parametrize("sides", [(256, 256), (270, 400), (900, 300), (1200, 1300)])
def test_a_crop_has_the_models_size_and_lies_in_the_picture(
    config: CropConfig, sides: tuple[int, int]
) -> None:
    source = picture(*sides)
    for seed in range(20):
        pixels, crop = random_crop(source, 256, config, np.random.default_rng(seed))
        assert pixels.shape == (256, 256, 3)
        assert pixels.dtype == np.uint8
        assert 0 <= crop.top <= sides[0] - crop.size + 1
        assert 0 <= crop.left <= sides[1] - crop.size + 1


def test_scales_are_those_of_the_papers_listings() -> None:
    source = picture(1000, 1000)
    for config, low, high in [(CropConfig(), 288, 384), (ENCODE_CROPS, 256, 288)]:
        sizes = [
            random_crop(source, 256, config, np.random.default_rng(seed))[1].size
            for seed in range(100)
        ]
        assert max(sizes) <= round(256 * 1000 / low)
        assert min(sizes) >= round(256 * 1000 / high)
        assert max(sizes) - min(sizes) > 0.7 * 256 * (1000 / low - 1000 / high)


def test_a_picture_is_never_scaled_up() -> None:
    source = picture(260, 260)
    pixels, crop = random_crop(source, 256, CropConfig(flip=False), np.random.default_rng(0))
    assert crop.size == 256
    cut = source[crop.top : crop.top + 256, crop.left : crop.left + 256]
    assert np.array_equal(pixels, cut)
    with pytest.raises(UnusablePicture, match="too_small"):
        random_crop(picture(255, 1000), 256, CropConfig(), np.random.default_rng(0))


def test_the_recorded_square_is_the_one_that_is_seen() -> None:
    source = picture(1024, 768)
    pixels, crop = random_crop(source, 256, ENCODE_CROPS, np.random.default_rng(3))
    square = source[crop.top : crop.top + crop.size, crop.left : crop.left + crop.size]
    seen = np.asarray(Image.fromarray(square).resize((256, 256), Image.Resampling.BOX))
    assert np.abs(seen.astype(int) - pixels).mean() < 2


def test_encoding_takes_the_middle_and_never_mirrors() -> None:
    source = picture(256, 1024)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        pixels, crop = random_crop(source, 256, ENCODE_CROPS, rng)
        assert 288 <= crop.left <= 480  # 3/8 and 5/8 of the 768 columns of room
        assert pixels[0, 0, 0] < pixels[0, -1, 0]


def test_half_of_the_training_crops_are_mirrored() -> None:
    mirrored, source = 0, picture(300, 300)
    for seed in range(200):
        pixels, _ = random_crop(source, 256, CropConfig(), np.random.default_rng(seed))
        mirrored += int(pixels[0, 0, 0] > pixels[0, -1, 0])
    assert 70 < mirrored < 130


def test_equal_generators_give_equal_crops() -> None:
    source = picture(500, 600)
    one, other = (
        random_crop(source, 256, CropConfig(), np.random.default_rng(7))[0] for _ in range(2)
    )
    assert np.array_equal(one, other)


@pytest.mark.parametrize("config", [CropConfig(), ENCODE_CROPS, WHOLE])
def test_cutting_before_scaling_changes_no_pixel_and_no_draw(config: CropConfig) -> None:
    for seed in range(60):
        sizes = np.random.default_rng(seed)
        image_size = int(sizes.choice([64, 128]))
        height, width = sizes.integers(image_size, 4 * image_size, size=2)
        source = sizes.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        one, other = np.random.default_rng(seed), np.random.default_rng(seed)
        pixels, crop = random_crop(source, image_size, config, one)
        wanted, where = scaled_whole(source, image_size, config, other)
        assert np.array_equal(pixels, wanted)
        assert crop == where
        assert one.random() == other.random()


def scaled_whole(
    source: np.ndarray, image_size: int, config: CropConfig, rng: np.random.Generator
) -> tuple[np.ndarray, Crop]:
    """Listing 1 to the letter: cut, scale all of it, cut again, mirror."""
    height, width = source.shape[:2]
    short = min(height, width)
    top, left = (
        int(
            rng.integers(
                int(config.slack_low * (side - short)),
                int(config.slack_high * (side - short)),
                endpoint=True,
            )
        )
        for side in (height, width)
    )
    low, high = round(config.scale_low * image_size), round(config.scale_high * image_size)
    side = int(rng.integers(min(short, low), min(short, high), endpoint=True))
    square = source[top : top + short, left : left + short]
    square = cv2.resize(square, (side, side), interpolation=cv2.INTER_AREA)
    y, x = (int(rng.integers(0, side - image_size, endpoint=True)) for _ in range(2))
    pixels = square[y : y + image_size, x : x + image_size]
    if config.flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    back = short / side
    where = Crop(
        size=round(image_size * back), left=left + round(x * back), top=top + round(y * back)
    )
    return pixels, where


def test_a_crop_neither_changes_its_picture_nor_takes_more_than_one_thread() -> None:
    source = picture(300, 400)
    before = source.copy()
    source.flags.writeable = False
    for seed in range(20):
        random_crop(source, 256, CropConfig(), np.random.default_rng(seed))
    assert np.array_equal(source, before)
    assert cv2.getNumThreads() == 1


def test_impossible_crops_are_refused() -> None:
    with pytest.raises(ValueError, match="scale_low"):
        CropConfig(scale_low=0.5)
    with pytest.raises(ValueError, match="slack_low"):
        CropConfig(slack_low=0.8, slack_high=0.2)
