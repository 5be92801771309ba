"""The original single-file layouts of Stable Diffusion 1.x, 2.x and SDXL: where each component lies, and of what shape it is.

Only one direction is written down, from the names of the diffusers and transformers classes to those of the original file:
the names of a built model are always known, so reading and writing use the same tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lora_scripts.errors import ModelError
from lora_scripts.models.clip_layout import clip_config, clip_names
from lora_scripts.models.layout_names import Place, Shapes
from lora_scripts.models.open_clip_layout import open_clip_config, open_clip_places
from lora_scripts.models.published import published_config
from lora_scripts.models.unet_layout import UNET_PREFIX, unet_config, unet_names
from lora_scripts.models.vae_layout import VAE_PREFIX, vae_config, vae_names

__all__ = ["LAYOUTS", "FileLayout", "TextPlace", "derive_config"]


@dataclass(frozen=True)
class TextPlace:
    """Where a text encoder lies in a file.

    Attributes:
        prefix: of its names.
        open_clip: whether the names are OpenCLIP's rather than those of transformers.
        penultimate: whether the model reads the last layer but one, of which the loaded encoder is built no further.
    """

    prefix: str
    open_clip: bool = False
    penultimate: bool = False


@dataclass(frozen=True)
class FileLayout:
    """How the files of one family are built.

    Attributes:
        family: a key of the table of families.
        title: of the family, for messages.
        texts: component -> where that text encoder lies.
        architecture: `modelspec.architecture` of its files.
        implementation: `modelspec.implementation` of its files.
        velocity_architecture: as `architecture`, of the models that predict velocity where those have a name of their own.
        velocity_sample_size: latent side of the models that predict velocity, where that is another one.
        if_silent: what to tell people about a file that does not say what its model predicts; {title} is the model.
    """

    family: str
    title: str
    texts: Mapping[str, TextPlace]
    architecture: str
    implementation: str
    velocity_architecture: str = ""
    velocity_sample_size: int | None = None
    if_silent: str = ""

    @property
    def components(self) -> tuple[str, ...]:
        return ("unet", "vae", *self.texts)

    def architecture_of(self, prediction_type: str) -> str:
        """`modelspec.architecture` of a file; the models of one family that predict velocity may have a name of their own."""
        velocity = prediction_type == "v_prediction"
        return (velocity and self.velocity_architecture) or self.architecture

    def places(self, component: str, names: Iterable[str], file_names: Iterable[str] | None = None) -> dict[str, Place]:
        """Name in the component's module -> its place in the file.

        Args:
            names: all tensor names of the module.
            file_names: of the file that is read, whose spelling is followed; None for a file to be written.
        Raises:
            KeyError, ValueError: a name that the original layout has no place for.
        """
        if component in self.texts:
            text = self.texts[component]
            if text.open_clip:
                return open_clip_places(names, text.prefix)
            nested = file_names is None or any(name.startswith(text.prefix + "text_model.") for name in file_names)
            plain = clip_names(names, text.prefix, with_text_model=nested)
        else:
            plain = {"unet": unet_names, "vae": vae_names}[component](names)
        return {name: Place(stored) for name, stored in plain.items()}

    def must_be_read(self, component: str) -> tuple[str, ...]:
        """Beginnings of names in a file that must all find a place in the component.

        Around them real files carry what no loader reads: position numbers, losses of the VAE's training, a projection,
        schedule tables.
        """
        if component == "unet":
            return (UNET_PREFIX,)
        if component == "vae":
            return tuple(VAE_PREFIX + part for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
        text = self.texts[component]
        if text.penultimate:
            return ()
        if text.open_clip:
            return (text.prefix + "transformer.resblocks.",)
        return (text.prefix + "encoder.layers.", text.prefix + "text_model.encoder.layers.")


_COMPVIS = "https://github.com/CompVis/stable-diffusion"
_STABILITY = "https://github.com/Stability-AI/"

LAYOUTS: Mapping[str, FileLayout] = {
    "sd15": FileLayout(
        family="sd15",
        title="Stable Diffusion 1.x",
        texts={"text_encoder": TextPlace("cond_stage_model.transformer.")},
        architecture="stable-diffusion-v1",
        implementation=_COMPVIS,
    ),
    "sd2": FileLayout(
        family="sd2",
        title="Stable Diffusion 2.x",
        texts={"text_encoder": TextPlace("cond_stage_model.model.", open_clip=True, penultimate=True)},
        architecture="stable-diffusion-v2-512",
        velocity_architecture="stable-diffusion-v2-768-v",
        implementation=_STABILITY + "stablediffusion",
        velocity_sample_size=96,
        if_silent=(
            "{title} does not say what it predicts, so noise (epsilon) at 512 px is taken. If it is a 768 px model (2.0-v, 2.1), "
            "it predicts velocity: set prediction: v_prediction and resolution: 768."
        ),
    ),
    "sdxl": FileLayout(
        family="sdxl",
        title="SDXL",
        texts={
            "text_encoder": TextPlace("conditioner.embedders.0.transformer."),
            "text_encoder_2": TextPlace("conditioner.embedders.1.model.", open_clip=True),
        },
        architecture="stable-diffusion-xl-v1-base",
        implementation=_STABILITY + "generative-models",
    ),
}
"""By family."""


def derive_config(
    component: str, shapes: Shapes, written: Mapping[str, Any] | None = None, family: str = "sd15"
) -> dict[str, Any]:
    """The published configuration with everything that the shapes decide put in; equal to it for a full-size model.

    Not visible in shapes are the numbers of attention heads and of norm groups, the VAE's scaling factor and a few more: those
    come from `written`, else stay as published; heads are as wide as in the published model.

    Args:
        component: one of the family's components.
        shapes: of all tensors of the single file, by their original names.
        written: settings from the file's header; what the shapes say goes before it.
    Raises:
        ModelError: the shapes do not describe a model of this kind.
    """
    layout, written = LAYOUTS[family], written or {}
    published = published_config(component, family)
    try:
        said = _said_by_shapes(component, shapes, layout)
    except (KeyError, IndexError, ValueError) as error:
        raise ModelError(
            f"the {component} in this file is not built like {layout.title} (at {error}). "
            "The file is incomplete or of another model: use the original download."
        ) from None
    return {**published, **_heads(component, published, said), **written, **said}


def _said_by_shapes(component: str, shapes: Shapes, layout: FileLayout) -> dict[str, Any]:
    if component == "unet":
        pooled = [shapes[text.prefix + "text_projection"][1] for text in layout.texts.values() if _pools(text)]
        return unet_config(shapes, pooled[0] if pooled else None)
    if component == "vae":
        return vae_config(shapes)
    text = layout.texts[component]
    if text.open_clip:
        return open_clip_config(shapes, text.prefix, penultimate=text.penultimate)
    return clip_config(shapes, text.prefix)


def _pools(text: TextPlace) -> bool:
    return text.open_clip and not text.penultimate


def _heads(component: str, published: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Attention heads of another size than the published one: 64 wide in every text encoder and in the later U-Nets."""
    if "num_attention_heads" in published:
        return {"num_attention_heads": max(1, said["hidden_size"] // 64)}
    # Despite its name this is the number of heads where it is a list (huggingface/diffusers, `UNet2DConditionModel`).
    if isinstance(published.get("attention_head_dim"), list):
        return {"attention_head_dim": [max(1, width // 64) for width in said["block_out_channels"]]}
    return {}
