"""Blocks of squares to blocks of codes, on a CPU or a GPU."""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from models.fast_encoder import FastEncoder
from models.stage_one import Encoder, StageOne
from pipelines.data.encoding_config import EncodingConfig
from pipelines.data.picture_blocks import PLACE
from pipelines.data.storage import sha256_file
from pipelines.training.weights import load_stage_one

TOKEN_BLOCK = pa.schema(
    [
        *PLACE,
        pa.field("tokens", pa.large_binary()),  # little-endian uint16 in raster order, all rows
        pa.field("encoder", pa.string()),  # which actor, and its two clocks after this block
        pa.field("busy_seconds", pa.float64()),
        pa.field("seconds", pa.float64()),
    ]
)


class BlockEncoder:
    """Holds the encoder of a dVAE or VQ-VAE: one actor of the pipeline.

    `calls` threads may call it at once. On a GPU two of them keep it busy: while one waits for its
    codes, the other copies its pixels to pinned memory and queues its work behind. Both queue on
    the one default stream, so that the GPU's memory holds one batch's activations.
    """

    def __init__(
        self, dvae: Path, sha256: str, config: EncodingConfig, device: str, threads: int, calls: int
    ) -> None:
        torch.set_num_threads(threads)
        _round_the_same_way_always()
        found = sha256_file(dvae)
        if found != sha256:
            raise ValueError(f"{dvae} must have SHA-256 {sha256} on every node, got {found}")
        self.device = torch.device(device)
        self.model = _encoding_model(dvae, config, self.device)
        side = self.model.config.image_size
        # A call's own: a copy to the GPU reads it while the next call fills the other.
        self.staging: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(calls):
            shape = (config.batch_samples, side, side, 3)
            pinned = self.device.type == "cuda"
            self.staging.put(torch.empty(shape, dtype=torch.uint8, pin_memory=pinned))
        self.name = uuid.uuid4().hex
        self.clock = BusyClock()

    def __call__(self, block: pa.Table) -> pa.Table:
        """A TOKEN_BLOCK of a PICTURE_BLOCK; the pixels end here."""
        with self.clock.call():
            side = self.model.config.image_size
            pixels = np.frombuffer(block["pixels"][0].as_buffer(), np.uint8)
            tokens = self.encode(pixels.reshape(-1, side, side, 3)).tobytes()
        busy, seconds = self.clock.read()
        made = {
            "tokens": [tokens],
            "encoder": [self.name],
            "busy_seconds": [busy],
            "seconds": [seconds],
        }
        places = dict(zip(PLACE.names, block.select(PLACE.names).columns, strict=True))
        return pa.table(places | made, schema=TOKEN_BLOCK)

    @torch.inference_mode()
    def encode(self, squares: np.ndarray) -> np.ndarray:  # (B, S, S, 3) uint8 -> (B, g, g) uint16
        if not len(squares):
            grid = self.model.config.grid
            return np.empty((0, grid, grid), "<u2")
        staging = self.staging.get()
        try:
            # Always a whole batch: kernels are chosen by shape, and some by the shapes before.
            staging[len(squares) :] = 0
            staging.numpy()[: len(squares)] = squares
            pixels = staging.to(self.device, non_blocking=True)
            # The channels are last in memory as they come, which suits the convolutions.
            codes = self.model.encode(pixels.permute(0, 3, 1, 2).float().div_(255))
            # `cpu` waits for the way there too.
            return codes[: len(squares)].cpu().numpy().astype("<u2")
        finally:
            self.staging.put(staging)


class BusyClock:
    """Seconds since its making, and in how many of them at least one call was under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._born = time.monotonic()
        self._busy, self._calls, self._since = 0.0, 0, 0.0

    @contextmanager
    def call(self) -> Iterator[None]:
        with self._lock:
            if not self._calls:
                self._since = time.monotonic()
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self._busy += time.monotonic() - self._since

    def read(self) -> tuple[float, float]:
        """Busy seconds and all seconds."""
        with self._lock:
            now = time.monotonic()
            return self._busy + (now - self._since if self._calls else 0.0), now - self._born


def _encoding_model(dvae: Path, config: EncodingConfig, device: torch.device) -> StageOne:
    model, _ = load_stage_one(dvae)
    del model.decoder  # half of the weights, which encoding does not use
    model = model.to(device)
    assert isinstance(model.encoder, Encoder)
    model.encoder = FastEncoder(model.encoder, config.precision)
    return model


def _round_the_same_way_always() -> None:
    """The process is ours: the kernels must not be chosen by timing, and fp32 must be fp32."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
