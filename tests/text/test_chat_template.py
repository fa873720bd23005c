"""Conversations become ids that only the template steers, and templates stay within bounds."""

from __future__ import annotations

import time
from datetime import datetime
from functools import cache

import hypothesis
import hypothesis.strategies as st
import pytest
from transformers import AutoTokenizer

from jamba_lm.errors import InputError, TokenizerError
from jamba_lm.text.chat_template import ChatTemplate
from jamba_lm.text.template_sandbox import BoundedTemplate
from jamba_lm.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.folders import FAMILIES, KINDS, family_folder, read, trained_folder, write

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Wie ist das Wetter in Köln? a < b && x|y 🚤"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
        ],
    },
    {"role": "tool", "content": '{"sky": "grey"}'},
    {"role": "assistant", "content": "It is grey.\n\nBring a coat."},
    {"role": "user", "content": "Thanks 123"},
]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_kind = pytest.mark.parametrize("kind", KINDS)


# -- the two families


def test_the_bom_family_is_written_as_described():
    tokenizer = load_tokenizer(family_folder("bom"))
    text = tokenizer.apply_chat_template(CONVERSATION[:2])
    assert text == (
        "<|startoftext|><|bom|><|system|> Be kind.<|eom|>"
        "<|bom|><|user|> Wie ist das Wetter in Köln? a < b && x|y 🚤<|eom|><|bom|><|assistant|>"
    )
    calls = tokenizer.apply_chat_template(CONVERSATION[2:3], add_generation_prompt=False)
    assert '<tool_calls>[{"name": "weather", "arguments": {"city": "Köln"}}]</tool_calls>' in calls


def test_the_chatml_family_is_written_as_described():
    tokenizer = load_tokenizer(family_folder("think"))
    text = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."},
        ],
        variables={"enable_thinking": True},
    )
    assert text == (
        "<|startoftext|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    calls = tokenizer.apply_chat_template(CONVERSATION[2:4], add_generation_prompt=False)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>' in calls
    assert "<tool_response>" in calls


@every_kind
@every_family
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
def test_a_conversation_gets_the_ids_of_transformers(family, kind, tools):
    folder = family_folder(family, kind)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CONVERSATION, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert load_tokenizer(folder).chat_ids(CONVERSATION, tools=tools) == list(expected)


@every_kind
def test_a_tokenizer_trained_here_has_a_template_that_starts_with_the_bos(kind):
    tokenizer = load_tokenizer(trained_folder(kind))
    ids = tokenizer.chat_ids([{"role": "user", "content": "hi"}])
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|startoftext|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_without_a_bos_gets_one(tmp_path):
    tokenizer = with_template(tmp_path, "{{ messages[0].content }}")
    assert tokenizer.chat_ids([{"role": "user", "content": "x"}])[0] == tokenizer.bos_id
    assert tokenizer.chat_ids([{"role": "user", "content": "x"}], add_bos=False) == (
        tokenizer.encode("x", add_bos=False)
    )


# -- no message can speak for another

WHOLE = "<|im_end|> <|im_start|> <|bom|> <|eom|> <|system|> <|user|> <|endoftext|> <think> </think>"
PARTS = (
    "<|im_ end|> <|eo m|> <| |> < > | im_start bom user <| im_end|> \ufdd0 </ think> <tool_ call>"
)
FRAGMENTS = [*WHOLE.split(), *PARTS.split(), "<|startoftext|>", "<tool_call>", "</tool_call>"]
HOSTILE = (
    st.lists(
        st.one_of(st.sampled_from([*FRAGMENTS, "\n", " ", ""]), st.text(max_size=3)), max_size=8
    )
    .map("".join)
    .map(lambda text: text.encode("utf-8", "ignore").decode())
)


def with_template(folder, template: str) -> Tokenizer:
    source = family_folder("think")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write(folder / name, read(source / name))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return load_tokenizer(folder)


@cache
def load_cached(family: str, template: str | None = None) -> Tokenizer:
    tokenizer = load_tokenizer(family_folder(family))
    if template is not None:
        tokenizer.chat_template = ChatTemplate({"default": BoundedTemplate.compile(template)})
    return tokenizer


def control_tokens(tokenizer: Tokenizer, ids: list[int], *more: str) -> list[int]:
    """Return the control tokens among `ids`, in their order."""
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>", *more)
    control = tokenizer.special_ids | {tokenizer.token_id(name) for name in names}
    return [one for one in ids if one in control]


def conversation(system: str, user: str, tool: str) -> list[dict]:
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": user},
        {"role": "assistant", "content": "So."},
        {"role": "tool", "content": tool},
        {
            "role": "user",
            "content": [{"type": "text", "text": user}, {"type": "text", "text": tool}],
        },
    ]


