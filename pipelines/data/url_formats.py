"""The files that URL lists come in, each read to the columns `url` and `caption`."""

import fnmatch
import glob
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from pipelines.data.bad_files import BadFile, read_parquet_list
from pipelines.data.storage import Location

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


def list_files(place: Location) -> list[Location]:
    """The files that a path, a directory or a pattern means, in the order of their names."""
    if place.is_s3:
        found = _list_s3(place)
    elif place.path.is_file():
        return [place]
    elif place.path.is_dir():
        found = [Location(path) for path in place.path.iterdir() if _is_list(path.name)]
    else:
        paths = map(Path, glob.glob(str(place), recursive=True))
        found = [Location(path) for path in paths if path.is_file()]
    if not found:
        raise ValueError(f"the URL list must be a file, but there is none at {place}")
    return sorted(found, key=str)


def _is_list(name: str) -> bool:
    return Path(name).suffix in FORMATS and not name.startswith(".")


def _list_s3(place: Location) -> list[Location]:
    bucket, key = place.object_name()
    if "*" not in key:
        if place.exists():
            return [place]
        return [place / e.name for e in place.list() if "/" not in e.name and _is_list(e.name)]
    folder = Location(f"s3://{bucket}/{key[: key.index('*')]}-".rpartition("/")[0])
    pattern = str(place).removeprefix(f"{folder}/").split("/")
    return [folder / e.name for e in folder.list() if _matches(e.name.split("/"), pattern)]


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """As on disk, but for "**": a star is a part of one name, and of none that is hidden."""
    pairs = zip(parts, pattern, strict=False)
    return len(parts) == len(pattern) and all(
        fnmatch.fnmatchcase(part, wanted) and not part.startswith(".") for part, wanted in pairs
    )


def read_pairs(file: Location, columns: UrlColumns) -> pa.Table:
    """The pairs of one file, nothing where a row has nothing: such a row is dropped later, and no
    reason to refuse a list. Raises BadFile with the file and, where there are lines, the line.
    """
    with _at_hand(file) as path:
        try:
            table = _read_file(path, file, columns)
        except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError) as error:
            place = f"(line {line}) " if (line := _bad_line(path)) else ""
            fault = f"{place}must be a readable {path.suffix} URL list"
            raise BadFile(file, fault, error) from error
    missing = [name for name in columns.names if name not in table.column_names]
    if missing:
        raise BadFile(
            file,
            f"must have the columns {columns.url} and {columns.caption}, but "
            f"{' and '.join(missing)} is missing; it has {', '.join(table.column_names) or 'none'}"
            " (--url-column and --caption-column name others)",
        )
    texts = [_as_text(table, name, file) for name in columns.names]
    return pa.table(texts, schema=PAIR)


@contextmanager
def _at_hand(file: Location) -> Iterator[Path]:
    """A file on the local disk: itself, or for a while a copy of one in S3."""
    if not file.is_s3:
        yield file.path
        return
    with tempfile.TemporaryDirectory(prefix="manray-") as folder:
        path = Path(folder) / f"list{file.suffix}"
        path.write_bytes(file.read())
        yield path


def _as_text(table: pa.Table, name: str, file: Location) -> Any:
    try:
        return pc.fill_null(table[name].cast(pa.string()), pa.scalar(""))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BadFile(
            file, f"must have text in the column {name}, got {table[name].type}"
        ) from error


def _read_file(path: Path, file: Location, columns: UrlColumns) -> pa.Table:
    match path.suffix:
        case ".parquet":
            return read_parquet_list(path, file, columns.names)
        case ".csv":
            return _read_delimited(path, columns, ",", names=None)
        case ".tsv":
            return _read_delimited(path, columns, "\t", names=_names_without_header(path, columns))
        case ".jsonl":
            return pa_json.read_json(path)
        case ".json":
            return _read_json(path, file, columns)
        case ".txt":
            return _read_text(path, columns)
    raise ValueError(f"{file} must end in one of {', '.join(FORMATS)}, got {path.suffix!r}")


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


def _read_json(path: Path, file: Location, columns: UrlColumns) -> pa.Table:
    """A list of objects, or of nothing else."""
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise BadFile(file, f"(line {error.lineno}) must be readable .json", error) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadFile(file, f"must be a list of objects with {' and '.join(columns.names)}")
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
