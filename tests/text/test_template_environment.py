"""What chat templates may use, against the environment that transformers gives them."""

from __future__ import annotations

import pytest
from transformers.utils import chat_template_utils

from tests.text.conftest import TRANSFORMERS
from tinkex.text.templates import TemplateRefusedError, render_template

MESSAGES = [
    {"role": "user", "content": " Hi, {name}! ", "tags": ["a", "b"]},
    {"role": "assistant", "content": "x<y", "meta": {"items": 3, "n": None}},
]

#: What a template says, as transformers renders it.
ALLOWED = [
    "{{ messages[0].content.strip().split(',')[0].upper() }}",
    "{{ messages[0]['content'] | trim }}{{ messages[1].content | tojson }}",
    "{{ messages[1].meta.items() | list }}",  # a method of dict goes before a key
    "{{ messages[1].meta['items'] }}{{ messages[1].meta.n is none }}{{ messages[1].nothing }}",
    "{{ messages[1].nothing is defined }}{{ messages[1].meta.get('z', 4) }}",
    "{% for m in messages %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}",
    "{% for m in messages %}{{ loop.previtem is defined }}{{ loop.first }}{% endfor %}",
    "{% for m in messages %}{{ loop.cycle('a', 'b') }}{{ loop.nothing }}{% endfor %}",
    "{% set ns = namespace(n=1, s='q') %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ ns.s }}{{ ns.no }}",
    "{% set ns = namespace(f=messages[0].content.format) %}{{ ns.f(name='you') }}",
    "{{ messages[0].content.format(name='you') }}{{ '{}'.format('a') }}",
    "{{ dict(a=1) | tojson }}{{ dict.fromkeys('ab', 1) }}",
    "{% for key, value in messages[1].items() %}{{ key }}{% break %}{% endfor %}",
    "{{ messages[0].tags | join('-') }}{{ messages[0].tags.index('b') }}{{ messages | length }}",
]

#: transformers refuses it since 5.23.
UNDERSCORE = "{% set ns = namespace(_x=1) %}{{ ns._x }}"
#: What leads out of a template.
FORBIDDEN = [
    "{{ messages[0].__class__ }}{{ messages[0].__class__.x }}",
    "{{ messages[0].content.__class__.__mro__ }}",
    "{{ messages[0].content.format.__self__.__class__.x }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages[0].content.format_map({'name': 1}).__class__.x }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ messages[0].tags.clear() }}",
    "{{ dict.__class__.x }}",
    "{{ dict.mro() }}",
    "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
    UNDERSCORE,
    "{% for m in messages %}{{ loop._iterator.x }}{% endfor %}",
    "{{ raise_exception.__globals__.x }}",
]


def theirs(template):
    return chat_template_utils.render_jinja_template([MESSAGES], chat_template=template)[0][0]


@pytest.mark.parametrize("template", ALLOWED)
def test_what_is_allowed_gives_what_it_gives_in_transformers(template):
    assert theirs(template) == render_template(template, MESSAGES)[0]


@pytest.mark.parametrize("template", FORBIDDEN)
def test_what_leads_out_of_the_template_is_refused(template):
    if template != UNDERSCORE or TRANSFORMERS >= (5, 23):
        refusals = r"unsafe|not safely|undefined|has no attribute|underscore"
        with pytest.raises(Exception, match=refusals):
            theirs(template)

    with pytest.raises(TemplateRefusedError):
        render_template(template, MESSAGES)

    assert {"role", "content", "tags"} == set(MESSAGES[0])


def test_a_template_s_own_error_is_passed_on():
    with pytest.raises(TemplateRefusedError, match="not accept these messages: no system"):
        render_template("{{ raise_exception('no system') }}", MESSAGES)


def test_generation_marks_give_ranges_and_leave_no_trace():
    template = (
        "{% for m in messages %}[{% generation %}{{ m.role }}{% endgeneration %}]{% endfor %}"
    )

    text, ranges = render_template(template, MESSAGES)

    assert "[user][assistant]" == text
    assert ["user", "assistant"] == [text[start:stop] for start, stop in ranges]
