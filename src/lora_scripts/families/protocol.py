"""What a model family offers to the rest of the program, and the small types that pass between them.

A family is one file: how its weights are loaded, its loss, and what it makes of a prompt.
The training loop, the cache, the exporters and the commands know this protocol and nothing about any family.

Legend for shapes: B batch, C channels, h w latent height and width, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from lora_scripts.adapters.presets import BlockRoles
    from lora_scripts.config import RunConfig
    from lora_scripts.dialogues.answers import Answer, AnswerRequest
    from lora_scripts.models.shards import Shards
    from lora_scripts.models.source import BaseModel
    from lora_scripts.training.draws import Draws

__all__ = ["Batch", "Encoder", "LanguageFamily", "Loss", "ModelFamily", "PassWork", "PictureFamily", "SampleRequest"]


@dataclass(frozen=True)
class Encoder:
    """One frozen and repeatable stage of a family; its outputs are cached on disk.

    Attributes:
        name: folder name in the cache, "latents" or "text".
        reads: which part of an example it reads: "image" gives `run` a list of pixel tensors [3,H,W] in [-1,1] of one
            size, "caption" a list of strings, "mask" a list of [1,H,W] in 0..1, how much each pixel is to be learnt, "fit" a
            list of `Framing`: the picture's size and crop. The last is not cached.
        fingerprint: changes whenever the same input would give another output: weights, dtype, settings.
        run: encodes a list of inputs, one dictionary of tensors each (on the CPU).
        batch_size: how many inputs one call of `run` takes at most.
        exact: `run` in float32, for inputs whose encoding in half precision is not finite; None where `run` is exact.
    """

    name: str
    reads: Literal["image", "caption", "mask", "fit"]
    fingerprint: str
    run: Callable[[Sequence[Any]], list[dict[str, Tensor]]]
    batch_size: int = 8
    exact: Callable[[Sequence[Any]], list[dict[str, Tensor]]] | None = None


@dataclass(frozen=True)
class Batch:
    """Examples of one shape, stacked, on the training device.

    Attributes:
        tensors: encodings by name, each with a leading batch dimension B; "weight" [B], by which the examples' losses count
            in the total, where they do not all count alike.
        captions: the B captions, after shuffling and dropout; for what is trained and so cannot be encoded ahead.
        keys: the B names that random draws belong to; the same example in another epoch has another key.
        strata: the B parts of 0..1, as (start, width), that noise levels may be drawn from so that those of a whole
            optimizer step are spread evenly; None for independent draws.
        levels: B prescribed noise levels, each a share 0..1 of the trained range, for measurements; the noise is then
            plain. None in training.
        filled: for a tensor whose rows differ in length, how much of each row is filled, from the front.
    """

    tensors: Mapping[str, Tensor]
    captions: Sequence[str]
    keys: Sequence[str]
    strata: Sequence[tuple[float, float]] | None = None
    levels: Sequence[float] | None = None
    filled: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Batch:
        """The same examples with these tensors in place of theirs."""
        return replace(self, tensors=tensors)

    def at_levels(self, levels: Sequence[float]) -> Batch:
        """The same examples at prescribed noise levels."""
        return replace(self, levels=levels)

    @property
    def form(self) -> tuple[object, ...]:
        """Names, shapes and number formats of the tensors: equal for batches that one recorded pass can serve."""
        return tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(self.tensors.items()))

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Loss:
    """A sum with the number of things it was summed over, so that micro-batches add up to one exact mean.

    Attributes:
        total: [] the sum of the per-example losses (images) or per-token losses (text), with gradient.
        count: images or target tokens in `total`.
        per_example: [B] the examples' own losses without any weighting, detached, for reports and measurements.
        levels: [B] the noise levels they were drawn at, each a share 0..1 of the trained range; None where there is none.
    """

    total: Tensor
    count: int
    per_example: Tensor
    levels: Tensor | None = None


@dataclass(frozen=True)
class PassWork:
    """How much a forward and backward pass over a batch computes.

    Attributes:
        flops: floating-point operations of its matrix products, a multiplication and an addition as two; about.
        places: rows of the matrices, tokens say.
        padding: of these, what stands for nothing.
        dtype: that it is computed in.
    """

    flops: float
    places: int
    padding: int
    dtype: torch.dtype


@dataclass(frozen=True)
class SampleRequest:
    """One picture to render.

    Attributes:
        width, height: pixels; a multiple of 8.
        guidance: classifier-free guidance scale; 1 turns it off.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 42
    steps: int = 20
    guidance: float = 7.0
    width: int = 512
    height: int = 512


