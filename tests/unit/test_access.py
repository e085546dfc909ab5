"""Keys, rate limits, policies, repeated requests: what stands before the drawing."""

import asyncio
import hashlib
from pathlib import Path

import numpy as np
import pytest
from starlette.datastructures import Headers

from jobs import serve_keys
from pipelines.sampling.access import Access, AccessSettings, check_exposure, hosts_for
from pipelines.sampling.idempotency import SECONDS_KEPT, Answers
from pipelines.sampling.keys import KeyFile, UnreadableKeys, add_key, read_keys, remove_key
from pipelines.sampling.openai_errors import ApiError
from pipelines.sampling.policies import Policies, PolicySettings
from pipelines.sampling.rate_limits import RateLimits, TokenBuckets


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- keys ---------------------------------------------------------------------------------------


def test_the_file_holds_digests_and_never_a_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    keys = [add_key(file, name) for name in ("ann", "bob")]
    text = file.read_text()
    assert all(key.startswith("sk-manray-") and key not in text for key in keys)
    assert hashlib.sha256(keys[0].encode()).hexdigest() in text
    held = KeyFile(file)
    assert [held.holder(key) for key in keys] == ["ann", "bob"]
    for wrong in ("", keys[0][:-1], keys[0] + "x", keys[0].upper(), "ключ", "\ud800", "a" * 10_000):
        assert held.holder(wrong) is None


def test_keys_come_and_go_while_the_file_is_in_use(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    old = add_key(file, "ann")
    held = KeyFile(file)
    new = add_key(file, "ann-2")
    assert (held.holder(old), held.holder(new)) == ("ann", "ann-2")
    remove_key(file, "ann")
    assert (held.holder(old), held.holder(new)) == (None, "ann-2")


@pytest.mark.parametrize("text", ["ann", "ann xyz", f"ann {'0' * 64}\nann {'1' * 64}"])
def test_a_file_that_breaks_lets_nobody_in_until_it_is_mended(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    key = add_key(file, "ann")
    held, good = KeyFile(file), file.read_bytes()
    file.write_text(text)
    with pytest.raises(UnreadableKeys):
        held.holder(key)
    file.unlink()
    with pytest.raises(UnreadableKeys):
        held.holder(key)
    file.write_bytes(good)
    assert held.holder(key) == "ann"


def test_no_keys_are_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# nobody\n")
    with pytest.raises(ValueError, match="at least one key"):
        KeyFile(tmp_path / "keys")
    with pytest.raises(FileNotFoundError):
        KeyFile(tmp_path / "none")


def test_the_verb_makes_lists_and_ends_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    assert serve_keys.main(["add", "--keys", str(file), "--name", "ann"]) == 0
    key = capsys.readouterr().out.strip()
    assert KeyFile(file).holder(key) == "ann"
    assert serve_keys.main(["add", "--keys", str(file), "--name", "ann"]) == 2
    assert "remove it first" in capsys.readouterr().err
    assert serve_keys.main(["add", "--keys", str(file), "--name", "a b"]) == 2
    assert serve_keys.main(["list", "--keys", str(file)]) == 0
    assert capsys.readouterr().out == "ann\n"
    assert serve_keys.main(["remove", "--keys", str(file), "--name", "ann"]) == 0
    assert read_keys(file) == {}


@pytest.mark.parametrize(
    ("authorization", "who"),
    [
        ("Bearer KEY", "ann"),
        ("bearer KEY", "ann"),
        ("Bearer  KEY", "ann"),
        ("Bearer", None),
        ("Bearer ", None),
        ("Basic KEY", None),
        ("KEY", None),
        ("", None),
    ],
)
def test_who_asks_is_in_one_header(tmp_path: Path, authorization: str, who: str | None) -> None:
    key = add_key(tmp_path / "keys", "ann")
    access = Access(AccessSettings(keys=tmp_path / "keys"))
    headers = Headers({"authorization": authorization.replace("KEY", key)})
    if who:
        assert access.holder(headers) == who
    else:
        with pytest.raises(ApiError) as caught:
            access.holder(headers)
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


# --- where from ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "host.example"])
def test_others_are_not_let_in_without_keys_unless_that_is_said(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow-without-keys"):
        check_exposure(host, AccessSettings(), allow_without_keys=False)
    check_exposure(host, AccessSettings(), allow_without_keys=True)
    check_exposure(host, AccessSettings(keys=tmp_path), allow_without_keys=False)
    assert hosts_for(host, AccessSettings().hosts) == ()
    assert hosts_for(host, ("a.example",)) == ("a.example",)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_keys_but_its_own_name(host: str) -> None:
    check_exposure(host, AccessSettings(), allow_without_keys=False)
    assert hosts_for(host, AccessSettings().hosts) == AccessSettings().hosts


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "127.0.0.1:8000"}, None),
        ({"host": "LOCALHOST"}, None),
        ({"host": "[::1]:8000"}, None),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, None),
        ({"host": "evil.example"}, "unknown_host"),
        ({"host": "127.0.0.1.evil.example:8000"}, "unknown_host"),
        ({"host": "localhost@evil.example"}, "unknown_host"),
        ({}, "unknown_host"),
        ({"host": "127.0.0.1:8000", "origin": "http://evil.example"}, "foreign_origin"),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:9000"}, "foreign_origin"),
        ({"host": "127.0.0.1:8000", "origin": "http://localhost:8000"}, "foreign_origin"),
        ({"host": "127.0.0.1:8000", "origin": "null"}, "foreign_origin"),
    ],
)
def test_foreign_names_and_foreign_pages_are_turned_away(
    headers: dict[str, str], code: str | None
) -> None:
    access = Access(AccessSettings())
    if code is None:
        access.check_host(Headers(headers))
    else:
        with pytest.raises(ApiError) as caught:
            access.check_host(Headers(headers))
        assert caught.value.code == code


