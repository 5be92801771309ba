"""CLIP's tokenizer, without a network: from a folder, from the hub cache, or from the vocabulary in this package."""

from __future__ import annotations

import gzip
from importlib.resources import files
from typing import TYPE_CHECKING

from lora_scripts.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import CLIPTokenizer

__all__ = [
    "CLIP_VOCAB_SIZE",
    "clip_merges",
    "clip_vocabulary",
    "find_tokenizer",
    "packaged_clip_tokenizer",
    "tokenizer_from_folder",
]

CLIP_VOCAB_SIZE = 49408
_MAX_TOKENS = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"
_HUB_REPOSITORIES = (
    ("openai/clip-vit-large-patch14", ""),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/"),
)


def _byte_symbols() -> list[str]:
    """One printable character for each byte value, in CLIP's order: printable bytes first, then the others.

    Source: Radford et al. 2019 (GPT-2), section 2.2: byte-level byte-pair encoding; the order is that of openai/CLIP.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(others)]


def clip_merges() -> list[tuple[str, str]]:
    """CLIP's 48,894 byte-pair merges, the most frequent first."""
    data = files("lora_scripts.models").joinpath("assets", "clip_vocabulary", "merges.txt.gz").read_bytes()
    lines = gzip.decompress(data).decode("utf-8").split("\n")
    # The list goes on beyond what CLIP uses; the first line is a version note.
    used = lines[1 : CLIP_VOCAB_SIZE - 512 - 2 + 1]
    return [(left, right) for left, right in (line.split() for line in used)]


def clip_vocabulary() -> dict[str, int]:
    """CLIP's 49,408 tokens: 256 bytes, 256 bytes that end a word, one token per merge, start and end."""
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += ["".join(pair) for pair in clip_merges()]
    tokens += [_START, _END]
    return {token: index for index, token in enumerate(tokens)}


def packaged_clip_tokenizer(pad_token: str = _END) -> CLIPTokenizer:
    """CLIP's tokenizer, built from the vocabulary that ships with this package.

    Args:
        pad_token: what captions are filled up with: CLIP's own is the end mark, OpenCLIP's "!", its token 0.
    """
    from transformers import CLIPTokenizer

    tokenizer: CLIPTokenizer = CLIPTokenizer(
        vocab=clip_vocabulary(),
        merges=clip_merges(),
        unk_token=_END,
        bos_token=_START,
        eos_token=_END,
        pad_token=_END,
        model_max_length=_MAX_TOKENS,
    )
    return _padding_with(tokenizer, pad_token)


def _padding_with(tokenizer: CLIPTokenizer, pad_token: str) -> CLIPTokenizer:
    # Set afterwards: given to the constructor, it would be cut out of captions as a mark, while OpenCLIP reads "!" as a word.
    if tokenizer.pad_token != pad_token:
        tokenizer.pad_token = pad_token
    return tokenizer


def tokenizer_from_folder(folder: Path) -> CLIPTokenizer:
    """The tokenizer in a `tokenizer` folder.

    Raises:
        ModelError: files are missing or damaged.
    """
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer.json").is_file() and not (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    ):
        raise ModelError(
            f"{folder}: holds neither vocab.json with merges.txt nor tokenizer.json. Copy the whole tokenizer folder."
        )
    try:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises anything from KeyError to its Rust part's bare Exception
        raise ModelError(
            f"{folder}: the tokenizer cannot be read ({type(error).__name__}). Download that folder again."
        ) from None
    # Old files do not state the length; without it nothing would be cut to the model's 77 positions.
    if tokenizer.model_max_length > 1_000_000:
        tokenizer.model_max_length = _MAX_TOKENS
    return tokenizer


def find_tokenizer(beside: Path | None, vocab_size: int, name: str, pad_token: str = _END) -> CLIPTokenizer:
    """The tokenizer that fits a text encoder.

    Looked for in this order: the folder given, then for CLIP's vocabulary the hub cache and this package, then the built-in
    model's tokenizer if it has the right size.

    Args:
        beside: a `tokenizer` folder that belongs to the model; may not exist.
        vocab_size: rows of the token embedding.
        name: of the model, for messages.
        pad_token: what captions are filled up with; a tokenizer folder of the model's own says that itself.
    Raises:
        ModelError: none has that size.
    """
    if beside is not None and beside.is_dir():
        tokenizer = tokenizer_from_folder(beside)
        if len(tokenizer) > vocab_size or (vocab_size == CLIP_VOCAB_SIZE and len(tokenizer) < vocab_size):
            raise ModelError(
                f"{name}: the tokenizer in {beside} knows {len(tokenizer)} tokens, the text encoder {vocab_size}. "
                "They belong to different models: replace the tokenizer folder."
            )
        return tokenizer
    if vocab_size == CLIP_VOCAB_SIZE:
        return _padding_with(_from_hub_cache() or packaged_clip_tokenizer(), pad_token)
    builtin = _builtin_tokenizer(vocab_size)
    if builtin is None:
        raise ModelError(
            f"{name}: its text encoder knows {vocab_size} tokens, which is not CLIP's vocabulary ({CLIP_VOCAB_SIZE}). "
            f"Put the model's tokenizer folder beside the file, under the name {beside.name if beside else 'tokenizer'}."
        )
    return builtin


def _from_hub_cache() -> CLIPTokenizer | None:
    from lora_scripts.models.hub import cached_file

    for repo_id, folder in _HUB_REPOSITORIES:
        vocab, merges = (cached_file(repo_id, folder + filename) for filename in ("vocab.json", "merges.txt"))
        if vocab and merges:
            try:
                tokenizer = tokenizer_from_folder(vocab.parent)
            except ModelError:
                continue  # half of a cached repository is no reason to stop: the package has the same vocabulary
            if len(tokenizer) == CLIP_VOCAB_SIZE:
                return tokenizer
    return None


def _builtin_tokenizer(vocab_size: int) -> CLIPTokenizer | None:
    from lora_scripts.builtin.weights import builtin_path

    try:
        path = builtin_path("mini-sd")
    except ModelError:
        return None
    folder = (path if path.is_dir() else path.parent) / "tokenizer"
    if not folder.is_dir():
        return None
    tokenizer = tokenizer_from_folder(folder)
    return tokenizer if len(tokenizer) == vocab_size else None
