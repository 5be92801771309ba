"""The same adapter in another spelling: tensors byte for byte, alpha carried to where the spelling keeps it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_scripts.adapter_files.copying import CopiedTensor, tensor_hash, write_copies
from lora_scripts.adapter_files.endings import KINDS
from lora_scripts.adapter_files.reference import ARCHITECTURES, kohya_names
from lora_scripts.atomic import write_atomically
from lora_scripts.atomic_folder import new_folder
from lora_scripts.errors import ModelError
from lora_scripts.export.diffusers import adapter_settings
from lora_scripts.export.names import LANGUAGE_MODEL, split_layer
from lora_scripts.export.peft_config import METADATA_KEY

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile, AdapterLayer

__all__ = ["SPELLINGS", "Target", "convert_file"]

Target = Literal["kohya", "diffusers", "peft"]
SPELLINGS: tuple[Target, ...] = ("kohya", "diffusers", "peft")

_VERSIONS = {  # ss_base_model_version and modelspec.architecture where the file had none
    "sd15": ("sd_v1", "stable-diffusion-v1/lora"),
    "sd2": ("sd_v2", "stable-diffusion-v2-512/lora"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
}
_PEFT_PARTS = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
}
_OF_THE_OLD_FILE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", METADATA_KEY, "format")
"""Header texts that describe the tensors' bytes or the spelling, so that the new file must not inherit them."""
_LYCORIS = ("loha", "lokr", "oft", "full", "glora", "ia3", "norm")
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


def convert_file(file: AdapterFile, target: Target, output: Path) -> None:
    """Writes the adapter anew; `output` is a file, for "peft" a folder with one PEFT folder per component.

    Args:
        file: for Stable Diffusion 1, 2 or SDXL, opened without a model's layer names.
    Raises:
        ModelError: the spelling has no place for what the file holds, its model is not known, or it is damaged.
        DataError: the place cannot be written. Nothing was written.
    """
    _require_convertible(file, target)
    if target == "kohya":
        _write_kohya(file, output)
    elif target == "diffusers":
        _write_diffusers(file, output)
    else:
        _write_peft(file, output)


def _require_convertible(file: AdapterFile, target: Target) -> None:
    if file.architecture == LANGUAGE_MODEL:
        raise ModelError(
            f"{file.path}: is a LoRA for a language model, and a PEFT folder is the only spelling that their programs share; "
            "kohya and diffusers files are for pictures. For vLLM, llama.cpp or mlx-lm: lora-scripts export."
        )
    if file.architecture not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: is for {file.title}; the spellings are known for Stable Diffusion 1, 2 and SDXL only."
        )
    file.require_sound()
    known = kohya_names(file.architecture)
    for name, layer in file.layers.items():
        if not layer.known or (target == "kohya" and name not in known):
            raise ModelError(
                f"{file.path}: {layer.file_name} has no name in a {target} file of {file.title}. "
                "It is misspelt or of another model: lora-scripts inspect tells more."
            )
        if target != "kohya" and layer.kind not in ("lora", "dora"):
            raise ModelError(
                f"{file.path}: {layer.file_name} is a {KINDS[layer.kind]}, which a {target} file has no place for. Add --bake "
                "to turn it into a plain LoRA on the way."
            )