class ModelFamily(Protocol):
    """One architecture, as the loop and everything around it know it.

    Attributes:
        name: "sd15"; found from the weights.
        task: the `task_type` that trains it.
        default_targets: component -> endings of the names of the layers that get an adapter.
        conv_targets: the same for what else gets one where convolutions train; empty where there is none.
        block_roles: which blocks decide what is in a picture and which its look, for `preset`; empty where nobody knows.
        components: the modules that adapters can be attached to: {"unet": ..., "text_encoder": ...}.
        few_shapes: whether all batches have one of a few shapes (buckets), rather than each its own (texts).
        joins_weights: whether the frozen weights of layers with the same input become one product; see `adapters.same_input`.
        num_levels: most noise levels at which an example can be measured; 1 where the loss draws nothing.
        shards: of the frozen weights; None where every process holds the whole model.
    """

    name: ClassVar[str]
    task: ClassVar[str]
    num_levels: ClassVar[int]
    few_shapes: ClassVar[bool]
    joins_weights: ClassVar[bool]
    conv_targets: ClassVar[Mapping[str, Sequence[str]]]
    block_roles: ClassVar[BlockRoles]
    shards: Shards | None

    @property
    def default_targets(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def components(self) -> Mapping[str, nn.Module]: ...

    @classmethod
    def load(cls, source: BaseModel, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Self:
        """The frozen model, in evaluation mode, no parameter asking for a gradient."""
        ...

    @classmethod
    def outline(cls, source: BaseModel, config: RunConfig, device: torch.device, dtype: torch.dtype) -> Self:
        """The same without reading any weight, made within a `FakeTensorMode`: all shapes and no content, for predictions."""
        ...

    def set_checkpointing(self, on: bool) -> None:
        """Whether the backward pass computes activations again rather than keeping them; off after `load`."""
        ...

    def drawn(self, batch: Batch, draws: Draws) -> Batch:
        """The batch with all that `loss` would draw for it among its tensors; `loss` then computes on tensors alone."""
        ...

    def loss(self, batch: Batch, draws: Draws) -> Loss:
        """One forward pass of the training objective; no optimizer, no backward pass."""
        ...

    def blocks(self) -> Sequence[nn.Module]:
        """The large blocks of the model in the order in which they compute; empty where they are not known."""
        ...

    def same_input(self) -> Sequence[Sequence[str]]:
        """Names of linear layers, as an adapter has them, that read the same tensor, each group in the order of their calls."""
        ...

    def fusable_parts(self) -> Sequence[nn.Module]:
        """Modules that occur many times and are worth compiling, each by itself; none within another one."""
        ...

    def wide_parts(self) -> Sequence[nn.Module]:
        """Modules whose linear layers and 1x1 convolutions see a row for every position, so that their products are large."""
        ...

    def work(self, batch: Batch) -> PassWork | None:
        """What a pass over the batch computes, from a formula; None where there is none."""
        ...

    def predict(self, batch: Batch, draws: Draws) -> Tensor:
        """[B,...] the model's answer for a batch; what the finished file's effect is compared by."""
        ...


class PictureFamily(ModelFamily, Protocol):
    """A denoiser: `families/sd15.py` and `families/sdxl.py` are the examples to read.

    Attributes:
        default_resolution: pixels, the side of the square the family was trained at.
        base_model_version: `ss_base_model_version` in a file's header, which the WebUI sorts by.
        modelspec_architecture: `modelspec.architecture` in a file's header.
        prediction: what the denoiser predicts, "epsilon" or "v_prediction".
        max_caption_tokens: tokens that the text encoder reads of a caption, start and end marks left out.
    """

    @property
    def base_model_version(self) -> str: ...
    @property
    def modelspec_architecture(self) -> str: ...
    @property
    def prediction(self) -> str: ...
    @property
    def default_resolution(self) -> int: ...
    @property
    def max_caption_tokens(self) -> int: ...

    def file_names(self) -> Mapping[str, str]:
        """Every layer that a finished file can hold -> its name in a kohya file, without a suffix."""
        ...

    def encoders(self) -> Sequence[Encoder]:
        """The stages whose outputs can be computed once and cached; what is trained is not among them."""
        ...

    def release_encoders(self) -> None:
        """Moves what only `encoders` and `sample` need off the training device."""
        ...

    def cut_caption(self, caption: str) -> str:
        """The part of a caption that the text encoder reads: all of it, or its beginning."""
        ...

    def sample(self, requests: Sequence[SampleRequest]) -> list[Image]:
        """Rendered pictures, the same for the same request whatever else is in the list."""
        ...


class LanguageFamily(ModelFamily, Protocol):
    """A model that goes on with a text: `families/causal_lm.py`.

    Attributes:
        tokenizer: the model's own, of transformers.
        most_tokens: the longest text that the model was made for.
        packs: whether the texts of a batch go through it one behind the other, without padding.
        notes: lines for people on how the model is run.
        fingerprint: changes whenever the same tokens would get other probabilities.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def most_tokens(self) -> int: ...
    @property
    def packs(self) -> bool: ...
    @property
    def notes(self) -> Sequence[str]: ...

    def pair_log_probs(self, batch: Batch) -> Tensor:
        """[2,B] log probability of each pair's preferred answer, and of its other one."""
        ...

    def answer(self, requests: Sequence[AnswerRequest]) -> list[Answer]:
        """The model's answers, the same for the same request whatever else is in the list."""
        ...
