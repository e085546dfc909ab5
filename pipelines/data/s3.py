"""Objects of S3: whole or absent, with conditional writes, timeouts and bounded retries.

Address, region and keys come from where AWS's own tools find them (AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, ~/.aws, the machine's role), never from a config.
"""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import Any, TypeVar

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5.0, 60.0
ATTEMPTS = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0
MAX_OBJECT_BYTES = 5 * 10**9  # of one PutObject: nothing here is uploaded in parts
REFUSED = frozenset(
    {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
)
RETRIED = frozenset({409, 429, 500, 502, 503, 504})  # 409: another conditional write is under way

Result = TypeVar("Result")


class StorageRefused(ValueError):
    """The store cannot be used as it was asked for: keys, rights or the bucket are missing."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """An object as it was read. Both times are the server's, so no clock of ours is compared."""

    data: bytes
    version: str
    """ETag, for a conditional write."""
    age_s: float
    """Seconds since it was written."""


def get(bucket: str, key: str) -> Found:
    """Raises FileNotFoundError if there is none; an answer that is cut off is asked for again."""

    def once() -> Found:
        response = client().get_object(Bucket=bucket, Key=key)
        headers = response["ResponseMetadata"]["HTTPHeaders"]
        _expect(response, "ContentLength", "ETag", "LastModified")
        _expect(headers, "date")
        data = response["Body"].read()
        if len(data) != response["ContentLength"]:
            raise ConnectionError(f"{len(data)} of {response['ContentLength']} bytes came")
        now = parsedate_to_datetime(headers["date"])
        age = (now - response["LastModified"]).total_seconds()
        return Found(data=data, version=response["ETag"], age_s=max(0.0, age))

    return _retry(once, bucket, key)


def exists(bucket: str, key: str) -> bool:
    """True if there is an object of just this name."""
    try:
        _retry(lambda: client().head_object(Bucket=bucket, Key=key), bucket, key)
    except FileNotFoundError:
        return False
    return True


def put(bucket: str, key: str, data: bytes) -> None:
    """Write an object, in the place of an older one if there is one."""
    _check_size(bucket, key, data)
    _retry(lambda: client().put_object(Bucket=bucket, Key=key, Body=data), bucket, key)


def create(bucket: str, key: str, data: bytes) -> bool:
    """Write an object that must not exist yet; False if somebody was first.

    An answer may be lost after the write was done: the next try is then refused, but finds its own
    bytes there, and has won.
    """
    return _put_if(bucket, key, data, IfNoneMatch="*")


def swap(bucket: str, key: str, data: bytes, version: str) -> bool:
    """Replace an object if it still has this version; False if somebody was first."""
    return _put_if(bucket, key, data, IfMatch=version)


def delete(bucket: str, key: str) -> None:
    """Remove an object; fine if there is none."""
    _retry(lambda: client().delete_object(Bucket=bucket, Key=key), bucket, key)


def listing(bucket: str, prefix: str) -> list[tuple[str, int, float]]:
    """Key, bytes and time of writing (Unix seconds) of all objects under a prefix, by key."""
    found: list[tuple[str, int, float]] = []
    more: dict[str, str] = {}
    while True:
        call = partial(_list_page, bucket, prefix, more)
        page = _retry(call, bucket, prefix)
        for item in page.get("Contents", ()):
            found.append((item["Key"], int(item["Size"]), item["LastModified"].timestamp()))
        if not page.get("IsTruncated"):
            return sorted(found)
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _list_page(bucket: str, prefix: str, more: dict[str, str]) -> dict[str, Any]:
    page = dict(client().list_objects_v2(Bucket=bucket, Prefix=prefix, **more))
    _expect(page, "IsTruncated")
    return page


def _expect(answer: Mapping[str, Any], *names: str) -> None:
    """Raise ConnectionError if an answer has not all of these.

    Of an answer that is cut off within its head, botocore 1.44 makes one with an empty body: a
    listing without objects, say.
    """
    if missing := [name for name in names if name not in answer]:
        raise ConnectionError(f"an answer came without {', '.join(missing)}")


@lru_cache(maxsize=1)
def client() -> Any:
    """This process's client; retries are ours, so that every call's are counted in one place."""
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"total_max_attempts": 1},
            max_pool_connections=32,
        ),
    )


def _put_if(bucket: str, key: str, data: bytes, **condition: str) -> bool:
    _check_size(bucket, key, data)
    try:
        _retry(
            lambda: client().put_object(Bucket=bucket, Key=key, Body=data, **condition),
            bucket,
            key,
        )
        return True
    except FileExistsError:
        pass
    except FileNotFoundError:  # If-Match, and the object is gone
        return False
    try:
        return get(bucket, key).data == data
    except FileNotFoundError:
        return False


def _check_size(bucket: str, key: str, data: bytes) -> None:
    if len(data) > MAX_OBJECT_BYTES:
        raise ValueError(
            f"s3://{bucket}/{key} must have at most {MAX_OBJECT_BYTES:,} bytes, got {len(data):,}: "
            "choose fewer rows per shard"
        )


def _retry(call: Callable[[], Result], bucket: str, key: str) -> Result:
    """Call until it works, at most ATTEMPTS times, with pauses of random length between.

    Raises FileNotFoundError, FileExistsError (a condition did not hold), StorageRefused, or
    ConnectionError with the last cause.
    """
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        ParamValidationError,
    )

    where = f"s3://{bucket}/{key}"
    client()  # an address that is none is no fault of the network's
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except NoCredentialsError:
            raise StorageRefused(
                f"{where} must have credentials, found none: set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, a profile in ~/.aws, or a role of the machine"
            ) from None
        except ParamValidationError:
            raise  # ours to mend, not the store's
        except ClientError as error:
            _raise_final(error.response, bucket, where)
            last: Exception = error
        except (BotoCoreError, OSError, ValueError) as error:  # ValueError: of a cut date in a head
            last = error
        if attempt + 1 < ATTEMPTS:
            time.sleep(random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)))
    raise ConnectionError(f"{where}: gave up after {ATTEMPTS} attempts: {last}") from last


def _raise_final(response: dict[str, Any], bucket: str, where: str) -> None:
    """Raise what another try cannot mend."""
    code = str(response["Error"].get("Code", ""))
    status = int(response["ResponseMetadata"]["HTTPStatusCode"])
    if code == "NoSuchBucket":
        raise StorageRefused(f"{where}: the bucket {bucket} must exist, there is none")
    if status == 412:
        raise FileExistsError(f"{where} was written by somebody else")
    if status == 404:
        raise FileNotFoundError(f"{where} does not exist")
    # SlowDown and RequestTimeout come with several statuses.
    if status in RETRIED or code in ("SlowDown", "RequestTimeout", "RequestTimeTooSkewed"):
        return
    if code in REFUSED or status in (401, 403):
        raise StorageRefused(f"{where}: the store refused the credentials ({code or status})")
    raise StorageRefused(f"{where}: the store refused the request ({code}, status {status})")
