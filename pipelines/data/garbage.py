"""Removing the attempts that no commit names, never one that a commit may still name.

An attempt is garbage if its shard has a commit record, and the record names another attempt.
Records are created once and never removed or replaced. So once a shard has one, no other attempt of
it can ever be named: not by a worker that was held up for hours and wakes after this, not by two
drivers at once, and not by a request that reaches S3 late. Attempts of a shard without a record are
left alone, however old they are, because one of them may be the one that is committed next; when
the dataset is sealed, every shard has a record. No clock and no lease takes part in the argument.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.data.stage import ATTEMPTS, BEGUN, COMMITS, MANIFEST, read_commit
from pipelines.data.storage import Entry, Location


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was removed."""

    files: int
    bytes: int


def collect(place: Location) -> Collected:
    """Remove the attempts that can never count, and a sealed dataset's temporary files and marks.

    Raises plan.DamagedFile, before anything is removed, if a commit record cannot be read.
    """
    doomed = list(garbage(place))
    for entry in doomed:
        (place / entry.name).delete()
    return Collected(files=len(doomed), bytes=sum(entry.bytes for entry in doomed))


def garbage(place: Location) -> Iterator[Entry]:
    """The files that `collect` removes."""
    # One listing tells of files and of records: what is committed later waits.
    files = place.list()
    records = {entry.name for entry in files if entry.name.startswith(f"{COMMITS}/")}
    sealed = any(entry.name == MANIFEST for entry in files)
    attempts = sum(bool(shard_of(entry.name)) for entry in files)
    if sealed and attempts == 2 * len(records) and not any(_is_for_now(e.name) for e in files):
        return  # each record names two files, which are there: none is left over
    commits = {
        name: read_commit(place / name)
        for name in sorted(records)
        if name.endswith(".json") and not is_temporary(name)
    }
    named = {name for commit in commits.values() for name in (commit.file, commit.dropped_file)}
    committed = {commit.shard for commit in commits.values()}
    for entry in files:
        if _is_for_now(entry.name):
            # A killed writer's, of a record or of a report; all records are there if it is sealed.
            if sealed:
                yield entry
        elif shard_of(entry.name) in committed and entry.name not in named:
            yield entry


def shard_of(name: str) -> str:
    """The shard that an attempt's file is of; empty for any other file."""
    folder, _, file = name.partition("/")
    is_attempt = folder == ATTEMPTS and file.endswith(".parquet")
    return attempt_of(file).rpartition(".")[0] if is_attempt else ""


def attempt_of(name: str) -> str:
    """What the two files of one attempt have in common."""
    return name.removesuffix(".parquet").removesuffix(".dropped")


def _is_for_now(name: str) -> bool:
    """True for what nobody asks for once the dataset is sealed."""
    return is_temporary(name) or name.startswith(f"{BEGUN}/")


def is_temporary(name: str) -> bool:
    """True for what a write to the local disk leaves when it is killed before its last step."""
    file = name.rpartition("/")[2]
    return file.startswith(".") and file.endswith(".tmp")
