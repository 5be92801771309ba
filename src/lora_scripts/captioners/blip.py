"""BLIP writes captions: greedy, by beam search, or sampled, with all candidates of a picture from one encoder pass."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from lora_scripts.captioners.blip_decoding import decode, encode_images
from lora_scripts.captioners.folders import (
    BLIP_CAPTIONING,
    MODELS_DIR,
    ModelFolder,
    check_folder,
    describe,
    dtype_name,
    fastest_dtype,
    find_model,
    first_available,
    load_image_processor,
    load_weights,
    quiet_libraries,
)
from lora_scripts.captioners.pixels import Pixels
from lora_scripts.captioners.protocol import Candidates, CaptionerSettings
from lora_scripts.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["MODEL_VARIABLE", "Blip", "ordered"]

MODEL_VARIABLE = "LORA_SCRIPTS_CAPTION_MODEL"
"""Environment variable that names the default model: a folder or a hub id."""

BUILTIN_MODEL = "builtin:mini-blip"


class Blip:
    """BLIP base and large from local folders or the hub cache, and the built-in mini-blip.

    Source: Li et al. 2022, arXiv 2201.12086; folders as transformers' BlipForConditionalGeneration reads them.
    """

    name: ClassVar[str] = "blip"
    licence: ClassVar[str] = "BSD-3-Clause (BLIP base and large), Apache-2.0 (mini-blip)"
    memory: ClassVar[str] = (
        "base: 1 GB of GPU memory or 1.5 GB of memory; large: about twice as much; mini-blip: 0.3 GB"
    )

    def __init__(
        self,
        folder: ModelFolder,
        model: Any,
        tokenizer: Any,
        pixels: Pixels,
        settings: CaptionerSettings,
        notes: list[str],
    ) -> None:
        self.folder = folder
        self.model = model
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.settings = settings
        self.notes = notes
        text_config = model.config.text_config
        limit = text_config.max_position_embeddings - 1
        self.prompt_ids: list[int] = [text_config.bos_token_id, *self._prompt_tokens(settings.prompt)]
        self.max_tokens = min(settings.max_tokens, limit - len(self.prompt_ids))
        if self.max_tokens < settings.min_tokens:
            raise ConfigError(
                f"--prompt: leaves no room for a caption; {folder.name} reads at most {limit} tokens. Shorten it, or lower --min-tokens."
            )

    @classmethod
    def load(
        cls, model: str | None, device: torch.device, dtype: torch.dtype | None, settings: CaptionerSettings
    ) -> Self:
        """See `Captioner.load`."""
        quiet_libraries()
        from transformers import AutoTokenizer, BlipForConditionalGeneration

        folder, notes = choose_model(model, settings)
        check_folder(folder, BLIP_CAPTIONING)
        dtype = dtype or fastest_dtype(device, folder)
        weights = load_weights(BlipForConditionalGeneration, folder, BLIP_CAPTIONING, device, dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
        pixels = Pixels(load_image_processor("Blip", folder))
        notes = [f"Caption model: {describe(folder, [dtype_name(dtype)])}", *notes]
        return cls(folder, weights, tokenizer, pixels, settings, notes)

    @property
    def models(self) -> dict[str, str]:
        return {"model": self.folder.name}

    @property
    def image_side(self) -> int:
        return int(self.model.config.vision_config.image_size)

    def prepare(self, image: Image) -> np.ndarray[Any, Any]:
        """[3,side,side] normalised pixels."""
        return self.pixels(image)

    def caption(self, prepared: Sequence[Any], keys: Sequence[str]) -> list[Candidates]:
        """See `Captioner.caption`; candidates are ordered by their likelihood."""
        return self.write(prepared, keys, self.settings.num_candidates or 1)

    @torch.inference_mode()
    def write(self, prepared: Sequence[Any], keys: Sequence[str], num_candidates: int) -> list[Candidates]:
        """As `caption`, with a number of candidates: greedy decoding writes one caption greedily and samples the others."""
        vision = self.model.vision_model
        weight = vision.post_layernorm.weight
        pixels = torch.from_numpy(np.stack(prepared)).to(weight.device, weight.dtype)
        states = encode_images(vision, pixels)
        if self.settings.decoding == "beam":
            return self._beam(states, num_candidates)
        text_config = self.model.config.text_config
        draws = torch.stack([self._draws(key, num_candidates) for key in keys])
        decoded = decode(
            self.model.text_decoder,
            states,
            self.prompt_ids,
            draws,
            end_id=text_config.sep_token_id,
            min_tokens=self.settings.min_tokens,
            max_tokens=self.max_tokens,
            top_p=self.settings.top_p,
        )
        likelihoods, finished = decoded.log_probs.exp().tolist(), decoded.finished.tolist()
        results = []
        for row, tokens in enumerate(decoded.tokens.tolist()):
            texts = [self._text([token for token in ids if token >= 0]) for ids in tokens]
            results.append(ordered(texts, likelihoods[row], likelihoods[row], [not done for done in finished[row]]))
        return results

    def _draws(self, key: str, num_candidates: int) -> Tensor:
        """[K,max_tokens] uniform numbers of one picture; NaN stands for the likeliest token."""
        rows = []
        for candidate in range(num_candidates):
            if candidate == 0 and self.settings.decoding == "greedy":
                rows.append([float("nan")] * self.max_tokens)
            else:
                stream = random.Random(f"{self.settings.seed}/{key}/{candidate}")  # noqa: S311
                rows.append([stream.random() for _ in range(self.max_tokens)])
        return torch.tensor(rows, dtype=torch.float64).float()

    def _beam(self, states: Tensor, num_candidates: int) -> list[Candidates]:
        text_config = self.model.config.text_config
        beams = max(self.settings.num_beams, num_candidates)
        prompt = torch.tensor([self.prompt_ids] * len(states), device=states.device)
        found = self.model.text_decoder.generate(
            input_ids=prompt,
            encoder_hidden_states=states,
            encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),
            eos_token_id=text_config.sep_token_id,
            pad_token_id=text_config.pad_token_id,
            num_beams=beams,
            num_return_sequences=num_candidates,
            do_sample=False,
            min_new_tokens=self.settings.min_tokens,
            max_new_tokens=self.max_tokens,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = found.sequences[:, len(self.prompt_ids) :].view(len(states), num_candidates, -1).tolist()
        scores = found.sequences_scores.float().exp().view(len(states), num_candidates).tolist()
        results = []
        for row, candidates in zip(scores, tokens, strict=True):
            cut = [text_config.sep_token_id not in ids and len(ids) >= self.max_tokens for ids in candidates]
            results.append(ordered([self._text(ids) for ids in candidates], row, row, cut))
        return results

    def _prompt_tokens(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt.strip() else []
        return ids

    def _text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode([*self.prompt_ids[1:], *tokens], skip_special_tokens=True)).strip()


def choose_model(model: str | None, settings: CaptionerSettings) -> tuple[ModelFolder, list[str]]:
    """The folder of the named model, else of the best full-size BLIP on this machine, else of the built-in one."""
    if model is not None:
        return find_model(model, BLIP_CAPTIONING, download=settings.download), []
    folder, notes = first_available(BLIP_CAPTIONING, MODEL_VARIABLE)
    if folder is not None:
        return folder, notes
    visible = MODELS_DIR / BLIP_CAPTIONING.example.split("/")[1]
    notes.append(
        "No full-size BLIP was found on this machine, so the small built-in model is used. It knows the drawn scenes of the demo, "
        f"not photographs. For your own pictures put the files of {BLIP_CAPTIONING.example} ({BLIP_CAPTIONING.file_list}) into "
        f"{visible}, or fetch it once with: --model {BLIP_CAPTIONING.example} --download"
    )
    return find_model(BUILTIN_MODEL, BLIP_CAPTIONING), notes


def ordered(
    texts: Sequence[str], scores: Sequence[float], likelihoods: Sequence[float], truncated: Sequence[bool]
) -> Candidates:
    """The candidates best first; of equal texts one, the better."""
    best: dict[str, int] = {}
    for index in sorted(range(len(texts)), key=lambda index: (-scores[index], index)):
        best.setdefault(texts[index], index)
    order = list(best.values())
    return Candidates(
        tuple(texts[index] for index in order),
        tuple(float(scores[index]) for index in order),
        tuple(float(likelihoods[index]) for index in order),
        tuple(bool(truncated[index]) for index in order),
    )