def test_a_proxy_may_pass_on_another_host_than_the_page_was_loaded_from() -> None:
    access = Access(AccessSettings(hosts=("pictures.example", "inner")))
    access.check_host(Headers({"host": "inner:8000", "origin": "https://pictures.example"}))


# --- how often ----------------------------------------------------------------------------------


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    clock = Clock()
    buckets = TokenBuckets(RateLimits(pictures_per_minute=60, burst=10), clock)
    assert buckets.take("ann", 10) == 0
    assert buckets.take("ann", 4) == pytest.approx(4)
    assert buckets.take("bob", 10) == 0  # everybody has their own
    clock.now += 3.9
    assert buckets.take("ann", 4) == pytest.approx(0.1)
    clock.now += 0.1
    assert buckets.take("ann", 4) == 0
    assert buckets.take("ann", 1) == pytest.approx(1)
    buckets.give_back("ann", 4)
    assert buckets.take("ann", 4) == 0
    clock.now += 1e6  # a pause fills it once, not many times
    assert buckets.take("ann", 10) == 0
    assert buckets.take("ann", 1) > 0


def test_over_a_long_time_nobody_gets_more_than_the_rate() -> None:
    clock, rng = Clock(), np.random.default_rng(0)
    buckets = TokenBuckets(RateLimits(pictures_per_minute=120, burst=16), clock)
    drawn = 0
    for _ in range(5000):
        clock.now += float(rng.exponential(0.5))
        wanted = int(rng.integers(1, 17))
        drawn += wanted * (buckets.take("ann", wanted) == 0)
    seconds = clock.now - 1000
    assert 0.9 * 2 * seconds < drawn <= 2 * seconds + 16


def test_the_buckets_of_those_who_left_are_forgotten() -> None:
    clock = Clock()
    buckets = TokenBuckets(RateLimits(pictures_per_minute=60, burst=10), clock)
    for number in range(5000):
        clock.now += 1
        buckets.take(f"key{number}", 1)
    assert len(buckets._full_at) <= 1025


# --- for what -----------------------------------------------------------------------------------


