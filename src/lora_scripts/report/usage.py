"""How to use the finished files: what the page says at its top, and where other programs look for them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_scripts.export.vllm import VLLM_RANKS
from lora_scripts.report.markup import Html, el

__all__ = ["Usage", "use_folder", "use_in_prompts"]


@dataclass(frozen=True)
class Usage:
    """What to do with a finished LoRA.

    Attributes:
        sentence: for the paragraph at the top.
        chinese: the same.
        label: what `line` is, in English and Chinese.
        line: to copy: a prompt, a command.
        places: (program, what to do there).
        purposes: file name or ending -> what it is for.
    """

    sentence: Sequence[Html | str]
    chinese: str
    label: tuple[str, str]
    line: str
    places: Sequence[tuple[str, Html]] = ()
    purposes: Mapping[str, str] = field(default_factory=dict)

    def purpose(self, path: Path) -> str:
        """What a file is for; empty where that is not known."""
        return self.purposes.get(path.name) or self.purposes.get(path.suffix.lower(), "")


def use_in_prompts(name: str, trigger: str, weight: float) -> Usage:
    """A file for programs that make pictures: `<lora:NAME:0.8>`, the way the WebUI loads it."""
    tag = f"<lora:{name}:{weight:g}>"
    sentence: list[Html | str] = [
        "Put the file into your tool's LoRA folder and write ",
        el("code", tag),
        " in the prompt",
        *([", together with the trigger word ", el("code", trigger), "."] if trigger else ["."]),
    ]
    words = ", ".join(part for part in (trigger, "what the picture should show") if part)
    return Usage(
        sentence,
        f"使用方法：把文件放入 LoRA 文件夹，在提示词中写入 {tag}" + (f" 和触发词 {trigger}。" if trigger else "。"),
        ("In the prompt", "提示词"),
        f"{tag} {words}",
        [
            ("AUTOMATIC1111 WebUI, Forge", el("code", "models/Lora")),
            ("ComfyUI", el("code", "models/loras")),
            ("diffusers", el("code", f'pipe.load_lora_weights(".", weight_name="{name}.safetensors")')),
        ],
        {
            ".safetensors": "The LoRA.",
            ".json": "Its card in the WebUI: trigger word, weight, notes. Put it beside the LoRA.",
            ".png": "Its preview picture. Put it beside the LoRA.",
        },
    )


def use_folder(name: str, base_model: str, folder: Path, rank: int, system_prompt: str = "") -> Usage:
    """A PEFT folder of a language model; it is talked with as it was trained, after the same system text."""
    highest = next((each for each in VLLM_RANKS if each >= rank), rank)
    both = f"--base-model {base_model} --lora {folder}"
    return Usage(
        [
            "The folder ",
            el("code", name),
            " is a PEFT adapter, which transformers and vLLM load as it is; ",
            el("code", "lora-scripts chat"),
            " talks with it.",
        ],
        f"使用方法：文件夹 {name} 是 PEFT 格式，transformers 与 vLLM 可直接加载；也可以用 lora-scripts chat 与它对话。",
        ("Talk with it", "对话"),
        f"lora-scripts chat {both}" + (f" --system {shlex.quote(system_prompt)}" if system_prompt else ""),
        [
            ("transformers, PEFT", el("code", f'model.load_adapter("{folder}")')),
            (
                "vLLM",
                el(
                    "code",
                    f"vllm serve {base_model} --enable-lora --max-lora-rank {highest} --lora-modules {name}={folder}",
                ),
            ),
            ("llama.cpp", el("code", f"lora-scripts export --for llamacpp {both} --output {name}.gguf")),
            ("mlx-lm", el("code", f"lora-scripts export --for mlx {both} --output {name}-mlx")),
        ],
        {
            name: "The LoRA: one folder with all that follows.",
            "adapter_model.safetensors": "The trained weights.",
            "adapter_config.json": "Their rank, their layers and the base model, for the programs that load them.",
            "README.md": "A card for people: the base model, how a prompt is written, what was trained.",
            "chat_template.jinja": "How a dialogue is written for this model.",
            "tokenizer.json": "The base model's tokenizer.",
            "tokenizer_config.json": "Which of its tokens are special.",
        },
    )
