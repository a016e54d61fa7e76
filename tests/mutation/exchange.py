"""Put a mutant in place of its module inside a process that has imported everything already.

Functions keep their identity and get the mutant's code, so that whoever imported them calls the mutant. Defaults and
constants of modules and classes are computed anew. No file is written: the tree stays whole, whatever happens.
"""

from __future__ import annotations

import ast
import gc
import sys
import types
from collections.abc import Iterator

from tests.mutation.mutants import Mutant, module_of, path_of

Key = tuple[str, int]
"""A function: its qualified name and first line."""


class NotApplied(Exception):
    """Nothing of the running module differs: the mutant was not tried."""


def exchange(mutant: Mutant, original: str | None = None) -> None:
    """Make the running module the mutant. Raises NotApplied when nothing changes."""
    module = sys.modules[module_of(mutant.file)]
    original = path_of(mutant.file).read_text() if original is None else original
    functions = _live(str(module.__file__))
    done = _codes(functions, original, mutant.source, str(module.__file__))
    old, new = ast.parse(original), ast.parse(mutant.source)
    done += _defaults(functions, old, new, module)
    done += _constants(module, module, old.body, new.body)
    classes = zip(_classes(old), _classes(new), strict=True)
    for before, after in classes:
        holder = getattr(module, before.name)
        done += _constants(module, holder, before.body, after.body)
    if not done:
        raise NotApplied(mutant.key)


def _live(path: str) -> dict[Key, list[types.FunctionType]]:
    """The functions that were made from a file, wherever they are kept."""
    found: dict[Key, list[types.FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType and thing.__code__.co_filename == path:
            found.setdefault(_key(thing.__code__), []).append(thing)
    return found


def _key(code: types.CodeType) -> Key:
    return code.co_qualname, code.co_firstlineno


def _compiled(source: str, path: str) -> Iterator[types.CodeType]:
    todo = [compile(source, path, "exec", dont_inherit=True)]
    while todo:
        code = todo.pop()
        yield code
        todo += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]


def _codes(functions: dict[Key, list[types.FunctionType]], old: str, new: str, path: str) -> int:
    before = {_key(code): code for code in _compiled(old, path)}
    done = 0
    for code in _compiled(new, path):
        if before[_key(code)] != code:
            for function in functions.get(_key(code), []):
                function.__code__ = code
                done += 1
    return done


def _defaults(functions: dict[Key, list[types.FunctionType]], old: ast.Module, new: ast.Module, module) -> int:
    done = 0
    for before, after in zip(_functions(old), _functions(new), strict=True):
        now, was = after.args, before.args
        if ast.dump(ast.Tuple([*was.defaults, *filter(None, was.kw_defaults)])) == ast.dump(
            ast.Tuple([*now.defaults, *filter(None, now.kw_defaults)])
        ):
            continue
        places = [node.lineno for node in (after, *after.decorator_list)]
        for (name, line), live in functions.items():
            if name.split(".")[-1] != after.name or line not in places:
                continue
            for function in live:
                function.__defaults__ = tuple(_value(node, module) for node in now.defaults) or None
                named = zip(now.kwonlyargs, now.kw_defaults, strict=True)
                function.__kwdefaults__ = {arg.arg: _value(node, module) for arg, node in named if node is not None}
                done += 1
    return done


def _constants(module, holder, old: list[ast.stmt], new: list[ast.stmt]) -> int:
    """Assignments of a module or of a class, and what a dataclass or NamedTuple has made of them."""
    done = 0
    for before, after in zip(old, new, strict=True):
        if not isinstance(after, (ast.Assign, ast.AnnAssign)) or after.value is None:
            continue
        if ast.dump(before.value) == ast.dump(after.value):  # type: ignore[attr-defined]
            continue
        target = after.target if isinstance(after, ast.AnnAssign) else after.targets[0]
        value = _value(after.value, module)
        pairs = zip(target.elts, value, strict=True) if isinstance(target, ast.Tuple) else [(target, value)]
        for name, one in pairs:
            assert isinstance(name, ast.Name)
            _set(module, holder, name.id, one)
            done += 1
    return done


def _set(module, holder, name: str, value: object) -> None:
    was = holder.__dict__.get(name)
    if holder is module:
        for other in list(sys.modules.values()):  # those that imported it by name
            if getattr(other, "__name__", "").startswith(("volvelle", "tests")) and vars(other).get(name) is was:
                setattr(other, name, value)
        setattr(module, name, value)
        return
    setattr(holder, name, value)
    for maker in (holder.__dict__.get("__init__"), holder.__dict__.get("__new__")):
        if isinstance(maker, types.FunctionType) and maker.__defaults__:
            code, defaults = maker.__code__, list(maker.__defaults__)
            given = code.co_varnames[: code.co_argcount][-len(defaults) :]
            if name in given:
                defaults[given.index(name)] = value
                maker.__defaults__ = tuple(defaults)


def _functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def _classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def _value(node: ast.expr, module) -> object:
    return eval(compile(ast.Expression(node), "<mutant>", "eval"), dict(vars(module)))  # our own source