def no_cats(prompt: str) -> str | None:
    return "No cats, please." if "cat" in prompt else None


def no_white(pixels: np.ndarray) -> str | None:
    return "Too white." if pixels.mean() > 200 else None


def broken(value: object) -> str | None:
    raise RuntimeError("secret of the operator")


def careless(value: object) -> bool:
    return False


def test_policies_say_why_not() -> None:
    policies = Policies(
        PolicySettings(prompt=f"{__name__}:no_cats", picture=f"{__name__}:no_white")
    )
    white, black = np.full((8, 8, 3), 255, np.uint8), np.zeros((8, 8, 3), np.uint8)

    async def check() -> None:
        await policies.check_prompt("a dog")
        await policies.check_pictures([black, black])
        with pytest.raises(ApiError, match="No cats") as caught:
            await policies.check_prompt("a cat")
        assert (caught.value.status, caught.value.param) == (400, "prompt")
        assert caught.value.code == "content_policy_violation"
        with pytest.raises(ApiError, match="Too white"):
            await policies.check_pictures([black, white])

    asyncio.run(check())


@pytest.mark.parametrize("name", ["broken", "careless"])
def test_a_policy_that_fails_lets_nothing_pass(name: str) -> None:
    policies = Policies(PolicySettings(prompt=f"{__name__}:{name}"))
    with pytest.raises(ApiError) as caught:
        asyncio.run(policies.check_prompt("a dog"))
    assert (caught.value.status, caught.value.code) == (500, "policy_failed")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["nope", "no.such:thing", f"{__name__}:nope", f"{__name__}:Path"])
def test_a_policy_that_is_not_there_is_said_at_the_start(name: str) -> None:
    if name.endswith("Path"):
        Policies(PolicySettings(prompt=name))  # whatever can be called
        return
    with pytest.raises(ValueError, match="policy must be"):
        Policies(PolicySettings(prompt=name))


# --- the same again -----------------------------------------------------------------------------


def test_a_repeated_key_gets_the_answer_that_was_or_is_being_made() -> None:
    clock, made = Clock(), []

    async def check() -> None:
        answers, let_on = Answers(clock), asyncio.Event()

        async def make() -> bytes:
            made.append(1)
            await let_on.wait()
            return b"%d" % len(made)

        first = [asyncio.create_task(answers.once("ann", "k", b"r", make)) for _ in range(3)]
        await asyncio.sleep(0)
        let_on.set()
        assert await asyncio.gather(*first) == [b"1"] * 3
        assert await answers.once("ann", "k", b"r", make) == b"1"
        assert await answers.once("bob", "k", b"r", make) == b"2"
        with pytest.raises(ApiError) as caught:
            await answers.once("ann", "k", b"other", make)
        assert caught.value.code == "idempotency_key_reused"
        clock.now += SECONDS_KEPT + 1
        assert await answers.once("ann", "k", b"r", make) == b"3"

    asyncio.run(check())


def test_work_ends_when_the_last_of_those_who_wait_has_left_and_failures_are_not_kept() -> None:
    async def check() -> None:
        answers, ended = Answers(), asyncio.Event()

        async def forever() -> bytes:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return b""

        waiting = [asyncio.create_task(answers.once("a", "k", b"r", forever)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.wait({waiting[0]})
        assert not ended.is_set()
        waiting[1].cancel()
        await asyncio.wait({waiting[1]})
        assert ended.is_set()

        async def fail() -> bytes:
            raise ApiError("no")

        async def succeed() -> bytes:
            return b"yes"

        with pytest.raises(ApiError):
            await answers.once("a", "k", b"r", fail)
        assert await answers.once("a", "k", b"r", succeed) == b"yes"

    asyncio.run(check())


def test_answers_are_kept_up_to_a_number_of_bytes() -> None:
    async def check() -> None:
        answers = Answers()

        async def make() -> bytes:
            return bytes(20 * 1024 * 1024)

        for number in range(8):
            await answers.once("a", str(number), b"r", make)
        assert len(answers._entries) <= 5

    asyncio.run(check())
