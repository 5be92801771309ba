"""Rules: each step by itself, all of them together, and rules files with faults."""

from pathlib import Path

import pytest

from lora_scripts.captioners.rules import Rules, drop_final_stop, drop_repeats, load_rules, strip_openers, tidy
from lora_scripts.errors import ConfigError


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a picture of a cat", "a cat"),
        ("A photo of the red house", "the red house"),
        ("there is a dog on the beach", "a dog on the beach"),
        ("this is an image of a tree", "a tree"),
        ("a close up of a flower", "a flower"),
        ("a close-up picture of a flower", "a flower"),
        ("a painting of a boat", "a boat"),
        ("here are two robots at night", "two robots at night"),
        ("a scene in the snow", "a scene in the snow"),
        ("a picture of", "a picture of"),
        ("a cat in a picture of a house", "a cat in a picture of a house"),
        ("thereis a cat", "thereis a cat"),
    ],
)
def test_openers_are_taken_away_at_the_start_alone(before: str, after: str) -> None:
    assert strip_openers(before) == after


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a cat cat cat", "a cat"),
        ("a man with a hat with a hat with a hat", "a man with a hat"),
        ("a dog and a dog and a dog", "a dog"),
        ("red, blue, red, green", "red, blue, green"),
        ("the cat in the category", "the cat in the category"),
        ("a cat on a mat", "a cat on a mat"),
        ("The the cat", "The cat"),
    ],
)
def test_repeats_are_said_once(before: str, after: str) -> None:
    assert drop_repeats(before) == after


def test_tidy_mends_blanks_around_marks() -> None:
    assert tidy(" a man ' s  hat , , red .") == "a man's hat, red."


def test_a_final_stop_goes_and_other_marks_stay() -> None:
    assert [drop_final_stop(text) for text in ("a cat.", "a cat...", "a cat?", "a cat,")] == [
        "a cat",
        "a cat...",
        "a cat?",
        "a cat",
    ]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a red cat", "mystyle, a red cat"),
        ("mystyle, a red cat", "mystyle, a red cat"),
        ("MyStyle, a red cat", "mystyle, a red cat"),
        ("mystyle painting", "mystyle painting"),
        ("a cat, mystyle, red", "mystyle, a cat, red"),
        ("mystyles of art", "mystyle, mystyles of art"),
        ("", "mystyle"),
    ],
)
def test_the_trigger_stands_first_and_once(before: str, after: str) -> None:
    assert Rules(trigger="mystyle").apply(before) == after


def test_ban_takes_whole_words_and_phrases_in_any_case() -> None:
    rules = Rules(ban=("watermark", "a Hat", "水印"))
    assert rules.apply("a cat with a hat, Watermark") == "a cat with"
    assert rules.apply("watermarked paper") == "watermarked paper"
    assert rules.apply("一只猫，有水印") == "一只猫，有"


def test_replace_and_vocabulary_use_one_term_for_one_thing() -> None:
    rules = Rules(replace={"kitty": "cat"}, vocabulary={"ink wash": ("sumi-e", "ink painting", "ink-wash")})
    assert rules.apply("a Sumi-e kitty beside an ink painting") == "a ink wash cat beside an ink wash"
    assert rules.apply("kittykat") == "kittykat"


def test_longer_phrases_are_replaced_before_shorter_ones() -> None:
    assert Rules(replace={"red cat": "fox", "cat": "dog"}).apply("a red cat and a cat") == "a fox and a dog"


def test_words_that_blip_makes_up_are_dropped() -> None:
    assert Rules().apply("arafed image of a woman in a red dress") == "a woman in a red dress"


def test_all_steps_work_together_in_order() -> None:
    rules = Rules(trigger="mystyle", prefix="ink wash", suffix="best quality", ban=("watermark",), lowercase=True)
    assert rules.apply("There is a Cat cat , watermark .") == "mystyle, ink wash, a cat, best quality"
    assert [name for name, _ in rules.explain("There is a Cat cat , watermark .")] == [
        "tidy",
        "openers",
        "repeats",
        "lowercase",
        "ban",
        "final stop",
        "prefix and suffix",
        "trigger first",
    ]


@pytest.mark.parametrize("text", ["a cat, red", "mystyle, a cat", "一只猫"])
def test_rules_change_nothing_the_second_time(text: str) -> None:
    rules = Rules(trigger="mystyle", ban=("blue",), vocabulary={"cat": ("kitty",)})
    once = rules.apply(text)
    assert rules.apply(once) == once


def test_rules_are_read_from_yaml_with_flags_on_top(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(
        "trigger: mystyle\nban: [watermark]\nreplace:\n  kitty: cat\nvocabulary:\n  ink wash: [sumi-e]\nstrip_openers: false\n",
        "utf-8",
    )
    rules = load_rules(path, {"trigger": "other", "ban": ["logo"], "replace": {"doggy": "dog"}, "prefix": None})
    assert rules == Rules(
        trigger="other",
        ban=("watermark", "logo"),
        replace={"kitty": "cat", "doggy": "dog"},
        vocabulary={"ink wash": ("sumi-e",)},
        strip_openers=False,
    )


def test_every_fault_of_a_rules_file_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("triger: x\nban: {a: 1}\nreplace: [a]\nlowercase: sometimes\n", "utf-8")
    with pytest.raises(ConfigError) as caught:
        load_rules(path, {})
    assert len(caught.value.faults) == 4
    assert "triger: no such rule. Did you mean trigger?" in caught.value.faults[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", r"rules\.yaml line 1: is no valid YAML"),
        ("- a\n- b\n", "should hold settings such as"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("replace:\n  '': x\n", "an empty word matches everywhere"),
    ],
)
def test_what_is_no_rules_file_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=reason):
        load_rules(path, {})


def test_a_missing_rules_file_names_the_template(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such rules file\. See configs/captioner_rules\.yaml"):
        load_rules(tmp_path / "rules.yaml", {})


def test_the_template_in_configs_loads() -> None:
    template = Path(__file__).parents[3] / "configs" / "captioner_rules.yaml"
    assert load_rules(template, {}).apply("a picture of a cat.") == "mystyle, a cat"
