"""The proof that a finished kohya file holds what was trained: read back from the disk, compared, and run.

Only the names are shared with the code that wrote the file: the header is parsed by hand, and the effect is measured with the
file's tensors on the real layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts.errors import ExportError
from lora_scripts.export.effect import Effect, measure_effect, side_paths
from lora_scripts.export.names import FileNames, kohya_file_names, kohya_layer_names
from lora_scripts.export.read_back import (
    Stored,
    StoredLayer,
    Verification,
    check_keys,
    compare_stored,
    read_tensors_by_hand,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_scripts.adapters.weights import LoRAWeights

__all__ = ["Effect", "Verification", "applied_file", "verify_effect", "verify_file"]

_SUFFIXES = (".lora_down.weight", ".lora_up.weight", ".alpha")


def verify_file(
    path: str | Path,
    expected: LoRAWeights,
    names: FileNames | None = None,
) -> Verification:
    """Reads a finished kohya file back and compares it with what was trained.

    Raises:
        ExportError: the file cannot be read; a key is missing, unknown or of another shape; a number is not finite;
            alpha differs; a weight change is further from the trained one than the file's dtype explains; every change
            is zero. The text says "failed" and what to do.
    """
    path = Path(path)
    tensors, metadata, header_bytes, dtype = read_tensors_by_hand(path)
    names = kohya_layer_names(expected) if names is None else names
    check_keys(path, tensors, [names[layer] + suffix for layer in expected for suffix in _SUFFIXES])
    layers = {layer: _layer(path, tensors, names[layer]) for layer in expected}
    return compare_stored(Stored(path, layers, len(tensors), dtype, header_bytes, metadata), expected)


def verify_effect(
    path: str | Path,
    components: Mapping[str, nn.Module],
    forward: Callable[[], Tensor],
    trained_output: Tensor,
    names: FileNames | None = None,
    tolerance: float = 0.02,
    compute_dtype: torch.dtype | None = None,
) -> Effect:
    """Runs the model without any LoRA and with the file's, and compares the file's change with the trained one.

    Call it while the trained adapter is switched off or taken away.

    Args:
        components: the modules the LoRA was trained on, `{"unet": ..., "text_encoder": ...}`.
        forward: the model's output for one fixed input; it must run the components given.
        trained_output: what `forward` gave with the trained adapter at work.
        tolerance: allowed difference of the two changes, as a fraction of the trained change.
        compute_dtype: what the layers compute in, where it is coarser than the output's dtype (autocast).
    Raises:
        ExportError: the file changes nothing in the output, or not what the trained adapter changes.
    """
    path = Path(path)
    return measure_effect(
        path, forward, lambda: applied_file(path, components, names), trained_output, tolerance, compute_dtype
    )


@contextmanager
def applied_file(
    path: str | Path, components: Mapping[str, nn.Module], names: FileNames | None = None
) -> Iterator[None]:
    """The file's LoRA at work on the components, layer by layer beside the frozen weights; gone afterwards.

    Raises:
        ExportError: the file cannot be read, or names a layer that the components lack.
    """
    path = Path(path)
    tensors = read_tensors_by_hand(path)[0]
    names = kohya_file_names(components) if names is None else names
    modules = {
        names[layer]: module
        for component, root in components.items()
        for path, module in root.named_modules()
        if (layer := f"{component}.{path}") in names
    }
    pairs = []
    for name in sorted({key.removesuffix(suffix) for key in tensors for suffix in _SUFFIXES if key.endswith(suffix)}):
        if name not in modules:
            raise ExportError(f"{path}: failed: {name} is no layer of the model it was trained on.")
        pairs.append((modules[name], _layer(path, tensors, name)))
    with side_paths(pairs):
        yield


def _layer(path: Path, tensors: Mapping[str, Tensor], name: str) -> StoredLayer:
    names = (name + _SUFFIXES[0], name + _SUFFIXES[1], name + _SUFFIXES[2])
    down, up, alpha = (tensors[key] for key in names)
    if alpha.ndim:
        raise ExportError(f"{path}: failed: {names[2]} is {list(alpha.shape)} in the file, [] was trained.")
    return StoredLayer(down, up, float(alpha), names)
