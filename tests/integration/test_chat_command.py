"""`lora-scripts chat`, fed through a pipe as a script would do it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.commands import command
from helpers.tiny_causal_lms import random_lora, save_tiny, tiny_model, tokenizer
from lora_scripts.adapters.weights import LoRATensors, LoRAWeights
from lora_scripts.answering.generate import answer
from lora_scripts.dialogues.answers import Answer, AnswerRequest
from lora_scripts.dialogues.conversation import Message, Role
from lora_scripts.export.peft_folder import write_peft_folder

Capsys = pytest.CaptureFixture[str]


def other_lora() -> LoRAWeights:
    return {
        layer: LoRATensors(-lora.lora_A, lora.lora_B, lora.alpha)
        for layer, lora in random_lora(tiny_model("llama")).items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Base, and two LoRAs for it."""
    folder = tmp_path_factory.mktemp("chat")
    base = save_tiny(folder / "base")
    one = write_peft_folder(folder / "kind", random_lora(tiny_model("llama")), base, torch.float32)
    return base, one, write_peft_folder(folder / "curt", other_lora(), base, torch.float32)


def said(*messages: str, lora: LoRAWeights | None = None, weight: float = 1.0, most: int = 8, **more: Any) -> Answer:
    """What transformers' model says whose weights were changed for good; roles alternate, beginning with the user."""
    model = tiny_model("llama")
    layers = {f"language_model.{path}": module for path, module in model.named_modules()}
    for layer, tensors in (lora or {}).items():
        layers[layer].weight.data += weight * tensors.delta()
    roles: tuple[Role, Role] = ("user", "assistant")
    asked = tuple(Message(roles[number % 2], text) for number, text in enumerate(messages))
    return answer(model, tokenizer(), AnswerRequest(asked, max_new_tokens=most, **more))


def chat(
    capsys: Capsys, monkeypatch: pytest.MonkeyPatch, folders: tuple[Path, Path, Path], lines: str, *words: object
) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = command(capsys, "chat", "--base-model", folders[0], "--device", "cpu", "--max-tokens", 8, *words)
    assert code == 0
    return out, err


