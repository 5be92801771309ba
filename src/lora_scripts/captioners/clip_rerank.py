"""BLIP writes several captions and a second model that compares pictures with texts chooses one.

The chooser is CLIP or BLIP's own matching head. Its scores and the runner-up are kept: they show which captions are doubtful.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lora_scripts.captioners.blip import Blip, ordered
from lora_scripts.captioners.blip_decoding import encode_images
from lora_scripts.captioners.folders import (
    BLIP_MATCHING,
    CLIP,
    FolderKind,
    ModelFolder,
    check_folder,
    describe,
    dtype_name,
    fastest_dtype,
    find_model,
    first_available,
    load_image_processor,
    load_weights,
    model_type,
    quiet_libraries,
)
from lora_scripts.captioners.pixels import Pixels
from lora_scripts.captioners.protocol import Candidates, CaptionerSettings
from lora_scripts.errors import ModelError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["RANK_VARIABLE", "ClipBlip", "ClipRanker", "MatchingRanker", "load_ranker"]

RANK_VARIABLE = "LORA_SCRIPTS_RANK_MODEL"
"""Environment variable that names the default model for choosing: a folder or a hub id."""

BUILTIN_RANKER = "builtin:mini-blip-itm"
NUM_CANDIDATES = 5
LIKELIHOOD_WEIGHT = 4.0
"""How much the caption model's own opinion counts: the mean log probability of a candidate's tokens times this is added to the
chooser's score. Choosers prefer odd wordings now and then. With the first version of the built-in
models, whose captions had 5 % of the attributes wrong, the choice named 1.1 points more of them right with it than without.
"""
MATCHING_TOKENS = 35
"""BLIP's matching head was trained on texts up to this length."""


