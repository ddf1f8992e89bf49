"""Drafts: the text of a conversation, and where in it each turn stands."""

from __future__ import annotations

import pytest

from tests.text.conftest import TEMPLATES
from tinkex.text import templates
from tinkex.text.drafts import Drafter, Turn, completion_draft
from tinkex.text.messages import Conversation

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ("<|im_start|>", "<|im_end|>")
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"at": "B"}'}}


def talk(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def conversation(messages, tools=None, train_on="assistant"):
    return Conversation.of(messages, tools, train_on)


def said(draft):
    return [(turn.message, draft.text[turn.start : turn.stop]) for turn in draft.turns]


def template(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def test_a_turn_is_the_answer_and_its_end():
    [draft] = Drafter(CHATML, CONTROL).drafts(conversation(talk("a", "b", "a", "b")))

    assert [(1, "b<|im_end|>\n"), (3, "b<|im_end|>\n")] == said(draft)


def test_a_template_that_takes_back_reasoning_gives_a_draft_for_each_turn():
    drafts = Drafter(template("qwen3"), CONTROL).drafts(conversation(talk("a", "b", "c", "d")))

    empty = "<think>\n\n</think>\n\n"
    assert [[(3, f"{empty}d<|im_end|>\n")], [(1, f"{empty}b<|im_end|>\n")]] == [*map(said, drafts)]
    assert (1,) == drafts[0].left_out


def test_each_beginning_of_a_conversation_is_rendered_once(monkeypatch):
    """With and without the generation prompt: 8 texts for 4 turns, of which 4 become drafts."""
    asked = []
    original = templates.render_template

    def counting(text, messages, **options):
        asked.append((len(messages), options["add_generation_prompt"]))
        return original(text, messages, **options)

    monkeypatch.setattr(templates, "render_template", counting)
    drafter = Drafter(template("qwen3"), CONTROL)
    drafter.drafts(conversation(talk("a", "b")))  # what is the same for all conversations
    asked.clear()

    drafts = drafter.drafts(conversation(talk(*"abcdefgh")))

    assert 4 == len(drafts)
    assert [(n, n % 2 == 1) for n in range(1, 9)] == sorted(asked)


def test_the_drafts_of_a_conversation_show_its_calls_in_the_same_form():
    """Each turn separately, too, although a template may take calls in one form only."""
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Welcome."},
    ]

    drafts = Drafter(template("qwen3"), CONTROL).drafts(conversation(messages))

    spoken = dict(pair for draft in drafts for pair in said(draft))
    assert {1, 3, 5} == set(spoken)
    assert '{"name": "weather", "arguments": {"at": "B"}}' in spoken[1]
    assert all('"arguments": {"at": "B"}' in draft.text for draft in drafts)


SHOW_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
SHOW_CALLS = "{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
SHOW_NAMES = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
SHOW_SAID = "{% if m.role != 'tool' %}{{ m.content }}{% endif %}"
TOOL = {"type": "function", "function": {"name": "weather", "description": "At B: sunny."}}


@pytest.mark.parametrize(
    ("tools", "body", "missing"),
    [
        (SHOW_TOOLS, "{{ m.content }}" + SHOW_CALLS, None),
        ("", "{{ m.content }}" + SHOW_CALLS, "the tool 'weather'"),
        (SHOW_TOOLS, "{{ m.content }}", "the call of 'weather' in message 1"),
        (SHOW_TOOLS, "{{ m.content }}" + SHOW_NAMES, "the arguments of 'weather' in message 1"),
        (SHOW_TOOLS, SHOW_SAID + SHOW_CALLS, "the tool's message 2"),
    ],
)
def test_what_a_template_drops_is_missed_though_its_words_stand_elsewhere(tools, body, missing):
    """The name of a tool is in its schema and in its calls, the result in the answer."""
    messages = [
        {"role": "user", "content": "Weather at B?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is sunny at B."},
    ]
    drafter = Drafter(tools + CHATML.replace("{{ m.content }}", body), CONTROL)

    if missing is None:
        assert 1 == len(drafter.drafts(conversation(messages, [TOOL])))
        assert "zq" not in drafter.draft(conversation(messages, [TOOL])).text
    else:
        with pytest.raises(ValueError, match=f"the chat template does not show {missing}"):
            drafter.drafts(conversation(messages, [TOOL]))


def test_a_result_that_is_dropped_is_missed_without_calls_too():
    messages = [*talk("a"), {"role": "tool", "content": "b"}, {"role": "assistant", "content": "b"}]
    drafter = Drafter(CHATML.replace("{{ m.content }}", SHOW_SAID), CONTROL)

    with pytest.raises(ValueError, match="does not show the tool's message 1"):
        drafter.drafts(conversation(messages))


def test_control_tokens_in_a_message_are_refused_whatever_the_template():
    for form in (CHATML, None):
        with pytest.raises(ValueError, match=r"message 0 contains '<\|im_end\|>'"):
            Drafter(form, CONTROL).drafts(conversation(talk("<|im_end|>", "b")))


def test_a_prompt_too_says_all_that_was_said():
    """A system prompt that the template drops would be obeyed by nothing and missed by someone."""
    forgetful = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
    messages = [{"role": "system", "content": "Be brief."}, *talk("a")]

    with pytest.raises(ValueError, match="does not show the system's message 0; put its text into"):
        Drafter(forgetful, CONTROL).prompt(conversation(messages))
    assert "Be brief." in Drafter(CHATML, CONTROL).prompt(conversation(messages))


def test_half_a_character_is_refused():
    with pytest.raises(ValueError, match="lone surrogate"):
        Drafter(CHATML, CONTROL).drafts(conversation(talk("\ud83d", "b")))
    with pytest.raises(ValueError, match="lone surrogate"):
        completion_draft("a", "\ud83d")


def test_of_a_completion_what_follows_the_prompt_counts():
    assert (Turn(0, 2, 5),) == completion_draft("ab", "cde").turns
    with pytest.raises(TypeError, match="completion must be a str, got int"):
        completion_draft("ab", 3)
