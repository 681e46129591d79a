"""A folder is complete or absent, even if its replacement is interrupted at any point."""

import pytest

from ctde_jax.checkpoint.atomic import put_back, written_whole


@pytest.fixture
def folder(tmp_path):
    with written_whole(tmp_path / "here" / "folder") as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text("first")
    return tmp_path / "here" / "folder"


def content(folder):
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return (folder / "inner" / "file").read_text()


def test_new_folder_replaces_all_previous_files(folder):
    (folder / "more").touch()
    with written_whole(folder) as new:
        assert not [*new.iterdir()]
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text("second")
        assert (folder / "inner" / "file").read_text() == "first"
    assert content(folder) == "second"
    assert not (folder / "more").exists()


def test_failed_write_changes_nothing(folder):
    def fail():
        with written_whole(folder) as new:
            (new / "file").touch()
            raise EOFError

    with pytest.raises(EOFError):
        fail()
    assert content(folder) == "first"


@pytest.mark.parametrize("renamed", [1, 2])
def test_killed_replacement_is_undone_or_completed(folder, renamed):
    folder.rename(folder.with_name(".folder.replaced"))
    if renamed == 2:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_text("second")
    put_back(folder)
    assert content(folder) == ["first", "second"][renamed - 1]


def test_files_of_a_killed_process_do_not_interfere(folder):
    folder.with_name(".folder.partial").mkdir()
    (folder.with_name(".folder.partial") / "half").touch()
    with written_whole(folder) as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text("second")
    assert content(folder) == "second"
    assert not (folder / "half").exists()
