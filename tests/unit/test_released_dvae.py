"""OpenAI's released dVAE becomes a model of ours that computes the same, and nothing of it runs."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from models.dvae import DVAE
from pipelines.training.released_dvae import ReleasedDVAE, read_released
from tests.fixtures.peers import need_peer

ROOT = Path(__file__).parents[2]
# Width, codes, code's width, blocks in a group; then height and width of a picture.
SIZES = [
    (64, 512, 8, 1, (16, 16)),
    (64, 1024, 128, 2, (32, 72)),
    (96, 777, 40, 1, (64, 24)),
    (72, 512, 16, 3, (8, 40)),
    (128, 8192, 64, 2, (40, 32)),
]
SMALL = {"n_hid": 64, "vocab_size": 512, "n_blk_per_group": 1}


@pytest.fixture(scope="module")
def package() -> ModuleType:
    return need_peer("dall_e")


@pytest.fixture(scope="module")
def small(package: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small released pair."""
    directory = tmp_path_factory.mktemp("small")
    save(as_released(package.Encoder(**SMALL)), directory / "encoder.pkl")
    save(as_released(package.Decoder(**SMALL, n_init=8)), directory / "decoder.pkl")
    return directory


def as_released(module: nn.Module) -> nn.Module:
    """The module as the torch of 2021 made it, with biases that matter."""
    for part in module.modules():
        if isinstance(part, nn.Upsample):
            del part.recompute_scale_factor  # torch 1.11 has it first
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(std=0.1)
    return module


