"""What the codes of a token dataset keep: some pictures beside what stage one makes of them."""

from pathlib import Path
from typing import Any

import numpy as np

from pipelines.data.decode import UnusablePicture, decode_picture
from pipelines.data.page import inline_picture, short
from pipelines.data.report_sampling import first_rows, sampled_shards
from pipelines.data.stage import Manifest
from pipelines.data.storage import sha256_file

PICTURES = 8
SIDE = 256
QUALITY = 85
SMALLEST_SHARP_SIDE = 128


def reconstructions(
    tokens: Manifest, pictured: Manifest | None
) -> tuple[list[dict[str, Any]], str]:
    """The pairs (original, decoded), or none and why."""
    dvae = Path(tokens.sources.get("dvae", ""))
    if pictured is None or not dvae.is_file():
        return [], "The pictures or the model that made the codes are no longer where they were."
    if sha256_file(dvae) != tokens.inputs["dvae"]:
        return [], f"{dvae} is another model than the one that made these codes."
    rows = _rows(tokens, pictured)
    if not rows:
        return [], "None of the sampled rows has both codes and its picture."
    decoded = _decode(dvae, [row["image_tokens"] for row in rows])
    return [
        {
            "caption": short(row["caption"]),
            "sharp": len(made) < SMALLEST_SHARP_SIDE,
            "images": [inline_picture(p, (SIDE, SIDE), QUALITY) for p in (row["square"], made)],
        }
        for row, made in zip(rows, decoded, strict=True)
    ], ""


def _rows(tokens: Manifest, pictured: Manifest) -> list[dict[str, Any]]:
    """One row each of the first keys, with the square that was encoded."""
    found: list[dict[str, Any]] = []
    for shard in sampled_shards(tokens):
        wanted = {row["key"]: row for row in first_rows(tokens, shard, PICTURES)}
        for row in first_rows(pictured, shard, 8 * PICTURES):
            if len(found) == PICTURES:
                return found
            if row["key"] in wanted:
                try:
                    pixels = decode_picture(row["image"])
                except UnusablePicture:
                    continue
                code = wanted[row["key"]]
                top, left, size = (code[f"crop_{name}"] for name in ("top", "left", "size"))
                square = np.ascontiguousarray(pixels[top : top + size, left : left + size])
                found.append(code | {"square": square})
    return found


def _decode(dvae: Path, codes: list[bytes]) -> list[np.ndarray]:
    # Only a report of tokens wants torch; those of the stages before do without its second.
    import torch

    from pipelines.training.weights import load_stage_one

    model, _ = load_stage_one(dvae)
    grid, pictures = model.config.grid, []
    with torch.inference_mode():
        for code in codes:  # one by one: a paper-sized decoder takes about 0.4 GB a picture
            tokens = torch.from_numpy(np.frombuffer(code, "<u2").astype(np.int64))
            pixels = model.decode(tokens.reshape(1, grid, grid))[0]
            pictures.append((pixels * 255).round().byte().permute(1, 2, 0).numpy())
    return pictures
