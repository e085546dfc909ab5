"""What the server tells Prometheus: through Ray's exporter on every node, and on /metrics."""

import asyncio
from dataclasses import asdict
from typing import Any

from pipelines.sampling.fan_out import FanOut
from pipelines.sampling.pieces import PieceSampler

SECONDS_BETWEEN_REPORTS = 2.0
FIRST_PICTURE_BOUNDS = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]


async def report_load(pieces: PieceSampler) -> None:
    """Enter a sampler's load in Ray's metrics for as long as the replica lives."""
    from ray.util.metrics import Counter, Gauge

    busy = Gauge("manray_slots_in_use", "Slots of the batch that draw a picture.")
    fill = Gauge("manray_batch_fill", "Share of the batch's slots in use.")
    waiting = Gauge("manray_pictures_waiting", "Pictures that have no slot yet.")
    tokens = Counter("manray_image_tokens", "Image tokens drawn.")
    cancelled = Counter("manray_pieces_cancelled", "Pieces whose caller left.")
    drawn = left = 0
    while True:
        load = await asyncio.to_thread(pieces.load)
        busy.set(load.busy)
        fill.set(load.busy / load.slots)
        waiting.set(load.waiting)
        _add(tokens, load.drawn - drawn)
        _add(cancelled, pieces.cancelled - left)
        drawn, left = load.drawn, pieces.cancelled
        await asyncio.sleep(SECONDS_BETWEEN_REPORTS)


async def report_requests(metrics: "IngressMetrics", source: FanOut) -> None:
    """Enter an ingress' requests in Ray's metrics for as long as the replica lives."""
    while True:
        metrics.enter(source)
        await asyncio.sleep(SECONDS_BETWEEN_REPORTS)


class IngressMetrics:
    """Of one ingress replica."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._first = Histogram(
            "manray_first_picture_seconds",
            "From a request's arrival to its first picture, whole or partial.",
            boundaries=FIRST_PICTURE_BOUNDS,
        )
        self._requests = Counter("manray_requests", "Requests by outcome.", tag_keys=("outcome",))
        self._wanted = Gauge("manray_slots_wanted", "Slots that requests under way want.")
        self._entered: dict[str, int] = {}
        self._counts = [0] * (len(FIRST_PICTURE_BOUNDS) + 1)
        self._sum = 0.0

    def first_picture(self, seconds: float) -> None:
        """A request got its first picture, whole or partial."""
        self._first.observe(seconds)
        self._counts[sum(seconds > bound for bound in FIRST_PICTURE_BOUNDS)] += 1
        self._sum += seconds

    def text(self, source: FanOut) -> str:
        """Of this replica, in Prometheus' text format."""
        self.enter(source)
        lines = [
            "# HELP manray_slots_wanted Slots that requests under way want.",
            "# TYPE manray_slots_wanted gauge",
            f"manray_slots_wanted {source.load}",
            "# HELP manray_requests_total Requests by outcome.",
            "# TYPE manray_requests_total counter",
        ]
        lines += [
            f'manray_requests_total{{outcome="{name}"}} {count}'
            for name, count in asdict(source.tally).items()
        ]
        name, total = "manray_first_picture_seconds", 0
        lines += [
            f"# HELP {name} From a request's arrival to its first picture, whole or partial.",
            f"# TYPE {name} histogram",
        ]
        bounds = [*map(str, FIRST_PICTURE_BOUNDS), "+Inf"]
        for bound, count in zip(bounds, self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        lines += [f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]
        return "\n".join(lines) + "\n"

    def enter(self, source: FanOut) -> None:
        """Bring Ray's metrics up to date."""
        self._wanted.set(source.load)
        for name, count in asdict(source.tally).items():
            more = count - self._entered.get(name, 0)
            self._entered[name] = count
            if more:
                self._requests.inc(more, tags={"outcome": name})


def _add(counter: Any, more: int) -> None:
    if more:  # Ray refuses to count by zero
        counter.inc(more)
