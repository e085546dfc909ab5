"""img2dataset's own fetching and resizing, for lists whose every URL is trusted.

Nothing of the wall holds here: file:// is read, inner addresses are asked, redirects go anywhere,
and bytes, total time and pixels have no cap before decoding.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from typing import Any

from pipelines.data.causes import reason_said
from pipelines.data.collapse import CollapseWatch
from pipelines.data.fetch import FetchConfig
from pipelines.data.resize import PNG_COMPRESSION, ResizeConfig, Resized
from pipelines.data.url_vetting import AGENT, OPT_OUT


def img2dataset_results(
    urls: Sequence[str], fetch: FetchConfig, resize: ResizeConfig, watch: CollapseWatch
) -> list[dict[str, Any]]:
    """For each URL the columns of a stored picture, or reason and detail."""
    # Its albumentations asks the internet for a newer version.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # noqa: TID251  # a worker of any cluster
    from img2dataset.downloader import download_image_with_retry
    from img2dataset.resizer import Resizer

    resizer = Resizer(
        image_size=resize.short_side,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_format=resize.encoding,
        encode_quality=PNG_COMPRESSION if resize.encoding == "png" else resize.quality,
        max_image_area=resize.max_pixels,
    )

    def download(url: str) -> tuple[int, io.BytesIO | None, str | None]:
        row = (0, url)
        return download_image_with_retry(row, fetch.timeout_s, fetch.retries, AGENT, OPT_OUT)

    results = []
    with ThreadPool(fetch.concurrency) as pool:
        # In slices, so that no more bodies than open requests are in memory.
        for start in range(0, len(urls), fetch.concurrency):
            for _, body, error in pool.map(download, urls[start : start + fetch.concurrency], 1):
                reason = "" if body is not None else reason_said(error or "")
                watch.saw(reason)
                results.append(_resized(resizer, body) if body else _lost(reason))
    return results


def _resized(resizer: Any, body: io.BytesIO) -> dict[str, Any]:
    sha256 = hashlib.sha256(body.getbuffer()).hexdigest()
    image, width, height, original_width, original_height, error = resizer(body)
    if error is not None:
        return _lost("too_many_pixels" if error == "image area too large" else "broken_picture")
    resized = Resized(
        image=image,
        width=width,
        height=height,
        original_width=original_width,
        original_height=original_height,
    )
    return resized.columns(sha256)


def _lost(reason: str) -> dict[str, Any]:
    return {"reason": reason, "detail": ""}
