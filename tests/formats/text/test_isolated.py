"""Chat templates that would take all time or memory, or leave the sandbox."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pumice.errors import InputError
from pumice.formats.text import chat_template, isolated
from pumice.formats.text.chat_template_write import to_jinja
from pumice.templates import TEMPLATES

TOKENS = {"bos": "<s>", "eos": "</s>", "specials": ("<s>", "</s>", "<im_start>", "<im_end>")}
GOOD = to_jinja(TEMPLATES["v1"], ("<im_start>", "<im_end>"))
WRITE = "{% for m in messages %}{{ m.content }}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + WRITE
# Ways out of Jinja's sandbox, of public reports.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch {file}') }}",
    "{{ self.__init__.__globals__.__builtins__.open('{file}', 'w') }}",
    "{{ lipsum.__globals__['os'].popen('touch {file}') }}",
    "{{ joiner.__init__.__globals__.os.system('touch {file}') }}",
    "{{ namespace.__init__.__globals__.os.system('touch {file}') }}",
    "{{ raise_exception.__globals__['__builtins__'].open('{file}', 'w') }}",
    "{{ raise_exception.__closure__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ ('%s' | attr('__class__')) }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch {file}') }}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append({'role': 'user'}) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ url_for.__globals__['os'].popen('touch {file}') }}",
    "{{ request.application.__globals__.__builtins__.__import__('os') }}",
    "{{ config.__class__.__init__.__globals__['os'].popen('touch {file}') }}",
    "{{ dict.mro()[-1].__subclasses__() }}",
    "{{ range.__init__.__globals__ }}",
    "{{ (1).__class__.__bases__[0].__subclasses__() }}",
    "{{ [].__class__.__base__.__subclasses__()[40]('{file}', 'w') }}",
    "{{ {}.__class__.__base__ }}",
    "{{ self._TemplateReference__context.environment.globals }}",
    "{{ caller.__globals__ }}",
    "{{ loop.__class__ }}",
    "{{ '' | attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ ''['__class__'] }}",
    "{{ ''['__cla' ~ 'ss__'] }}",
    "{% set f = ''.format %}{{ f.__self__.__class__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}{{ m._func.__globals__ }}",
    "{{ m.__code__ }}",
    "{% for x in (1,).__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ (messages | selectattr('__class__')) | list }}",
    "{{ messages | groupby('__class__') }}",
    "{{ messages | sort(attribute='__class__') }}",
    "{{ messages | sum(attribute='__class__') }}",
    "{{ messages | tojson(indent='__class__') }}{{ 0 .__class__.__base__.__subclasses__() }}",
]


def test_it_gives_what_the_same_process_gives() -> None:
    expected = chat_template.describe(GOOD, **TOKENS)
    assert isolated.describe(GOOD, **TOKENS, label="here") == expected
    assert isolated.image_wrap(GOOD, **TOKENS) == ("<im_start>", "<im_end>")


def test_an_error_names_the_file() -> None:
    with pytest.raises(InputError, match=r"here: this chat template cannot be .*; name the format"):
        isolated.describe("{{ messages.nothing.at.all }}", **TOKENS, label="here")


NESTED = "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}" + WRITE
BLOCKS = "{% if true %}" * 3000 + WRITE


@pytest.mark.parametrize("source", [NESTED, BLOCKS], ids=["parentheses", "blocks"])
def test_what_is_nested_too_deep_is_told_as_such(source: str) -> None:
    with pytest.raises(InputError, match=r"here: .*it is not Jinja: maximum recursion depth exceeded"):
        isolated.describe(source, **TOKENS, label="here")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot bound CPU time or memory")
@pytest.mark.parametrize(
    "source",
    [
        ENDLESS,
        "{{ 'x' * 8000000000 }}" + WRITE,
        "{% set x = namespace(t='xx') %}{% for i in range(40) %}{% set x.t = x.t ~ x.t %}{% endfor %}",
        "{{ '%8000000000d' | format(1) }}" + WRITE,
        "{{ 'x' * 200000 }}" + WRITE,
    ],
    ids=["endless", "product", "doubling", "format", "long"],
)
def test_time_and_memory_are_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONFAULTHANDLER", "")
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    message = r"here: this chat template .*; name the format with --template"
    with pytest.raises(InputError, match=message) as caught:
        isolated.describe(source, **TOKENS, label="here")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < isolated.CPU_SECONDS + 5
    assert "8000000000 characters" not in str(caught.value)  # which had to be in memory
    assert "(it fails: )" not in str(caught.value)


def test_no_template_leaves_the_sandbox(tmp_path: Path) -> None:
    file = tmp_path / "escaped"
    for source in ESCAPES:
        template = source.replace("{file}", str(file)) + WRITE
        try:
            chat = chat_template.describe(template, **TOKENS).chat
        except InputError:
            continue
        assert "class" not in str(chat) and "root:" not in str(chat), source
    assert not file.exists()
