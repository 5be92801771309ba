"""What TensorBoard shows, read back from its event files."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.told import answers, preview, report, short_run, start
from lora_scripts.training.events import Validation
from lora_scripts.training.tensorboard import TensorBoardListener


def accumulate(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def test_tensorboard_reads_back_every_number_picture_and_text(tmp_path: Path) -> None:
    listener = TensorBoardListener(tmp_path)
    listener.started(start())
    listener.previewed(preview(0, "red"))
    listener.stepped(report(10))
    listener.close()

    events = accumulate(tmp_path)
    losses = events.Scalars("loss/train")
    assert [point.step for point in losses] == list(range(1, 11))
    assert [point.value for point in losses] == pytest.approx([0.5 + i / 100 for i in range(10)])
    expected = {
        "loss/smoothed": 0.5,
        "lr/unet": 1e-4,
        "lr/text_encoder": 5e-5,
        "grad_norm": 0.75,
        "speed/images_per_s": 12.5,
        "memory/current_gib": 1.0,
        "memory/peak_gib": 3.0,
    }
    for tag, value in expected.items():
        assert [(point.step, point.value) for point in events.Scalars(tag)] == [(10, pytest.approx(value))], tag

    shown = events.Images("preview/1")
    picture = Image.open(io.BytesIO(shown[0].encoded_image_string))
    assert (shown[0].step, picture.size, picture.getpixel((3, 3))) == (0, (16, 8), (255, 0, 0))

    def text(tag: str) -> str:
        (event,) = events.Tensors(f"{tag}/text_summary")
        words: bytes = event.tensor_proto.string_val[0]
        return words.decode("utf-8")

    assert text("config").splitlines() == [
        "```yaml",
        "lora_rank: 8",
        "learning_rate: 0.0002",
        "sample_seed: 7",
        "description: 水墨",
        "```",
    ]
    assert "base model | builtin:mini-sd" in text("run")
    assert "2 | 猫.png | 一只猫" in text("captions")
    assert "a cat, ink &#124; wash" in text("captions")
    assert text("preview/2") == "一只&#60;猫&#62;"


def test_tensorboard_shows_answers_of_base_and_lora_in_one_table(tmp_path: Path) -> None:
    listener = TensorBoardListener(tmp_path)
    listener.started(start(settings={"task_type": "text-generation"}))
    listener.answered(answers(10, "2 of 2 answers do not end."))
    listener.stepped(report(10))
    listener.close()

    events = accumulate(tmp_path)
    (event,) = events.Tensors("answers/text_summary")
    assert event.step == 10
    assert event.tensor_proto.string_val[0].decode("utf-8").splitlines() == [
        "prompt | base model | LoRA",
        "--- | --- | ---",
        "Where is it? | No idea. | It arrives today, dear (10).",
        "包裹&#60;在哪&#62;？ | &#124; &#35; &#124; &#42;not&#42; a table | 下午到。",
        "",
        "2 of 2 answers do not end.",
    ]
    assert [(point.step, point.value) for point in events.Scalars("answers/ended")] == [(10, 1.0)]
    assert [point.value for point in events.Scalars("answers/repeated")] == [0.0]
    assert [point.value for point in events.Scalars("speed/trained_tokens_per_s")] == [12.5]


def test_tensorboard_shows_both_validation_losses_and_their_gap_in_one_chart(tmp_path: Path) -> None:
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    listener = TensorBoardListener(tmp_path)
    listener.started(start())
    listener.validated(Validation(0, [0.5, 0.7], [0.4, 0.4]))
    listener.close()

    events = accumulate(tmp_path)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    (chart,) = [chart for chart in layout.category[0].chart if chart.title.startswith("memorisation")]
    shown = {tag: events.Scalars(tag)[0].value for tag in chart.multiline.tag}
    assert shown == {
        "validation/held_out": pytest.approx(0.6),
        "validation/training": pytest.approx(0.4),
        "validation/gap": pytest.approx(0.2),
    }


def test_tensorboard_caption_table_stops_at_100(tmp_path: Path) -> None:
    listener = TensorBoardListener(tmp_path)
    listener.started(start(captions=[(f"{i}.png", "a cat") for i in range(130)]))
    listener.close()
    (event,) = accumulate(tmp_path).Tensors("captions/text_summary")
    words = event.tensor_proto.string_val[0].decode()
    assert "100 | 99.png" in words
    assert "100.png" not in words
    assert words.endswith("30 more are not shown.")


def test_tensorboard_curves_of_a_resumed_run_join(tmp_path: Path) -> None:
    short_run(TensorBoardListener(tmp_path), 0, 30, loss=0.9)
    short_run(TensorBoardListener(tmp_path), 20, 40, loss=0.1)
    events = accumulate(tmp_path)
    losses = {point.step: point.value for point in events.Scalars("loss/train")}
    assert sorted(losses) == list(range(1, 41))
    assert losses[20] == pytest.approx(0.99)
    assert losses[21] == pytest.approx(0.1)
    assert [point.step for point in events.Scalars("loss/train")] == list(range(1, 41))
    assert [image.step for image in events.Images("preview/1")] == [0, 10, 20, 30, 40]


def test_tensorboard_part_started_with_the_clock_set_back_still_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_run(TensorBoardListener(tmp_path), 0, 30, loss=0.9)
    earlier = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: earlier)
    short_run(TensorBoardListener(tmp_path), 20, 30, loss=0.1)
    assert [round(point.value, 2) for point in accumulate(tmp_path).Scalars("loss/smoothed")] == [0.9, 0.9, 0.1]


def test_tensorboard_numbers_are_on_the_disk_before_the_run_ends(tmp_path: Path) -> None:
    listener = TensorBoardListener(tmp_path)
    listener.started(start())
    listener.stepped(report(10))
    assert len(accumulate(tmp_path).Scalars("loss/train")) == 10
    listener.close()
