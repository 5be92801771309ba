"""README.md of an adapter: what it is, how its prompts look, and how other programs use it."""

from __future__ import annotations

__all__ = ["adapter_card"]


def adapter_card(name: str, base_title: str, rank: int, *, prompt: str = "", notes: str = "") -> str:
    """Markdown with the header that model hubs read.

    Args:
        name: of the adapter's folder.
        base_title: a hub id, or the last part of a path.
        prompt: a rendered example, up to where the answer begins; empty where there is no chat template.
        notes: what was trained, such as a system prompt or a trigger word; empty for nothing.
    """
    base_line = f"base_model: {base_title}\n" if "/" in base_title else ""
    parts = [
        f"---\n{base_line}library_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n- lora-scripts\n---\n",
        f"# {name}\n",
        f"A LoRA (rank {rank}) for {base_title}, trained with lora-scripts.\n",
    ]
    if notes:
        parts.append(f"{notes}\n")
    if prompt:
        parts.append(f"A prompt, by the chat template beside this file:\n\n```\n{prompt}\n```\n")
    parts.append(
        f"""## Use it

`BASE` is {base_title}: a hub id or the path of its folder. This folder is `{name}`.

transformers with PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

vLLM: `vllm serve BASE --enable-lora --max-lora-rank RANK --lora-modules {name}={name}`, RANK from `lora-scripts export --for vllm`.

llama.cpp: `lora-scripts export --for llamacpp --base-model BASE --lora {name} --output {name}.gguf`, then
`llama-cli -m BASE.gguf --lora {name}.gguf`.
"""
    )
    return "\n".join(parts)
