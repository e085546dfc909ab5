"""The files that URL lists come in, each read to the columns `url` and `caption`."""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

FORMATS = (".parquet", ".csv", ".tsv", ".json", ".jsonl", ".txt")
PAIR = pa.schema([("url", pa.string()), ("caption", pa.string())])
SCHEMES = ("http://", "https://")


@dataclass(frozen=True, kw_only=True)
class UrlColumns:
    """What the two columns are called in the list."""

    url: str = "url"
    caption: str = "caption"

    def __post_init__(self) -> None:
        if not self.url or not self.caption or self.url == self.caption:
            raise ValueError(f"two columns must be named, got {self.url!r} and {self.caption!r}")

    @property
    def names(self) -> tuple[str, str]:
        return self.url, self.caption


def list_files(path: Path) -> list[Path]:
    """The files that a path, a directory or a pattern means, in the order of their names."""
    if str(path).startswith(("s3:", "http:", "https:")):
        raise ValueError(f"the URL list must be on a local disk or a mounted one, got {path}")
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in FORMATS and p.name[0] != ".")
    else:
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
    if not found:
        raise ValueError(f"the URL list must be a file, but there is none at {path}")
    return found


def read_pairs(path: Path, columns: UrlColumns) -> pa.Table:
    """The pairs of one file, nothing where a row has nothing: such a row is dropped later, and no
    reason to refuse a list. Raises ValueError with the file and, where there are lines, the line.
    """
    try:
        table = _read_file(path, columns)
    except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError) as error:
        place = f" (line {line})" if (line := _bad_line(path)) else ""
        raise ValueError(
            f"{path}{place} must be a readable {path.suffix} URL list: {error}"
        ) from error
    missing = [name for name in columns.names if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path} must have the columns {columns.url} and {columns.caption}, but "
            f"{' and '.join(missing)} is missing; it has {', '.join(table.column_names) or 'none'}"
            " (--url-column and --caption-column name others)"
        )
    texts = [_as_text(table, name, path) for name in columns.names]
    return pa.table(texts, schema=PAIR)


def _as_text(table: pa.Table, name: str, path: Path) -> Any:
    try:
        return pc.fill_null(table[name].cast(pa.string()), pa.scalar(""))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"{path} must have text in the column {name}, got {table[name].type}"
        ) from error


def _read_file(path: Path, columns: UrlColumns) -> pa.Table:
    match path.suffix:
        case ".parquet":
            names = pq.read_schema(path).names
            wanted = [name for name in columns.names if name in names]
            return pq.read_table(path, columns=wanted if len(wanted) == 2 else None)
        case ".csv":
            return _read_delimited(path, columns, ",", names=None)
        case ".tsv":
            return _read_delimited(path, columns, "\t", names=_names_without_header(path, columns))
        case ".jsonl":
            return pa_json.read_json(path)
        case ".json":
            return _read_json(path, columns)
        case ".txt":
            return _read_text(path, columns)
    raise ValueError(f"{path} must end in one of {', '.join(FORMATS)}, got {path.suffix!r}")


def _read_delimited(
    path: Path, columns: UrlColumns, delimiter: str, names: list[str] | None
) -> pa.Table:
    return pa_csv.read_csv(
        path,
        read_options=pa_csv.ReadOptions(column_names=names, use_threads=False),  # rows have numbers
        parse_options=pa_csv.ParseOptions(
            delimiter=delimiter,
            # Without a header nobody quotes either: a quote is a letter of the caption.
            quote_char='"' if names is None else False,
            newlines_in_values=names is None,
        ),
        convert_options=pa_csv.ConvertOptions(
            column_types={name: pa.string() for name in columns.names}
        ),
    )


def _names_without_header(path: Path, columns: UrlColumns) -> list[str] | None:
    """Conceptual Captions' files are caption TAB url; None if the first line is a header."""
    with path.open(encoding="utf-8") as file:
        first = file.readline().rstrip("\r\n").split("\t")
    if len(first) != 2:
        return None
    if first[1].startswith(SCHEMES):
        return [columns.caption, columns.url]
    return [columns.url, columns.caption] if first[0].startswith(SCHEMES) else None


def _read_json(path: Path, columns: UrlColumns) -> pa.Table:
    """A list of objects, or of nothing else."""
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} (line {error.lineno}) must be readable .json: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must be a list of objects with {' and '.join(columns.names)}")
    names = sorted({name for row in rows for name in row})
    return pa.Table.from_pydict({name: [row.get(name) for row in rows] for name in names})


def _read_text(path: Path, columns: UrlColumns) -> pa.Table:
    """A URL a line, with TAB caption or without one; empty lines are nothing."""
    lines = path.read_text(encoding="utf-8").split("\n")
    pairs = [line.strip().partition("\t")[::2] for line in lines if line.strip()]
    urls, captions = zip(*pairs, strict=True) if pairs else ((), ())
    arrays = [pa.array(list(urls), pa.string()), pa.array(list(captions), pa.string())]
    return pa.table(arrays, names=list(columns.names))


def _bad_line(path: Path) -> int:
    """The first line that is not text or, of JSON lines, no JSON object; 0 if none stands out."""
    if path.suffix == ".parquet":
        return 0
    for number, line in _numbered(path):
        try:
            text = line.decode()
            if path.suffix == ".jsonl" and text.strip() and not isinstance(json.loads(text), dict):
                return number
        except ValueError:
            return number
    return 0


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from enumerate(file, start=1)
