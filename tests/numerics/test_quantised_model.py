"""A language model loaded in 4 or 8 bits: what is quantised, what it costs in loss, and when it is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.tiny_causal_lms import KINDS, save_tiny
from lora_scripts.config import RunConfig
from lora_scripts.errors import ConfigError, ModelError
from lora_scripts.families.causal_lm import CausalLanguageModel
from lora_scripts.families.protocol import Batch
from lora_scripts.models import quantised
from lora_scripts.models.frozen_linear import PLAIN_LINEAR
from lora_scripts.models.quantised import num_weights, stored_bytes
from lora_scripts.models.source import resolve_base_model
from lora_scripts.training.draws import Draws

CPU = torch.device("cpu")


def test_no_kernel_is_fetched_from_the_hub(tmp_path: Path) -> None:
    # On CPUs with AVX512-BF16 the import of bitsandbytes asks this package for one.
    pytest.importorskip("bitsandbytes", reason="quantised models need bitsandbytes")
    asked = tmp_path / "asked"
    (tmp_path / "kernels.py").write_text(
        f"import pathlib\ndef get_kernel(*_, **__):\n    pathlib.Path({str(asked)!r}).touch()\n    raise OSError\n",
        "utf-8",
    )
    script = (
        "import torch\nfrom lora_scripts.models.quantised import require_quantisation\n"
        "require_quantisation('nf4', torch.device('cpu'), torch.float32)\n"
        "import sys\nassert 'kernels' not in sys.modules\nimport kernels\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stderr
    assert not asked.exists()


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(quantised, "load_language_model", read)


def load(folder: Path, quantization: str, dtype: torch.dtype = torch.float32) -> CausalLanguageModel:
    config = RunConfig.model_validate(
        {
            "task_type": "text-generation",
            "train_data_dir": str(folder),
            "base_model": str(folder),
            "output_dir": str(folder / "out"),
            "quantization": quantization,
        }
    )
    source = resolve_base_model(config.base_model, task=config.task_type)
    return CausalLanguageModel.load(source, config, CPU, dtype)


def batch() -> Batch:
    tokens = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(5))
    targets = torch.arange(1, 24).repeat(4, 1)
    keys = [str(row) for row in range(4)]
    return Batch({"tokens": tokens, "targets": targets}, [], keys, filled={"tokens": [24] * 4, "targets": [23] * 4})


def mean_loss(family: CausalLanguageModel) -> float:
    loss = family.loss(batch(), Draws(0))
    return float(loss.total) / loss.count


class TestWithBitsandbytes:
    @pytest.fixture(autouse=True)
    def _needs_it(self) -> None:
        pytest.importorskip("bitsandbytes", reason="quantised models need bitsandbytes")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(("quantization", "bound"), [("nf4", 0.03), ("int8", 0.002)])
    def test_loss_is_near_that_of_the_full_model(
        self, kind: str, quantization: str, bound: float, tmp_path: Path
    ) -> None:
        folder = save_tiny(tmp_path, kind)
        full, small = load(folder, "none"), load(folder, quantization)
        assert small.packs
        assert small.notes == full.notes == []
        expected, found = mean_loss(full), mean_loss(small)
        assert found != expected
        assert found == pytest.approx(expected, rel=bound)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("quantization", ["nf4", "int8"])
    def test_every_layer_with_an_adapter_is_quantised_and_nothing_else(
        self, kind: str, quantization: str, tmp_path: Path
    ) -> None:
        folder = save_tiny(tmp_path, kind)
        full, small = load(folder, "none"), load(folder, quantization, torch.bfloat16)
        head = small.model.get_output_embeddings()
        quantised_layers = {
            name
            for name, layer in small.model.named_modules()
            if isinstance(layer, nn.Linear) and not layer.weight.is_floating_point()
        }
        linear = {n for n, layer in full.model.named_modules() if isinstance(layer, nn.Linear)}
        assert quantised_layers == linear - {"lm_head"}
        assert type(head) in PLAIN_LINEAR
        assert head.weight.dtype is small.model.get_input_embeddings().weight.dtype is torch.bfloat16
        assert small.default_targets == full.default_targets

    def test_bytes_are_those_of_the_packed_weights_with_their_scales(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path)
        full, nf4, int8 = (load(folder, quantization) for quantization in ("none", "nf4", "int8"))
        assert num_weights(full.model) == num_weights(nf4.model) == num_weights(int8.model)
        layers = [layer for n, layer in full.model.named_modules() if isinstance(layer, nn.Linear) and n != "lm_head"]
        numbers = sum(layer.weight.numel() for layer in layers)
        rows = sum(layer.out_features for layer in layers)
        assert stored_bytes(full.model) == 4 * sum(parameter.numel() for parameter in full.model.parameters()) + sum(
            buffer.numel() * buffer.element_size() for buffer in full.model.buffers()
        )
        assert stored_bytes(full.model) - stored_bytes(int8.model) == 3 * numbers - 4 * rows
        # Half a byte each, one for every 64 of them, and tables of 16 and 256 float32 that every layer has.
        saved = stored_bytes(full.model) - stored_bytes(nf4.model)
        tables = 4 * (16 + 256)
        assert saved == pytest.approx(numbers * (4 - 0.5 - 1 / 64) - tables * len(layers), abs=8 * len(layers))

    def test_bitsandbytes_that_fails_is_told_before_weights_are_read(
        self, tmp_path: Path, no_reading: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*arguments: object) -> None:
            raise RuntimeError("no kernel for this device\nand more")

        monkeypatch.setattr(quantised, "_try_out", fails)
        with pytest.raises(ConfigError, match=r"nf4: .* cannot do this on cpu \(no kernel for this device\)\. .*none"):
            load(save_tiny(tmp_path), "nf4")


def test_missing_bitsandbytes_is_told_before_weights_are_read(
    tmp_path: Path, no_reading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"nf4 needs the package bitsandbytes.*lora-scripts\[quant\].*none\."):
        load(save_tiny(tmp_path), "nf4")


def test_model_that_is_stored_quantised_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(ModelError, match=r"stored quantised \(gptq\).*Use the original model"):
        load(folder, "none")


def test_pissa_and_pictures_are_refused(tmp_path: Path) -> None:
    values = {"train_data_dir": "d", "base_model": "b", "output_dir": "o", "quantization": "nf4"}
    with pytest.raises(ValueError, match="quantization: has no effect because task_type is text-to-image"):
        RunConfig.model_validate(values)
    with pytest.raises(ValueError, match="lora_init: pissa: not with quantization: nf4"):
        RunConfig.model_validate(values | {"task_type": "text-generation", "lora_init": "pissa"})
