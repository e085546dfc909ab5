"""Tars of strangers: each way to be bad is refused in words, and nothing is ever extracted."""

import io
import tarfile
from pathlib import Path

import pytest

from pipelines.data.archive import ArchiveLimits, read_members

LIMITS = ArchiveLimits(max_members=10, max_member_bytes=4096)


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes], tar_format: int) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


def member(name: str, content: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_plain_members_come_in_order(tmp_path: Path, tar_format: int) -> None:
    path = tar_of(
        tmp_path / "a.tar",
        member("a.txt", b"1" * 600, mtime=1.5),  # a fraction makes an extended header
        member("b.txt", b"", mtime=2.5),
        tar_format=tar_format,
    )
    assert list(read_members(path, LIMITS)) == [("a.txt", b"1" * 600), ("b.txt", b"")]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (member("../x"), "names within itself"),
        (member("/etc/x"), "names within itself"),
        (member("a\\..\\x"), "names within itself"),
        (member("x", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "plain files only"),
        (member("x", b"", type=tarfile.LNKTYPE, linkname="good.txt"), "plain files only"),
        (member("x", b"", type=tarfile.CHRTYPE), "plain files only"),
        (member("x", b"", type=tarfile.FIFOTYPE), "plain files only"),
        (member("x", b"", type=tarfile.DIRTYPE), "plain files only"),
        (member("x", type=tarfile.GNUTYPE_SPARSE), "plain files only"),
        (member("x", b"1" * 5000), "at most 4,096 bytes"),
        (member("good.txt"), "twice"),
        (member("n" * 150), "extended header that sets 'path='"),
        (member("x", b"1", pax_headers={"GNU.sparse.map": "0,1"}), "sets 'GNU.sparse'"),
    ],
)
def test_a_bad_member_is_refused(
    tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes], says: str
) -> None:
    good = member("good.txt")
    path = tar_of(tmp_path / "a.tar", good, bad, tar_format=tarfile.PAX_FORMAT)
    with pytest.raises(ValueError, match=says):
        list(read_members(path, LIMITS))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    members = [member(f"{number}.txt") for number in range(11)]
    path = tar_of(tmp_path / "a.tar", *members, tar_format=tarfile.USTAR_FORMAT)
    with pytest.raises(ValueError, match="at most 10 members"):
        list(read_members(path, LIMITS))


@pytest.mark.parametrize("kept", [100, 512, 700, 1024, 1536])
def test_a_cut_tar_is_refused(tmp_path: Path, kept: int) -> None:
    path = tar_of(
        tmp_path / "a.tar", member("a"), member("b", b"2"), tar_format=tarfile.USTAR_FORMAT
    )
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="cut off"):
        list(read_members(path, LIMITS))


def test_a_bad_checksum_is_no_end_of_the_archive(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", member("a"), member("b"), tar_format=tarfile.USTAR_FORMAT)
    content = bytearray(path.read_bytes())
    content[1024] ^= 1  # the second header's name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad checksum"):
        list(read_members(path, LIMITS))
