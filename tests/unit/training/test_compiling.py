"""Compiled parts give the losses and gradients of plain ones, whatever the adapter, and leave the model as it was.

All kinds of adapter go through torch.compile's capture, whose code is run uncompiled here ("aot_eager"); the compiler itself
takes minutes on a slow machine and is asked once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from helpers.compilers import require_cpp_compiler
from helpers.tiny_causal_lms import tiny_model, tokenizer
from helpers.trained_family import KINDS, family_with_adapter, picture_batch, random_adapter
from lora_scripts.adapters.lora import Adapter
from lora_scripts.families.causal_lm import CausalLanguageModel
from lora_scripts.families.protocol import Batch
from lora_scripts.models import low_bit_layers
from lora_scripts.training.compiling import CompiledParts, compiler_fault
from lora_scripts.training.draws import Draws

DRAWS = Draws(3)

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
"""The capture looks at every tensor it meets."""


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def language_model(kind: str) -> tuple[CausalLanguageModel, Adapter]:
    family = CausalLanguageModel(tiny_model("llama").requires_grad_(False), tokenizer())
    return family, random_adapter(family, family.default_targets, kind)


def text_batch(*lengths: int) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(3, 250, (length,), generator=generator)
    targets = torch.tensor([[1, length - 1] for length in lengths])
    filled = {"tokens": list(lengths), "targets": [2] * len(lengths)}
    return Batch({"tokens": tokens, "targets": targets}, [], [str(n) for n in lengths], filled=filled)


def passes(family: Any, adapter: Adapter, batches: list[Batch], compiled: CompiledParts | None) -> list[torch.Tensor]:
    """Losses, then gradients."""
    adapter.zero_grad()
    losses = []
    for batch in batches:
        if compiled is None:
            loss = family.loss(batch, DRAWS).total
            loss.backward()
        else:
            with compiled.at_work():
                loss = family.loss(batch, DRAWS).total
                loss.backward()
        losses.append(loss.detach())
    return [*losses, *(p.grad.clone() for p in adapter.parameters() if p.grad is not None)]


def one_of_each(parts: Sequence[nn.Module]) -> list[nn.Module]:
    """A transformer block and a residual block: enough to go through what the others repeat."""
    return list({type(part): part for part in parts}.values())


def assert_equal_to_rounding(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max().clamp_min(1.0)))


@pytest.mark.parametrize(("kind", "checkpointing"), [*((kind, False) for kind in KINDS), ("lora", True)])
def test_pictures_give_the_same_numbers_compiled(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path, kind)
    family.set_checkpointing(checkpointing)
    batches = [family.drawn(picture_batch(name, width), DRAWS) for name, width in (("a", 8), ("b", 12))]
    expected = passes(family, adapter, batches, None)
    compiled = CompiledParts(one_of_each(family.fusable_parts()), few_shapes=True, backend="aot_eager")
    counters.clear()
    assert_equal_to_rounding(passes(family, adapter, batches, compiled), expected)
    assert counters["stats"]["unique_graphs"] > 0
    assert kind == "loha" or not counters["graph_break"]  # LoHa differentiates within its own backward pass
    counters.clear()
    passes(family, adapter, batches, compiled)
    assert counters["stats"]["unique_graphs"] == 0, "the second round of the same shapes compiles nothing"


def test_texts_of_new_lengths_give_the_same_numbers_and_compile_nothing_new() -> None:
    family, adapter = language_model("lora")
    lengths = [(7, 12, 3), (5, 9, 4), (11, 4), (6, 6, 6, 6), (13, 8, 2)]
    batches = [text_batch(*each) for each in lengths]
    expected = passes(family, adapter, batches, None)
    compiled = CompiledParts(family.fusable_parts(), few_shapes=False, backend="aot_eager")
    assert_equal_to_rounding(passes(family, adapter, batches, compiled), expected)
    counters.clear()
    passes(family, adapter, [text_batch(10, 5, 9), text_batch(15, 4), text_batch(3, 4, 5, 6, 7)], compiled)
    assert counters["stats"]["unique_graphs"] == 0


def test_outside_of_training_passes_nothing_runs_compiled(tmp_path: Path) -> None:
    family, adapter = family_with_adapter(tmp_path)
    called = []
    parts = family.fusable_parts()
    names = [name for name, _ in family.components["unet"].named_modules()]
    compiled = CompiledParts(parts, few_shapes=True, backend=lambda module, inputs: called.append(1) or module.forward)
    batch = family.drawn(picture_batch("a"), DRAWS)
    family.loss(batch, DRAWS)
    assert not called
    passes(family, adapter, [batch], compiled)
    assert called
    called.clear()
    assert all(part._compiled_call_impl is None for part in parts)
    assert [name for name, _ in family.components["unet"].named_modules()] == names


def test_the_compiler_itself_gives_the_same_numbers(tmp_path: Path) -> None:
    require_cpp_compiler()
    assert compiler_fault(torch.device("cpu")) == ""
    family, adapter = family_with_adapter(tmp_path)
    batches = [family.drawn(picture_batch("a"), DRAWS)]
    expected = passes(family, adapter, batches, None)
    compiled = CompiledParts(one_of_each(family.fusable_parts())[:1], few_shapes=True)
    assert_equal_to_rounding(passes(family, adapter, batches, compiled), expected)


def test_a_missing_compiler_is_told_in_a_few_words() -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}):  # which, unlike monkeypatch, puts the old value back
        assert "no-such-compiler" in compiler_fault(torch.device("cpu"))


@pytest.mark.parametrize("low_bit", ["int8", "fp8"])
def test_products_in_8_bits_are_compiled_with_the_rest(
    low_bit: Literal["int8", "fp8"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao", reason="products in 8 bits need torchao")
    monkeypatch.setattr(low_bit_layers, "LEAST_WEIGHTS", 0)
    family, adapter = family_with_adapter(tmp_path)
    batches = [family.drawn(picture_batch("a"), DRAWS)]
    plain = passes(family, adapter, batches, None)
    layers = low_bit_layers.LowBitLayers(family.wide_parts(), low_bit)
    blocks = [block for block in family.blocks() if at_work(layers, block)]
    with layers.at_work():
        expected = passes(family, adapter, batches, None)
        compiled = CompiledParts(blocks[:1], few_shapes=True, backend="aot_eager")
        counters.clear()
        assert_equal_to_rounding(passes(family, adapter, batches, compiled), expected)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert not torch.equal(plain[0], expected[0])


def at_work(layers: low_bit_layers.LowBitLayers, block: nn.Module) -> list[nn.Module]:
    """The modules of a block that multiply in 8 bits in a training pass."""
    with layers.at_work():
        return [module for module in block.modules() if low_bit_layers.low_bit_of(module) is not None]
