"""Language models of a few thousand random numbers, with a tokenizer and a chat template, as folders on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lora_scripts.adapters.weights import LoRATensors, LoRAWeights
from lora_scripts.export.names import layer_shapes

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = ("llama", "qwen2", "gemma")


def config_of(kind: str, **changes: Any) -> Any:
    """Llama with grouped queries, Qwen2 with biases on q, k and v, Gemma with a head that is tied to the embedding."""
    import transformers

    classes = {
        "llama": (transformers.LlamaConfig, {}),
        "qwen2": (transformers.Qwen2Config, {}),
        "gemma": (transformers.GemmaConfig, {"head_dim": 8, "tie_word_embeddings": True}),
    }
    kind_of_config, own = classes[kind]
    ids = {"vocab_size": 260, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    return kind_of_config(**{**_SIZES, **ids, **own, **changes})


def tiny_model(kind: str, **changes: Any) -> Any:
    """A random model in float32 whose biases and norms are not zero or one, so that losing them would show."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config_of(kind, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save_tiny(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **save: Any) -> Path:
    """A folder as `base_model:` takes it."""
    model = tiny_model(kind).to(dtype)
    model.save_pretrained(folder, **save)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """One token for each byte, and the marks of the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "<|end|>", "<|user|>", "<|assistant|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|end|>", pad_token="<|end|>", chat_template=TEMPLATE
    )


def random_lora(model: Any, rank: int = 4, alpha: float = 6.0, head: bool = False) -> LoRAWeights:
    """A LoRA on every linear layer (but the head) that changes the output visibly; alpha differs from the rank."""
    torch.manual_seed(11)
    return {
        layer: LoRATensors(torch.randn(rank, shape[1]) * 0.2, torch.randn(shape[0], rank) * 0.2, alpha)
        for layer, shape in layer_shapes({"language_model": model}).items()
        if head or not layer.endswith("lm_head")
    }


def probe() -> torch.Tensor:
    """[2, 9] token ids."""
    torch.manual_seed(3)
    return torch.randint(0, 256, (2, 9))


def logits_with(model: Any, weights: LoRAWeights) -> torch.Tensor:
    """What the LoRA makes of the model, by adding each change to its weight; the model is left as it was."""
    layers = {f"language_model.{path}": module for path, module in model.named_modules()}
    kept = {layer: layers[layer].weight.data for layer in weights}
    for layer, lora in weights.items():
        layers[layer].weight.data = (kept[layer].float() + lora.delta()).to(kept[layer].dtype)
    with torch.no_grad():
        output: torch.Tensor = model(probe()).logits
    for layer, weight in kept.items():
        layers[layer].weight.data = weight
    return output
