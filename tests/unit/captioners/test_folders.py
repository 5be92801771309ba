"""Model folders: found on this machine alone, and refused with the list of what is missing."""

import json
import os
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_captioners import upstream_layout, write_blip, write_clip
from lora_scripts.captioners.blip import MODEL_VARIABLE, Blip, choose_model
from lora_scripts.captioners.folders import (
    BLIP_CAPTIONING,
    CLIP,
    ModelFolder,
    check_folder,
    fastest_dtype,
    find_model,
    first_available,
)
from lora_scripts.captioners.protocol import CaptionerSettings
from lora_scripts.errors import ModelError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blip(tmp_path_factory.mktemp("models") / "blip")


@pytest.fixture(autouse=True)
def nothing_else_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment variable, no models folder and an empty hub cache; and no network."""
    monkeypatch.delenv(MODEL_VARIABLE, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def cached(tmp_path: Path, hub_id: str, source: Path, leave_out: str = "") -> Path:
    """The folder's files in the layout of the hub cache."""
    root = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
    snapshot = root / "snapshots" / "abc"
    shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns(leave_out) if leave_out else None)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    return snapshot


def load(model: str | None) -> Blip:
    return Blip.load(model, CPU, None, CaptionerSettings(max_tokens=8))


def test_a_folder_of_either_layout_loads(blip: Path, tmp_path: Path) -> None:
    shutil.copytree(blip, tmp_path / "published")
    upstream_layout(tmp_path / "published")
    assert not (tmp_path / "published" / "processor_config.json").exists()
    assert load(str(blip)).image_side == load(str(tmp_path / "published")).image_side == 32


def test_a_folder_with_the_vocabulary_alone_loads(blip: Path, tmp_path: Path) -> None:
    shutil.copytree(blip, tmp_path / "old", ignore=shutil.ignore_patterns("tokenizer.json"))
    one, two = load(str(blip)), load(str(tmp_path / "old"))
    assert one.tokenizer("a red cat")["input_ids"] == two.tokenizer("a red cat")["input_ids"]


def test_sharded_weights_load(blip: Path, tmp_path: Path) -> None:
    shutil.copytree(blip, tmp_path / "sharded", ignore=shutil.ignore_patterns("model.safetensors"))
    weights = load_file(blip / "model.safetensors")
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name].contiguous() for name in part}, tmp_path / "sharded" / file, {"format": "pt"})
    places = {name: file for file, part in halves.items() for name in part}
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, value in load(str(tmp_path / "sharded")).model.state_dict().items():
        assert torch.equal(value, load(str(blip)).model.state_dict()[name]), name
        break


def test_a_missing_file_is_listed_with_those_that_were_found(blip: Path, tmp_path: Path) -> None:
    shutil.copytree(blip, tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors", "processor_config.json"))
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path / "half"))
    text = str(caught.value)
    assert "2 of 4 files are missing" in text
    assert "found    config.json" in text
    assert "missing  model.safetensors or model.safetensors.index.json" in text
    assert "missing  preprocessor_config.json or processor_config.json" in text


