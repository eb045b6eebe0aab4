"""The language of templates is sandboxed; messages keep their borders."""

import json
import os
import socket
import subprocess
import sys

import jinja2
import pytest
from glimmer.frontend.child import receive, send
from glimmer.frontend.text.template import make_environment


def render(template: str, **variables: object) -> str:
    return make_environment().from_string(template).render(**variables)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% for x in range(10000000) %}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_what_a_template_may_not_do(template: str) -> None:
    with pytest.raises((jinja2.TemplateError, OverflowError)):
        render(template, messages=[])


def test_the_inside_of_objects_is_not_there() -> None:
    assert render("{{ messages.__class__ }}", messages=[]) == ""


def test_the_filters_and_tags_of_chat_templates() -> None:
    assert render("{{ x | tojson }}", x={"a": "<é>"}) == '{"a": "<é>"}'
    assert render("{{ x | tojson(indent=1, sort_keys=True) }}", x={"b": 1, "a": 2}) == (
        '{\n "a": 2,\n "b": 1\n}'
    )
    assert render("{{ x | tojson(ensure_ascii=True) }}", x="é") == '"\\u00e9"'
    assert render(
        "{% for i in x %}{% if i %}{% break %}{% endif %}{{ i }}{% endfor %}", x=[0, 1]
    ) == ("0")
    assert render("a {% generation %}b{% endgeneration %} c") == "a b c"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("  {% if 1 %}\nx\n  {% endif %}\n") == "x\n"
    assert render("{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}") == "2"


def test_messages_keep_their_borders() -> None:
    here, there = socket.socketpair()
    with here, there:
        for message in (b"x", b"long " * 10_000):
            here.settimeout(10)
            send(here, message)
            assert receive(there) == message
        here.close()
        assert receive(there) == b""


def test_the_process_answers_until_the_other_side_closes() -> None:
    link, theirs = socket.socketpair()
    module = "glimmer.frontend.text.template_child"
    with theirs:
        command = [sys.executable, "-P", "-m", module, str(os.getpid())]
        process = subprocess.Popen(command, stdin=theirs.fileno())
    link.settimeout(60)
    template = "{{ name }}{{ end }}{% if fail %}{{ raise_exception('no') }}{% endif %}"
    setup = {"template": template, "variables": {"end": "!"}, "added": ["<x>"]}
    send(link, json.dumps(setup).encode())
    assert receive(link) == b"ready"
    for message, answer in (
        ({"name": "é"}, "=é!"),
        ({"fail": True}, "!TemplateError: no"),
        ({"name": "again"}, "=again!"),
        ({"name": "a<x>"}, "~a\udc00x>!"),
    ):
        send(link, json.dumps(message).encode())
        assert receive(link).decode("utf-8", "surrogatepass") == answer
    link.close()
    assert process.wait(60) == 0
