"""`lora-scripts export`: a language model's LoRA in the form that another program takes, loaded again and compared."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.errors import ConfigError, DataError, ExportError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

    from lora_scripts.adapters.weights import LoRAWeights
    from lora_scripts.export.language_base import LanguageBase

__all__ = ["add_arguments", "run"]


@dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
        weights: what is exported, by the model's own names.
        shapes: all linear layers of the base.
        tokenizer: the folder whose tokenizer goes along.
        prompt: a rendered example, for the card.
    """

    base: LanguageBase
    source: Path
    output: Path
    weights: LoRAWeights
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    tokenizer: Path
    prompt: str


@dataclass(frozen=True)
class Target:
    """One kind of output.

    Attributes:
        is_file: whether the output is a file that must end so, rather than a folder.
        write: writes it; lines for the terminal.
        logits: a loaded base model and token ids to the logits with what was written.
    """

    write: Callable[[Job], list[str]]
    logits: Callable[[Job, Any, Tensor], Tensor]
    is_file: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's options."""
    parser.add_argument(
        "--for", dest="target", choices=list(TARGETS), required=True, help="the program that is to load it"
    )
    parser.add_argument("--base-model", required=True, help="folder, hub id on this machine or builtin:NAME")
    parser.add_argument("--lora", type=Path, required=True, help="PEFT folder")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write (llamacpp: a file that ends in .gguf)"
    )
    parser.add_argument(
        "--no-check", action="store_true", help="do not load the base to compare, which takes its memory"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes, loads again and compares; the exit code."""
    from lora_scripts.export.bake import bake
    from lora_scripts.export.language_base import open_base
    from lora_scripts.export.prompt import prompt_facts, read_tokenizer
    from lora_scripts.export.reader import read_lora_file
    from lora_scripts.merging.language_model import tokenizer_folder

    target = TARGETS[arguments.target]
    _check_output(arguments.output, target)
    base = open_base(arguments.base_model)
    shapes = base.layer_shapes()
    weights, baked = bake(read_lora_file(arguments.lora, shapes).weights)
    if baked.folded:
        print(f"{arguments.lora}: {baked}")
    tokenizer_at = tokenizer_folder(base, [arguments.lora])
    tokenizer = read_tokenizer(tokenizer_at)
    facts = prompt_facts(tokenizer, base.folder)
    dtype = next(iter(weights.values())).lora_A.dtype
    job = Job(base, arguments.lora, arguments.output, weights, shapes, dtype, tokenizer_at, facts.rendered)
    for line in target.write(job):
        print(line)
    if not arguments.no_check:
        print(_compare(job, target, tokenizer))
    print("\n".join(facts.lines()))
    return 0


def _check_output(output: Path, target: Target) -> None:
    from lora_scripts.atomic_folder import require_free

    if target.is_file:
        if output.suffix != target.is_file or output.is_dir():
            raise ConfigError(f"--output {output}: must be a file that ends in {target.is_file}.")
        return
    try:
        require_free(output)
    except DataError as error:
        raise ConfigError(f"--output {error}") from error


def _compare(job: Job, target: Target, tokenizer: Any) -> str:
    """Loads the base once and compares its logits with the LoRA as it was read, and as it was written."""
    import torch

    from lora_scripts.export.effect import compare_effect
    from lora_scripts.export.prompt import probe_ids

    model = job.base.load()
    input_ids = probe_ids(tokenizer, int(model.config.get_text_config().vocab_size))
    with torch.no_grad():
        plain = model(input_ids).logits.float()
        with _beside(model, job.weights):
            trained = model(input_ids).logits.float()
        written = target.logits(job, model, input_ids).float()
    effect = compare_effect(job.output, plain, written, trained, compute_dtype=model.dtype)
    return (
        f"{job.output}: loaded, largest logit difference from the trained model {effect.largest_difference:.1e} "
        f"(the LoRA changes logits by {effect.trained_change:.1e}, root mean square)"
    )


@contextmanager
def _beside(model: Any, weights: LoRAWeights) -> Iterator[None]:
    from lora_scripts.export.effect import side_paths
    from lora_scripts.export.names import LANGUAGE_MODEL

    layers = {f"{LANGUAGE_MODEL}.{path}": module for path, module in model.named_modules()}
    with side_paths((layers[layer], lora) for layer, lora in weights.items()):
        yield


def _write_peft(job: Job) -> list[str]:
    from lora_scripts.export.card import adapter_card
    from lora_scripts.export.peft_folder import write_peft_folder
    from lora_scripts.export.plain import plain_scale
    from lora_scripts.export.verify_peft import verify_folder

    rank, _ = plain_scale(job.weights)
    card = adapter_card(job.output.resolve().name, job.base.title, rank, prompt=job.prompt)
    write_peft_folder(
        job.output, job.weights, job.base.name, job.dtype, tokenizer=job.tokenizer, card=card, model_layers=job.shapes
    )
    return [str(verify_folder(job.output, job.weights))]


def _write_vllm(job: Job) -> list[str]:
    import json

    from lora_scripts.export.bake import bake
    from lora_scripts.export.vllm import VLLM_RANKS, vllm_faults
    from lora_scripts.models.weights_file import inspect_weights

    weights, baked = bake(job.weights, ranks=VLLM_RANKS)
    lines = [f"vLLM: {baked}", *_write_peft(replace(job, weights=weights))]
    config = json.loads((job.output / "adapter_config.json").read_text(encoding="utf-8"))
    faults = vllm_faults(config, inspect_weights(job.output / "adapter_model.safetensors").tensors)
    if faults:
        raise ExportError(f"{job.output}: failed: vLLM would refuse it: {'; '.join(faults)}.")
    name = job.output.resolve().name
    lines.append(
        f"Serve it: vllm serve {job.base.name} --enable-lora --max-lora-rank {baked.rank} --lora-modules {name}={job.output}"
    )
    return lines


def _peft_logits(job: Job, model: Any, input_ids: Tensor) -> Tensor:
    """By PEFT itself, which changes the model for good."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():  # PEFT asks transformers for names that are on their way out
        warnings.simplefilter("ignore", FutureWarning)
        logits: Tensor = PeftModel.from_pretrained(model, str(job.output)).eval()(input_ids).logits
    return logits


def _write_llamacpp(job: Job) -> list[str]:
    from lora_scripts.export.gguf_adapter import write_gguf_adapter

    write_gguf_adapter(job.output, job.weights, job.base, job.source.resolve().name, job.dtype)
    return [f"{job.output}: written", f"Use it: llama-cli -m BASE.gguf --lora {job.output}"]


def _gguf_logits(job: Job, model: Any, input_ids: Tensor) -> Tensor:
    from lora_scripts.export.gguf_adapter import read_gguf_adapter

    return _logits_beside(model, read_gguf_adapter(job.output, job.base, job.shapes), input_ids)


def _write_mlx(job: Job) -> list[str]:
    from lora_scripts.export.mlx import write_mlx_folder

    write_mlx_folder(job.output, job.weights, job.base, job.dtype)
    return [
        f"{job.output}: written",
        f"Use it: mlx_lm.generate --model {job.base.name} --adapter-path {job.output} --prompt ...",
    ]


def _mlx_logits(job: Job, model: Any, input_ids: Tensor) -> Tensor:
    from lora_scripts.export.mlx import read_mlx_folder

    return _logits_beside(model, read_mlx_folder(job.output, job.shapes), input_ids)


def _logits_beside(model: Any, weights: LoRAWeights, input_ids: Tensor) -> Tensor:
    with _beside(model, weights):
        logits: Tensor = model(input_ids).logits
    return logits


TARGETS: Mapping[str, Target] = {
    "peft": Target(_write_peft, _peft_logits),
    "vllm": Target(_write_vllm, _peft_logits),
    "llamacpp": Target(_write_llamacpp, _gguf_logits, is_file=".gguf"),
    "mlx": Target(_write_mlx, _mlx_logits),
}
