"""`lora-scripts export`, run as a user runs it: each kind of output, loaded again, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import command
from helpers.tiny_causal_lms import KINDS, TEMPLATE, probe, random_lora, save_tiny, tiny_model
from lora_scripts.export.names import layer_shapes
from lora_scripts.export.peft_folder import write_peft_folder
from lora_scripts.export.reader import read_lora_file

ROOT = Path(__file__).resolve().parents[2]
Capsys = pytest.CaptureFixture[str]


def base_and_lora(folder: Path, kind: str = "llama", rank: int = 4, alpha: float = 6.0) -> tuple[Path, Path]:
    base = save_tiny(folder / "base", kind)
    weights = random_lora(tiny_model(kind), rank, alpha)
    return base, write_peft_folder(folder / "polite", weights, base, torch.float32)


def export(capsys: Capsys, target: str, base: Path, lora: Path, output: Path, *more: object) -> str:
    code, out, err = command(
        capsys, "export", "--for", target, "--base-model", base, "--lora", lora, "--output", output, *more
    )
    assert (code, err) == (0, "")
    return out


def refused(capsys: Capsys, target: str, base: object, lora: object, output: object) -> str:
    """The one message of a failed export."""
    code, out, err = command(
        capsys, "export", "--for", target, "--base-model", base, "--lora", lora, "--output", output
    )
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    return err.strip()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["peft", "vllm", "llamacpp", "mlx"])
def test_every_output_is_loaded_and_makes_the_same_logits(
    kind: str, target: str, tmp_path: Path, capsys: Capsys
) -> None:
    base, lora = base_and_lora(tmp_path, kind)
    output = tmp_path / ("out.gguf" if target == "llamacpp" else "out")
    out = export(capsys, target, base, lora, output)
    shown = out.partition("largest logit difference from the trained model ")[2].split()[0]
    assert float(shown) < 1e-4
    assert "changes logits by" in out
    assert "Prompt of an example: <|user|>My parcel has not arrived. What can I do?<|end|><|assistant|>" in out
    assert "Stop tokens: <|end|>" in out


def test_peft_folder_is_plain_and_complete(tmp_path: Path, capsys: Capsys) -> None:
    base, lora = base_and_lora(tmp_path)
    export(capsys, "peft", base, lora, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 6, str(base.resolve()))
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    card = (tmp_path / "out" / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize(
    ("rank", "alpha", "wanted"), [(4, 6.0, (8, 8)), (3, 4.0, (8, 8)), (8, 5.0, (8, 5)), (9, 9.0, (16, 16))]
)
def test_vllm_folder_has_a_rank_of_its_list_and_a_whole_alpha(
    rank: int, alpha: float, wanted: tuple[int, int], tmp_path: Path, capsys: Capsys
) -> None:
    base, lora = base_and_lora(tmp_path, rank=rank, alpha=alpha)
    out = export(capsys, "vllm", base, lora, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == wanted
    assert f"vllm serve {base} --enable-lora --max-lora-rank {wanted[0]} --lora-modules out={tmp_path / 'out'}" in out
    shapes = layer_shapes({"language_model": tiny_model("llama")})
    before, after = read_lora_file(lora, shapes).weights, read_lora_file(tmp_path / "out", shapes).weights
    for layer, trained in before.items():
        torch.testing.assert_close(after[layer].delta(), trained.delta())


def test_gguf_adapter_holds_what_llama_cpp_reads(tmp_path: Path, capsys: Capsys) -> None:
    base, lora = base_and_lora(tmp_path, "llama")
    export(capsys, "llamacpp", base, lora, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 6.0
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert len(tensors) == 28
    trained = load_file(lora / "adapter_model.safetensors")
    start = "base_model.model.model.layers.1"
    for ours, theirs in {
        "attn_v": "self_attn.v_proj",
        "ffn_down": "mlp.down_proj",
        "attn_output": "self_attn.o_proj",
    }.items():
        assert torch.equal(tensors[f"blk.1.{ours}.weight.lora_a"], trained[f"{start}.{theirs}.lora_A.weight"])
        assert torch.equal(tensors[f"blk.1.{ours}.weight.lora_b"], trained[f"{start}.{theirs}.lora_B.weight"])


def test_rows_of_q_and_k_lie_in_llama_cpps_order(tmp_path: Path, capsys: Capsys) -> None:
    """Row by row from the definition: feature i of a head's first half and of its second half stand side by side."""
    base, lora = base_and_lora(tmp_path, "llama")
    export(capsys, "llamacpp", base, lora, tmp_path / "out.gguf")
    tensors = {
        tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors
    }
    trained = load_file(lora / "adapter_model.safetensors")
    for ours, theirs, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        stored = tensors[f"blk.0.{ours}.weight.lora_b"]
        wanted = trained[f"base_model.model.model.layers.0.self_attn.{theirs}.lora_B.weight"]
        half = wanted.shape[0] // heads // 2
        rows = [head * 2 * half + side * half + i for head in range(heads) for i in range(half) for side in range(2)]
        assert torch.equal(stored, wanted[rows])
        assert not torch.equal(stored, wanted)


