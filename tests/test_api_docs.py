"Every public name says in a sentence what it is, and what its parameters are; nbdev can show each of them."
import importlib
import inspect
import re
from pathlib import Path

import pytest
from fastcore.docments import docments
from nbdev.showdoc import show_doc

PACKAGE = Path(__file__).resolve().parent.parent / 'eva_session9'
FILES = [path.relative_to(PACKAGE.parent).with_suffix('') for path in sorted(PACKAGE.rglob('*.py')) if path.name[0] != '_']
SENTENCE = re.compile(r"[A-Z`'(0-9].*[.?!]\)?$")


def own(kind):
    "(name, function) of the public methods that are written in the class, its constructor included where there is one."
    if '__init__' in vars(kind): yield '__init__', kind
    for name, member in vars(kind).items():
        member = getattr(member, '__func__', member)
        if name[0] != '_' and inspect.isfunction(member): yield name, member


def public():
    "Dotted name -> function or class, for each in a module's `__all__` and the methods of those classes."
    for module in (importlib.import_module('.'.join(file.parts)) for file in FILES):
        for name in module.__all__:
            symbol, dotted = getattr(module, name), f'{module.__name__}.{name}'
            if inspect.isroutine(symbol) or inspect.isclass(symbol): yield dotted, symbol
            if inspect.isclass(symbol): yield from ((f'{dotted}.{method}', member) for method, member in own(symbol))


def overrides(name):
    "Does a method of this name stand in a base class, where it is documented?"
    kind = PUBLIC.get(name.rpartition('.')[0])
    return inspect.isclass(kind) and any(name.rpartition('.')[2] in vars(base) for base in kind.__mro__[1:-1])


PUBLIC = dict(public())
NAMES = [name for name in PUBLIC if not name.endswith('__init__')]
CALLED = [name for name in PUBLIC if not inspect.isclass(PUBLIC[name]) and not overrides(name) or name.endswith('__init__')]


@pytest.mark.parametrize('name', NAMES)
def test_a_sentence_says_what_it_is(name):
    first, *rest = (inspect.getdoc(PUBLIC[name]) or '').split('\n')
    assert SENTENCE.match(first), f'{name}: {first!r} is not a sentence'
    assert not rest or not rest[0], f'{name}: the docstring begins with more than one line'


@pytest.mark.parametrize('name', CALLED)
def test_every_parameter_is_documented(name):
    found = docments(PUBLIC[name], full=True, returns=False, args_kwargs=True)
    on_one_line = inspect.isroutine(PUBLIC[name]) and re.search(r'def \w+\(.*\): *# ', inspect.getsource(PUBLIC[name]))
    for parameter, told in found.items():
        known = told.docment or told.anno is not inspect.Parameter.empty or on_one_line
        assert known or parameter in ('self', 'cls'), f'{name}: {parameter} has neither a comment nor a type'


@pytest.mark.parametrize('name', [name for name in CALLED if inspect.isroutine(PUBLIC[name])])
def test_no_comment_of_a_parameter_is_shown_as_the_return(name):
    assert not re.search(r'\w: .*\) -> .*: *# ', inspect.getsource(PUBLIC[name])), f'{name}: give the parameter a line of its own'


@pytest.mark.parametrize('name', [name for name in NAMES if not overrides(name)])
@pytest.mark.filterwarnings('error')
def test_nbdev_can_show_it(name):
    assert PUBLIC[name].__name__ in show_doc(PUBLIC[name])._repr_markdown_()
