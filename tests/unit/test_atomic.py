"""Files that are there whole or not at all."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lora_scripts.atomic import write_atomically
from lora_scripts.errors import DataError


def test_text_and_bytes_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "猫.txt"
    write_atomically(path, "一\n")
    assert path.read_bytes() == "一\n".encode()
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == [path.name]


def test_a_name_of_full_length_can_be_written(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("x" * 255), "y")


def test_permissions_of_the_older_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    path.chmod(0o640)
    write_atomically(path, "x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_links_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious", "utf-8")
    os.symlink(tmp_path / "precious", tmp_path / "link")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    for name in ("link", "dangling"):
        with pytest.raises(DataError, match=rf"{name}: is a symbolic link"):
            write_atomically(tmp_path / name, "x")
    with pytest.raises(DataError, match="is a folder"):
        write_atomically(tmp_path, "x")
    assert (tmp_path / "precious").read_text("utf-8") == "precious"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of file sizes are set as on Linux")
def test_a_full_disk_leaves_the_older_file_and_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("older", "utf-8")
    program = (
        "import resource, signal, sys; from pathlib import Path; from lora_scripts.atomic import write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_atomically(Path(sys.argv[1]), b'x' * 3_000_000)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.startswith(
        f"DataError {path}: no room left on the disk, 3.0 MB are needed. The older file is unharmed."
    )
    assert path.read_text("utf-8") == "older"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match=r"a: cannot be written \(Permission denied\)"):
        write_atomically(tmp_path / "a", "x")
