"""The report's histograms and its table of hosts, of sampled rows."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from pipelines.data.page import short
from pipelines.data.report_sampling import Sampled
from pipelines.data.row_rules import detector

WIDTH, HEIGHT = 480.0, 130.0
MAX_BARS = 12
LANGUAGE_CAPTIONS = 2000  # 0.1 s
LANGUAGE_LETTERS = 20  # cld3 guesses at shorter ones
TOP_HOSTS = 12
HALF_OCTAVE = 0.5  # width of a bar of the aspect ratio


def charts(sampled: Sampled) -> list[dict[str, Any]]:
    """Size, aspect, caption length, language and, if there is one, the split of kept rows."""
    rows, total = sampled.kept, sampled.manifest.rows_out
    if not rows:
        return []
    note = "of all rows" if len(rows) == total else f"of {len(rows):,} of {total:,} rows"
    sides = [(row["original_width"], row["original_height"]) for row in rows]
    captions = [row["caption"] for row in rows]
    found = [
        ("Shorter side of the original, pixels", note, whole_bins([min(side) for side in sides])),
        ("Aspect ratio, width to height", note, _aspects(sides)),
        ("Words in a caption", note, whole_bins([len(text.split()) for text in captions])),
        ("Letters and signs in a caption", note, whole_bins([len(text) for text in captions])),
        ("Language of captions, by cld3", _language_note(captions), _languages(captions)),
    ]
    if "split" in rows[0]:
        found.append(("Split", note, Counter(str(row["split"]) for row in rows).most_common()))
    return [{"title": title, "note": said, "bars": bars(counts)} for title, said, counts in found]


def whole_bins(values: Sequence[int]) -> list[tuple[str, int]]:
    """Whole-number bins of equal width; the last one holds all above the 99th percentile."""
    low, high = min(values), int(np.percentile(values, 99, method="higher"))
    step = max(1, -(-(high - low + 1) // MAX_BARS))
    edges = list(range(low, high + 1, step))
    counts = np.bincount(
        np.minimum((np.array(values) - low) // step, len(edges) - 1), minlength=len(edges)
    )
    labels = [f"{edge}" if step == 1 else f"{edge}–{edge + step - 1}" for edge in edges]
    if max(values) >= edges[-1] + step:
        labels[-1] = f"{edges[-1]}+"
    return [(label, int(count)) for label, count in zip(labels, counts, strict=True)]


def bars(counts: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Places in a 480 × 170 chart."""
    highest, width = max(count for _, count in counts), WIDTH / max(len(counts), 4)
    return [
        {
            "x": round(index * width + 3, 1),
            "y": round(16 + HEIGHT * (1 - count / highest), 1),
            "width": round(width - 6, 1),
            "height": round(HEIGHT * count / highest, 1),
            "middle": round((index + 0.5) * width, 1),
            "count": f"{count:,}",
            "label": short(label),
        }
        for index, (label, count) in enumerate(counts)
    ]


def hosts(samples: Sequence[Sampled]) -> list[dict[str, Any]]:
    """The hosts with most sampled pairs: kept at the end, dropped on the way, most often why."""
    kept = Counter(_host(row.get("url")) for row in samples[-1].kept)
    dropped: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    for sample in samples:
        for row in sample.dropped:
            host = _host(row["url"])
            dropped[host] += 1
            reasons.setdefault(host, Counter())[row["reason"]] += 1
    return [
        {
            "host": short(host),
            "kept": kept[host],
            "dropped": dropped[host],
            "percent": round(100 * kept[host] / count, 1),
            "reason": reasons[host].most_common(1)[0][0] if host in reasons else "",
        }
        for host, count in (kept + dropped).most_common(TOP_HOSTS)
    ]


def _host(url: str | None) -> str:
    try:
        return urlsplit(url or "").hostname or "(none)"
    except ValueError:
        return "(not a URL)"


def _aspects(sides: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
    """Half octaves around 1:1."""
    found = Counter(
        max(-4, min(4, round(math.log2(max(w, 1) / max(h, 1)) / HALF_OCTAVE))) for w, h in sides
    )
    ends: dict[int, Callable[[str], str]] = {-4: "≤ {}".format, 4: "≥ {}".format}
    return [
        (ends.get(step, str)(f"{2 ** (step * HALF_OCTAVE):.2g}"), found[step])
        for step in range(min(found), max(found) + 1)
    ]


def _languages(captions: Sequence[str]) -> list[tuple[str, int]]:
    found: Counter[str] = Counter()
    for caption in captions[:LANGUAGE_CAPTIONS]:
        if sum(letter.isalpha() for letter in caption) < LANGUAGE_LETTERS:
            found["short"] += 1
            continue
        guess = detector().FindLanguage(caption)
        found[guess.language if guess.is_reliable else "unsure"] += 1
    rest = found.most_common()[MAX_BARS - 1 :]
    counts = found.most_common(MAX_BARS - 1)
    return [*counts, ("others", sum(count for _, count in rest))] if rest else counts


def _language_note(captions: Sequence[str]) -> str:
    return (
        f"of {min(len(captions), LANGUAGE_CAPTIONS):,} captions; short: fewer than "
        f"{LANGUAGE_LETTERS} letters, unsure: not reliable"
    )
