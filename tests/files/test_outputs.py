"""What a command would write is checked before it works, never overwrites what it reads, and is never half there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ivtp.errors import ConfigError, OutputError
from ivtp.files.outputs import check_folder, check_output, whole, write_text

NOT_WRITABLE = Path("/proc")
"""A folder that takes no new file, not even from root."""
on_linux = pytest.mark.skipif(not NOT_WRITABLE.is_dir(), reason="needs a read-only folder that root has as well")


def refused(file: Path, **more: object) -> str:
    """The one line."""
    with pytest.raises(ConfigError) as caught:
        check_output(file, "--output", **more)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("--output")
    return text


def test_what_can_be_written_passes_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "old.json")
    before = sorted(tmp_path.iterdir())
    for name in ("new.json", "old.json", "link.json"):
        check_output(tmp_path / name, "--output")
    check_output(None, "--output")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.json").read_text() == "old"


@pytest.mark.parametrize("alias", ["itself", "another way", "symbolic link", "hard link", "link into a folder"])
def test_an_input_is_never_overwritten(tmp_path: Path, alias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = tmp_path / "photo.png"
    photo.write_text("pixels")
    monkeypatch.chdir(tmp_path)
    aliased = tmp_path / "alias.png"
    if alias == "itself":
        aliased = Path("photo.png")
    elif alias == "another way":
        (tmp_path / "folder").mkdir()
        aliased = Path("folder/../photo.png")
    elif alias == "symbolic link":
        aliased.symlink_to(photo)
    elif alias == "hard link":
        aliased.hardlink_to(photo)
    else:
        (tmp_path / "again").symlink_to(tmp_path)
        aliased = tmp_path / "again" / "photo.png"
    assert "would overwrite" in refused(aliased, inputs=[str(photo)])


def test_two_outputs_and_a_checkpoint_do_not_overwrite_each_other(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "would overwrite" in refused(tmp_path / "new.json", inputs=[tmp_path / "new.json"])
    assert "would overwrite" in refused(tmp_path / "config.json", inputs=[tmp_path])
    check_output(tmp_path / "results.json", "--output", inputs=[tmp_path, None, "some/hub-id", "x" * 9999])


def test_folders_devices_loops_and_odd_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "is a folder" in refused(tmp_path / "folder")
    assert "is no regular file" in refused(Path(os.devnull))
    (tmp_path / "sink").symlink_to(os.devnull)
    assert "is no regular file" in refused(tmp_path / "sink")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be written" in refused(tmp_path / "loop")
    assert "does not exist" in refused(tmp_path / "nowhere" / "out.json")
    assert "cannot be written" in refused(tmp_path / ("n" * 300))
    assert "is followed by --compile" in refused(Path("--compile"))
    assert "suffixes .png" in refused(tmp_path / "out.hdf", suffixes=(".png",))


@on_linux
def test_a_folder_that_takes_no_file() -> None:
    assert "cannot be written" in refused(NOT_WRITABLE / "out.json")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_folder(NOT_WRITABLE / "new", "--output")


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk quota stands in for a full disk: the kernel refuses the probe's bytes."""
    resource = pytest.importorskip("resource")
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        assert "File too large" in refused(tmp_path / "out.json")
        with pytest.raises(OutputError, match="File too large"):
            write_text(tmp_path / "out.json", "x" * 9999, "--output")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_can_be_created(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b", "FOLDER")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    for folder in ("file", "file/below", "broken"):
        with pytest.raises(ConfigError, match=r"^FOLDER .* no folder"):
            check_folder(tmp_path / folder, "FOLDER")
    with pytest.raises(ConfigError, match="--keep"):
        check_folder(Path("--keep"), "FOLDER")


def half_write(file: Path, error: BaseException) -> None:
    """A write that does not come to its end."""
    with whole(file, "--output") as partial:
        partial.write_text("half")
        raise error


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "out.txt"
    file.write_text("old")
    for error, becomes in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(5, "gone"), OutputError)):
        with pytest.raises(becomes) as caught:
            half_write(file, error)
    assert str(caught.value) == f"--output {file} could not be written (gone)"
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_keeps_leading_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    write_text(tmp_path / "link.txt", "new", "--output")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
