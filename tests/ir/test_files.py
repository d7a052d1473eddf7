import os
from pathlib import Path

import pytest

from ir.errors import DataError
from ir.files import appearing, inside, read_json, read_text


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("old")
    with appearing(path) as draft:
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), appearing(path) as draft:
        draft.write_text("half")
        raise OSError("full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name", ["", "..", "../secret", "/etc/passwd", "a/b", "a\\b", "a\0b", "nowhere", "loop", "out", "deep", "pipe", "folder"]
)
def test_nothing_outside_of_a_folder_is_a_file_of_it(tmp_path, name):
    folder = tmp_path / "folder"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    os.mkfifo(folder / "pipe")
    for link, to in (("loop", "loop"), ("out", "../secret"), ("deep", "out")):
        (folder / link).symlink_to(to)
    with pytest.raises(DataError):
        inside(folder, name)


def test_links_within_a_folder_and_a_cache_of_the_hub_are_followed(tmp_path):
    folder = tmp_path / "models--a--b/snapshots/0123"
    folder.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (tmp_path / "models--a--b/blobs/ff").write_text("blob")
    (folder / "here").write_text("here")
    (folder / "link").symlink_to("here")
    (folder / "blob").symlink_to("../../blobs/ff")
    assert [inside(folder, name).read_text() for name in ("here", "link", "blob")] == ["here", "here", "blob"]


def test_text_is_read_up_to_a_limit_and_of_files_alone(tmp_path):
    path = tmp_path / "text"
    path.write_text("größer")
    assert read_text(path, 8) == "größer"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff")
    for wrong, limit in ((path, 7), (tmp_path / "pipe", 8), (tmp_path / "bytes", 8), (tmp_path, 8), (tmp_path / "no", 8), (Path("\0"), 8)):
        with pytest.raises(DataError):
            read_text(wrong, limit)
    with pytest.raises(DataError, match="no file"):
        read_text(Path("/dev/zero"))


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 5000, r'["half \ud83d a character"]'])
def test_what_is_no_json_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="no JSON"):
        read_json(tmp_path / "a.json")


def test_characters_in_two_halves_are_read(tmp_path):
    (tmp_path / "a.json").write_text(r'["\ud83d\ude00", "ends in a backslash: \\ud83d"]')
    assert read_json(tmp_path / "a.json") == ["\U0001f600", r"ends in a backslash: \ud83d"]