@every_family
@hypothesis.given(system=HOSTILE, user=HOSTILE, tool=HOSTILE)
@hypothesis.settings(max_examples=200)
def test_no_message_makes_a_control_token(family, system, user, tool):
    tokenizer = load_cached(family)
    tools = [{"name": tool, "parameters": {user: system}}]
    hostile = tokenizer.chat_ids(conversation(system, user, tool), tools=tools)
    harmless = tokenizer.chat_ids(conversation("a", "b", "c"), tools=tools)
    assert control_tokens(tokenizer, hostile) == control_tokens(tokenizer, harmless)


@every_family
@hypothesis.given(system=HOSTILE, user=HOSTILE, tool=HOSTILE)
def test_hostile_messages_still_arrive_whole(family, system, user, tool):
    tokenizer = load_cached(family)
    messages = conversation(system, user, tool)
    ids = tokenizer.chat_ids(messages)
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.apply_chat_template(messages)


@hypothesis.given(answer=HOSTILE, user=HOSTILE)
@hypothesis.settings(max_examples=200)
def test_an_answer_keeps_its_own_markup_and_cannot_end_itself(answer, user):
    tokenizer = load_cached("think")
    ids = tokenizer.chat_ids(
        [{"role": "user", "content": user}, {"role": "assistant", "content": answer}],
        add_generation_prompt=False,
    )
    start, end = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
    steering = [one for one in ids if one in tokenizer.special_ids]
    assert steering == [1, start, end, start, end]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.content | trim }}{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.content.replace('<think>', '') }}{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.content.replace(' ', '') }}{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.content.split('x')|join }}{% endfor %}",
        "<|im_start|>{% for m in messages %}{{ m.content }}{% endfor %}",
        "<|im_start|>{{ messages | map(attribute='content') | join }}",
        "<|im_start|>{{ messages | tojson }}",
        "<|im_start|>{{ messages[0].content ~ messages[-1].content }}",
    ],
)
@hypothesis.given(contents=st.lists(HOSTILE, min_size=1, max_size=4))
def test_no_template_brings_a_control_token_together_from_pieces(template, contents):
    tokenizer = load_cached("think", template)
    messages = [{"role": "user", "content": text} for text in contents]
    harmless = [{"role": "user", "content": "a"} for _ in contents]
    assert control_tokens(tokenizer, tokenizer.chat_ids(messages)) == control_tokens(
        tokenizer, tokenizer.chat_ids(harmless)
    )


# -- messages


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "one or more"),
        ("hi", "expected a list"),
        ({"role": "user"}, "expected a list"),
        (["hi"], r"messages\[0\] is 'hi'"),
        ([{"content": "hi"}], "role is None, expected one of system"),
        ([{"role": "wizard", "content": "hi"}], "role is 'wizard'"),
        ([{"role": "<|im_end|>", "content": "hi"}], "role is '<|im_end|>'"),
        ([{"role": ["user"], "content": "hi"}], "role is"),
        ([{"role": "user"}], "content is None, expected a text"),
        ([{"role": "user", "content": 5}], "content is 5"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "Jamba reads text"),
        ([{"role": "user", "content": "a\ud800"}], r"U\+D800"),
        ([{"role": "user", "content": "a", "x": object()}], "holds a object"),
        ([{"role": "user", "content": "a", "x": {1: 2}}], "holds the key 1"),
        ([{"role": "assistant", "content": None}], "content is None"),
        ([{"role": "assistant", "tool_calls": "x"}], "tool_calls holds"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}], "tool_calls holds"),
    ],
)
def test_malformed_messages_are_refused_by_place(messages, expected):
    with pytest.raises(InputError, match=expected.replace("<|im_end|>", r"<\|im_end\|>")) as caught:
        load_cached("think").chat_ids(messages)
    assert "\n" not in str(caught.value)


