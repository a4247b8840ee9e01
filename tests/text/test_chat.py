"""Chat templates against transformers (text and ids), against look-alikes, and against hostile programs."""

import gc
import itertools
import json
import os
import random
import re
import subprocess
import threading
from pathlib import Path

import pytest
from chat_shapes import CONVERSATIONS, SPECIALS, TEMPLATES, TOKENS, turns
from hypothesis import given, settings
from hypothesis import strategies as st
from text_corpus import SENTENCES, llama_2_tree, trained, tree
from transformers import PreTrainedTokenizerFast

from headway.errors import InputError, MachineError
from headway.text import Tokenizer, chat, train_tokenizer
from headway.text.chat import ChatTemplate, special_tokens


@pytest.fixture(scope="module")
def made():
    return {name: ChatTemplate(source, TOKENS, name) for name, (source, _) in TEMPLATES.items()}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """transformers' tokenizer over ours, with every special token of the templates; and ours."""
    ours = train_tokenizer(SENTENCES, "bpe", 700, special_tokens=SPECIALS)
    path = ours.save(tmp_path_factory.mktemp("tokenizer"))
    return ours, PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False, **TOKENS)


def outcome(function, *args, **kwargs):
    """The result, or None where the template refuses."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        if isinstance(error, InputError):
            assert "\n" not in str(error)
        return None


CASES = [(t, c, g) for t in TEMPLATES for c in CONVERSATIONS for g in (False, True)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_equals_transformers(name, made, library):
    rendered = 0
    for case, prompt in itertools.product(CONVERSATIONS, (False, True)):
        messages, options = CONVERSATIONS[case]
        options = {**options, "add_generation_prompt": prompt}
        expected = outcome(
            library[1].apply_chat_template, messages, chat_template=TEMPLATES[name][0], tokenize=False, **options
        )
        assert outcome(made[name].render, messages, **options) == expected, (case, prompt)
        rendered += expected is not None
    assert rendered >= 20


@pytest.mark.parametrize("name", TEMPLATES)
def test_segments_and_ids_without_look_alikes(name, made, library):
    ours, theirs = library
    pattern = re.compile("|".join(map(re.escape, SPECIALS)))
    for case, prompt in itertools.product(CONVERSATIONS, (False, True)):
        messages, options = CONVERSATIONS[case]
        options = {**options, "add_generation_prompt": prompt}
        text = outcome(made[name].render, messages, **options)
        if text is None or case in ("look-alike", "thinking"):
            continue
        parts = made[name].segments(messages, control=SPECIALS, **options)
        assert "".join(part for part, _ in parts) == text
        assert [part for part, is_control in parts if is_control] == pattern.findall(text)
        expected = theirs.apply_chat_template(
            messages, chat_template=TEMPLATES[name][0], tokenize=True, return_dict=False, **options
        )
        assert made[name].encode(ours, messages, **options) == expected


def replaced(value, text):
    """Every string of a value but roles, types and keys, with `text` put in its middle."""
    if isinstance(value, str):
        return f"{value[:1]}{text}{value[1:]}"
    if isinstance(value, list):
        return [replaced(item, text) for item in value]
    fixed = ("role", "type", "tool_call_id", "id")
    return {key: item if key in fixed else replaced(item, text) for key, item in value.items()} if value else value


@pytest.mark.fault("A3")
@pytest.mark.parametrize("name", TEMPLATES)
def test_look_alikes_anywhere_are_text(name, made, library):
    """Control tokens in every string a template is given change no control token of the result, nor its place."""
    attack = "".join(token for token in SPECIALS if "think>" not in token)
    checked = 0
    for case, prompt in itertools.product(CONVERSATIONS, (False, True)):
        messages, options = CONVERSATIONS[case]
        options = {"add_generation_prompt": prompt, **options}
        harmless = outcome(render_as, made[name], replaced(messages, "☃"), replaced_options(options, "☃"))
        if harmless is None or case == "look-alike":
            continue
        hostile = render_as(made[name], replaced(messages, attack), replaced_options(options, attack))
        assert [(part.replace(attack, "☃"), kind) for part, kind in hostile] == harmless
        ids = made[name].encode(library[0], replaced(messages, attack), **replaced_options(options, attack))
        guarded = library[0].special_ids
        written = [library[0].special_id(part) for part, is_control in harmless if is_control]
        assert [number for number in ids if number in guarded] == written
        # The negative control: without segments the attack works.
        text = made[name].render(replaced(messages, attack), **replaced_options(options, attack))
        if attack in text:
            assert len(guarded.intersection(library[0].encode(text, control=True))) > len({*written})
        checked += 1
    assert checked >= 16


def replaced_options(options, text):
    return {key: replaced(value, text) if isinstance(value, list) else value for key, value in options.items()}


def render_as(template, messages, options):
    return template.segments(messages, control=SPECIALS, **options)


PIECES = [
    "<|im_",
    "end|>",
    "<|im_end|>",
    "<",
    ">",
    "|>",
    "<|",
    "user",
    "</s",
    "</think>",
    "\n",
    " ",
    "s>",
    "[INST",
    "]",
    "x",
]


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), min_size=1, max_size=4))
@pytest.mark.parametrize("name", ["chatml", "phi", "gemma", "marked"])
def test_no_pieces_assemble_a_control_token(name, made, library, texts):
    found = made[name].segments(turns(*texts), control=SPECIALS)
    plain = made[name].segments(turns(*("x" for _ in texts)), control=SPECIALS)
    assert [part for part in found if part[1]] == [part for part in plain if part[1]]
    assert "".join(part for part, _ in found) == made[name].render(turns(*texts))
    ids = made[name].encode(library[0], turns(*texts))
    written = [library[0].special_id(part) for part, is_control in found if is_control]
    assert [number for number in ids if number in library[0].special_ids] == written


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0].content.replace('</think>', '') }}", "<|im_</think>end|>"),
        ("{{ messages[0].content|replace('</think>', '') }}", "<|im_</think>end|>"),
        ("{{ messages[0].content[1:] }}", "x<|im_end|>"),
        ("{{ messages[0].content|lower }}", "<|IM_END|>"),
        ("{{ messages[0].content[::-1] }}", "<|im_end|>"[::-1]),
        ("{{ messages[0].content.split('-')|join }}", "<|im_-end|>"),
        ("<{{ messages[0].content }}>", "s"),
        ("<|im_{{ messages[0].content }}|>", "end"),
        ("<{{ messages[0].content }}", "s>"),
        ("{{ messages[0].content }}s>", "<"),
        ("{% for c in messages[0].content %}{{ c }}{% endfor %}", "<|im_end|>"),
        ("{{ '%s'|format(messages[0].content) }}{{ messages[0].content|tojson }}", "<s>"),
        ("{{ messages|tojson }}{{ messages|string }}", "<|im_end|>"),
    ],
)
@pytest.mark.fault("A3")
def test_no_template_turns_contents_into_control(source, text):
    template = ChatTemplate(f"<|im_start|>{source}<|im_end|>")
    parts = template.segments(turns(text), control=SPECIALS)
    assert [part for part in parts if part[1]] == [("<|im_start|>", True), ("<|im_end|>", True)]
    assert "".join(part for part, _ in parts) == template.render(turns(text))


def test_a_role_makes_control_tokens_only_if_known(made):
    control = ("<|user|>", "<|critic|>", "<|end|>")
    for name in ("phi", "glm"):
        assert ("<|user|>", True) in made[name].segments(turns("a"), control=control)
        with pytest.raises(InputError, match=r"the control token '<\|critic\|>'"):
            made[name].segments([{"role": "critic", "content": "a"}], control=control)
    with pytest.raises(InputError, match=r"the control token '<\|end\|>'"):
        made["phi"].segments([{"role": "end", "content": "a"}], control=control)
    for source in ("{{ '<|' + {'user': 'critic'}[messages[0].role] + '|>' }}", "{{ '<|%s|>'|format('critic') }}"):
        with pytest.raises(InputError, match=r"the control token '<\|critic\|>'"):
            ChatTemplate(source).segments(turns("a"), control=control)
    upper = ChatTemplate("{{ '<|' ~ messages[0].role|upper ~ '|>' }}")
    assert upper.segments(turns("a"), control=["<|USER|>"]) == [("<|USER|>", True)]
    # One bracket may be XML around a name of the user's: text, unless it stands around a role.
    xml = ChatTemplate("<{{ messages[0].content }}>")
    assert xml.segments([{"role": "tool", "content": "user"}], control=["<user>"]) == [("<user>", False)]
    with pytest.raises(InputError, match="the control token '<user>'"):
        xml.segments(turns("user"), control=["<user>"])


def test_a_template_that_decides_by_a_control_token_is_refused_only_then():
    source = "{% set end = '</s>' %}{% if not messages[0].content.endswith(end) %}{{ messages[0].content + end }}"
    template = ChatTemplate(source + "{% else %}{{ messages[0].content }}{% endif %}")
    assert template.segments(turns("a"), control=["</s>"]) == [("a", False), ("</s>", True)]
    assert template.render(turns("a</s>")) == "a</s>"
    with pytest.raises(InputError, match="contents hold a control token by which the template decides"):
        template.segments(turns("a</s>"), control=["</s>"])


def tokenizer_trees():
    """Shapes of tokenizers in which the place of a text in the whole matters."""
    metaspace = tree("unigram")
    metaspace["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    swallowing = tree("bpe")
    for entry in swallowing["added_tokens"]:
        entry["rstrip"] = entry["lstrip"] = True
    lowercase = tree("wordpiece")
    return {"metaspace": metaspace, "swallowing": swallowing, "llama": llama_2_tree(), "wordpiece": lowercase}


@pytest.mark.parametrize("shape", ["metaspace", "swallowing", "llama", "wordpiece"])
def test_ids_equal_transformers_for_other_tokenizers(shape, tmp_path):
    ours = Tokenizer(tokenizer_trees()[shape])
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(ours.save(tmp_path)), clean_up_tokenization_spaces=False)
    guarded = ours.special_ids - {ours.unk_id}
    names = [ours.token(number) for number in sorted(guarded)]
    source = f"{names[-1]}{{% for m in messages %}}{names[-2]} {{{{ m.content }}}} {names[-1]}\n{{% endfor %}}"
    template, messages = ChatTemplate(source), turns("hello world", " he", "held\n")
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=False)
    assert template.encode(ours, messages) == expected
    ids = template.encode(ours, turns(f"hello {names[-1]} world", "".join(names), "held"))
    assert [number for number in ids if number in guarded] == [ours.special_id(names[-1])] + [
        ours.special_id(name) for name in (names[-2], names[-1]) * 3
    ]


def test_special_tokens_are_those_of_the_roles(library):
    assert special_tokens(library[0]).items() <= {**TOKENS, "eos_token": "</s>"}.items()
    assert special_tokens(trained("byte"))["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_continuing_equals_transformers(name, made, library):
    done = 0
    for case in ("answered", "space", "parts", "unicode", "thought"):
        messages, options = CONVERSATIONS[case]
        expected = outcome(
            library[1].apply_chat_template,
            messages,
            chat_template=TEMPLATES[name][0],
            tokenize=False,
            continue_final_message=True,
            **options,
        )
        if "{'type'" in str(expected):
            continue  # a list printed by a template that knows no parts
        found = outcome(made[name].render, messages, continue_final=True, **options)
        assert found == expected, case
        if found is not None:
            parts = made[name].segments(messages, control=SPECIALS, continue_final=True, **options)
            assert "".join(part for part, _ in parts) == found
            done += 1
    assert done >= 2
    with pytest.raises(InputError, match="together with add_generation_prompt"):
        made[name].render(turns("a"), continue_final=True, add_generation_prompt=True)


def test_spans_are_what_the_assistant_wrote(made, library):
    messages = turns("a", "b c", "d", "", "e", "last", system="s")
    for name in ("chatml", "marked", "llama-3.1", "llama-2", "zephyr", "alpaca", "qwen-2.5"):
        text, spans = made[name].render(messages), made[name].spans(messages)
        inside = [text[start:stop] for start, stop in spans]
        assert len(inside) == 3
        for written, content in zip(inside, ("b c", "", "last"), strict=True):
            assert re.fullmatch(rf"\s*{content}\s*(<\|im_end\|>|<\|eot_id\|>|</s>|<\|end\|>)+", written), (
                name,
                written,
            )
    # The library's own mask over a template with generation blocks, in characters.
    theirs = library[1].apply_chat_template(
        messages, chat_template=TEMPLATES["marked"][0], return_dict=True, return_assistant_tokens_mask=True
    )
    text, spans = made["marked"].render(messages), made["marked"].spans(messages)
    places = library[1](text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    mask = [int(any(start <= a and b <= stop for start, stop in spans)) for a, b in places]
    assert mask == theirs["assistant_masks"] and 0 < sum(mask) < len(mask)
    for name in ("qwen-3", "phi"):  # one drops what was thought, one ends every unfinished text with eos
        with pytest.raises(InputError, match=rf"messages\[1\]: {name} writes it differently when more follows"):
            made[name].spans(CONVERSATIONS["thinking"][0])
    trimmed = ChatTemplate("{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x[:-1] }}")
    with pytest.raises(InputError, match="generation blocks"):
        trimmed.spans(turns("a"))


# Programs that no sandbox without limits survives. {name: source}
HOSTILE = {
    "attribute walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute walk by filter": "{{ (''|attr('__class__')).__mro__ }}",
    "attribute walk by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "function globals": "{{ raise_exception.__globals__['os'].system('true') }}",
    "generator frame": "{% set g = messages|map('string') %}{{ g.gi_frame.f_back.f_builtins }}",
    "cycler globals": "{{ cycler.__init__.__globals__.os }}",
    "mutation": "{{ messages.append(1) }}",
    "namespace": "{% set n = namespace(__class__=1) %}{{ n }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "endless loop": "{% set r = range(99999) %}" + "{% for a in r %}" * 4 + "{% endfor %}" * 4,
    "endless recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "range": "{{ range(10**9)|list }}",
    "giant string": "{{ 'a' * 10**10 }}",
    "giant string, folded": "{{ ('a' * 4000000000)|length }}",
    "giant list": "{{ ([0] * 10**9)|length }}",
    "giant integer": "{{ (10 ** (10 ** 9)) > 0 }}",
    "giant integer, slowly": "{% set n = namespace(x=7) %}{% for i in r %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling": "{% set n = namespace(x='aa') %}{% for i in r %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling blocks": "{% set n = namespace(x='aa') %}{% for i in r %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "nested list": "{% set n = namespace(x=[0]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "nested list, as JSON": "{% set n = namespace(x=[0]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x|tojson }}",
    "compared": "{% set n = namespace(x=[0], y=[0]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "center": "{{ 'a'|center(10**10) }}",
    "method": "{{ 'a'.ljust(10**10)|length }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "strftime": "{{ strftime_now('%0' ~ '9' * 9 ~ 'd')|length }}{{ ''.zfill(10**10) }}",
    "replace": "{% set x = 'a' * 99999 %}{{ x.replace('a', x)|length }}",
    "indent": "{{ {'a': 1}|tojson(indent=10**10) }}",
    "lipsum": "{{ lipsum(n=10**7) }}",
    "batch": "{{ [1]|batch(10**10, 0)|list }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}",
    "deep source": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep list": "{{ " + "[" * 300 + "]" * 300 + " }}" + "{% if 1 %}" * 5_000,
    "surrogate": "{{ '\\ud800' }}",
    "syntax": "{% for %}",
    "unicode escapes": "{{ '\\\\ud800'.encode().decode('unicode_escape') }}",
}


@pytest.mark.fault("Q8")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused(name):
    template = ChatTemplate("\n{% set r = range(99) %}" + HOSTILE[name], where="model.gguf chat_template", seconds=0.3)
    with pytest.raises(InputError, match=r"^model\.gguf chat_template") as caught:
        template.render(turns("a"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 and caught.value.exit_code == 3


@pytest.mark.fault("Q8")
def test_limits_hold_and_innocent_templates_keep_them():
    template = ChatTemplate("{% set x = 'a' * messages[0].content|length * 1000000 %}{{ x|length }}")
    assert template.render(turns("x" * 30)) == "30000000"
    with pytest.raises(InputError, match="takes more than 64 MB of memory"):
        template.render(turns("x" * 100))
    assert template.render(turns("x")) == "1000000"  # the process that ended is replaced
    template._child._process.kill()
    template._child._process.wait()
    assert template.render(turns("x")) == "1000000"
    with pytest.raises(InputError, match=r"writes more than 1048576 characters"):
        ChatTemplate("{% for i in range(3) %}{{ 'a' * 400000 }}{% endfor %}").render(turns("a"))
    with pytest.raises(InputError, match=r"takes more than 0\.2 s of CPU time"):
        ChatTemplate(HOSTILE["endless loop"], seconds=0.2).render(turns("a"))
    long = "naïve 😀" * 100_000
    assert ChatTemplate(TEMPLATES["chatml"][0]).render(turns(long)) == f"<|im_start|>user\n{long}<|im_end|>\n"


@pytest.mark.fault("Q8")
def test_nothing_runs_before_the_first_rendering_and_nothing_stays():
    template = ChatTemplate("{{ broken")
    assert template._child._process is None
    template = ChatTemplate("{{ messages[0].content }}")
    template.render(turns("a"))
    process = template._child._process
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert re.search(r"Max open files +0 +0", limits) and re.search(r"Max core file size +0 +0", limits)
    del template
    gc.collect()
    assert process.poll() is not None


def test_an_interrupted_request_does_not_shift_the_next(monkeypatch):
    template = ChatTemplate("{{ messages[0].content }}")
    template.render(turns("a"))

    class Interrupted:
        close = template._child._process.stdout.close

        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(template._child._process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        template.render(turns("b"))
    assert template.render(turns("c")) == "c"


def test_a_process_that_cannot_start_is_the_machine_s_fault(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(MachineError, match=r"its process cannot be started: .*Cannot allocate memory"):
        ChatTemplate("a").render(turns("a"))


def test_what_jinja_imports_late_works(library):
    """The child can open nothing, so each of these must have been imported before."""
    text = (
        "{{ m|wordwrap(3) }}{{ m|pprint }}{{ m|urlize }}{{ '<b>x</b>'|striptags }}{{ [2, 1]|sort }}{{ m|truncate(4) }}"
    )
    text += "{{ '%05.1f'|format(3) }}{{ messages|map(attribute='role')|unique|list }}{{ {'a': 1}|xmlattr }}"
    source = "{% set m = messages[0].content %}{{ m|e ~ m|title ~ (lipsum(1) and '') }}" + text
    messages = turns("naïve http://a.b <c> text", "d")
    expected = library[1].apply_chat_template(messages, chat_template=source, tokenize=False)
    assert ChatTemplate(source).render(messages) == expected and "http" in expected


def test_threads_and_forked_processes_share_a_template(made):
    found, random_texts = {}, random.Random(0)
    texts = [str(random_texts.random()) for _ in range(64)]

    def work(part):
        for text in part:
            found[text] = made["chatml"].render(turns(text))

    threads = [threading.Thread(target=work, args=(texts[start::8],)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {text: f"<|im_start|>user\n{text}<|im_end|>\n" for text in texts}
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(send, made["chatml"].render(turns("forked")).encode())
        made["chatml"]._child._stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(receive, 100) == b"<|im_start|>user\nforked<|im_end|>\n"
    os.close(receive), os.close(send)
    assert made["chatml"].render(turns("after")) == "<|im_start|>user\nafter<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([], "messages: "),
        ("hello", "messages: "),
        ({"role": "user", "content": "a"}, "messages: "),
        (["hello"], "messages[0]: "),
        ([{"content": "a"}], "messages[0].role: None; expected a string"),
        ([{"role": 1, "content": "a"}], "messages[0].role: 1"),
        ([*turns("a", "b"), {"role": "user"}], "messages[2].content: missing"),
        ([*turns("a", "b"), {"role": "user", "content": None}], "messages[2].content: None"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "messages[0].content: None"),
        ([{"role": "user", "content": 3}], "messages[0].content: 3"),
        ([{"role": "user", "content": {"text": "a"}}], "messages[0].content: "),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]: 'a'"),
        ([{"role": "user", "content": [{"text": "a"}]}], "messages[0].content[0]: "),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0]: "),
        ([{"role": "user", "content": "a", "x": {1: 2}}], "messages[0].x: key 1; expected a string"),
        ([{"role": "user", "content": "a", "x": [b""]}], "messages[0].x[0]: a bytes that JSON cannot carry"),
        ([{"role": "user", "content": "a", "x": 10**200}], "messages[0].x: a int"),
        ([{"role": "user", "content": "a", "x": json.loads("[" * 70 + "]" * 70)}], "messages[0].x"),
    ],
)
def test_wrong_messages_are_named(messages, place, made):
    with pytest.raises(InputError, match="^" + re.escape(place)):
        made["chatml"].render(messages)


@pytest.mark.fault("T10")
def test_lone_surrogates_are_refused(made):
    for messages, options, place in (
        (turns("\ud800"), {}, "messages[0].content: not valid Unicode: lone surrogate U+D800 at character 0"),
        (turns("a", "b\udc00"), {}, "messages[1].content: not valid Unicode"),
        ([{"role": "\udfff", "content": ""}], {}, "messages[0].role: not valid Unicode"),
        ([{"role": "user", "content": "", "\udc00": 1}], {}, "a key of messages[0]: not valid Unicode"),
        ([{"role": "user", "content": [{"type": "text", "text": "\udffd"}]}], {}, "messages[0].content[0].text: not"),
        (turns("a"), {"tools": [{"name": "\udc01"}]}, "tools[0].name: not valid Unicode"),
        (turns("a"), {"documents": [{"text": "\udc01"}]}, "documents[0].text: not valid Unicode"),
        (turns("a"), {"date_string": "\udc01"}, "date_string: not valid Unicode"),
    ):
        for call in (made["chatml"].render, made["chatml"].spans):
            with pytest.raises(InputError, match="^" + re.escape(place)):
                call(messages, **options)
    with pytest.raises(InputError, match="not valid Unicode"):
        ChatTemplate("\ud800")
    for wrong in (None, b"{{ a }}", "x" * (chat.MAX_SOURCE + 1)):
        with pytest.raises(InputError, match="at most 1048576 characters of jinja2 source"):
            ChatTemplate(wrong)
    for name in ("tools", "documents"):
        with pytest.raises(InputError, match=f"^{name}: holds something else"):
            made["chatml"].render(turns("a"), **{name: ["x"]})


def test_the_lines_of_a_template_are_named():
    for source, place in (
        ("a\n{{ raise_exception('no\n\x1bway') }}", "c.jinja line 2: no way; expected a conversation that"),
        ("a\n\n{% if %}", "c.jinja line 3: TemplateSyntaxError"),
        ("a\n\n\n{{ messages[0].content + 1 }}", "c.jinja line 4: TypeError"),
        ("\n{% macro f() %}\n{{ 1 / 0 }}{% endmacro %}\n{{ f() }}", "c.jinja line 3: ZeroDivisionError"),
    ):
        with pytest.raises(InputError, match="^" + re.escape(place)):
            ChatTemplate(source, where="c.jinja").render(turns("a"))
