"""LoRA files by name, and pictures by number."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lora_scripts.errors import ConfigError, DataError
from lora_scripts.families.protocol import SampleRequest
from lora_scripts.sampling.infotext import read_infotext
from lora_scripts.sampling.lora_files import checkpoint_files, find_loras, resolve_lora, step_of
from lora_scripts.sampling.pictures import Origin, check_folder, lora_hash, save_grid, save_picture


@pytest.fixture
def output(tmp_path: Path) -> Path:
    run = tmp_path / "output" / "ink"
    for step in (100, 20):
        folder = run / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in (f"ink-{step}", "adapter", "optimizer"):
            (folder / f"{name}.safetensors").write_bytes(b"x")
    (run / "ink.safetensors").write_bytes(b"x")
    (run / "checkpoint-30.partial").mkdir()
    (run / "checkpoint-30.partial" / "ink-30.safetensors").write_bytes(b"x")
    other = tmp_path / "output" / "水墨"
    other.mkdir()
    (other / "水墨.safetensors").write_bytes(b"x")
    (other / "ink.safetensors").write_bytes(b"y")
    return tmp_path / "output"


def test_finished_files_and_those_of_checkpoints_are_found_and_no_state(output: Path) -> None:
    found = find_loras([output / "ink", output / "水墨"])
    assert list(found) == ["ink", "ink-20", "ink-100", "水墨"]
    assert found["ink"] == output / "ink" / "ink.safetensors"  # of the folder given first
    assert found["ink-100"] == output / "ink" / "checkpoint-100" / "ink-100.safetensors"


def test_peft_folder_goes_by_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "my_lora").mkdir()
    (tmp_path / "my_lora" / "adapter_config.json").write_text("{}")
    assert find_loras([tmp_path]) == {"my_lora": tmp_path / "my_lora"}


def test_unknown_name_is_refused_with_the_nearest_and_the_place(output: Path) -> None:
    folders = [output / "ink"]
    known = find_loras(folders)
    with pytest.raises(ConfigError, match=r"<lora:ink-10>: no such LoRA in .*ink\. Did you mean ink-100"):
        resolve_lora("ink-10", known, folders)
    with pytest.raises(ConfigError, match=r"There are: ink, ink-100, ink-20\."):
        resolve_lora("quite different", known, folders)
    with pytest.raises(ConfigError, match=r"No LoRA lies there\. .*--lora-dir"):
        resolve_lora("ink", {}, [])


def test_path_may_stand_in_place_of_a_name(output: Path) -> None:
    path = output / "水墨" / "水墨.safetensors"
    assert resolve_lora(str(path), {}, []) == path
    assert resolve_lora(str(path.with_suffix("")), {}, []) == path


def test_checkpoints_of_a_run_come_by_step_and_the_finished_file_last(output: Path) -> None:
    names = [path.name for path in checkpoint_files(str(output / "ink"))]
    assert names == ["ink-20.safetensors", "ink-100.safetensors", "ink.safetensors"]


def test_checkpoints_by_pattern(output: Path) -> None:
    for pattern in ("checkpoint-*", "checkpoint-*/*.safetensors"):
        names = [path.name for path in checkpoint_files(str(output / "ink" / pattern))]
        assert names == ["ink-20.safetensors", "ink-100.safetensors"]
    assert [path.name for path in checkpoint_files(str(output / "ink" / "checkpoint-20"))] == ["ink-20.safetensors"]
    assert checkpoint_files(str(output / "ink" / "ink.safetensors")) == [output / "ink" / "ink.safetensors"]


def test_pattern_without_a_file_is_refused(output: Path) -> None:
    with pytest.raises(ConfigError, match=r"--checkpoints .*nothing: no LoRA file there"):
        checkpoint_files(str(output / "nothing"))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("ink-100.safetensors", 100),
        ("ink-step00000200.safetensors", 200),
        ("ink.safetensors", None),
        ("checkpoint-7", 7),
    ],
)
def test_step_is_read_from_the_name(name: str, step: int | None) -> None:
    assert step_of(Path(name)) == step


ORIGIN = Origin("mini-sd", "0123456789", "Euler", 1)
REQUEST = SampleRequest("a fox", seed=7, width=8, height=8)


def test_pictures_are_numbered_and_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "00003-1.png").write_bytes(b"precious")
    (tmp_path / "notes.png").write_bytes(b"precious")
    image = Image.new("RGB", (8, 8))
    names = [
        save_picture(tmp_path, image, REQUEST, "a fox <lora:ink:1>", ORIGIN, {"ink": "ab" * 32}).name for _ in range(2)
    ]
    assert names == ["00004-7.png", "00005-7.png"]
    assert [save_grid(tmp_path, image, "grid").name for _ in range(2)] == ["grid-0000.png", "grid-0001.png"]
    assert (tmp_path / "00003-1.png").read_bytes() == b"precious"
    found = read_infotext(tmp_path / "00004-7.png")
    assert found is not None
    assert found.prompt == "a fox <lora:ink:1>"
    assert (found.settings["Model hash"], found.settings["Lora hashes"]) == ("0123456789", "ink: abababababab")


def test_output_place_that_is_a_file_is_refused_before_rendering(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(DataError, match=r"--output .*file: cannot be made"):
        check_folder(tmp_path / "file")


def test_lora_hash_is_that_of_the_tensor_part(tmp_path: Path) -> None:
    import hashlib

    header = b'{"a":{}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"tensors")
    assert lora_hash(tmp_path / "a.safetensors", {}) == hashlib.sha256(b"tensors").hexdigest()
    assert lora_hash(tmp_path / "a.safetensors", {"sshs_model_hash": "abc"}) == "abc"
