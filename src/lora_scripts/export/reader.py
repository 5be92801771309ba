"""LoRA files in the spellings in use: kohya, diffusers old and new, PEFT; of Stable Diffusion and of language models.

What is not plain LoRA (LoHa, LoKr, DoRA, ...), what was made for another architecture and what is damaged is refused with
the reason: a file read half would give a picture that nobody can explain.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_scripts.adapters.weights import LoRATensors, LoRAWeights
from lora_scripts.errors import ModelError
from lora_scripts.export.names import LANGUAGE_MODEL, as_shapes, file_path, kohya_name, split_layer
from lora_scripts.export.peft_config import LANGUAGE_MODEL_TASK, AdapterConfig, folder_config, header_configs

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LoRAFile", "read_lora_file"]

Format = Literal["kohya", "diffusers", "peft"]

_KOHYA_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_PARTS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
_OTHER_KINDS = {
    re.compile(pattern): kind
    for pattern, kind in {
        r"\.hada_[wt]\d": "a LoHa",
        r"\.lokr_[wt]\d": "a LoKr",
        r"\.(dora_scale|lora_magnitude_vector)": "a DoRA",
        r"\.b?oft_(blocks|diag|r)": "an OFT",
        r"\.lora_mid\.": "a Tucker-decomposed LoCon",
        r"\.(a1|a2|b1|b2)\.weight$": "a GLoRA",
        r"\.on_input$": "an (IA)^3",
        r"\.diff(_b)?$": "a full difference of weights",
        r"\.(w|b)_norm$": "a LyCORIS that changes norm layers",
    }.items()
}
_NOT_ADAPTERS = {
    "model.diffusion_model.": "a whole model; give it as base_model, not as a LoRA",
    "cond_stage_model.": "a whole model; give it as base_model, not as a LoRA",
    "first_stage_model.": "a whole model; give it as base_model, not as a LoRA",
    "emb_params": "a textual-inversion embedding, not a LoRA",
    "clip_l": "a textual-inversion embedding, not a LoRA",
    "control_model.": "a ControlNet, not a LoRA",
    "controlnet_": "a ControlNet, not a LoRA",
    "decoder.": "a VAE or another whole network, not a LoRA",
}
_OLD_NAMES = {  # the attention processors of diffusers before 0.17 named their layers so
    "unet": {"to_out": "to_out.0"},
    "text_encoder": {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"},
}
_SHOWN = 5


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA read from disk.

    Attributes:
        path: the file, or the folder it lies in.
        format: the spelling it was found in.
        weights: layers by the model's own names; tensors in the file's dtype, on the CPU.
        metadata: the file's header texts.
    """

    path: Path
    format: Format
    weights: LoRAWeights
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name it goes by in `<lora:NAME:1>`."""
        return self.path.stem if self.path.suffix == ".safetensors" else self.path.name

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({lora.rank for lora in self.weights.values()}))


def read_lora_file(path: str | Path, layer_names: Iterable[str] | None = None) -> LoRAFile:
    """A LoRA in kohya, diffusers or PEFT spelling, with its layers under the model's own names.

    Args:
        path: a `.safetensors` file, a PEFT folder (also one with `unet/` and `text_encoder/` in it), or a folder
            that holds a single `.safetensors` file.
        layer_names: all layer names of the loaded model, component in front. A mapping to weight shapes, as
            `layer_shapes` gives, checks the shapes as well and fits 1x1 convolutions to linear layers. Without it
            kohya's underscores stay as they are, since only the model can tell which of them were dots.
    Returns:
        alpha is the file's; where the file has none it equals the rank (scale 1), which is how all readers take it.
    Raises:
        ModelError: not a LoRA, another kind of adapter, layers that the model lacks, other shapes, damaged tensors.
    """
    path = Path(path)
    layers = None if layer_names is None else as_shapes(layer_names)
    collected: dict[str, LoRATensors] = {}
    found: set[Format] = set()
    metadata: dict[str, str] = {}
    for file, component in _files_of(path):
        tensors, header = _load(file)
        metadata.update(header)
        kind = _format_of(file, tensors)
        found.add(kind)
        collected.update(_weights_of(file, tensors, header, kind, component, layers))
    return LoRAFile(path, found.pop(), collected, metadata)


def _files_of(path: Path) -> list[tuple[Path, str | None]]:
    """The files to read, each with the component it is known to belong to by its folder."""
    if not path.exists():
        raise ModelError(f"{path}: no such LoRA file or folder. Check the path.")
    if path.is_file():
        return [(path, None)]
    parts: list[tuple[Path, str | None]] = [
        (path / component / "adapter_model.safetensors", component) for component in _COMPONENTS
    ]
    parts = [(file, component) for file, component in parts if file.is_file()]
    if parts:
        return parts
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        if (path / name).is_file():
            return [(path / name, None)]
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return [(files[0], None)]
    if not files:
        raise ModelError(
            f"{path}: a folder without a LoRA in it: no adapter_model.safetensors and no other .safetensors file. "
            "Name the LoRA's file, or a PEFT folder."
        )
    raise ModelError(f"{path}: {len(files)} .safetensors files lie in this folder. Name the one that is meant.")


def _load(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    from lora_scripts.models.weights_file import inspect_weights, read_tensors

    header = inspect_weights(file)
    return dict(read_tensors(header, header.tensors)), header.metadata


def _format_of(file: Path, keys: Iterable[str]) -> Format:
    keys = list(keys)
    for pattern, kind in _OTHER_KINDS.items():
        example = next((key for key in keys if pattern.search(key)), None)
        if example is not None:
            raise ModelError(
                f"{file}: is {kind} ({example}), which cannot be read here. Only plain LoRA can; convert it to one first."
            )
    pairs = [key for key in keys if _split_part(key)[1] in ("down", "up")]
    if not pairs:
        for start, what in _NOT_ADAPTERS.items():
            if any(key.startswith(start) for key in keys):
                raise ModelError(f"{file}: is {what}.")
        shown = ", ".join(keys[:_SHOWN]) or "nothing"
        raise ModelError(
            f"{file}: is not a LoRA: none of its tensors is a pair of low-rank matrices. It holds {shown}."
        )
    if any(key.startswith(tuple(_KOHYA_COMPONENTS)) for key in pairs):
        return "kohya"
    return "peft" if any(key.startswith("base_model.model.") for key in pairs) else "diffusers"


def _split_part(key: str) -> tuple[str, str]:
    """("unet.x.to_q", "down") from "unet.x.to_q.lora_A.weight"; an unknown ending gives part "" and the key itself."""
    for ending, part in _PARTS.items():
        if key.endswith(ending):
            return key.removesuffix(ending), part
    return key, ""


def _weights_of(
    file: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, str],
    kind: Format,
    component: str | None,
    layers: Mapping[str, tuple[int, ...] | None] | None,
) -> dict[str, LoRATensors]:
    groups: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in tensors.items():
        base, part = _split_part(key)
        if part:
            old_spelling = part != "alpha" and key.endswith(("_lora.down.weight", "_lora.up.weight"))
            name = base if kind == "kohya" else _dotted(base, component, old_spelling)
            groups.setdefault(name, {})[part] = tensor
        else:
            strangers.append(key)
    configs = _configs(file, header, kind)
    of_language_model = any(config.task_type == LANGUAGE_MODEL_TASK for config in configs.values())
    resolve = _Names(layers, LANGUAGE_MODEL if of_language_model else "unet")
    unmatched = strangers + [name for name in groups if resolve(name, kind) is None]
    if unmatched:
        raise ModelError(_unmatched_text(file, unmatched, len(groups) + len(strangers), layers or ()))
    weights: dict[str, LoRATensors] = {}
    for name, parts in groups.items():
        layer = resolve(name, kind)
        assert layer is not None, name
        shape = layers[layer] if layers is not None else None
        weights[layer] = _one_layer(file, name, layer, parts, shape, configs)
    return weights


def _dotted(base: str, component: str | None, old_spelling: bool) -> str:
    """A diffusers or PEFT name with its component in front where the file says which, in today's spelling."""
    name = base.removeprefix("base_model.model.").replace(".processor.", ".")
    if component is not None and not name.startswith(f"{component}."):
        name = f"{component}.{name}"
    if old_spelling:
        stem, _, last = name.rpartition(".")
        kind = "text_encoder" if name.startswith("text_encoder") else "unet"
        name = f"{stem}.{_OLD_NAMES[kind].get(last, last)}"
    return name