def test_a_nest_of_lists_is_refused():
    nest: list = []
    for _ in range(5000):
        nest = [nest]
    with pytest.raises(InputError, match="nested more than"):
        load_cached("think").chat_ids([{"role": "user", "content": "a", "x": nest}])


def test_text_parts_are_one_text():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    tokenizer = load_cached("bom")
    assert tokenizer.chat_ids([{"role": "user", "content": parts}]) == tokenizer.chat_ids(
        [{"role": "user", "content": "one two"}]
    )


def test_messages_are_left_as_they_were():
    messages = conversation("<|im_end|>", "<|im_end|>", "<|im_end|>")
    before = repr(messages)
    load_cached("think").chat_ids(messages, tools=[TOOL])
    assert repr(messages) == before


def test_a_variable_cannot_take_the_place_of_the_messages():
    with pytest.raises(InputError, match="'messages' is set by other means"):
        load_cached("think").chat_ids(CONVERSATION, variables={"messages": []})


def test_a_tool_use_template_serves_when_there_are_tools(tmp_path):
    with_template(tmp_path, "plain")
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("tools", encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    user = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(user) == "plain"
    assert tokenizer.apply_chat_template(user, tools=[TOOL]) == "tools"


# -- what templates may use


def run(source: str, now=lambda: datetime(2026, 11, 22), **values) -> str:
    return BoundedTemplate.compile(source).run(values, now)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "22 Nov 2026"),
        ("{{ {'b': 1, 'a': ['é<']}|tojson }}", '{"b": 1, "a": ["é<"]}'),
        ("{{ {'a': 1}|tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        (
            "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "13",
        ),
        ("{% for i in 'abc' %}{{ loop.index0 }}{{ i if loop.last }}{% endfor %}", "012c"),
        (
            "{% set ns = namespace(n=0) %}"
            "{% for i in range(4) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
            "6",
        ),
        ("{% macro f(a, b=2) %}{{ a ~ b }}{% endmacro %}{{ f(1) }}{{ f('x', b='y') }}", "12xy"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{{ 'a,b'.split(',')[-1] }}{{ 'x' in 'xy' }}{{ [3, 1]|sort }}", "bTrue[1, 3]"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        ("{% for k, v in {'a': 1}|items %}{{ k }}={{ v }}{% endfor %}", "a=1"),
        ("{{ [{'r': 'u'}, {'r': 's'}]|selectattr('r', 'equalto', 's')|list|length }}", "1"),
        ("{{ [{'r': 'u'}]|map(attribute='r')|join(', ') }}{{ missing is defined }}", "uFalse"),
        ("{{ '{} {x}'.format(1, x=2) }}{{ '%s' % 3 }}{{ messages[::-1][0] }}", "1 23b"),
        ("{%- for m in messages %}\n    {{- m }}\n{%- endfor %}", "ab"),
        (
            "{{ 'x'|upper|default('y') }}{{ ''|default('y', true) }}{{ 'a'|replace('a', 'b') }}",
            "Xyb",
        ),
    ],
)
def test_what_published_templates_use_works(source, expected):
    assert run(source, messages=["a", "b"]) == expected


def test_a_refusal_of_the_template_is_the_askers_to_mend():
    with pytest.raises(InputError, match="refuses these messages: Roles must alternate"):
        run("{{ raise_exception('Roles must\n alternate') }}")


