"""The curve of best of N as a picture: SVG without scripts, fonts or colours from elsewhere."""

import math

from pipelines.evaluation.best_of_n import Curve

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 56, 48
COLOURS = ("#0057b7", "#d1495b", "#00798c")
WORDS = {
    "thumbnails": "16 × 16 pixels, no network",
    "judge": "another contrastive model",
    "reranker": "the reranker itself",
}


def best_of_n_chart(curve: Curve) -> str:
    """Shares with their 95 % intervals over log N; the scale begins below the lowest of them."""
    low = min(
        share - half
        for judge in curve.share
        for share, half in zip(curve.share[judge], curve.half_width[judge], strict=True)
    )
    bottom = max(0.0, math.floor(low * 10) / 10)
    steps = max(1, round((1 - bottom) * 10))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20">Share of {curve.prompts} prompts whose best of N is found among '
        f"{curve.corpus_pictures} pictures, by judge</text>",
    ]
    for step in range(steps + 1):
        value = bottom + step / 10
        y = _y(value, bottom)
        lines.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        )
        lines.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.1f}</text>')
    for pool in curve.pools:
        x = _x(pool, curve.pools)
        lines.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">N = {pool}</text>'
        )
    for number, judge in enumerate(curve.share):
        lines += _line(curve, judge, COLOURS[number % len(COLOURS)], number, bottom)
    return "\n".join([*lines, "</svg>\n"])


def _line(curve: Curve, judge: str, colour: str, number: int, bottom: float) -> list[str]:
    """A judge's line, its intervals (side by side with the others') and its name."""
    marks, points = [], []
    for pool, share, half in zip(
        curve.pools, curve.share[judge], curve.half_width[judge], strict=True
    ):
        x, y = _x(pool, curve.pools) + 4 * (number - 1), _y(share, bottom)
        points.append(f"{x:.1f},{y:.1f}")
        top, foot = _y(min(1.0, share + half), bottom), _y(max(bottom, share - half), bottom)
        marks.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{foot:.1f}" stroke="{colour}"/>'
        )
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
    path = f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
    values = ", ".join(f"{share:.3f}" for share in curve.share[judge])
    name = (
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - BOTTOM - 12 - 18 * number}" text-anchor="end" '
        f'fill="{colour}">{WORDS.get(judge, judge)}: {values}</text>'
    )
    return [path, *marks, name]


def _x(pool: int, pools: tuple[int, ...]) -> float:
    span = math.log(pools[-1] / pools[0]) or 1.0
    return LEFT + 24 + (WIDTH - LEFT - RIGHT - 48) * math.log(pool / pools[0]) / span


def _y(share: float, bottom: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share) / (1 - bottom or 1.0)
