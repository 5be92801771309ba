"""Loading a language model and its tokenizer from a folder in transformers' layout; no code of the folder's own is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

__all__ = ["DEFAULT_MOST_TOKENS", "load_language_model", "load_tokenizer", "most_tokens", "outline_language_model"]

DEFAULT_MOST_TOKENS = 2048


def load_language_model(folder: Path, name: str, dtype: torch.dtype | str, **options: Any) -> PreTrainedModel:
    """The frozen model on the CPU, in evaluation mode.

    Args:
        folder: in transformers' layout.
        name: of the model, for messages.
        dtype: of the weights; "auto" keeps that of its files.
        options: more of `from_pretrained`'s, which may take it elsewhere.
    Raises:
        ModelError: the folder is incomplete or damaged, wants code of its own, is of a kind that transformers lacks, or is
            quantised already.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from lora_scripts.models.frozen_linear import freeze_linears

    _refuse_quantised(folder, name)
    logging.set_verbosity_error()  # what it says of missing weights is an error below
    logging.disable_progress_bar()
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"base_model {name}: {_unusable(error)}") from None
    lacking = sorted(loading["missing_keys"])
    if lacking:
        raise ModelError(
            f"base_model {name}: {len(lacking)} of its weights are missing, {lacking[0]} among them. "
            "Copy or download the whole model."
        )
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    freeze_linears(frozen)
    return frozen


def outline_language_model(folder: Path, name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model without its weights, on the meta device: every module and shape, no memory.

    Args:
        dtype: of the weights; None for what its config.json says.
    Raises:
        ModelError: transformers does not know this kind of model, or it wants code of its own.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora_scripts.models.frozen_linear import freeze_linears

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **({} if dtype is None else {"dtype": dtype})
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"base_model {name}: {_unusable(error)}") from None
    freeze_linears(model)
    return model


def load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer that lies beside the weights.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_fast=True)
    except Exception as error:  # what its many readers raise has no common base
        raise ModelError(
            f"base_model {name}: its tokenizer cannot be read ({type(error).__name__}). The folder needs "
            "tokenizer.json or tokenizer.model, and tokenizer_config.json: copy or download the whole model."
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(
            f"base_model {name}: its tokenizer has no fast form (tokenizer.json), which is needed to tell which "
            "tokens an answer became. Use a version of the model that has it."
        )
    return tokenizer


def most_tokens(folder: Path, name: str) -> int:
    """The longest text that the model in a folder was made for, by its config.json."""
    return int(_settings(folder, name).get("max_position_embeddings") or DEFAULT_MOST_TOKENS)


def _unusable(error: Exception) -> str:
    """Why transformers could not make a model of a folder, and what to do."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return (
            "it brings program code of its own, which is never run here. Use a version of the model that transformers "
            "knows by itself."
        )
    if "model type" in str(error) and "not recognize" in str(error):
        return f"the installed transformers does not know this kind of model ({text[:120]}). Update transformers."
    return f"it cannot be loaded ({text[:200]}). Copy or download the whole model again."


def _refuse_quantised(folder: Path, name: str) -> None:
    stored = _settings(folder, name).get("quantization_config")
    if stored:
        raise ModelError(
            f"base_model {name}: its weights are stored quantised ({stored.get('quant_method', 'in an unknown way')}). "
            "Use the original model; quantization: nf4 or int8 quantises it while it is loaded for training."
        )


def _settings(folder: Path, name: str) -> dict[str, Any]:
    from lora_scripts.models.recognise import read_json

    return dict(read_json(folder / "config.json", name))
