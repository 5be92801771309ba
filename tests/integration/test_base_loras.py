"""Training on top of other LoRAs: what is folded in, what notices it, and what the finished file holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from helpers.commands import command
from helpers.library_networks import library_network
from helpers.seen import Seen, train
from helpers.tiny_causal_lms import probe, tiny_model
from helpers.tiny_causal_lms import random_lora as random_language_lora
from lora_scripts.base_loras import find_base_loras
from lora_scripts.config import RunConfig
from lora_scripts.config_file import make_config
from lora_scripts.errors import ConfigError, ModelError, ResumeError
from lora_scripts.export.names import layer_shapes
from lora_scripts.export.peft_folder import write_peft_folder
from lora_scripts.export.reader import read_lora_file
from lora_scripts.export.writer import write_lora
from lora_scripts.families.protocol import Batch, SampleRequest
from lora_scripts.families.sd15 import StableDiffusion15
from lora_scripts.folding import fold_base_loras
from lora_scripts.models.source import resolve_base_model
from lora_scripts.sampling.denoise import render
from lora_scripts.sampling.lora_set import LoRASet, WeightedLoRA
from lora_scripts.training.draws import Draws
from unit.sampling.tiny_sd import random_lora, tiny_parts

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    """Two LoRAs for the tiny model, of denoiser and text encoder."""
    paths = []
    for name, seed in (("warm", 1), ("ink", 2)):
        paths.append(tmp_path / f"{name}.safetensors")
        write_lora(paths[-1], random_lora(tiny_parts(), seed=seed, size=0.1), {}, torch.float32)
    return paths


def on_top(loras: list[Path]) -> list[dict[str, Any]]:
    return [{"path": str(loras[0]), "weight": 0.7}, {"path": str(loras[1]), "weight": -0.4}]


def family_of(values: dict[str, Any]) -> StableDiffusion15:
    config = RunConfig.model_validate(values)
    source = resolve_base_model(config.base_model)
    family = StableDiffusion15.load(source, config, torch.device("cpu"), torch.float32)
    family._parts.read_rest()  # encoders, which a run reads when there is something to encode
    return family


def losses(seen: Seen) -> list[float]:
    return [loss for report in seen.reports for loss in report.losses]


def test_folded_model_has_the_loss_of_the_model_with_the_loras_side_by_side(
    settings: Settings, loras: list[Path]
) -> None:
    values = settings(base_loras=on_top(loras), train_text_encoder=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(2, 4, 4, 4, generator=generator) for name in ("latents_mean", "latents_std")}
    batch = Batch(tensors, ["a red cat", "two blue fish"], ["a", "b"])
    family = family_of(values)
    plain = family.loss(batch, Draws(1)).total
    weighted = [
        WeightedLoRA(read_lora_file(path, layer_shapes(family.components)).weights, weight, weight)
        for path, weight in zip(loras, (0.7, -0.4), strict=True)
    ]
    with LoRASet(family.components, weighted):
        beside = family.loss(batch, Draws(1)).total
    fold_base_loras(family.components, find_base_loras(RunConfig.model_validate(values)))
    folded = family.loss(batch, Draws(1)).total
    torch.testing.assert_close(folded, beside, rtol=1e-5, atol=0)
    assert abs(float(beside - plain)) > 1e-3 * float(plain)


def test_run_on_top_of_loras_is_the_run_on_the_folded_model(
    settings: Settings, tiny_sd_folder: Path, loras: list[Path], tmp_path: Path
) -> None:
    values = settings(base_loras=on_top(loras), output_dir=str(tmp_path / "a" / "run"))
    seen = train(values)
    family = family_of(values)
    fold_base_loras(family.components, find_base_loras(RunConfig.model_validate(values)))
    folded = shutil.copytree(tiny_sd_folder, tmp_path / "folded")
    library_network(family._parts.unet).save_pretrained(folded / "unet")
    library_network(family._parts.text_encoder).save_pretrained(folded / "text_encoder")
    other = train(settings(base_model=str(folded), output_dir=str(tmp_path / "b" / "run")))
    assert losses(seen) == losses(other)  # captions were encoded with the LoRAs' text encoder, too
    assert any("warm at 0.7 (" in note and "ink at -0.4 (" in note for note in seen.notes)


def test_file_beside_the_loras_gives_what_the_previews_show(settings: Settings, loras: list[Path]) -> None:
    values = settings(
        base_loras=on_top(loras), save_precision="fp32", sample_every=6, sample_prompts=["a red cat"], sample_steps=2
    )
    seen = train(values)
    assert any("effect compared" in note for note in seen.notes)
    out = Path(values["output_dir"])
    family = family_of(values)
    shapes = layer_shapes(family.components)
    files = [(loras[0], 0.7), (loras[1], -0.4), (out / "run.safetensors", 1.0)]
    weighted = [WeightedLoRA(read_lora_file(file, shapes).weights, weight, weight) for file, weight in files]
    request = SampleRequest("a red cat", steps=2, width=32, height=32)
    with Image.open(out / "run.png") as picture:
        shown = np.asarray(picture.convert("RGB"), np.float32)
    for at_work, is_near in ((weighted, True), (weighted[2:], False)):
        with LoRASet(family.components, at_work):
            (rendered,) = render(family._parts, [request], torch.device("cpu"))
        assert (float(np.abs(np.asarray(rendered, np.float32) - shown).max()) < 2.5) is is_near


def test_finished_file_says_which_loras_were_beneath(settings: Settings, loras: list[Path]) -> None:
    values = settings(base_loras=on_top(loras), max_steps=1, sample_every=1, sample_prompts=["x"], sample_steps=1)
    train(values)
    out = Path(values["output_dir"])
    with safe_open(out / "run.safetensors", "pt") as file:
        beneath = json.loads(file.metadata()["lora_scripts.base_loras"])
    assert [(each["name"], each["weight"]) for each in beneath] == [("warm", 0.7), ("ink", -0.4)]
    assert all(len(each["sha256"]) == 64 for each in beneath)
    assert "<lora:warm:0.7> <lora:ink:-0.4>" in json.loads((out / "run.json").read_text("utf-8"))["notes"]
    with Image.open(out / "run.png") as picture:
        assert "<lora:warm:0.7> <lora:ink:-0.4>" in picture.info["parameters"]
    assert "warm at 0.7 and ink at -0.4" in (out / "report.html").read_text("utf-8")


def test_changed_lora_or_weight_is_refused_on_resume_and_a_renamed_one_is_not(
    settings: Settings, loras: list[Path], tmp_path: Path
) -> None:
    values = settings(base_loras=on_top(loras), max_steps=2)
    train(values)
    moved = tmp_path / "elsewhere" / "other_name.safetensors"
    moved.parent.mkdir()
    shutil.copy(loras[0], moved)
    train(values | {"base_loras": [{"path": str(moved), "weight": 0.7}, on_top(loras)[1]]})
    with pytest.raises(ResumeError, match=r"(?s)base LoRA 2: was .*, is now null.*another output_dir"):
        train(values | {"base_loras": on_top(loras)[:1]})
    with pytest.raises(ResumeError, match=r'base LoRA 1: was "weight 0.7, sha256'):
        train(values | {"base_loras": [{"path": str(loras[0]), "weight": 0.8}, on_top(loras)[1]]})
    write_lora(loras[1], random_lora(tiny_parts(), seed=3, size=0.1), {}, torch.float32)
    with pytest.raises(ResumeError, match=r"(?s)base LoRA 2: was .*is now.*init_lora_weights: .*run-2"):
        train(values)


def test_other_loras_encode_captions_anew_and_pictures_not(
    settings: Settings, loras: list[Path], pictures: Path, tmp_path: Path
) -> None:
    def entries(kind: str) -> int:
        return len(list((pictures / ".cache" / kind).rglob("*.safetensors")))

    train(settings(max_steps=1, output_dir=str(tmp_path / "a")))
    latents, texts = entries("latents"), entries("text")
    train(settings(max_steps=1, output_dir=str(tmp_path / "b"), base_loras=str(loras[0])))
    assert (entries("latents"), entries("text")) == (latents, 2 * texts)
    train(settings(max_steps=1, output_dir=str(tmp_path / "c"), base_loras=str(loras[1])))
    assert (entries("latents"), entries("text")) == (latents, 3 * texts)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ([{"path": "no.safetensors"}], r"base_loras: entry 1: no\.safetensors: no such LoRA file or folder"),
        ([{"path": "{warm}"}, {"path": "{warm}", "weight": 0.5}], r"entry 2: .* is entry 1 already.*1\.5 for both"),
    ],
)
def test_missing_or_doubled_entry_is_named(
    settings: Settings, loras: list[Path], written: list[dict[str, Any]], told: str
) -> None:
    entries = [entry | {"path": entry["path"].replace("{warm}", str(loras[0]))} for entry in written]
    with pytest.raises(ConfigError, match=told):
        train(settings(base_loras=entries))


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ([{"path": "a", "weight": 0}], "entry 1: weight: 0 would leave it without effect"),
        (["a", {"path": "b", "wieght": 0.7}], "entry 2: wieght: no such setting"),
        ([{"weight": 0.7}], "entry 1: path: field required"),
        ([{"path": "a", "weight": "much"}], "entry 1: weight: should be a valid number"),
    ],
)
def test_wrong_entry_is_named_with_its_line(settings: Settings, written: list[Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"my.yaml line 7: base_loras: {told}"):
        make_config(settings(base_loras=written), "my.yaml", {"base_loras": 7})


@pytest.mark.parametrize("adapter", ["dora", "oft"])
def test_own_form_of_what_depends_on_the_weight_is_refused(settings: Settings, adapter: str) -> None:
    values = settings(base_loras=["a.safetensors"], adapter=adapter, export_as="own")
    values = {key: value for key, value in values.items() if not key.startswith("lora_")}
    with pytest.raises(ConfigError, match=r"export_as: a .* depends on the weight it was trained on.*export_as: plain"):
        make_config(values)
    make_config(values | {"export_as": "plain"})


def test_lora_for_another_model_is_refused_by_its_entry(settings: Settings, loras: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    write_lora(other, random_lora(tiny_parts(context=24)), {}, torch.float32)
    with pytest.raises(ModelError, match=r"base_loras: entry 2: .*other\.safetensors: .*another base"):
        train(settings(base_loras=[str(loras[0]), str(other)]))


def test_plan_and_check_know_the_loras(
    settings: Settings, loras: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    for values in (settings(base_loras=on_top(loras)), settings(base_loras=["gone.safetensors"])):
        (tmp_path / "my.yaml").write_text(yaml.safe_dump(values), "utf-8")
        for name in ("plan", "check"):
            code, out, err = command(capsys, name, *(["--config"] if name == "check" else []), tmp_path / "my.yaml")
            if "gone.safetensors" in str(values["base_loras"]):
                assert (code, "entry 1: gone.safetensors" in err) == (2, True)
            else:
                assert code == 0, err
                assert name == "check" or "warm at 0.7 and ink at -0.4" in out


# Language models ------------------------------------------------------------------------------------------------------


def language_lora(folder: Path, model: Any, **how: Any) -> Path:
    weights = random_language_lora(model, **how)
    shapes = layer_shapes({"language_model": model})
    write_peft_folder(folder, weights, "base", torch.float32, model_layers=shapes)
    return folder


def test_language_run_on_top_of_a_lora_is_the_run_on_the_merged_model(
    language_settings: Settings, tiny_language_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    manner = language_lora(tmp_path / "manner", model)
    values = language_settings(base_loras=[{"path": str(manner), "weight": 0.5}], save_precision="fp32")
    seen = train(values)
    assert any("effect compared" in note for note in seen.notes)
    folder = Path(values["output_dir"]) / "run"
    assert "manner at 0.5" in (folder / "README.md").read_text("utf-8")
    assert read_lora_file(folder).ranks == (2,)  # not of what lies beneath
    merged = shutil.copytree(tiny_language_model, tmp_path / "merged")
    with torch.no_grad():
        for name, change in random_language_lora(model).items():
            model.get_submodule(name.removeprefix("language_model.")).weight.add_(change.delta(), alpha=0.5)
    model.save_pretrained(merged)
    other = train(language_settings(base_model=str(merged), output_dir=str(tmp_path / "b" / "run")))
    assert losses(seen) == pytest.approx(losses(other), rel=1e-5)


def test_head_that_is_tied_to_the_embedding_changes_alone(tmp_path: Path) -> None:
    model = tiny_model("gemma").requires_grad_(False)
    folder = language_lora(tmp_path / "head", model, head=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    embedded = model.get_input_embeddings().weight.clone()
    changes = random_language_lora(model, head=True)
    hidden = model.base_model(probe()).last_hidden_state
    config = RunConfig(train_data_dir=tmp_path, base_model="x", output_dir=tmp_path / "out", base_loras=[str(folder)])
    wanted_head = embedded + changes["language_model.lm_head"].delta()
    fold_base_loras({"language_model": model}, find_base_loras(config))
    assert torch.equal(model.get_input_embeddings().weight, embedded)
    torch.testing.assert_close(model.lm_head.weight.data, wanted_head)
    assert not torch.equal(model.base_model(probe()).last_hidden_state, hidden)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loras_stand_beside_quantised_layers(
    language_settings: Settings, tiny_language_model: Path, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised models need bitsandbytes")
    from lora_scripts.families.causal_lm import CausalLanguageModel

    manner = language_lora(tmp_path / "manner", tiny_model("llama"))
    values = language_settings(quantization=kind, mixed_precision="fp32", base_loras=str(manner))
    config = RunConfig.model_validate(values)
    source = resolve_base_model(config.base_model)
    family = CausalLanguageModel.load(source, config, torch.device("cpu"), torch.float32)
    layer = "model.layers.0.self_attn.q_proj"
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    before = family.model.get_submodule(layer)(rows)
    (told,) = fold_base_loras(family.components, find_base_loras(config))
    change = random_language_lora(tiny_model("llama"))[f"language_model.{layer}"].delta()
    torch.testing.assert_close(family.model.get_submodule(layer)(rows) - before, rows @ change.T, rtol=1e-4, atol=1e-4)
    assert "beside 14 quantised layers" in told
    assert any("effect compared" in note for note in train(values).notes)
