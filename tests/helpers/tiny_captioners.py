"""Small random captioners in the folder layouts of the real ones, with tokenizers built on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
WORDS = [
    "a",
    "an",
    "the",
    "red",
    "blue",
    "green",
    "white",
    "cat",
    "dog",
    "house",
    "tree",
    "boat",
    "with",
    "on",
    "in",
    "at",
    "by",
    "near",
    "sitting",
    "running",
    "night",
    "day",
    "beach",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_blip(folder: Path, *, matching: bool = False, seed: int = 0, side: int = 32) -> Path:
    """A BLIP captioner, or with `matching` BLIP's matching head, of about 60,000 random weights."""
    vocabulary = [*MARKS, *WORDS, "picture", "of", *LETTERS, *(f"##{letter}" for letter in LETTERS), ",", "."]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary), "utf-8")
    tokenizer = BertTokenizer.from_pretrained(folder, bos_token="[DEC]", additional_special_tokens=["[ENC]"])
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **vision,
        "encoder_hidden_size": 32,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 64,
        "bos_token_id": 5,
        "sep_token_id": 3,
        "eos_token_id": 3,
        "pad_token_id": 0,
        "initializer_range": 0.4,
    }
    vision |= {"image_size": side, "patch_size": 8, "initializer_range": 0.4}
    config = BlipConfig(vision_config=vision, text_config=text, projection_dim=16, image_text_hidden_size=16)
    torch.manual_seed(seed)
    model = (BlipForImageTextRetrieval if matching else BlipForConditionalGeneration)(config)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": side, "width": side}), tokenizer).save_pretrained(folder)
    return folder


def upstream_layout(folder: Path) -> Path:
    """Turn a folder into the layout of the published ones: preprocessor_config.json in place of processor_config.json."""
    combined = json.loads((folder / "processor_config.json").read_text("utf-8"))
    pixels = {
        **combined["image_processor"],
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels), "utf-8")
    (folder / "processor_config.json").unlink()
    return folder


def write_clip(folder: Path, *, seed: int = 0, side: int = 32) -> Path:
    """A CLIP model of about 50,000 random weights, with a byte-level vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    marks = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), ",</w>", ".</w>", *marks]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **tower,
        "vocab_size": len(tokens),
        "max_position_embeddings": 77,
        "bos_token_id": len(tokens) - 2,
        "eos_token_id": len(tokens) - 1,
        "pad_token_id": len(tokens) - 1,
    }
    config = CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": side, "patch_size": 8}, projection_dim=16
    )
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPProcessor(CLIPImageProcessorPil(**sizes), tokenizer).save_pretrained(folder)
    return folder


BLIP_VISION = {
    "base": {"hidden_size": 768, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}


def write_full_size_blip(folder: Path, seed: int = 0, size: str = "base") -> Path:
    """BLIP as it was published: its sizes, 384-px pictures and 30,524 tokens, but random weights, in bf16.

    Args:
        size: "base" (450 MB) or "large" (940 MB).
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", *(f"[unused{number}]" for number in range(99)), *MARKS[1:5]]
    vocabulary += [f"word{number}" for number in range(30_522 - len(vocabulary))]
    (folder / "vocab.txt").write_text("\n".join([*vocabulary, "[DEC]", "[ENC]"]), "utf-8")
    tokenizer = BertTokenizer.from_pretrained(folder, bos_token="[DEC]", additional_special_tokens=["[ENC]"])
    config = BlipConfig(
        vision_config={**BLIP_VISION[size], "image_size": 384, "patch_size": 16, "initializer_range": 0.02},
        text_config={
            "initializer_range": 0.02,
            "vocab_size": 30_524,
            "encoder_hidden_size": BLIP_VISION[size]["hidden_size"],
            "num_attention_heads": 12,
            "bos_token_id": 30_522,
            "sep_token_id": 102,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    )
    torch.manual_seed(seed)
    BlipForConditionalGeneration._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(), tokenizer).save_pretrained(folder)
    return upstream_layout(folder)
