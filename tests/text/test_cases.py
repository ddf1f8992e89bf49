"""Inputs of public reports (tests/data/cases) with the templates that they were reported for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tinkex.data import datums, files

CASES = Path(__file__).parent.parent / "data" / "cases"


@pytest.fixture
def render(load):
    """The examples of a case with a template, and the tokenizer."""

    def render(case, kind, **options):
        ours, _ = load(kind, kind in ("mistral_v01", "mistral_v03", "llama2", "zephyr"))
        data = files.read(CASES / case)
        return datums.render(data.records, ours, datums.Options(4000, **options)), ours

    return render


def learned(example, tokenizer):
    return tokenizer.decode(example.tokens[example.counted == 1].tolist())


@pytest.mark.parametrize("kind", ["mistral_v01", "gemma3", "llama2"])
def test_a_row_that_a_template_refuses_is_named_and_the_others_are_good(render, kind):
    rendered, _ = render("two_users.jsonl", kind)

    assert ["line 4"] == [bad.where for bad in rendered.bad]
    assert "roles must alternate" in rendered.bad[0].reason.lower()
    assert len(rendered.examples) > 3


def test_a_system_message_that_a_template_refuses_is_named(render):
    rendered, _ = render("system_first.jsonl", "mistral_v01")

    assert [f"line {i}" for i in range(1, 5)] == [bad.where for bad in rendered.bad]


def test_a_conversation_that_the_assistant_begins(render):
    refused, _ = render("first_assistant.jsonl", "mistral_v01")
    shown, tokenizer = render("first_assistant.jsonl", "qwen2_5")

    assert 0 == len(refused.examples)
    assert "Hello, I am Bob.<|im_end|>\nbye<|im_end|>\n" == learned(shown.examples[0], tokenizer)


@pytest.mark.parametrize("split_turns", [True, False])
def test_all_three_turns_can_be_learned(render, split_turns):
    rendered, tokenizer = render("multi_turn.jsonl", "qwen3", split_turns=split_turns)

    [third, *others] = [
        learned(example, tokenizer) for example in rendered.examples if example.record == 0
    ]
    empty = "<think>\n\n</think>\n\n"
    assert f"{empty}third<|im_end|>\n" == third
    expected = [f"{empty}first<|im_end|>\n", f"{empty}second<|im_end|>\n"]
    assert (expected if split_turns else []) == others


@pytest.mark.parametrize("case", ["openai_tools_empty.jsonl", "openai_toolcall_only.jsonl"])
@pytest.mark.parametrize("kind", ["qwen2_5", "qwen3", "llama3_1", "glm4"])
def test_tools_and_calls_are_shown(render, case, kind):
    rendered, tokenizer = render(case, kind)
    text = tokenizer.decode(rendered.examples[0].tokens)
    said = "".join(learned(e, tokenizer) for e in rendered.examples if e.record == 0)

    assert [] == rendered.bad
    assert '"required"' in text
    assert "get_weather" in said
    assert "Paris" in said


def test_calls_without_a_schema_are_shown(render):
    rendered, tokenizer = render("mistral_tools.jsonl", "mistral_v03")

    assert [] == rendered.bad
    said = learned(rendered.examples[0], tokenizer)
    assert '[{"name": "get_weather", "arguments": {"city": "Paris"}' in said
    assert said.startswith("[TOOL_CALLS]")
    assert said.endswith("It is sunny.</s>")


def test_calls_that_a_template_cannot_show_are_bad_lines(render):
    rendered, _ = render("openai_tools_empty.jsonl", "smollm2")

    assert [] == rendered.examples
    assert "the chat template does not show the tool 'get_weather'" in rendered.bad[0].reason


def test_an_injected_turn_is_a_bad_line(render):
    rendered, _ = render("inject.jsonl", "qwen2_5")

    assert [] == rendered.examples
    assert "message 0 contains '<|im_end|>'" in rendered.bad[0].reason


def test_no_space_appears_between_prompt_and_completion(render):
    rendered, tokenizer = render("pc.jsonl", "llama2")
    example = rendered.examples[0]

    assert "capital of country 0?\nCity 0." == tokenizer.decode(
        example.tokens, skip_special_tokens=True
    )
    assert "City 0.</s>" == tokenizer.decode(example.tokens[example.counted == 1])


def test_a_system_prompt_is_part_of_what_is_read(render):
    rendered, tokenizer = render("sys_train.jsonl", "llama3")

    assert "You speak only French." in tokenizer.decode(rendered.examples[0].tokens)
    assert "oui<|eot_id|>" == learned(rendered.examples[0], tokenizer)


def test_a_prompt_of_messages_is_read_and_its_completion_learned(render):
    rendered, tokenizer = render("trl_conv_prompt_completion.jsonl", "llama3")

    assert "a<|eot_id|>" == learned(rendered.examples[0], tokenizer)