class _Names:
    """From a name in a file to the model's own name, or None where the model has no such layer."""

    def __init__(self, layers: Mapping[str, object] | None, unnamed: str) -> None:
        self.free = layers is None
        self.unnamed = unnamed  # the component that dotted names without one belong to
        self.table: dict[str, str] = {}
        for layer in layers or ():
            component, path = split_layer(layer)
            spelt = file_path(component, path)
            # A PEFT file of one component does not say which; the UNet comes first in the model and so wins.
            for dotted in (path, spelt, f"{component}.{path}", f"{component}.{spelt}"):
                self.table.setdefault(dotted, layer)
            for prefix, owner in _KOHYA_COMPONENTS.items():
                if owner == component:
                    self.table[kohya_name(layer, {component: prefix})] = layer

    def __call__(self, name: str, kind: Format) -> str | None:
        if not self.free:
            return self.table.get(name)
        if kind == "kohya":
            for prefix, component in _KOHYA_COMPONENTS.items():
                if name.startswith(prefix):
                    return f"{component}.{name.removeprefix(prefix)}"
            return None
        known = name.startswith(tuple(f"{component}." for component in _COMPONENTS))
        return name if known else f"{self.unnamed}.{name}"


def _configs(file: Path, header: Mapping[str, str], kind: Format) -> Mapping[str, AdapterConfig]:
    """Scales that stand outside the tensors, by component; "" is for all components."""
    if kind == "diffusers":
        return header_configs(file, header)
    return {"": folder_config(file)} if kind == "peft" else {}