def test_models_that_turn_halves_keep_their_order(tmp_path: Path, capsys: Capsys) -> None:
    base, lora = base_and_lora(tmp_path, "qwen2")
    export(capsys, "llamacpp", base, lora, tmp_path / "out.gguf")
    tensors = {
        tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors
    }
    trained = load_file(lora / "adapter_model.safetensors")
    assert torch.equal(
        tensors["blk.0.attn_q.weight.lora_b"], trained["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    )


def test_a_wrong_order_of_rows_is_found_by_the_check(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = base_and_lora(tmp_path, "llama")
    monkeypatch.setattr("lora_scripts.export.gguf_adapter._interleaved", lambda up, heads: up)
    code, _, err = command(
        capsys, "export", "--for", "llamacpp", "--base-model", base, "--lora", lora, "--output", tmp_path / "a.gguf"
    )
    assert code == 2
    assert "failed: the file changes the model's output otherwise than the trained adapter" in err


def test_mlx_folder_has_mlx_lms_layout(tmp_path: Path, capsys: Capsys) -> None:
    base, lora = base_and_lora(tmp_path)
    export(capsys, "mlx", base, lora, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", 2)
    assert config["lora_parameters"]["rank"] == 4
    assert config["lora_parameters"]["scale"] == 1.5
    assert "self_attn.q_proj" in config["lora_parameters"]["keys"]
    ours, trained = load_file(tmp_path / "out" / "adapters.safetensors"), load_file(lora / "adapter_model.safetensors")
    assert len(ours) == len(trained)
    for key, tensor in trained.items():
        path, part = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        assert torch.equal(ours[f"{path}.{part.lower()}"], tensor.T)


def test_half_precision_is_kept(tmp_path: Path, capsys: Capsys) -> None:
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    weights = random_lora(tiny_model("llama"))
    lora = write_peft_folder(tmp_path / "lora", weights, base, torch.bfloat16)
    for target in ("peft", "mlx"):
        export(capsys, target, base, lora, tmp_path / target)
        [file] = (tmp_path / target).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_a_template_that_ends_answers_otherwise_than_the_model_is_told(tmp_path: Path, capsys: Capsys) -> None:
    base, lora = base_and_lora(tmp_path)
    (base / "chat_template.jinja").write_text(TEMPLATE.replace("<|end|>", "<|user|>"))
    out = export(capsys, "mlx", base, lora, tmp_path / "out")
    assert "the template ends an answer with '<|user|>', which is no stop token of this model" in out


def test_a_model_without_a_template_is_told(tmp_path: Path, capsys: Capsys) -> None:
    base, lora = base_and_lora(tmp_path)
    (base / "chat_template.jinja").unlink()
    out = export(capsys, "peft", base, lora, tmp_path / "out")
    assert "Prompt: no chat template, the model is given plain text" in out
    assert "A prompt, by the chat template" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("door", ["export", "merge"])
def test_the_tools_folder_has_a_door_to_the_command(door: str) -> None:
    command_line = [sys.executable, str(ROOT / "tools" / f"{door}.py"), "--help"]
    done = subprocess.run(command_line, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: lora-scripts {door} [-h]")


def test_no_check_writes_without_loading_the_base(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = base_and_lora(tmp_path)
    monkeypatch.setattr("lora_scripts.export.language_base.LanguageBase.load", lambda *_: pytest.fail("loaded"))
    out = export(capsys, "peft", base, lora, tmp_path / "out", "--no-check")
    assert "largest logit difference" not in out
    assert "read back, 28 of 28 tensors" in out


def test_wrong_outputs_are_refused_before_anything_is_loaded(tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("mine")
    assert "is there already and holds files" in refused(capsys, "peft", "nowhere", "nothing", tmp_path / "taken")
    assert "must be a file that ends in .gguf" in refused(capsys, "llamacpp", "nowhere", "nothing", tmp_path / "out")


def test_wrong_bases_and_loras_end_in_one_message(tmp_path: Path, capsys: Capsys) -> None:
    base, lora = base_and_lora(tmp_path)
    out = tmp_path / "out"
    assert "no such file or folder" in refused(capsys, "peft", tmp_path / "nowhere", lora, out)
    assert "is a model that makes pictures" in refused(capsys, "peft", "builtin:mini-sd", lora, out)
    assert "no such LoRA file or folder" in refused(capsys, "peft", base, tmp_path / "nothing", out)
    other = save_tiny(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    assert "It was made for another base model" in refused(capsys, "peft", other, lora, out)
    (lora / "adapter_model.safetensors").write_bytes((lora / "adapter_model.safetensors").read_bytes()[:-40])
    assert "half a download" in refused(capsys, "peft", base, lora, out)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    assert "GGUF" in refused(capsys, "peft", tmp_path / "model.gguf", lora, out)
    assert not out.exists()


@pytest.mark.parametrize("target", ["peft", "vllm", "llamacpp", "mlx"])
def test_scales_and_ranks_that_loaders_misread_are_folded_in(target: str, tmp_path: Path, capsys: Capsys) -> None:
    """rsLoRA, an alpha with a fraction, alphas by layer, and unequal ranks, against PEFT on the folder as it was."""
    from peft import LoraConfig, get_peft_model

    base = save_tiny(tmp_path / "base")
    config = LoraConfig(
        r=4,
        lora_alpha=5.5,
        use_rslora=True,
        target_modules=["q_proj", "up_proj", "o_proj"],
        rank_pattern={"up_proj": 6},
        alpha_pattern={"o_proj": 3},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(5)
    model = get_peft_model(tiny_model("llama"), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    output = tmp_path / ("out.gguf" if target == "llamacpp" else "out")
    out = export(capsys, target, base, tmp_path / "theirs", output)
    assert "scale folded into lora_B, 4 layers padded with zeros: nothing lost" in out
    shown = out.partition("largest logit difference from the trained model ")[2].split()[0]
    assert float(shown) < 1e-4
    if target == "peft":
        with torch.no_grad():
            torch.testing.assert_close(through_peft(base, output), model(probe()).logits, atol=1e-4, rtol=0)


def through_peft(base: Path, folder: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        logits: torch.Tensor = model(probe()).logits
    return logits


def test_a_model_that_llama_cpp_names_otherwise_is_refused(tmp_path: Path, capsys: Capsys) -> None:
    from transformers import AutoModelForCausalLM, StableLmConfig

    from helpers.tiny_causal_lms import tokenizer

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(StableLmConfig(vocab_size=260, num_key_value_heads=4, **small))
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    lora = write_peft_folder(tmp_path / "lora", random_lora(model), tmp_path / "base", torch.float32)
    told = refused(capsys, "llamacpp", tmp_path / "base", lora, tmp_path / "out.gguf")
    assert "no GGUF adapter can be written for StableLmForCausalLM" in told
    assert "convert_hf_to_gguf.py" in told


def test_without_the_gguf_package_the_way_to_it_is_told(
    tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora = base_and_lora(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    told = refused(capsys, "llamacpp", base, lora, tmp_path / "out.gguf")
    assert "pip install 'lora-scripts[gguf]'" in told