def _write_kohya(file: AdapterFile, output: Path) -> None:
    assert file.architecture is not None
    names = kohya_names(file.architecture)
    tensors = []
    for name, layer in file.layers.items():
        for part, key in layer.parts.items():
            shape = layer.header.tensors[key].shape if part == "alpha" else _shape(layer, part, lengths_of_rows=True)
            tensors.append(_copy(f"{names[name]}.{part}", layer, key, shape))
        if "alpha" not in layer.parts and layer.alpha is not None:
            tensors.append(_alpha(f"{names[name]}.alpha", layer))
    digest = tensor_hash(tensors)
    texts = {**_kohya_texts(file, output), "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    write_copies(output, tensors, texts)


def _write_diffusers(file: AdapterFile, output: Path) -> None:
    tensors = [
        _copy(f"{name}.{_PEFT_PARTS[part]}", layer, key, _shape(layer, part))
        for name, layer in file.layers.items()
        for part, key in layer.parts.items()
        if part != "alpha"
    ]
    settings = {
        f"{component}.{setting}": value
        for component, layers in _by_component(file).items()
        for setting, value in _settings(layers).items()
    }
    texts = {**_kept_texts(file), "format": "pt", METADATA_KEY: json.dumps(settings, sort_keys=True)}
    write_copies(output, tensors, texts)


def _write_peft(file: AdapterFile, output: Path) -> None:
    texts = {**_kept_texts(file), "format": "pt"}
    with new_folder(output) as partial:
        for component, layers in _by_component(file).items():
            (partial / component).mkdir()
            tensors = [
                _copy(f"base_model.model.{path}.{_PEFT_PARTS[part]}", layer, key, _shape(layer, part))
                for path, layer in layers.items()
                for part, key in layer.parts.items()
                if part != "alpha"
            ]
            write_copies(partial / component / "adapter_model.safetensors", tensors, texts)
            config = {"peft_type": "LORA", "task_type": None, "inference_mode": True, **_settings(layers)}
            config["base_model_name_or_path"] = file.base_model or file.metadata.get("ss_sd_model_name") or None
            write_atomically(partial / component / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def _by_component(file: AdapterFile) -> dict[str, dict[str, AdapterLayer]]:
    """Component -> path -> layer."""
    components: dict[str, dict[str, AdapterLayer]] = {}
    for name, layer in file.layers.items():
        component, path = split_layer(name)
        components.setdefault(component, {})[path] = layer
    return components


def _settings(layers: Mapping[str, AdapterLayer]) -> dict[str, Any]:
    kinds = {layer.kind for layer in layers.values()}
    if len(kinds) > 1:
        layer = next(iter(layers.values()))
        raise ModelError(
            f"{layer.header.path}: some layers of {layer.component} are a DoRA and some a plain LoRA, which a PEFT "
            "configuration cannot say. Add --bake to turn all into a plain LoRA on the way."
        )
    scales = {
        path: (layer.rank, layer.alpha)
        for path, layer in layers.items()
        if layer.rank is not None and layer.alpha is not None
    }
    return adapter_settings(scales, dora=kinds == {"dora"})


def _copy(name: str, layer: AdapterLayer, key: str, shape: tuple[int, ...]) -> CopiedTensor:
    return CopiedTensor(name, layer.header.tensors[key].dtype, shape, (layer.header, key))


def _shape(layer: AdapterLayer, part: str, *, lengths_of_rows: bool = False) -> tuple[int, ...]:
    """The tensor's shape in the new file: as the model's layer is, a linear layer or a convolution.

    Args:
        lengths_of_rows: a DoRA's lengths as kohya files have them, [out, 1(, 1, 1)]; else as PEFT has them, [out] or
            [1, out, 1, 1].
    """
    own = layer.header.tensors[layer.parts[part]].shape
    wanted = layer.model_shape or layer.shape
    if wanted is None or layer.kind not in ("lora", "dora"):
        return own
    kernel = wanted[2:]
    if part == "lora_down.weight":
        return (own[0], wanted[1], *kernel)
    if part == "lora_up.weight":
        return (wanted[0], own[1], *[1] * len(kernel))
    if part != "dora_scale":
        return own
    if "lora_magnitude_vector" not in layer.parts[part] and len(own) > 1 and own[0] == 1 != wanted[0]:
        if lengths_of_rows:
            return own
        raise ModelError(
            f"{layer.header.path}: {layer.file_name} has a DoRA's lengths by input channel, which only kohya files can say."
        )
    if lengths_of_rows:
        return (wanted[0], *[1] * (len(wanted) - 1))
    return (1, wanted[0], 1, 1) if kernel else (wanted[0],)


def _alpha(name: str, layer: AdapterLayer) -> CopiedTensor:
    """Alpha that no tensor of the old file holds, in the matrices' dtype where that does not round it."""
    import torch

    stored = next(layer.header.tensors[key].dtype for key in layer.parts.values())
    value = torch.tensor(layer.alpha, dtype=torch.float64)
    narrow = value.to(getattr(torch, _DTYPES.get(stored, "float32")))
    exact = stored in _DTYPES and float(narrow) == float(value)
    tensor = narrow if exact else value.float()
    return CopiedTensor(name, stored if exact else "F32", (), data=bytes(tensor.reshape(1).view(torch.uint8).numpy()))


def _kept_texts(file: AdapterFile) -> dict[str, str]:
    return {key: value for key, value in file.metadata.items() if key not in _OF_THE_OLD_FILE}


def _kohya_texts(file: AdapterFile, output: Path) -> dict[str, str]:
    """The old texts, and those without which the WebUI hides a file where they were missing."""
    assert file.architecture is not None
    version, spec = _VERSIONS[file.architecture]
    ranks = Counter(layer.rank for layer in file.layers.values() if layer.rank)
    alphas = Counter(layer.alpha for layer in file.layers.values() if layer.alpha is not None)
    lycoris = any(kind in _LYCORIS for kind in file.kinds)
    texts = {
        "ss_base_model_version": version,
        "ss_v2": str(file.architecture == "sd2"),
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_dim": str(ranks.most_common(1)[0][0]) if ranks else "",
        "ss_network_alpha": f"{alphas.most_common(1)[0][0]:g}" if alphas else "",
        "ss_output_name": output.stem,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": spec,
        "modelspec.title": output.stem,
    }
    return {key: value for key, value in texts.items() if value} | _kept_texts(file)
