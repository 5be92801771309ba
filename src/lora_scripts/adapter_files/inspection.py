"""Everything that can be told about one adapter file, for `lora-scripts inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.adapter_files.endings import KINDS
from lora_scripts.adapter_files.header_facts import HeaderFacts, header_facts
from lora_scripts.adapter_files.measure import LayerFacts, block_norms, measure

if TYPE_CHECKING:
    from lora_scripts.adapter_files.adapter_file import AdapterFile
    from lora_scripts.adapter_files.readers import Verdict

__all__ = ["Inspection", "inspect_adapter"]

_STRONGEST = 5
_SHOWN = 3
_USUAL_DTYPES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        layers: the facts of each layer.
        verdicts: of the programs that load such files; empty for models that the tables do not cover.
        faults: what makes the file unusable as it is.
        notes: what is odd but harmless, or worth knowing.
    """

    file: AdapterFile
    header: HeaderFacts
    layers: list[LayerFacts]
    verdicts: list[Verdict]
    faults: list[str]
    notes: list[str]

    def strongest(self) -> list[LayerFacts]:
        """The layers with the largest change, largest first."""
        known = [facts for facts in self.layers if facts.norm]
        return sorted(known, key=lambda facts: -(facts.norm or 0.0))[:_STRONGEST]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for other programs."""
        file = self.file
        return {
            "path": str(file.path),
            "bytes": _num_bytes(file),
            "spelling": file.spelling,
            "architecture": file.architecture,
            "kinds": Counter(layer.kind for layer in file.layers.values()),
            "ranks": list(file.ranks),
            "alphas": list(file.alphas),
            "dtypes": file.dtypes(),
            "components": Counter(layer.component for layer in file.layers.values()),
            "adapter_config_base_model": file.base_model,
            "header": asdict(self.header),
            "blocks": {
                block: {"norm": norm, "layers": count} for block, (norm, count) in block_norms(self.layers).items()
            },
            "layers": [
                {
                    "name": facts.name,
                    "file_name": layer.file_name,
                    "known": layer.known,
                    "kind": layer.kind,
                    "rank": layer.rank,
                    "alpha": layer.alpha,
                    "shape": list(layer.shape) if layer.shape else None,
                    "norm": facts.norm,
                }
                for facts, layer in zip(self.layers, file.layers.values(), strict=True)
            ],
            "readers": [asdict(verdict) for verdict in self.verdicts],
            "faults": self.faults,
            "notes": self.notes,
        }


def inspect_adapter(path: str | Path, layer_names: Iterable[str] | None = None) -> Inspection:
    """Opens a file, measures its layers one by one, and asks the readers' tables.

    Args:
        layer_names: layers of a base model that it should fit, as open_adapter_file takes them.
    Raises:
        ModelError: no adapter file; tells what it is.
    """
    from lora_scripts.adapter_files.adapter_file import open_adapter_file
    from lora_scripts.adapter_files.readers import verdicts

    file = open_adapter_file(path, layer_names)
    layers = list(measure(file))
    return Inspection(
        file,
        header_facts(file.metadata),
        layers,
        verdicts(file),
        _faults(file, layers, checked=layer_names is not None),
        _notes(file, layers),
    )


def _num_bytes(file: AdapterFile) -> int:
    return sum(header.path.stat().st_size for header in file.headers())


def _faults(file: AdapterFile, layers: list[LayerFacts], *, checked: bool) -> list[str]:
    faults = list(dict.fromkeys(facts.fault for facts in layers if facts.fault))
    broken = {key: count for facts in layers for key, count in facts.broken.items()}
    if broken:
        holds = "holds" if len(broken) == 1 else "hold"
        shown = _some(f"{key} ({count:,})" for key, count in broken.items())
        faults.append(
            f"{_counted(len(broken), 'tensor')} {holds} numbers that are NaN or infinite: {shown}. The training has "
            "diverged or the file is damaged: use an earlier save, or fetch it again."
        )
    if file.duplicates:
        stand = "stands" if len(file.duplicates) == 1 else "stand"
        shown = _some(file.duplicates)
        faults.append(f"{_counted(len(file.duplicates), 'layer')} {stand} in the file twice: {shown}.")
    if checked:
        missing = [layer.file_name for layer in file.layers.values() if not layer.known]
        wrong = [
            layer.file_name
            for layer in file.layers.values()
            if layer.known and layer.shape and layer.model_shape and not _fits(layer.shape, layer.model_shape)
        ]
        for names, what in ((missing, "are not in the base model"), (wrong, "have another shape in the base model")):
            if names:
                made_for = f" The file was made for {file.title}." if file.architecture else ""
                faults.append(f"{len(names)} of {len(file.layers)} layers {what}: {_some(names)}.{made_for}")
    if layers and all(facts.changes_nothing for facts in layers):
        faults.append("Every layer's change is zero: the file does nothing. It was saved before the first step.")
    return faults


def _fits(shape: tuple[int, ...], model_shape: tuple[int, ...]) -> bool:
    from math import prod

    return shape[0] == model_shape[0] and prod(shape) == prod(model_shape)


def _notes(file: AdapterFile, layers: list[LayerFacts]) -> list[str]:
    notes = []
    zero = [facts.name for facts in layers if facts.changes_nothing]
    if zero and len(zero) < len(layers):
        change = "changes" if len(zero) == 1 else "change"
        notes.append(f"{_counted(len(zero), 'layer')} {change} nothing: {_some(zero)}.")
    if file.strangers:
        belong = "belongs" if len(file.strangers) == 1 else "belong"
        notes.append(f"{_counted(len(file.strangers), 'key')} {belong} to no layer: {_some(file.strangers)}.")
    unknown = [layer.file_name for layer in file.layers.values() if not layer.known]
    if unknown and len(unknown) < len(file.layers):
        are = "is" if len(unknown) == 1 else "are"
        notes.append(f"{_counted(len(unknown), 'layer')} {are} not in {file.title}: {_some(unknown)}.")
    without = [layer for layer in file.layers.values() if layer.rank and not layer.has_alpha]
    if without:
        have, them = ("has", "it") if len(without) == 1 else ("have", "them")
        notes.append(f"{_counted(len(without), 'layer')} {have} no alpha: programs take {them} at scale 1.")
    odd = [dtype for dtype in file.dtypes() if dtype not in _USUAL_DTYPES]
    if odd:
        notes.append(f"Some tensors are stored as {', '.join(odd)}, which not every program reads; fp16 is usual.")
    if "unknown" in file.kinds:
        notes.append("Some layers are of a kind that is not known here.")
    hidden = [facts for facts in layers if facts.norm is None and not facts.broken and not facts.fault]
    if hidden:
        kinds = {file.layers[facts.name].kind for facts in hidden}
        names = " and ".join(sorted(KINDS[kind] for kind in kinds))
        notes.append(f"The strength of {_counted(len(hidden), 'layer')} depends on the base model's weights ({names}).")
    return notes


def _some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _counted(count: int, what: str) -> str:
    """`1 layer`, `3 layers`."""
    return f"{count} {what}{'' if count == 1 else 's'}"
