"""Places on disk and in a real S3 server: one behaviour."""

import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.data import s3
from pipelines.data.storage import Location, refuse_secrets
from tests.fixtures.s3_server import S3Server


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    if request.param == "local":
        yield Location(tmp_path / "data")
    else:
        yield Location(f"s3://{request.getfixturevalue('bucket')}/some/data")


def test_a_location_reads_as_it_was_written() -> None:
    there = Location("s3://bucket/a//b/") / "c.json"
    assert (str(there), there.name, there.suffix) == ("s3://bucket/a/b/c.json", "c.json", ".json")
    assert there.resolve() == there
    assert pickle.loads(pickle.dumps(there)) == there
    assert len({there, Location(str(there))}) == 1
    here = Location("runs//x/../raw")
    assert str(here) == str(Path("runs//x/../raw"))
    assert os.fspath(here / "a") == str(Path("runs//x/../raw") / "a")
    with pytest.raises(ValueError, match="must be on the local disk"):
        os.fspath(there)


@pytest.mark.parametrize(
    "text", ["s3://", "s3://bucket", "s3:///key", "s3://b!/x", "s3://bucket/../x", "gs://b/x"]
)
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        Location(text)


def test_a_path_that_lost_a_slash_is_refused_not_made_a_directory() -> None:
    with pytest.raises(ValueError, match="must be local or s3://"):
        Location(Path("s3://bucket/x"))


@pytest.mark.parametrize(
    "secret", ["s3://AKIAIOSFODNN7EXAMPLE:key@bucket/x", "http://me:word@host", "ASIA" + "Q" * 16]
)
def test_credentials_in_a_config_are_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="must not hold credentials") as refusal:
        refuse_secrets("output", {"a": [{"b": secret}]})
    assert secret not in str(refusal.value)
    refuse_secrets("output", {"a": ["me@example.org", "s3://bucket/x", 3]})


def test_a_file_is_whole_or_absent(place: Location) -> None:
    file = place / "commits" / "1.json"
    assert not file.exists()
    with pytest.raises(FileNotFoundError):
        file.read()
    assert file.create_once(b"first")
    assert not file.create_once(b"second")
    assert file.read() == b"first"
    file.replace(b"third")
    (place / "attempts" / "x.parquet").put(b"1234567")
    assert [(e.name, e.bytes) for e in place.list()] == [
        ("attempts/x.parquet", 7),
        ("commits/1.json", 5),
    ]
    file.delete()
    file.delete()
    assert not file.exists()
    assert (place / "nothing").list() == []


def test_of_many_writers_at_once_one_wins(place: Location) -> None:
    for round_number in range(3):
        file = place / f"{round_number}.json"
        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(lambda i, file=file: file.create_once(b"by %d" % i), range(6)))
        assert sum(won) == 1
        assert file.read() == b"by %d" % won.index(True)


def test_an_answer_that_was_lost_is_no_defeat(bucket: str) -> None:
    file = Location(f"s3://{bucket}/a/record.json")
    assert file.create_once(b"mine")
    assert file.create_once(b"mine")  # as the retry after a lost acknowledgement finds it
    assert not file.create_once(b"theirs")


def test_an_object_is_swapped_only_at_its_version(bucket: str) -> None:
    assert s3.create(bucket, "a/lease", b"one")
    version = s3.get(bucket, "a/lease").version
    assert s3.swap(bucket, "a/lease", b"two", version)
    assert not s3.swap(bucket, "a/lease", b"three", version)
    assert s3.get(bucket, "a/lease").data == b"two"
    assert not s3.swap(bucket, "a/absent", b"x", version)


def test_a_listing_has_more_than_a_page(bucket: str, s3_server: S3Server) -> None:
    place = Location(f"s3://{bucket}/many")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: (place / f"{i:04d}").put(b"x"), range(1005)))
    assert [entry.name for entry in place.list()] == [f"{i:04d}" for i in range(1005)]


def test_a_missing_bucket_is_one_clear_line(bucket: str) -> None:
    with pytest.raises(ValueError, match="the bucket no-such-bucket must exist"):
        Location("s3://no-such-bucket/x").create_once(b"x")


def test_wrong_and_missing_credentials_are_one_clear_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3.client.cache_clear()
    with pytest.raises(ValueError, match="refused the credentials"):
        Location(f"s3://{bucket}/x").read()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    s3.client.cache_clear()
    with pytest.raises(ValueError, match="must have credentials, found none"):
        Location(f"s3://{bucket}/x").read()


def test_a_store_that_is_away_is_given_up_with_the_cause(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    s3.client.cache_clear()
    with pytest.raises(ConnectionError, match="gave up after 8 attempts"):
        Location(f"s3://{bucket}/x").read()


FULL = """
import resource, sys
from pipelines.data.storage import Location
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
place = Location(sys.argv[1])
assert place.create_once(b"x" * 900)
for write in ((place.replace), (Location(sys.argv[1] + ".new").put)):
    try:
        write(b"y" * 2000)
    except OSError as error:
        print(error.errno)
"""


def test_a_full_disk_harms_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "file")], capture_output=True, text=True
    )
    assert done.stdout == "27\n27\n", done.stderr  # EFBIG, as ENOSPC is raised
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"x" * 900)]