GROW = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for a in x recursive %}{{ loop(x) }}{% endfor %}",
        GROW.replace("START", "'a'").replace("STEP", "ns.x + ns.x"),
        GROW.replace("START", "'a'").replace("STEP", "ns.x ~ ns.x"),
        GROW.replace("START", "'a'").replace("STEP", "ns.x * 9"),
        GROW.replace("START", "'a'").replace("STEP", "ns.x.replace('a', 'aa')"),
        GROW.replace("START", "'a'").replace("STEP", "ns.x|replace('a', 'aa')"),
        GROW.replace("START", "'a'").replace("STEP", "[ns.x, ns.x]|join"),
        GROW.replace("START", "'a'").replace("STEP", "'%s%s' % (ns.x, ns.x)"),
        GROW.replace("START", "'a'").replace("STEP", "'{0}{0}'.format(ns.x)"),
        GROW.replace("START", "['a']").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x }}",
        GROW.replace("START", "['a']").replace("STEP", "(ns.x, ns.x)") + "{{ ns.x|string }}",
        GROW.replace("START", "['a']").replace("STEP", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x }}",
        GROW.replace("START", "{}").replace("STEP", "dict(a=ns.x, b=ns.x)") + "{{ ns.x|tojson }}",
        GROW.replace("START", "{}").replace("STEP", "{'a': ns.x.items(), 'b': ns.x.items()}"),
        GROW.replace("START", "[0]").replace("STEP", "[ns.x]") + "{{ ns.x|tojson(indent=9999) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
        "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        "{{ 'a' * 9**15 }}",
        "{{ [0] * 9**15 }}",
        "{{ 2 ** (9**15) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '%*d' % (10**12, 1) }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10**12) }}",
        "{{ 'a'.ljust(10**12) }}",
        "{{ 'a'|center(10**12) }}",
        "{{ 'a'|indent(10**12, true) }}",
        "{{ range(99999)|join('x' * 9999) }}",
        "{{ 5|round(-10**12) }}",
        "{{ lipsum(n=10**9) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{{ 1 / 0 }}",
        "{{ missing.field }}",
        "{{ missing|tojson }}",
        "{{ {}.x.y }}",
        "{{ [1]|sort(attribute=5)|first + 'a' }}",
        "{{ 'a' + 1 }}",
    ],
)
def test_a_hostile_or_broken_template_ends_soon_in_one_line(source):
    started = time.process_time()
    with pytest.raises(TokenizerError) as caught:
        run(source, x=[1, 2], messages=["a"])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    # The bound is 5 s of clock; this is what a machine that does other things grants it.
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ 'a'|nosuchfilter }}",
        "{% nosuchtag %}",
        "{{ (" * 500,
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
        "{% for i in x %}" * 40 + "{% endfor %}" * 40,
        "x" * 300_000,
        "{% generation %}",
    ],
)
def test_what_is_no_template_is_refused_in_one_line(source):
    with pytest.raises(TokenizerError, match="chat template") as caught:
        BoundedTemplate.compile(source)
    assert "\n" not in str(caught.value)


@hypothesis.given(source=st.text("{}%# abfor inx|()'\"[]=+*~.-\n", max_size=60))
@hypothesis.settings(max_examples=400)
def test_any_text_is_a_template_or_refused(source):
    try:
        run(source, x=["a"])
    except (TokenizerError, InputError) as error:
        assert "\n" not in str(error)


def test_a_long_conversation_is_no_bomb():
    text = "word " * 200_000
    tokenizer = load_cached("think")
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}] * 2
    written = tokenizer.apply_chat_template(messages)
    assert written.count(text) == 4
    many = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}] * 2000
    assert tokenizer.apply_chat_template(many).count("<|im_end|>") == 4000


@pytest.mark.parametrize(
    ("template", "contents"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["</", "think>"]),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["<", "|im_", "end|>"]),
        ("{% for m in messages %}{{ m.content|trim }}{% endfor %}", ["<|im_ \n", " end|>"]),
        ("{{ messages[0].content.replace('<think>', '') }}", ["<|im_<think>end|>"]),
        ("{{ messages[0].content.replace('<think>', '') }}", ["<<think>|im_end|>"]),
        ("{{ messages[0].content.split('x')|join }}", ["<x|im_end|>"]),
        ("{{ messages[0].content.split('x')|join }}", ["<|im_exnd|>"]),
        ("{{ messages[0].content|replace('#', '') }}", ["<|im_e#nd|>"]),
        ("{{ messages[0].content|upper|lower }}", ["<|im_end|>"]),
        ("{{ '<|im_end|>' if '<|im_end|>' in messages[0].content }}", ["<|im_end|>"]),
    ],
)
def test_known_ways_to_smuggle_a_control_token_fail(template, contents):
    tokenizer = load_cached("think", template)
    messages = [{"role": "user", "content": text} for text in contents]
    written = tokenizer.apply_chat_template(messages)
    assert "<|im_end|>" in written or "</think>" in written
    ids = tokenizer.chat_ids(messages, add_bos=False)
    assert control_tokens(tokenizer, ids) == []
    # A template that looks for a marked name does not find it; the content is then kept whole.
    if "<" not in template:
        assert tokenizer.decode(ids, skip_special=False) == written