class Harmful:
    """Opening this pickle creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.fault(22)
def test_pickled_weights_are_never_opened(blip: Path, tmp_path: Path) -> None:
    shutil.copytree(blip, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    payload = pickle.dumps(Harmful(tmp_path / "opened"))
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(payload)
    with pytest.raises(
        ModelError, match=r"pytorch_model\.bin is there, but it can run any program.*Get model\.safetensors"
    ):
        load(str(tmp_path / "old"))
    (tmp_path / "old" / "model.safetensors").write_bytes(payload)
    with pytest.raises(ModelError, match="pickle"):
        load(str(tmp_path / "old"))
    assert not (tmp_path / "opened").exists()


@pytest.mark.fault(22)
def test_code_in_a_model_folder_is_never_run(blip: Path, tmp_path: Path) -> None:
    shutil.copytree(blip, tmp_path / "custom")
    config = json.loads((tmp_path / "custom" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    (tmp_path / "custom" / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((tmp_path / "custom" / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.T", None]}
    (tmp_path / "custom" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "custom" / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    load(str(tmp_path / "custom"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault(22)
def test_half_a_download_is_recognised(blip: Path, tmp_path: Path) -> None:
    shutil.copytree(blip, tmp_path / "half")
    weights = tmp_path / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    with pytest.raises(ModelError, match="half a download"):
        load(str(tmp_path / "half"))


@pytest.mark.fault(22)
def test_another_kind_of_model_is_called_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a clip model by its config\.json, and a BLIP captioning model is needed"):
        load(str(write_clip(tmp_path / "clip")))
    with pytest.raises(ModelError, match=r"is no BLIP captioning model: .* weights are missing, such as text_decoder"):
        load(str(write_blip(tmp_path / "matching", matching=True)))


@pytest.mark.fault(22)
def test_a_mistyped_folder_gets_the_nearest_name(blip: Path) -> None:
    with pytest.raises(ModelError, match=r"blep: no such folder\. Did you mean blip\?"):
        load(str(blip.with_name("blep")))
    with pytest.raises(ModelError, match=r"is a file\. A BLIP captioning model is a folder"):
        load(str(blip / "config.json"))


@pytest.mark.fault(24)
def test_a_hub_id_is_found_in_the_cache_alone(blip: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no hub model of that name on this machine\. Either add --download"):
        load("someone/some-blip")
    cached(tmp_path, "someone/some-blip", blip)
    found = find_model("someone/some-blip", BLIP_CAPTIONING)
    assert (found.name, found.where) == ("someone/some-blip", "hub cache")
    assert load("someone/some-blip").models == {"model": "someone/some-blip"}


def test_a_cached_model_without_safetensors_says_so(blip: Path, tmp_path: Path) -> None:
    cached(tmp_path, "someone/some-blip", blip, leave_out="*.safetensors")
    with pytest.raises(ModelError, match="Part of it is in the hub cache, but no safetensors weights"):
        load("someone/some-blip")


@pytest.mark.fault(24)
def test_a_failed_download_tells_the_kind_of_fault_and_no_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"someone/some-blip: could not be downloaded \(\w+\)\. Check the name"
    ) as caught:
        find_model("someone/some-blip", BLIP_CAPTIONING, download=True)
    assert "http" not in str(caught.value)


def test_without_a_name_the_best_model_on_this_machine_is_taken(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first_available(BLIP_CAPTIONING, MODEL_VARIABLE) == (None, [])
    cached(tmp_path, "Salesforce/blip-image-captioning-base", blip)
    assert first_available(BLIP_CAPTIONING)[0].name == "Salesforce/blip-image-captioning-base"
    shutil.copytree(blip, Path("models") / "blip-image-captioning-large")
    assert first_available(BLIP_CAPTIONING)[0].where == "folder"
    assert first_available(BLIP_CAPTIONING)[0].path.name == "blip-image-captioning-large"
    monkeypatch.setenv(MODEL_VARIABLE, str(blip))
    assert choose_model(None, CaptionerSettings())[0].path == blip
    monkeypatch.setenv(MODEL_VARIABLE, str(blip / "gone"))
    with pytest.raises(ModelError, match="no such folder"):
        choose_model(None, CaptionerSettings())


def test_an_incomplete_model_is_passed_over_and_said(blip: Path) -> None:
    shutil.copytree(blip, Path("models") / "blip-image-captioning-base", ignore=shutil.ignore_patterns("*.safetensors"))
    found, remarks = first_available(BLIP_CAPTIONING)
    assert found is None
    assert remarks[0].startswith("Not used: models/blip-image-captioning-base: is no complete BLIP captioning model")


def test_without_any_full_size_model_the_built_in_one_is_taken_and_said(
    blip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(blip, tmp_path / "builtin" / "mini-blip")
    monkeypatch.setenv("LORA_SCRIPTS_BUILTIN_DIR", str(tmp_path / "builtin"))
    folder, notes = choose_model(None, CaptionerSettings())
    assert folder.name == "builtin:mini-blip"
    assert "No full-size BLIP was found on this machine, so the small built-in model is used" in notes[0]


def test_clip_folders_are_checked_too(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip")
    check_folder(ModelFolder(folder, "clip", "folder"), CLIP)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="1 of 4 files are missing"):
        check_folder(ModelFolder(folder, "clip", "folder"), CLIP)


def test_small_models_compute_in_fp32_on_a_cpu(blip: Path) -> None:
    assert fastest_dtype(CPU, ModelFolder(blip, "blip", "folder")) is torch.float32
    assert fastest_dtype(torch.device("cuda"), ModelFolder(blip, "blip", "folder")) is torch.float16