def _one_layer(
    file: Path,
    name: str,
    layer: str,
    parts: Mapping[str, Tensor],
    shape: tuple[int, ...] | None,
    configs: Mapping[str, AdapterConfig],
) -> LoRATensors:
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise ModelError(
            f"{file}: {name} lacks its {missing[0]} matrix. The file is damaged; fetch or export it again."
        )
    down, up = parts["down"], parts["up"]
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or down.shape[0] != up.shape[1]:
        raise ModelError(
            f"{file}: {name} is not a low-rank pair: down {list(down.shape)}, up {list(up.shape)}. "
            "The file is damaged or of an unknown kind."
        )
    if shape is not None:
        down, up = _fit(file, name, down, up, shape)
    rank = int(down.shape[0])
    component, path = split_layer(layer)
    config = configs.get(component) or configs.get("")
    if "alpha" in parts:
        alpha = float(parts["alpha"].float().reshape(-1)[0])
    elif config is not None:
        alpha = config.alpha_of((path, file_path(component, path)), rank)
    else:
        alpha = float(rank)
    return LoRATensors(lora_A=down, lora_B=up, alpha=alpha)


def _fit(file: Path, name: str, down: Tensor, up: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The pair with as many dimensions as the layer has; a 1x1 convolution and a linear layer are the same thing."""
    kernel = shape[2:] if len(shape) == 4 else (1, 1)
    if down.ndim == 2:
        down = down[:, :, None, None]
    if up.ndim == 2:
        up = up[:, :, None, None]
    wanted = (shape[0], shape[1], *kernel)
    given = (up.shape[0], down.shape[1], *down.shape[2:])
    if given != wanted or tuple(up.shape[2:]) != (1, 1):
        hint = "It was made for another base model."
        if ("attn2" in name and name.endswith(("to_k", "to_v"))) and math.prod(given) != math.prod(wanted):
            widths = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
            hint = f"It was made for {widths.get(given[1], 'another base model')}; this base is another."
        raise ModelError(
            f"{file}: {name} changes a layer of shape {list(given[: len(shape)])}, but this model's layer is "
            f"{list(shape)}. {hint}"
        )
    return (down, up) if len(shape) == 4 else (down[:, :, 0, 0], up[:, :, 0, 0])


def _unmatched_text(file: Path, unmatched: list[str], num_names: int, layers: Iterable[str]) -> str:
    shown = ", ".join(unmatched[:_SHOWN])
    more = f" and {len(unmatched) - _SHOWN} more" if len(unmatched) > _SHOWN else ""
    return f"{file}: {len(unmatched)} of {num_names} layers are not in this model: {shown}{more}. {_reason(unmatched, layers)}"


def _reason(unmatched: list[str], layers: Iterable[str]) -> str:
    text = "\n".join(unmatched)
    if any(split_layer(layer)[0] == LANGUAGE_MODEL for layer in layers):
        if any(mark in text for mark in ("lora_unet_", "lora_te", "unet.", "transformer_blocks")):
            return "It looks like a LoRA for a picture model; this base model is a language model."
        return "It was made for another language model, or trains layers of a kind that is not supported."
    if any(mark in text for mark in ("lora_te2_", "input_blocks", "output_blocks", "middle_block_", "text_encoder_2.")):
        return "It looks like a LoRA for SDXL, which does not fit this base model."
    if any(mark in text for mark in ("double_blocks", "single_blocks", "single_transformer_blocks")):
        return "It looks like a LoRA for Flux, which does not fit this base model."
    if "joint_blocks" in text or "lora_te3_" in text:
        return "It looks like a LoRA for Stable Diffusion 3, which does not fit this base model."
    if any(name.startswith(("diffusion_model.", "transformer.", "lora_transformer_")) for name in unmatched):
        return "It looks like a LoRA for a diffusion transformer, which does not fit this base model."
    if any(name.startswith(("model.layers.", "model.language_model.")) for name in unmatched):
        return "It looks like a LoRA for a language model."
    return "It was made for another base model, or trains layers of a kind that is not supported."
