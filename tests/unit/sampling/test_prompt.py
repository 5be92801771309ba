"""The WebUI's prompt syntax."""

from __future__ import annotations

import pytest

from lora_scripts.errors import ConfigError
from lora_scripts.sampling.prompt import LoRATag, has_emphasis, parse_emphasis, parse_prompt


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("<lora:ink>", LoRATag("ink", 1.0, 1.0)),
        ("<lora:ink:0.7>", LoRATag("ink", 0.7, 0.7)),
        ("<lora:ink:0.7:0.5>", LoRATag("ink", 0.7, 0.5)),  # text encoder first, then UNet
        ("<lora:ink:-1>", LoRATag("ink", -1.0, -1.0)),
        ("<lora:ink:te=0.2>", LoRATag("ink", 0.2, 0.2)),
        ("<lora:ink:0.8:te=0>", LoRATag("ink", 0.0, 0.0)),
        ("<lora:ink:te=0:unet=0.8>", LoRATag("ink", 0.0, 0.8)),
        ("<lora:水墨 风格-v2.1:.5>", LoRATag("水墨 风格-v2.1", 0.5, 0.5)),
        ("<LORA: ink : 1 >", LoRATag("ink", 1.0, 1.0)),
        ("<lyco:ink:0.7>", LoRATag("ink", 0.7, 0.7)),
    ],
)
def test_tag_is_read_as_the_webui_reads_it(tag: str, expected: LoRATag) -> None:
    found = parse_prompt(f"a fox, {tag} in snow")
    assert found.loras == (expected,)
    assert found.text == "a fox,  in snow"


def test_several_tags_are_all_found_in_order() -> None:
    found = parse_prompt("<lora:a:1> a fox <lora:b:0.5>, night<lora:a:0.2>")
    assert [tag.name for tag in found.loras] == ["a", "b", "a"]
    assert found.text == "a fox , night"


@pytest.mark.parametrize("prompt", ["a fox", "a < b > c", "1 <lora> 2", "", "（全角）<hypernet:x:1>"])
def test_prompt_without_a_lora_tag_stays_as_it_is(prompt: str) -> None:
    found = parse_prompt(prompt)
    assert (found.text, found.loras) == (prompt, ())


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("<lora:ink:much>", "'much' is not a weight"),
        ("<lora:ink:nan>", "'nan' is not a weight"),
        ("<lora:ink:0.7:>", "'' is not a weight"),
        ("<lora: :0.7>", "the name is missing"),
    ],
)
def test_broken_tag_is_refused_with_an_example(prompt: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{text}.*<lora:\w+:0\.7>"):
        parse_prompt(prompt)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("", [("", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("a (red:1.3) fox", [("a ", 1.0), ("red", 1.3), (" fox", 1.0)]),
        ("a ( red : 1.3 ) fox", [("a ", 1.0), (" red ", 1.3), (" fox", 1.0)]),
        ("((fox))", [("fox", 1.21)]),
        ("[fox]", [("fox", 1 / 1.1)]),
        ("([fox])", [("fox", 1.0)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("unbalanced)", [("unbalanced)", 1.0)]),
        ("[open", [("open", 1 / 1.1)]),
        (r"fox \(animal\)", [("fox (animal)", 1.0)]),
        (r"\[x\] \\ \n", [("[x] \\ n", 1.0)]),
        ("time 12:30", [("time 12:30", 1.0)]),
        ("(ratio 3:4)", [("ratio 3", 4.0)]),
        ("(a:1.2.3)", [("a:1.2.3)", 1.1)]),
        ("(红色:1.5)狐狸", [("红色", 1.5), ("狐狸", 1.0)]),
    ],
)
def test_emphasis_is_read_as_the_webui_reads_it(text: str, expected: list[tuple[str, float]]) -> None:
    found = parse_emphasis(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


def test_a_house_with_everything() -> None:
    found = parse_emphasis("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).")
    assert [(piece, round(weight, 4)) for piece, weight in found] == [
        ("a ", 1.0),
        ("house", 1.573),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641),
        (".", 1.1),
    ]


def test_has_emphasis_tells_weights_of_one_apart() -> None:
    assert has_emphasis("a (red) fox")
    assert not has_emphasis(r"a fox \(animal\) (red:1.0)")
