"""Files of every spelling loaded by diffusers and PEFT themselves: every key matched, the same change."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.picture_loras import rewritten
from helpers.tiny_diffusion import save_folder, tiny_parts
from lora_scripts.adapter_files.adapter_file import open_adapter_file
from lora_scripts.adapter_files.conversion import Target, convert_file
from lora_scripts.adapter_files.readers.diffusers import Diffusers
from lora_scripts.adapters.weights import LoRATensors
from lora_scripts.export.names import file_path, kohya_layer_names, layer_shapes, split_layer
from lora_scripts.export.writer import write_lora


@dataclass(frozen=True)
class Tiny:
    """A tiny model of a family and the names that its layers have in a kohya file."""

    family: str
    pipeline: Any
    shapes: dict[str, tuple[int, ...]]
    names: dict[str, str]

    def write(self, path: Path, alpha: Callable[[str, int], float]) -> tuple[Path, dict[str, LoRATensors]]:
        """A kohya file of every layer, ranks 1 and 2; alpha by name and number of the layer."""
        torch.manual_seed(0)
        weights = {}
        for number, name in enumerate(self.names):
            shape, rank = self.shapes[name], 1 + number % 2
            ones = [1] * (len(shape) - 2)
            down, up = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *ones)
            weights[name] = LoRATensors(down, up, alpha(name, number))
        version = {"sd15": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}[self.family]
        texts = {"ss_base_model_version": version, "ss_v2": str(self.family == "sd2"), "ss_output_name": "ink"}
        write_lora(path, weights, texts, torch.float32, self.names)
        return path, weights


@pytest.fixture(scope="module", params=["sd15", "sd2", "sdxl"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    pytest.importorskip("diffusers")
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    parts = tiny_parts(family)
    save_folder(parts, folder)
    shapes = layer_shapes(parts.components)
    return Tiny(family, pipeline_of(folder), shapes, kohya_layer_names(shapes, family))


def pipeline_of(folder: Path) -> Any:
    import diffusers

    return diffusers.DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)


def adapter_deltas(component: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What PEFT's layers add to each layer's weight."""
    return {
        name: module.get_delta_weight(next(iter(module.lora_A)))
        for name, module in component.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight") and len(module.lora_A)
    }


def deltas_in(pipeline: Any, path: Path) -> dict[str, torch.Tensor]:
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    found = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, component, None)
        if module is not None:
            found |= {f"{component}.{file_path(component, name)}": d for name, d in adapter_deltas(module).items()}
    pipeline.unload_lora_weights()
    return found


def wanted(weights: dict[str, LoRATensors]) -> dict[str, torch.Tensor]:
    def name(layer: str) -> str:
        component, path = split_layer(layer)
        return f"{component}.{file_path(component, path)}"

    return {name(layer): lora.delta() for layer, lora in weights.items()}


def differing(found: dict[str, torch.Tensor], weights: dict[str, LoRATensors]) -> set[str]:
    """Layers whose change is not that of the weights; every layer must be there."""
    expected = wanted(weights)
    assert set(found) == set(expected)
    return {name for name, delta in expected.items() if not torch.allclose(found[name], delta, rtol=1e-4, atol=1e-4)}


def test_diffusers_loads_a_kohya_file_with_every_key_and_the_same_change(tiny: Tiny, tmp_path: Path) -> None:
    path, weights = tiny.write(tmp_path / "ink.safetensors", lambda name, number: 3.0)
    assert Diffusers().takes(open_adapter_file(path)).ok
    assert differing(deltas_in(tiny.pipeline, path), weights) == set()


@pytest.mark.parametrize("by_way_of", ["diffusers", "kohya"])
def test_diffusers_loads_the_converted_file_with_unequal_alphas(tiny: Tiny, tmp_path: Path, by_way_of: Target) -> None:
    """Its own spelling carries every alpha; so does a kohya file that was written anew from one of PEFT's."""
    path, weights = tiny.write(tmp_path / "ink.safetensors", lambda name, number: 0.5 + number % 3)
    if by_way_of == "kohya":
        convert_file(open_adapter_file(path), "peft", tmp_path / "peft")
        convert_file(open_adapter_file(tmp_path / "peft"), "kohya", tmp_path / "back.safetensors")
        path = tmp_path / "back.safetensors"
    new = tmp_path / "new.safetensors"
    convert_file(open_adapter_file(path), "diffusers", new)
    assert Diffusers().takes(open_adapter_file(new)).ok
    assert differing(deltas_in(tiny.pipeline, new), weights) == set()


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("part", ["mid_block", ".attn2.to_k", "mlp.fc", "conv1", "proj_in"])
def test_layers_whose_alpha_diffusers_loses_are_the_ones_that_the_verdict_counts(
    tiny: Tiny, tmp_path: Path, part: str
) -> None:
    path, weights = tiny.write(tmp_path / "ink.safetensors", lambda name, number: 5.0 if part in name else 2.0)
    verdict = Diffusers().takes(open_adapter_file(path))
    lost = differing(deltas_in(tiny.pipeline, path), weights)
    assert verdict.ok == (not lost)
    assert verdict.ok or f"so {len(lost)} get the wrong strength" in verdict.reason


def test_peft_loads_the_folder_of_the_unet_with_the_same_change(tiny: Tiny, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    path, weights = tiny.write(tmp_path / "ink.safetensors", lambda name, number: 0.5 + number % 3)
    convert_file(open_adapter_file(path), "peft", tmp_path / "peft")
    model = peft.PeftModel.from_pretrained(copy.deepcopy(tiny.pipeline.unet), str(tmp_path / "peft" / "unet"))
    found = {f"unet.{name}": delta for name, delta in adapter_deltas(model.base_model.model).items()}
    of_unet = {name: lora for name, lora in weights.items() if name.startswith("unet.")}
    assert differing(found, of_unet) == set()


def test_a_file_that_the_verdict_refuses_is_refused_by_diffusers(tiny: Tiny, tmp_path: Path) -> None:
    path, _ = tiny.write(tmp_path / "ink.safetensors", lambda name, number: 3.0)
    name = tiny.names["unet.mid_block.resnets.0.conv1"]

    def core(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, f"{name}.lora_mid.weight": torch.ones(1, 1, 3, 3)}

    broken = rewritten(path, tmp_path / "core.safetensors", core)
    assert not Diffusers().takes(open_adapter_file(broken)).ok
    with pytest.raises(ValueError, match="not been correctly renamed"):
        deltas_in(tiny.pipeline, broken)