def save(value: Any, path: Path, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def runnable(module: nn.Module) -> nn.Module:
    """What today's torch misses in the package's module."""
    for part in module.modules():
        if isinstance(part, nn.Upsample):
            part.recompute_scale_factor = None
    return module


def read(directory: Path) -> ReleasedDVAE:
    return read_released(directory / "encoder.pkl", directory / "decoder.pkl", image_size=64)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(("n_hid", "vocab_size", "n_init", "n_blk_per_group", "sides"), SIZES)
@torch.no_grad()
def test_our_model_computes_what_the_package_computes(
    package: ModuleType,
    tmp_path: Path,
    n_hid: int,
    vocab_size: int,
    n_init: int,
    n_blk_per_group: int,
    sides: tuple[int, int],
    legacy: bool,
) -> None:
    torch.manual_seed(n_hid + vocab_size)
    sizes = {"n_hid": n_hid, "vocab_size": vocab_size, "n_blk_per_group": n_blk_per_group}
    encoder = as_released(package.Encoder(**sizes))
    decoder = as_released(package.Decoder(**sizes, n_init=n_init))
    save(encoder, tmp_path / "encoder.pkl", legacy=legacy)
    save(decoder, tmp_path / "decoder.pkl", legacy=legacy)
    model = read(tmp_path).load()

    assert model.config.group_count == 4
    for name, value in {**sizes, "n_init": n_init, "image_size": 64}.items():
        assert getattr(model.config, name) == value
    pixels = torch.rand(2, 3, *sides)
    theirs = encoder(package.map_pixels(pixels))
    assert relative_error(model.logits(pixels), theirs) <= 1e-5

    tokens = torch.randint(vocab_size, (2, sides[0] // 8, sides[1] // 8))
    codes = F.one_hot(tokens, vocab_size).permute(0, 3, 1, 2).float()
    stats = runnable(decoder)(codes)
    assert relative_error(model.decoder(codes), stats) <= 1e-5
    shown = package.unmap_pixels(torch.sigmoid(stats[:, :3]))
    assert relative_error(model.decode(tokens), shown) <= 1e-5


def test_the_weights_are_the_files_to_the_last_bit(package: ModuleType, tmp_path: Path) -> None:
    encoder = as_released(package.Encoder(**SMALL))
    decoder = as_released(package.Decoder(**SMALL))
    save(encoder, tmp_path / "encoder.pkl")
    save(decoder, tmp_path / "decoder.pkl")
    state = read(tmp_path).load().state_dict()
    theirs = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    theirs |= {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.items())


def test_the_package_need_not_be_installed(small: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('dall_e', 'attr'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from pipelines.training.released_dvae import read_released\n"
        f"model = read_released(Path({str(small / 'encoder.pkl')!r}), "
        f"Path({str(small / 'decoder.pkl')!r})).load()\n"
        "assert not {'dall_e', 'attr', 'pickle5'} & set(sys.modules)\n"
        "print(model.config.vocab_size, model.config.image_size)\n"
        "try:\n"
        "    import dall_e\n"
        "except ModuleNotFoundError:\n"
        "    print('blocked')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["512", "256", "blocked"]


def change_gain(encoder: nn.Module, decoder: nn.Module) -> None:
    encoder.blocks.group_3.block_1.post_gain = 0.5


def change_pool(encoder: nn.Module, decoder: nn.Module) -> None:
    encoder.blocks.group_1.pool = nn.MaxPool2d(3)


def change_upsample(encoder: nn.Module, decoder: nn.Module) -> None:
    decoder.blocks.group_2.upsample = nn.Upsample(scale_factor=2, mode="bilinear")


def average_instead(encoder: nn.Module, decoder: nn.Module) -> None:
    encoder.blocks.group_1.pool = nn.AvgPool2d(2)


def drop_a_block(encoder: nn.Module, decoder: nn.Module) -> None:
    del encoder.blocks.group_2.block_1


def drop_the_head(encoder: nn.Module, decoder: nn.Module) -> None:
    del decoder.blocks.output


def flatten_the_head(encoder: nn.Module, decoder: nn.Module) -> None:
    encoder.blocks.output.conv.w = nn.Parameter(torch.ones(512))


def change_a_shape(encoder: nn.Module, decoder: nn.Module) -> None:
    decoder.blocks.group_4.block_1.res_path.conv_2.w = nn.Parameter(torch.ones(16, 16, 5, 5))


def grow_without_end(encoder: nn.Module, decoder: nn.Module) -> None:
    encoder.blocks.input.w = nn.Parameter(torch.ones(8192, 1, 1, 1))


def share_a_module(encoder: nn.Module, decoder: nn.Module) -> None:
    encoder.blocks.group_1.block_1.res_path.conv_3 = encoder.blocks.group_1.block_1.res_path.conv_2


def share_a_weight(encoder: nn.Module, decoder: nn.Module) -> None:
    path = encoder.blocks.group_1.block_1.res_path
    path.conv_3.w = path.conv_2.w


def go_too_deep(encoder: nn.Module, decoder: nn.Module) -> None:
    inner = nn.Sequential()
    encoder.blocks.more = nn.Sequential()
    encoder.blocks.more.a = nn.Sequential()
    encoder.blocks.more.a.a = nn.Sequential()
    encoder.blocks.more.a.a.a = nn.Sequential()
    encoder.blocks.more.a.a.a.a = nn.Sequential()
    encoder.blocks.more.a.a.a.a.a = nn.Sequential(inner)


def name_badly(encoder: nn.Module, decoder: nn.Module) -> None:
    encoder.blocks._modules["\x1b[2J"] = nn.Identity()


def add_a_buffer(encoder: nn.Module, decoder: nn.Module) -> None:
    encoder.blocks.register_buffer("seen", torch.ones(2))


def have_no_parameter(encoder: nn.Module, decoder: nn.Module) -> None:
    encoder.blocks.input.register_parameter("b", None)


def lose_the_tables(encoder: nn.Module, decoder: nn.Module) -> None:
    encoder.blocks.group_1.block_1.res_path.relu_1.__dict__.pop("_parameters")


def halve(encoder: nn.Module, decoder: nn.Module) -> None:
    encoder.half()


def be_infinite(encoder: nn.Module, decoder: nn.Module) -> None:
    decoder.blocks.group_2.block_1.res_path.conv_2.w.data[3, 2, 1, 1] = float("inf")


CHANGES: dict[str, tuple[Callable[[nn.Module, nn.Module], None], str]] = {
    "gain": (change_gain, r"encoder\.pkl must .*post_gain of blocks\.group_3\.block_1 is not"),
    "pool": (change_pool, r"encoder\.pkl must .*kernel_size of blocks\.group_1\.pool is not 2"),
    "upsample": (change_upsample, r"decoder\.pkl must .*mode of .* is not nearest"),
    "average": (average_instead, r"names torch\.nn\.modules\.pooling\.AvgPool2d"),
    "a block": (drop_a_block, r"must be one dVAE, but .*group_2\.block_1.* got None"),
    "the head": (drop_the_head, r"blocks\.output\.conv\.w is not in both"),
    "flat": (flatten_the_head, r"blocks\.output\.conv\.w is no convolution"),
    "a shape": (change_a_shape, r"\(16, 16, 3, 3\), got \(16, 16, 5, 5\)"),
    "huge": (grow_without_end, "n_hid must be at most 4096, got 8192"),
    "one module twice": (share_a_module, "conv_3 is no module of its own"),
    "one weight twice": (share_a_weight, "two share a storage"),
    "depth": (go_too_deep, "is no module of its own"),
    "name": (name_badly, "has no fit _modules"),
    "buffer": (add_a_buffer, "blocks has buffers"),
    "no parameter": (have_no_parameter, "b of blocks.input is no weight"),
    "no tables": (lose_the_tables, "has no fit _parameters"),
    "dtype": (halve, r"names torch\.HalfStorage"),
    "infinite": (be_infinite, r"decoder\.pkl must hold finite weights, but .*conv_2\.w is not"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_is_not_the_released_one_is_refused(
    package: ModuleType, tmp_path: Path, name: str
) -> None:
    change, said = CHANGES[name]
    encoder, decoder = package.Encoder(**SMALL), package.Decoder(**SMALL, n_init=8)
    change(encoder, decoder)
    save(encoder, tmp_path / "encoder.pkl")
    save(decoder, tmp_path / "decoder.pkl")
    with pytest.raises(ValueError, match=said) as caught:
        read(tmp_path).load()
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_halves_of_two_models_are_refused(package: ModuleType, small: Path, tmp_path: Path) -> None:
    for sizes in ({"n_hid": 96}, {"vocab_size": 600}, {"n_blk_per_group": 2}):
        other = save(package.Decoder(**SMALL | sizes), tmp_path / "decoder.pkl")
        with pytest.raises(ValueError, match=r"must be one dVAE, but|must be a released decoder"):
            read_released(small / "encoder.pkl", other)


def test_the_two_files_cannot_be_swapped(small: Path) -> None:
    with pytest.raises(ValueError, match=r"decoder\.pkl must be .* holds no dall_e\.encoder"):
        read_released(small / "decoder.pkl", small / "encoder.pkl")


def test_a_state_dict_is_not_what_was_released(package: ModuleType, small: Path) -> None:
    path = save(dict(package.Encoder(**SMALL).state_dict()), small / "state.pkl")
    with pytest.raises(ValueError, match=r"state\.pkl must be a released encoder, but it holds no"):
        read_released(path, small / "decoder.pkl")


class Hostile:
    """A part of a module that runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_hostile_part_of_a_released_model_is_refused(
    package: ModuleType, small: Path, tmp_path: Path, legacy: bool
) -> None:
    encoder = package.Encoder(**SMALL)
    encoder.blocks.group_4.block_1.res_path.n_hid = Hostile(f"touch {tmp_path}/canary")
    path = save(encoder, tmp_path / "encoder.pkl", legacy=legacy)
    with pytest.raises(ValueError, match=r"names posix\.system, .*; nothing of it was run"):
        read_released(path, small / "decoder.pkl")
    assert not (tmp_path / "canary").exists()
    torch.load(path, weights_only=False)  # what everybody else does with such a file
    assert (tmp_path / "canary").exists()


def test_a_missing_file_is_said_with_its_address(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decoder must be .*https://\S+/decoder\.pkl"):
        read_released(small / "encoder.pkl", tmp_path / "decoder.pkl")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_cut_download_is_refused(small: Path, tmp_path: Path, share: float) -> None:
    data = (small / "encoder.pkl").read_bytes()
    (tmp_path / "encoder.pkl").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"encoder\.pkl must be a model that torch\.save wrote"):
        read_released(tmp_path / "encoder.pkl", small / "decoder.pkl")


@settings(max_examples=60)
@given(st.data())
def test_flipped_bits_in_the_description_give_an_error_or_a_model(
    small: Path, data: st.DataObject
) -> None:
    path = small / "encoder.pkl"
    whole = path.read_bytes()
    end = whole.index(b"PK", 4)  # data.pkl is the first member
    place = data.draw(st.integers(0, end))
    try:
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ (1 << data.draw(st.integers(0, 7)))]))
        with contextlib.suppress(ValueError):
            assert isinstance(read(small).load(), DVAE)
    finally:
        path.write_bytes(whole)
