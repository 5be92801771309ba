"""Where the time of steps goes, as the reports tell it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.seen import train
from helpers.tiny_causal_lms import tiny_model, tokenizer
from helpers.told import report
from lora_scripts.attaching import attach_adapter
from lora_scripts.config import RunConfig
from lora_scripts.families.causal_lm import CausalLanguageModel
from lora_scripts.families.protocol import Batch
from lora_scripts.planning.activations import trace_pass
from lora_scripts.training.draws import Draws
from lora_scripts.training.events import Events
from lora_scripts.training.log_file import step_line
from lora_scripts.training.matmul_rate import matmul_rate
from lora_scripts.training.throughput import Throughput, ThroughputMeter

CPU = torch.device("cpu")


def language_model(packing: bool = True) -> CausalLanguageModel:
    return CausalLanguageModel(tiny_model("llama").requires_grad_(False), tokenizer(), packing)


def batch_of(*lengths: int) -> Batch:
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    targets = torch.nn.utils.rnn.pad_sequence([torch.arange(1, n) for n in lengths], batch_first=True)
    filled = {"tokens": list(lengths), "targets": [n - 1 for n in lengths]}
    return Batch({"tokens": tokens, "targets": targets}, [], [str(n) for n in lengths], filled=filled)


def test_padding_is_counted_where_texts_are_padded_and_nowhere_else() -> None:
    for packing, wanted in ((False, 30 / 80), (True, 0.0)):
        meter = ThroughputMeter(language_model(packing), CPU)
        meter.batch(lambda: batch_of(40, 10))
        assert meter.take(1.0).padding == pytest.approx(wanted)


def test_waiting_is_the_time_in_which_batches_are_made() -> None:
    def slowly() -> Batch:
        time.sleep(0.05)
        return batch_of(5)

    meter = ThroughputMeter(language_model(), CPU)
    meter.batch(slowly)
    meter.batch(slowly)
    assert 0.1 <= meter.take(1.0).waiting < 0.5
    meter.batch(lambda: batch_of(5))
    assert meter.take(1.0).waiting < 0.05  # begins anew with every report


def test_share_of_the_peak_falls_with_the_time_that_was_taken() -> None:
    meter = ThroughputMeter(language_model(), CPU)
    shares = []
    for seconds in (1.0, 2.0):
        meter.batch(lambda: batch_of(40, 30))
        shares.append(meter.take(seconds).peak_share)
    assert shares[0] == pytest.approx(2 * shares[1])
    assert 0 < shares[0] < 0.1


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
def test_formula_of_the_arithmetic_agrees_with_what_a_pass_computes(packing: bool) -> None:
    family = language_model(packing)
    config = RunConfig(task_type="text-generation", train_data_dir=Path(), base_model="-", output_dir=Path())
    adapter = attach_adapter(family, config, Events())
    batch = batch_of(30, 20)
    traced = trace_pass(lambda b: family.loss(b, Draws(0)).total, batch, list(adapter.parameters()))
    assert family.work(batch).flops == pytest.approx(traced.flops, rel=0.15)  # half of attention lies behind each token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_speed_of_matrix_products_is_measured_quickly(dtype: torch.dtype) -> None:
    began = time.perf_counter()
    rate = matmul_rate(CPU, dtype, 0.02)
    assert 1e7 < rate < 1e14
    assert time.perf_counter() - began < 5


def test_whole_runs_report_it(language_settings: Callable[..., dict[str, Any]]) -> None:
    reports = train(language_settings(packing=False, max_steps=4)).reports
    assert len(reports) == 4
    for each in reports:
        assert each.throughput is not None
        assert 0 < each.throughput.waiting < 1
        assert 0 <= each.throughput.padding < 0.5
        assert each.throughput.peak_share > 0


def test_runs_on_pictures_report_what_is_known(settings: Callable[..., dict[str, Any]]) -> None:
    found = train(settings(max_steps=1)).reports[0].throughput
    assert found is not None
    assert 0 < found.waiting < 1
    assert (found.padding, found.peak_share) == (None, None)


def test_line_of_the_log_tells_it_beside_the_speed() -> None:
    plain = report(step=10)
    assert "waiting" not in step_line(plain)
    told = step_line(replace(plain, throughput=Throughput(0.012, 0.034, 0.38)))
    assert "/s  38% of peak  padding 3%  waiting 1%  memory" in told
