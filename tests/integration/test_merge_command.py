"""`lora-scripts merge`, run as a user runs it: the merged model, its files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.commands import command
from helpers.tiny_causal_lms import KINDS, TEMPLATE, logits_with, probe, random_lora, save_tiny, tiny_model, tokenizer
from lora_scripts.export.peft_folder import write_peft_folder

Capsys = pytest.CaptureFixture[str]


def merge(capsys: Capsys, base: Path, output: Path, *words: object) -> str:
    code, out, err = command(capsys, "merge", "--base-model", base, "--output", output, *words)
    assert (code, err) == (0, "")
    return out


def refused(capsys: Capsys, base: object, output: Path, *words: object) -> str:
    code, out, err = command(capsys, "merge", "--base-model", base, "--output", output, *words)
    assert code == 2
    assert "Traceback" not in err
    assert "written" not in out
    assert not list(output.parent.glob(output.name + ".*"))
    return err.strip()


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(probe()).logits
    return output


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_equals_base_and_adapter(kind: str, tmp_path: Path, capsys: Capsys) -> None:
    base = save_tiny(tmp_path / "base", kind)
    weights = random_lora(tiny_model(kind))
    lora = write_peft_folder(tmp_path / "lora", weights, base, torch.float32)
    out = merge(capsys, base, tmp_path / "merged", "--lora", lora)
    torch.testing.assert_close(
        logits(loaded(tmp_path / "merged")), logits_with(tiny_model(kind), weights), atol=1e-4, rtol=0
    )
    assert float(out.partition("largest logit difference from base with LoRA ")[2].split()[0]) < 1e-4
    assert "Stop tokens: <|end|>" in out


def test_merged_model_equals_pefts_own_merge(tmp_path: Path, capsys: Capsys) -> None:
    from peft import PeftModel

    base = save_tiny(tmp_path / "base")
    lora = write_peft_folder(tmp_path / "lora", random_lora(tiny_model("llama")), base, torch.float32)
    merge(capsys, base, tmp_path / "merged", "--lora", lora, "--no-check")
    theirs = PeftModel.from_pretrained(loaded(base), lora).merge_and_unload().state_dict()
    ours = loaded(tmp_path / "merged").state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name])


def test_several_loras_are_added_at_their_weights(tmp_path: Path, capsys: Capsys) -> None:
    base = save_tiny(tmp_path / "base")
    model = tiny_model("llama")
    first, second = random_lora(model), random_lora(model, rank=2, alpha=3.0)
    one = write_peft_folder(tmp_path / "one", first, base, torch.float32)
    two = write_peft_folder(tmp_path / "two", second, base, torch.float32)
    merge(capsys, base, tmp_path / "merged", "--lora", one, "--weight", 0.5, "--lora", two, "--weight", -0.25)
    merged = loaded(tmp_path / "merged").state_dict()
    for layer, lora in first.items():
        name = layer.removeprefix("language_model.") + ".weight"
        wanted = model.state_dict()[name] + 0.5 * lora.delta() - 0.25 * second[layer].delta()
        torch.testing.assert_close(merged[name], wanted)


def test_weight_zero_gives_the_base_bit_for_bit(tmp_path: Path, capsys: Capsys) -> None:
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    lora = write_peft_folder(tmp_path / "lora", random_lora(tiny_model("llama")), base, torch.float32)
    merge(capsys, base, tmp_path / "merged", "--lora", lora, "--weight", 0)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dtype_is_kept_and_rounded_once(tmp_path: Path, capsys: Capsys) -> None:
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    weights = random_lora(tiny_model("llama"))
    lora = write_peft_folder(tmp_path / "lora", weights, base, torch.float32)
    merge(capsys, base, tmp_path / "merged", "--lora", lora)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for layer, change in weights.items():
        name = layer.removeprefix("language_model.") + ".weight"
        wanted = (before[name].float() + change.delta()).bfloat16()
        torch.testing.assert_close(after[name], wanted, atol=0, rtol=2**-7)
        assert (after[name] != wanted).float().mean() < 0.01  # a sum may fall on the other side of a half


def test_shards_stay_as_they_are(tmp_path: Path, capsys: Capsys) -> None:
    base = save_tiny(tmp_path / "base", max_shard_size="40KB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    weights = random_lora(tiny_model("llama"))
    lora = write_peft_folder(tmp_path / "lora", weights, base, torch.float32)
    merge(capsys, base, tmp_path / "merged", "--lora", lora)
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    index = "model.safetensors.index.json"
    old, new = (json.loads((folder / index).read_text()) for folder in (base, tmp_path / "merged"))
    assert old["weight_map"] == new["weight_map"]
    torch.testing.assert_close(
        logits(loaded(tmp_path / "merged")), logits_with(tiny_model("llama"), weights), atol=1e-4, rtol=0
    )


def test_a_tied_head_stays_tied_where_no_lora_changes_it(tmp_path: Path, capsys: Capsys) -> None:
    base = save_tiny(tmp_path / "base", "gemma")
    lora = write_peft_folder(tmp_path / "lora", random_lora(tiny_model("gemma")), base, torch.float32)
    merge(capsys, base, tmp_path / "merged", "--lora", lora)
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    model = loaded(tmp_path / "merged")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_tied_head_that_a_lora_changes_gets_weights_of_its_own(tmp_path: Path, capsys: Capsys) -> None:
    from peft import PeftModel

    base = save_tiny(tmp_path / "base", "gemma")
    weights = random_lora(tiny_model("gemma"), head=True)
    assert "language_model.lm_head" in weights
    lora = write_peft_folder(tmp_path / "lora", weights, base, torch.float32)
    merge(capsys, base, tmp_path / "merged", "--lora", lora)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    with pytest.warns(UserWarning, match="tie"):
        theirs = logits(PeftModel.from_pretrained(loaded(base), lora).eval())
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), theirs, atol=1e-4, rtol=0)


def test_config_tokenizer_and_template_go_along(tmp_path: Path, capsys: Capsys) -> None:
    base = save_tiny(tmp_path / "base")
    (base / "LICENSE").write_text("as the base")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    own = tokenizer()
    own.chat_template = "POLITE " + TEMPLATE
    lora = write_peft_folder(tmp_path / "lora", random_lora(tiny_model("llama")), base, torch.float32, tokenizer=own)
    out = merge(capsys, base, tmp_path / "merged", "--lora", lora)
    merged = tmp_path / "merged"
    assert (merged / "chat_template.jinja").read_text() == "POLITE " + TEMPLATE  # the one it was trained with
    assert "Prompt of an example: POLITE <|user|>" in out
    for name in ("config.json", "generation_config.json"):
        assert json.loads((merged / name).read_text()) == json.loads((base / name).read_text())
    assert (merged / "LICENSE").read_text() == "as the base"
    assert not list(merged.glob("*.py"))
    assert str(tmp_path) not in (merged / "README.md").read_text()


def test_what_cannot_be_merged_ends_in_one_message(tmp_path: Path, capsys: Capsys) -> None:
    base = save_tiny(tmp_path / "base")
    weights = random_lora(tiny_model("llama"))
    lora = write_peft_folder(tmp_path / "lora", weights, base, torch.float32)
    out = tmp_path / "out"
    assert "given 3 times for 1 LoRAs" in refused(
        capsys, base, out, "--lora", lora, "--weight", 1, "--weight", 1, "--weight", 1
    )
    assert "between -10 and 10" in refused(capsys, base, out, "--lora", lora, "--weight", "nan")
    assert "is there already and holds files" in refused(capsys, base, lora, "--lora", lora)
    assert "was made for a language model" in refused(capsys, "builtin:mini-sd", out, "--lora", lora)
    other = write_peft_folder(tmp_path / "wide", random_lora(tiny_model("llama", hidden_size=64)), base, torch.float32)
    assert "made for another base model" in refused(capsys, base, out, "--lora", other)
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-400])
    assert "half a download" in refused(capsys, base, out, "--lora", lora)
    (base / "model.safetensors").unlink()
    assert "no .safetensors file in" in refused(capsys, base, out, "--lora", lora)
    assert not out.exists()


def test_layers_under_other_names_and_quantised_ones_are_refused(tmp_path: Path, capsys: Capsys) -> None:
    base = save_tiny(tmp_path / "base")
    lora = write_peft_folder(tmp_path / "lora", random_lora(tiny_model("llama")), base, torch.float32)
    path = base / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.uint8)}, path)
    told = refused(capsys, base, tmp_path / "out", "--lora", lora)
    assert "is stored as U8: the model is quantised" in told
    save_file({key.replace("q_proj", "wq"): tensor for key, tensor in tensors.items()}, path)
    assert "merge_and_unload" in refused(capsys, base, tmp_path / "out", "--lora", lora)


def test_numbers_too_large_for_the_models_dtype_are_never_written(tmp_path: Path, capsys: Capsys) -> None:
    base = save_tiny(tmp_path / "base", dtype=torch.float16)
    weights = {layer: lora for layer, lora in random_lora(tiny_model("llama"), alpha=4e6).items() if "q_proj" in layer}
    lora = write_peft_folder(tmp_path / "lora", weights, base, torch.float32)
    assert "NaN or infinite" in refused(capsys, base, tmp_path / "out", "--lora", lora)
    assert not (tmp_path / "out").exists()


def test_a_merge_that_went_wrong_is_found_by_the_check(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny(tmp_path / "base")
    lora = write_peft_folder(tmp_path / "lora", random_lora(tiny_model("llama")), base, torch.float32)
    monkeypatch.setattr("lora_scripts.merging.stream.add_changes", lambda weight, changes: None)
    code, _, err = command(capsys, "merge", "--base-model", base, "--lora", lora, "--output", tmp_path / "out")
    assert code == 2
    assert "changes nothing in the model's output" in err
