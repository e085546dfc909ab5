import io

import numpy as np
import pytest
from PIL import Image

from pipelines.data.crops import (
    ENCODE_CROPS,
    CropConfig,
    UnusablePicture,
    decode_picture,
    random_crop,
)

WHOLE = CropConfig(scale_low=1, scale_high=1, flip=False)


def picture(height: int, width: int) -> np.ndarray:
    """Red grows to the right and green downwards, so that a crop shows where it was."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, 0 * x], axis=2).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_stored_pictures_are_decoded(kind: str) -> None:
    pixels = decode_picture(encoded(picture(40, 30), kind))
    assert pixels.shape == (40, 30, 3)
    assert np.abs(pixels.astype(int) - picture(40, 30)).mean() < 8


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_picture_has_a_reason(share: float) -> None:
    data = encoded(picture(200, 200), "JPEG")
    with pytest.raises(UnusablePicture) as caught:
        decode_picture(data[: int(share * len(data))])
    assert caught.value.reason == "broken_picture"


def test_impossible_crops_are_refused() -> None:
    with pytest.raises(ValueError, match="scale_low"):
        CropConfig(scale_low=0.5)
    with pytest.raises(ValueError, match="slack_low"):
        CropConfig(slack_low=0.8, slack_high=0.2)
