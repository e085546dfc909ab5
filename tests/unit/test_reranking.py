"""Scores of pictures for a prompt, and the order they give."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.clip import Clip, ClipConfig
from pipelines.data.caption_slots import OwnSlots
from pipelines.data.storage import replace_file
from pipelines.data.tokenizer import CaptionTokenizer, TokenizerConfig, train_tokenizer
from pipelines.sampling.reranking import BATCH, NonFiniteScores, Reranker, best_first, load_reranker
from pipelines.training.clip_files import CLIP_FILE
from pipelines.training.weights import save_model

CONFIG = ClipConfig(
    image_size=16,
    patch_size=8,
    image_width=32,
    image_layers=2,
    image_heads=2,
    text_len=12,
    vocab_size=300,
    text_width=32,
    text_layers=2,
    text_heads=2,
    embed_width=16,
)
CAPTIONS = ["a red house", "a blue boat", "a house and a boat"]


def tokenizer_file(path: Path, captions: list[str] = CAPTIONS) -> Path:
    file = path / "tokenizer.json"
    replace_file(file, train_tokenizer(captions, TokenizerConfig(vocab_size=280)))
    return file


def clip() -> Clip:
    model = Clip(CONFIG)
    model.init_weights(0)
    return model


@pytest.fixture
def reranker(tmp_path: Path) -> Reranker:
    return Reranker(clip(), OwnSlots(CaptionTokenizer.from_file(tokenizer_file(tmp_path))))


def pictures(count: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("side", [16, 24])
def test_a_pictures_score_does_not_depend_on_its_batch(reranker: Reranker, side: int) -> None:
    many = pictures(2 * BATCH + 3, side)
    whole = reranker.scores("a red house", many)
    assert whole.dtype == np.float32
    assert whole.shape == (len(many),)
    for part in (slice(0, 1), slice(5, 12), slice(BATCH, BATCH + 1), slice(1, None)):
        np.testing.assert_allclose(
            reranker.scores("a red house", many[part]), whole[part], atol=1e-5
        )
    assert np.ptp(whole) > 1e-3


def test_scores_are_the_models_cosines(reranker: Reranker) -> None:
    some = pictures(3)
    ids = torch.tensor([[*reranker.captions.slots(["a blue boat"], 12)[0][0]]])
    pixels = torch.from_numpy(some).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        ends = torch.tensor([int((ids != 0).sum())])
        wanted = reranker.clip.encode_images(pixels) @ reranker.clip.encode_texts(ids, ends)[0]
    np.testing.assert_allclose(reranker.scores("a blue boat", some), wanted.numpy(), atol=1e-6)


def test_a_caption_of_any_length_ends_in_a_slot_of_its_own(tmp_path: Path) -> None:
    slots = OwnSlots(CaptionTokenizer.from_file(tokenizer_file(tmp_path)))
    ids, ends = slots.slots(["", "a red house", "boat " * 50], 8)
    assert ids.shape == (3, 8)
    assert ends.tolist() == [1, int((ids[1] != 0).sum()), 7]
    assert [int(ids[row, end]) for row, end in enumerate(ends)] == [0, 0, 0]


def test_no_pictures_have_no_scores(reranker: Reranker) -> None:
    assert reranker.scores("a red house", pictures(0)).shape == (0,)


@pytest.mark.parametrize(
    "wrong", [pictures(2).astype(np.float32), pictures(2)[0], pictures(2)[..., :1]]
)
def test_what_is_no_picture_is_refused(reranker: Reranker, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pictures must be uint8"):
        reranker.scores("a red house", wrong)


def test_scores_that_are_not_finite_are_refused(reranker: Reranker) -> None:
    with torch.no_grad():
        reranker.clip.image.projection.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteScores, match="3 of 3 are not"):
        reranker.scores("a red house", pictures(3))


def test_the_best_come_first_and_equals_keep_their_order() -> None:
    assert best_first(np.array([0.1, 0.7, 0.1, 0.9], np.float32)).tolist() == [3, 1, 0, 2]


def test_a_model_file_is_loaded_with_its_own_tokenizer_only(tmp_path: Path) -> None:
    own = tokenizer_file(tmp_path / "own")
    digest = CaptionTokenizer.from_file(own).digest
    file = tmp_path / "clip" / CLIP_FILE
    save_model(
        file,
        kind="clip",
        config=CONFIG,
        state=clip().state_dict(),
        metadata={"tokenizer_sha256": digest},
    )
    loaded = load_reranker(file, own, torch.device("cpu"))
    fresh = Reranker(clip(), OwnSlots(CaptionTokenizer.from_file(own)))
    scores = [ranker.scores("a boat", pictures(4)) for ranker in (loaded, fresh)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    other = tokenizer_file(tmp_path / "other", ["nothing of the kind", "nothing at all"])
    with pytest.raises(ValueError, match=f"was trained with tokenizer {digest}"):
        load_reranker(file, other, torch.device("cpu"))
    save_model(file, kind="prior", config=CONFIG, state={}, metadata={})
    with pytest.raises(ValueError, match="must hold a clip, got a prior"):
        load_reranker(file, own, torch.device("cpu"))


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    captions = OwnSlots(CaptionTokenizer.from_file(tokenizer_file(tmp_path)))
    small = ClipConfig(image_size=16, patch_size=8, vocab_size=100, text_width=64)
    with torch.device("meta"):
        model = Clip(small)
    with pytest.raises(ValueError, match="must hold the tokenizer's"):
        Reranker(model, captions)