class Ranker(Protocol):
    """Scores how well texts fit a picture."""

    folder: ModelFolder
    image_side: int

    def prepare(self, image: Image) -> Any: ...

    def score(self, prepared: Sequence[Any], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """One score per text of each picture; higher fits better."""
        ...


class ClipRanker:
    """CLIP: cosine of picture and text, scaled as in training (about 100 times), so that 1 point more is e times likelier.

    Texts beyond 77 tokens are scored by their beginning. Source: Radford et al. 2021, arXiv 2103.00020.
    """

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer, CLIPModel

        check_folder(folder, CLIP)
        self.folder = folder
        self.model = load_weights(CLIPModel, folder, CLIP, device, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
        self.pixels = Pixels(load_image_processor("CLIP", folder))
        self.image_side = int(self.model.config.vision_config.image_size)
        self.max_tokens = int(self.model.config.text_config.max_position_embeddings)

    def prepare(self, image: Image) -> np.ndarray[Any, Any]:
        return self.pixels(image)

    @torch.inference_mode()
    def embed_images(self, prepared: Sequence[Any]) -> Tensor:
        """[B,D] float32 of length one, of pictures that `prepare` made."""
        pixels = torch.from_numpy(np.stack(prepared)).to(self.model.device, self.model.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """[B,D] float32 of length one."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        tokens = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return _unit(self.model.get_text_features(**tokens))

    @torch.inference_mode()
    def score(self, prepared: Sequence[Any], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        images = self.embed_images(prepared)
        features = self.embed_texts([text for group in texts for text in group])
        cosines = (features * images.repeat_interleave(_counts(texts, images), dim=0)).sum(dim=-1)
        return _grouped((cosines * self.model.logit_scale.float().exp()).tolist(), texts)


class MatchingRanker:
    """BLIP's image-text matching head: log odds that picture and text belong together.

    Source: Li et al. 2022, arXiv 2201.12086, section 3.2; folders as transformers' BlipForImageTextRetrieval reads them.
    """

    def __init__(self, folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer, BlipForImageTextRetrieval

        check_folder(folder, BLIP_MATCHING)
        self.folder = folder
        self.model = load_weights(BlipForImageTextRetrieval, folder, BLIP_MATCHING, device, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
        self.pixels = Pixels(load_image_processor("Blip", folder))
        self.image_side = int(self.model.config.vision_config.image_size)

    def prepare(self, image: Image) -> np.ndarray[Any, Any]:
        return self.pixels(image)

    @torch.inference_mode()
    def score(self, prepared: Sequence[Any], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        device = self.model.device
        states = encode_images(
            self.model.vision_model, torch.from_numpy(np.stack(prepared)).to(device, self.model.dtype)
        )
        flat = [text for group in texts for text in group]
        tokens = self.tokenizer(flat, padding=True, truncation=True, max_length=MATCHING_TOKENS, return_tensors="pt")
        fused = self.model.text_encoder(
            input_ids=tokens["input_ids"].to(device),
            attention_mask=tokens["attention_mask"].to(device),
            encoder_hidden_states=states.repeat_interleave(_counts(texts, states), dim=0),
        ).last_hidden_state
        logits = self.model.itm_head(fused[:, 0]).float()
        return _grouped((logits[:, 1] - logits[:, 0]).tolist(), texts)


class ClipBlip:
    """BLIP writes five captions from one encoder pass, CLIP or BLIP's matching head picks the one that fits best."""

    name: ClassVar[str] = "clip-blip"
    licence: ClassVar[str] = f"{Blip.licence}; MIT (CLIP)"
    memory: ClassVar[str] = f"{Blip.memory}; CLIP base 0.4 GB, large 1 GB on top"

    def __init__(self, blip: Blip, ranker: Ranker, notes: list[str]) -> None:
        self.blip = blip
        self.ranker = ranker
        self.notes = notes

    @classmethod
    def load(
        cls, model: str | None, device: torch.device, dtype: torch.dtype | None, settings: CaptionerSettings
    ) -> Self:
        """See `Captioner.load`."""
        blip = Blip.load(model, device, dtype, settings)
        ranker, notes = load_ranker(settings, blip.folder, device, dtype)
        return cls(blip, ranker, [*blip.notes, *notes])

    @property
    def models(self) -> dict[str, str]:
        return {**self.blip.models, "rank_model": self.ranker.folder.name}

    @property
    def image_side(self) -> int:
        return max(self.blip.image_side, self.ranker.image_side)

    def prepare(self, image: Image) -> tuple[Any, Any]:
        return self.blip.prepare(image), self.ranker.prepare(image)

    def caption(self, prepared: Sequence[Any], keys: Sequence[str]) -> list[Candidates]:
        """See `Captioner.caption`; candidates are ordered by the chooser's score and their likelihood."""
        count = self.blip.settings.num_candidates or NUM_CANDIDATES
        written = self.blip.write([item[0] for item in prepared], keys, count)
        scores = self.ranker.score([item[1] for item in prepared], [candidates.texts for candidates in written])
        return [
            ordered(
                candidates.texts, _combined(row, candidates.likelihoods), candidates.likelihoods, candidates.truncated
            )
            for candidates, row in zip(written, scores, strict=True)
        ]


def _combined(scores: Sequence[float], likelihoods: Sequence[float]) -> list[float]:
    return [score + LIKELIHOOD_WEIGHT * math.log(max(p, 1e-9)) for score, p in zip(scores, likelihoods, strict=True)]


def load_ranker(
    settings: CaptionerSettings, blip: ModelFolder, device: torch.device, dtype: torch.dtype | None
) -> tuple[Ranker, list[str]]:
    """The model that chooses, and remarks for the user: the named one, else one on this machine that goes with the captioner.

    Raises:
        ModelError: there is none, or the named one cannot be used.
    """
    quiet_libraries()
    folder, kind, notes = _choose(settings, blip)
    dtype = dtype or fastest_dtype(device, folder)
    ranker: Ranker = ClipRanker(folder, device, dtype) if kind is CLIP else MatchingRanker(folder, device, dtype)
    return ranker, [f"Chosen by: {describe(folder, [dtype_name(dtype)])}", *notes]


def _choose(settings: CaptionerSettings, blip: ModelFolder) -> tuple[ModelFolder, FolderKind, list[str]]:
    named = settings.rank_model or os.environ.get(RANK_VARIABLE, "").strip()
    if named:
        folder = find_model(named, CLIP, download=settings.download)
        found = model_type(folder)
        if found not in ("clip", "blip"):
            check_folder(folder, CLIP)  # tells what is missing, or what it is instead
        return folder, BLIP_MATCHING if found == "blip" else CLIP, []
    if blip.where == "built in":
        return find_model(BUILTIN_RANKER, BLIP_MATCHING), BLIP_MATCHING, []
    notes: list[str] = []
    for kind in (CLIP, BLIP_MATCHING):
        available, remarks = first_available(kind)
        notes += remarks
        if available is not None:
            return available, kind, notes
    raise ModelError(
        f"--captioner clip-blip: needs a second model that chooses among the captions, and none is on this machine. Put the files of "
        f"{CLIP.example} ({CLIP.file_list}) into models/{CLIP.example.split('/')[1]}, or fetch them once with "
        f"--rank-model {CLIP.example} --download, or use --captioner blip."
    )


def _unit(features: Any) -> Tensor:
    """[B,D] of length one; newer versions of transformers return an object around the tensor."""
    return functional.normalize(getattr(features, "pooler_output", features).float(), dim=-1)


def _counts(texts: Sequence[Sequence[str]], like: Tensor) -> Tensor:
    return torch.tensor([len(group) for group in texts], device=like.device)


def _grouped(flat: list[float], texts: Sequence[Sequence[str]]) -> list[list[float]]:
    numbers = iter(flat)
    return [[next(numbers) for _ in group] for group in texts]
