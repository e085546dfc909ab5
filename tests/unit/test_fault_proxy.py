"""The proxy itself: it can cause each fault, a plain client sees it, and our S3 survives it."""

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ReadTimeoutError

from pipelines.data import s3
from tests.chaos.fault_proxy import KINDS, FaultPlan, FaultProxy
from tests.fixtures.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

BODY = bytes(range(256)) * 40
ALWAYS = 10**9


@pytest.fixture
def proxy(s3_server: S3Server, bucket: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.url) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Any:
    """boto3 without retries, one second of patience."""
    return boto3.client(
        "s3",
        endpoint_url=proxy.url,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(connect_timeout=1, read_timeout=1, retries={"total_max_attempts": 1}),
    )


def only(kind: str, **known: Any) -> FaultPlan:
    return FaultPlan(rates={kind: 1.0}, in_a_row=ALWAYS, **known)


def is_there(server: S3Server, bucket: str, key: str) -> bool:
    return "Contents" in server.client().list_objects_v2(Bucket=bucket, Prefix=key)


def test_without_faults_it_is_the_server(client: Any, bucket: str, proxy: FaultProxy) -> None:
    client.put_object(Bucket=bucket, Key="a", Body=BODY)
    assert client.get_object(Bucket=bucket, Key="a")["Body"].read() == BODY
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=bucket, Key="a", Body=b"", IfNoneMatch="*")
    assert [o["Key"] for o in client.list_objects_v2(Bucket=bucket)["Contents"]] == ["a"]
    assert proxy.counts == {"passed": 4}


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("error_500", "InternalError"),
        ("error_503", "ServiceUnavailable"),
        ("slow_down", "SlowDown"),
    ],
)
def test_errors_are_those_of_s3(
    client: Any, bucket: str, proxy: FaultProxy, s3_server: S3Server, kind: str, code: str
) -> None:
    proxy.plan = only(kind)
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=bucket, Key="a", Body=BODY)
    assert caught.value.response["Error"]["Code"] == code
    assert not is_there(s3_server, bucket, "a")
    assert proxy.counts == {kind: 1}


@pytest.mark.parametrize(
    ("kind", "done"),
    [("reset", False), ("cut_request", False), ("lost_answer", True), ("stall", False)],
)
def test_a_broken_connection_says_nothing_about_what_was_done(
    client: Any, bucket: str, proxy: FaultProxy, s3_server: S3Server, kind: str, done: bool
) -> None:
    proxy.plan = only(kind)
    with pytest.raises(BotoCoreError):
        client.put_object(Bucket=bucket, Key="a", Body=BODY)
    assert is_there(s3_server, bucket, "a") == done
    assert proxy.counts == {kind: 1}


def test_a_late_request_is_done_after_its_client_has_given_up(
    client: Any, bucket: str, proxy: FaultProxy, s3_server: S3Server
) -> None:
    proxy.plan = only("late")
    with pytest.raises(ReadTimeoutError):
        client.put_object(Bucket=bucket, Key="a", Body=BODY)
    proxy.plan = FaultPlan()
    while not is_there(s3_server, bucket, "a"):  # the test's time limit ends a proxy that forgets
        pass


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_is_cut_anywhere(
    client: Any, bucket: str, proxy: FaultProxy, s3_server: S3Server, seed: int
) -> None:
    s3_server.client().put_object(Bucket=bucket, Key="a", Body=BODY)
    proxy.plan = only("cut_answer", seed=seed)
    try:
        seen = client.get_object(Bucket=bucket, Key="a")["Body"].read()
    except BotoCoreError:
        return
    assert seen != BODY  # a plain client may even believe a head that was cut


def test_latency_only_costs_time(client: Any, bucket: str, proxy: FaultProxy) -> None:
    proxy.plan = only("latency")
    client.put_object(Bucket=bucket, Key="a", Body=BODY)
    assert client.get_object(Bucket=bucket, Key="a")["Body"].read() == BODY
    assert proxy.counts == {"latency": 2}


def test_a_plan_says_the_same_again_and_another_seed_something_else() -> None:
    rates = dict.fromkeys(KINDS, 0.1)
    whats = [(f"GET /{number}", nth) for number in range(99) for nth in (1, 2)]
    first, again, other = (
        [FaultPlan(seed=seed, rates=rates).draw(*what) for what in whats] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert {kind for kind, _ in first} == set(KINDS)
    with pytest.raises(ValueError, match="must be among"):
        FaultPlan(rates={"earthquake": 1.0})


@pytest.fixture
def our_s3(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`pipelines.data.s3` behind the proxy, with little patience."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    for name, value in {
        "CONNECT_TIMEOUT_S": 0.25,
        "READ_TIMEOUT_S": 0.25,
        "FIRST_PAUSE_S": 0.001,
        "LONGEST_PAUSE_S": 0.01,
    }.items():
        monkeypatch.setattr(s3, name, value)
    s3.client.cache_clear()
    yield
    s3.client.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_our_s3_survives_each_fault_of_every_call(
    our_s3: None, bucket: str, proxy: FaultProxy, kind: str
) -> None:
    times = 1 if kind in ("stall", "late", "latency") else 3
    proxy.forget(FaultPlan(rates={kind: 1.0}, in_a_row=times, seed=1))
    assert s3.create(bucket, "a", BODY)
    assert not s3.create(bucket, "a", b"other")
    found = s3.get(bucket, "a")
    assert found.data == BODY
    assert s3.swap(bucket, "a", b"new", found.version)
    assert not s3.swap(bucket, "a", b"newer", found.version)
    s3.put(bucket, "b", BODY)
    assert s3.exists(bucket, "b")
    assert not s3.exists(bucket, "c")
    assert [(key, size) for key, size, _ in s3.listing(bucket, "")] == [("a", 3), ("b", len(BODY))]
    s3.delete(bucket, "b")
    assert proxy.counts[kind] >= 8 * times


@pytest.mark.parametrize("seed", range(10))
def test_a_cut_answer_is_never_believed(
    our_s3: None, bucket: str, proxy: FaultProxy, seed: int
) -> None:
    s3.put(bucket, "a/b", BODY)
    proxy.forget(FaultPlan(rates={"cut_answer": 1.0}, in_a_row=3, seed=seed))
    assert s3.get(bucket, "a/b").data == BODY
    assert [key for key, _, _ in s3.listing(bucket, "a/")] == ["a/b"]


def test_a_store_that_is_away_for_long_is_named(
    our_s3: None, bucket: str, proxy: FaultProxy
) -> None:
    proxy.plan = only("slow_down")
    with pytest.raises(ConnectionError, match=r"gave up after 8 attempts.*SlowDown"):
        s3.get(bucket, "a")
    assert proxy.counts == {"slow_down": s3.ATTEMPTS}