def test_every_line_gets_an_answer_that_knows_what_was_said(
    folders: tuple[Path, Path, Path], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = chat(capsys, monkeypatch, folders, "Hi?\n\nAnd?\n", "--lora", folders[1])
    first = said("Hi?", lora=random_lora(tiny_model("llama"))).text
    second = said("Hi?", first, "And?", lora=random_lora(tiny_model("llama"))).text
    assert out == f"{first}\n{second}\n"
    assert "Hi" not in err


def test_loras_base_and_weight_can_be_changed_while_talking(
    folders: tuple[Path, Path, Path], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "Hi?\n/reset\n/lora curt\nHi?\n/reset\n/weight 0.5\nHi?\n/reset\n/base\nHi?\n/lora nobody\n/lora\n/weight x\n/quit\nHi?\n"
    out, err = chat(capsys, monkeypatch, folders, lines, "--lora", f"{folders[1]}=nice", "--lora", folders[2])
    expected = [
        said("Hi?", lora=random_lora(tiny_model("llama"))),
        said("Hi?", lora=other_lora()),
        said("Hi?", lora=other_lora(), weight=0.5),
        said("Hi?"),
    ]
    assert len({each.text for each in expected}) == 4
    assert out == "".join(f"{each.text}\n" for each in expected)
    assert "nobody: no such LoRA. There are: nice, curt." in err
    assert "Write a number, such as /weight 0.7." in err


def test_side_by_side_shows_everybody_and_goes_on_with_the_lora(
    folders: tuple[Path, Path, Path], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = chat(capsys, monkeypatch, folders, "Hi?\nAnd?\n", "--lora", folders[1], "--side-by-side")
    lora = random_lora(tiny_model("llama"))
    first = said("Hi?", lora=lora).text
    assert out.startswith(f"base> {said('Hi?').text}\nkind> {first}\nbase> {said('Hi?', first, 'And?').text}\nkind> ")


def test_no_adapter_and_system_text(
    folders: tuple[Path, Path, Path], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--lora", folders[1], "--no-adapter", "--system", "Hm.")
    out, _ = chat(capsys, monkeypatch, folders, "Hi?\n/system\nHi?\n", *words)
    asked = (Message("system", "Hm."), Message("user", "Hi?"))
    with_system = answer(tiny_model("llama"), tokenizer(), AnswerRequest(asked, max_new_tokens=8)).text
    assert out == f"{with_system}\n{said('Hi?').text}\n"
    assert with_system != said("Hi?").text


def test_drawn_answers_follow_the_seed_and_differ_from_turn_to_turn(
    folders: tuple[Path, Path, Path], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = chat(capsys, monkeypatch, folders, "Hi?\n/reset\nHi?\n", "--temperature", 1.5, "--seed", 3)
    first, second = (said("Hi?", temperature=1.5, seed=seed).text for seed in (3, 4))
    assert out == f"{first}\n{second}\n"
    assert first != second


def test_ctrl_c_stops_the_answer_and_not_the_program(
    folders: tuple[Path, Path, Path], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Impatient(io.StringIO):
        """Somebody who presses Ctrl-C when the first piece of an answer is seen."""

        pressed = False

        def write(self, text: str) -> int:
            written = super().write(text)
            if text and not self.pressed:
                self.pressed = True
                signal.raise_signal(signal.SIGINT)
            return written

    terminal = Impatient()
    monkeypatch.setattr(sys, "stdout", terminal)
    # A shell that runs the tests in the background leaves the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _, err = chat(capsys, monkeypatch, folders, "Hi?\nAnd?\n")
    finally:
        signal.signal(signal.SIGINT, before)
    whole = said("Hi?").text
    lines = terminal.getvalue().split("\n")
    begun = lines[0]
    assert 0 < len(begun) < len(whole)
    assert whole.startswith(begun)
    assert "[stopped]" in err
    assert terminal.getvalue().partition("\n")[2] == said("Hi?", begun, "And?").text + "\n"


def test_turns_that_no_longer_fit_are_forgotten_from_the_front(
    folders: tuple[Path, Path, Path], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = "Tell me more of it, will you?"  # with marks 32 of the 64 tokens that the model reads
    out, err = chat(capsys, monkeypatch, folders, f"{question}\n{question}!\n")
    assert "the first turns no longer fit" in err
    assert out == f"{said(question).text}\n{said(question + '!').text}\n"


def test_a_question_that_never_fits_is_refused_and_the_next_one_answered(
    folders: tuple[Path, Path, Path], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = chat(capsys, monkeypatch, folders, f"{'x' * 80}\nHi?\n")
    assert "the prompt has 83 tokens, and the model reads 64" in err
    assert out == f"{said('Hi?').text}\n"


def test_what_begins_with_two_slashes_is_said_and_an_unknown_command_explained(
    folders: tuple[Path, Path, Path], capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = chat(capsys, monkeypatch, folders, "/foo\n//foo\n")
    assert out == f"{said('/foo').text}\n"
    assert "/foo: no such command." in err
    assert "/weight 0.7" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lora", "nowhere"), "nowhere: no such LoRA file or folder"),
        (("--lora", "{kind}", "--lora", "{kind}"), "the name 'kind' is taken"),
        (("--lora", "{kind}=base"), "the name 'base' is taken"),
        (("--weight", 11, "--max-tokens", 0), "--weight 11.0: must be between -10 and 10.\n--max-tokens 0"),
        (("--lora", "{base}=nice"), "is a whole language model; give it as base_model, not as a LoRA"),
    ],
)
def test_wrong_options_are_one_message(
    folders: tuple[Path, Path, Path],
    capsys: Capsys,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi?\n"))
    filled = [str(word).format(kind=folders[1], base=folders[0]) for word in words]
    code, out, err = command(capsys, "chat", "--base-model", folders[0], *filled)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_model_that_makes_pictures_cannot_be_talked_with(tiny_sd_folder: Path, capsys: Capsys) -> None:
    code, _, err = command(capsys, "chat", "--base-model", tiny_sd_folder)
    assert code == 2
    assert "is a model that makes pictures" in err


def test_script_in_tools_talks_through_a_real_pipe(folders: tuple[Path, Path, Path]) -> None:
    script = Path(__file__).parents[2] / "tools" / "chat.py"
    words = ["--base-model", folders[0], "--lora", folders[1], "--max-tokens", "8", "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, str(script), *map(str, words)],
        input="Hi?\n你好？\n".encode(),
        capture_output=True,
        env={**os.environ, "PYTHONUTF8": "1"},
        timeout=120,
    )
    first = said("Hi?", lora=random_lora(tiny_model("llama"))).text
    second = said("Hi?", first, "你好？", lora=random_lora(tiny_model("llama"))).text
    assert (run.returncode, run.stdout.decode()) == (0, f"{first}\n{second}\n"), run.stderr.decode()
