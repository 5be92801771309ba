"""What a single file says about the noise schedule that its model was trained on.

Sources: the marker tensors `v_pred` and `ztsnr`, the header's modelspec entries, and the YAML file beside the model as
AUTOMATIC1111's WebUI reads it. All of them are optional, and most files of older models have none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lora_scripts.models.weights_file import WeightsHeader

__all__ = ["PredictionType", "ScheduleMarks", "schedule_of_file"]

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class ScheduleMarks:
    """What a file says.

    Attributes:
        prediction_type: None where it says nothing.
        zero_terminal_snr: whether it says that the last step of its schedule is pure noise.
    """

    prediction_type: PredictionType | None
    zero_terminal_snr: bool


def schedule_of_file(header: WeightsHeader) -> ScheduleMarks:
    """Looked at in this order: marker tensors, header, the YAML of the same name beside the file."""
    yaml = _yaml_beside(header)
    zero_snr = "ztsnr" in header.tensors or _yaml_value(yaml, "zsnr|zero_terminal_snr|rescale_betas_zero_snr") == "true"
    if "v_pred" in header.tensors:
        return ScheduleMarks("v_prediction", zero_snr)
    for said in (header.metadata.get("modelspec.prediction_type", ""), _yaml_value(yaml, "parameterization")):
        if said.lower() in ("v", "v_prediction", "velocity"):
            return ScheduleMarks("v_prediction", zero_snr)
        if said.lower() in ("eps", "epsilon"):
            return ScheduleMarks("epsilon", zero_snr)
    # Stability's names for the two sizes of its second generation: the larger ones predict velocity.
    if header.metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-768-v"):
        return ScheduleMarks("v_prediction", zero_snr)
    if header.metadata.get("modelspec.architecture", "").startswith("stable-diffusion-v2-512"):
        return ScheduleMarks("epsilon", zero_snr)
    return ScheduleMarks(None, zero_snr)


def _yaml_beside(header: WeightsHeader) -> str:
    beside = header.path.with_suffix(".yaml")
    if not beside.is_file() or beside.stat().st_size >= 100_000:
        return ""
    return beside.read_text(encoding="utf-8", errors="replace")


def _yaml_value(yaml: str, keys: str) -> str:
    """A value by its key, wherever in the file it stands; the rest of it, which may name classes to build, is not read."""
    found = re.search(rf"^\s*(?:{keys}):\s*[\"']?(\w+)[\"']?\s*(?:#.*)?$", yaml, re.MULTILINE)
    return found[1].lower() if found else ""
