"""A LoRA as the GGUF adapter file that llama.cpp loads beside a GGUF model (`--lora`).

Legend for shapes: R rank, in/out the layer's features, H heads, D the features of one head.

Source: ggml-org/llama.cpp, `convert_lora_to_gguf.py` (what a file holds) and `src/llama-adapter.cpp` (what is read).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.adapters.weights import LoRATensors, LoRAWeights
from lora_scripts.atomic import write_failure
from lora_scripts.errors import ExportError, ModelError
from lora_scripts.export.names import split_layer
from lora_scripts.export.plain import plain_scale
from lora_scripts.export.writer import require_finite

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_scripts.export.language_base import LanguageBase

__all__ = ["ARCHITECTURES", "GgufNames", "gguf_names", "read_gguf_adapter", "write_gguf_adapter"]

ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "Glm4ForCausalLM": "glm4",
    "GraniteForCausalLM": "granite",
    "SmolLM3ForCausalLM": "smollm3",
    "Olmo2ForCausalLM": "olmo2",
}
"""Class of transformers to architecture of llama.cpp, for those whose linear layers are converted as below."""

_PERMUTED = ("llama", "granite", "smollm3")
"""Architectures whose rotary embedding turns neighbouring features, where transformers turns the halves of a head: their
q and k rows are stored in another order."""


@dataclass(frozen=True)
class GgufNames:
    """What the layers of one model are called in llama.cpp, and in which order their rows lie.

    Attributes:
        architecture: `general.architecture`.
        tensors: layer to tensor name, `blk.0.attn_q.weight`.
        heads: layer to its number of heads, for the layers whose rows are stored in another order.
    """

    architecture: str
    tensors: Mapping[str, str]
    heads: Mapping[str, int]


def gguf_names(base: LanguageBase, layers: Iterable[str]) -> GgufNames:
    """The names for the layers of a base model, by gguf's own table.

    Raises:
        ExportError: the gguf package is missing, or the model or a layer of it is not among those that can be written.
    """
    gguf = _gguf()
    architecture = ARCHITECTURES.get(base.architecture)
    if architecture is None:
        raise ExportError(
            f"Export failed: no GGUF adapter can be written for {base.architecture}, only for {', '.join(ARCHITECTURES)}. "
            "Merge the LoRA into its base and convert the merged model with llama.cpp's convert_hf_to_gguf.py."
        )
    config = base.config
    by_name = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(by_name[architecture], int(config["num_hidden_layers"]))
    tensors, heads = {}, {}
    num_heads = int(config["num_attention_heads"])
    of_projection = {"q_proj": num_heads, "k_proj": int(config.get("num_key_value_heads") or num_heads)}
    for layer in layers:
        path = split_layer(layer)[1]
        name = table.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ExportError(f"Export failed: llama.cpp has no name for {path} of a {architecture} model.")
        tensors[layer] = name
        if architecture in _PERMUTED and path.rpartition(".")[2] in of_projection:
            heads[layer] = of_projection[path.rpartition(".")[2]]
    return GgufNames(architecture, tensors, heads)


def write_gguf_adapter(path: Path, weights: LoRAWeights, base: LanguageBase, name: str, dtype: torch.dtype) -> None:
    """Writes the adapter file; an older one of that name is replaced in one step.

    Per layer `<tensor>.lora_a` [R, in] and `<tensor>.lora_b` [out, R], rows of q and k in llama.cpp's order; the scale
    stands in `adapter.lora.alpha`, which llama.cpp divides by the rank.

    Args:
        name: `general.name`.
        dtype: of the tensors; float16 is kept, others become float32.
    Raises:
        ExportError: not plain LoRA, a number that is not finite, a model or layer without a name in llama.cpp, or the place
            cannot be written.
    """
    import torch

    _, alpha = plain_scale(weights)
    names = gguf_names(base, weights)
    dtype = dtype if dtype == torch.float16 else torch.float32
    require_finite(path, weights, dtype)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = _gguf().GGUFWriter(partial, names.architecture)
        try:
            _fill(writer, weights, names, name, alpha, dtype)
        finally:
            writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise ExportError(f"Export failed: {write_failure(path, None, error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _fill(writer: Any, weights: LoRAWeights, names: GgufNames, name: str, alpha: int, dtype: torch.dtype) -> None:
    gguf = _gguf()
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for layer, lora in weights.items():
        up = lora.lora_B.detach()
        if layer in names.heads:
            up = _interleaved(up, names.heads[layer])
        for part, tensor in (("lora_a", lora.lora_A.detach()), ("lora_b", up)):
            array = tensor.to(device="cpu", dtype=dtype).contiguous().numpy()
            writer.add_tensor(f"{names.tensors[layer]}.{part}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    for file in writer.fout:
        file.flush()
        os.fsync(file.fileno())


def read_gguf_adapter(path: Path, base: LanguageBase, layers: Iterable[str]) -> dict[str, LoRATensors]:
    """The layers of an adapter file by the model's own names, rows in transformers' order.

    Args:
        layers: all linear layers of the base.
    Raises:
        ModelError: the file is damaged, is no adapter, or was made for another model.
    """
    gguf = _gguf()
    if not path.is_file():
        raise ModelError(f"{path}: no such file. Check the path.")
    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: _tensor(tensor) for tensor in reader.tensors}
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the package lets through whatever a damaged file makes of its reading
        raise ModelError(f"{path}: is no whole GGUF file ({type(error).__name__}). Export it again.") from None
    if fields.get("general.type") != "adapter" or fields.get("adapter.type") != "lora":
        raise ModelError(f"{path}: is a GGUF file, but no LoRA adapter (general.type {fields.get('general.type')}).")
    names = gguf_names(base, [layer for layer in layers if not layer.endswith("lm_head")])
    if fields["general.architecture"] != names.architecture:
        raise ModelError(
            f"{path}: was made for a {fields['general.architecture']} model, the base is a {names.architecture} model."
        )
    weights = {}
    for layer, name in names.tensors.items():
        if f"{name}.lora_a" in tensors and f"{name}.lora_b" in tensors:
            down, up = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
            if layer in names.heads:
                up = _halves(up, names.heads[layer])
            weights[layer] = LoRATensors(down, up, float(fields["adapter.lora.alpha"]))
    if tensors:
        raise ModelError(f"{path}: {len(tensors)} of its tensors are not in this model, {min(tensors)} among them.")
    return weights


def _interleaved(up: Tensor, heads: int) -> Tensor:
    """[H * D, R] with the rows of each head in the order 0, D/2, 1, D/2 + 1, ..."""
    return up.reshape(heads, 2, -1, up.shape[1]).transpose(1, 2).reshape(up.shape)


def _halves(up: Tensor, heads: int) -> Tensor:
    """What `_interleaved` was given."""
    return up.reshape(heads, -1, 2, up.shape[1]).transpose(1, 2).reshape(up.shape)


def _tensor(tensor: Any) -> Tensor:
    import torch

    return torch.from_numpy(tensor.data.copy())


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ExportError(
            "Export failed: the gguf package is missing. Install it with: pip install 'lora-scripts[gguf]'"
        ) from None
    return gguf
