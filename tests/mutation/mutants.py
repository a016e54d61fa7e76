"""Mutants of a source file: Cosmic Ray's operators, of each kind those whose result a reader could mistake for right.

`a - b` for `a + b`, `<=` for `<`, a number one off, a condition turned round. `a << b` for `a / b` is left out: it does
not run, so it asks nothing of a test. Annotations and decorators are not mutated.
"""

from __future__ import annotations

import ast
import difflib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

SOURCE = Path(__file__).resolve().parents[2] / "src" / "volvelle"
BINARY = (
    "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul BitOr_BitAnd BitAnd_BitOr BitXor_BitOr "
    "RShift_LShift LShift_RShift"
)
COMPARISON = "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is"
OPERATORS = (
    *(f"ReplaceBinaryOperator_{pair}" for pair in BINARY.split()),
    *(f"ReplaceComparisonOperator_{pair}" for pair in COMPARISON.split()),
    *(f"ReplaceUnaryOperator_Delete_{sign}" for sign in ("USub", "Not", "Invert")),
    *("AddNot", "ReplaceAndWithOr", "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue"),
    *("NumberReplacer", "ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceContinueWithBreak"),
)

PAIRS = ((ast.Eq, ast.NotEq), (ast.Lt, ast.GtE), (ast.Gt, ast.LtE), (ast.Is, ast.IsNot), (ast.In, ast.NotIn))
OPPOSITE = {**dict(PAIRS), **{two: one for one, two in PAIRS}}


class Mutant(NamedTuple):
    """One mistake: in which file (from src/volvelle on, without .py) and function, and the line before and after."""

    file: str
    function: str
    was: str
    now: str
    lines: tuple[int, int]
    """First and last line of the statement; of a compound one its head."""
    source: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names the mutant for as long as its function and its line stay as they are."""
        return self.file, self.function, self.was, self.now


def path_of(file: str) -> Path:
    """The source file."""
    return SOURCE / f"{file}.py"


def module_of(file: str) -> str:
    """Its name as a module."""
    return "volvelle." + file.replace("/", ".")


def mutants(file: str, source: str | None = None) -> Iterator[Mutant]:
    """Every mutant of the file, each meaning once."""
    source = path_of(file).read_text() if source is None else source
    seen = {_meaning(source)}
    for name in OPERATORS:
        operator = OperatorProvider()[name]()
        places = sum(len(list(operator.mutation_positions(node))) for node in ast_nodes(get_ast(source)))
        for place in range(places):
            mutated = mutate_code(source, operator, place)
            assert mutated is not None
            meaning = _meaning(mutated)
            if meaning not in seen:
                seen.add(meaning)
                found = _described(file, source, mutated)
                if found is not None:
                    yield found


class _Plain(ast.NodeTransformer):
    """What a program means: no annotations, decorators, imports for type checkers, `strict=` of zip; one `not`."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns, node.decorator_list = None, []
        return self.generic_visit(node)

    def visit_ClassDef(self, node):
        node.decorator_list = []
        return self.generic_visit(node)

    def visit_Call(self, node):
        node.keywords = [one for one in node.keywords if one.arg != "strict"]
        return self.generic_visit(node)

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        inner = node.operand
        if isinstance(node.op, ast.Not) and isinstance(inner, ast.UnaryOp) and isinstance(inner.op, ast.Not):
            return inner.operand
        if isinstance(node.op, ast.Not) and isinstance(inner, ast.Compare) and len(inner.ops) == 1:
            inner.ops = [OPPOSITE[type(inner.ops[0])]()]
            return inner
        return node

    def visit_AnnAssign(self, node):
        node.annotation = ast.Name("_", ast.Load())
        return self.generic_visit(node)

    def visit_If(self, node):
        return None if "TYPE_CHECKING" in ast.dump(node.test) else self.generic_visit(node)


def _meaning(source: str) -> str:
    return ast.dump(_Plain().visit(ast.parse(source)))


def _described(file: str, source: str, mutated: str) -> Mutant | None:
    """None for statements of the module that a test cannot see anew: all but assignments and defaults."""
    old, new = source.splitlines(), mutated.splitlines()
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    _, start, stop, new_start, new_stop = next(block for block in blocks if block[0] != "equal")
    statement, names = _innermost(_parsed(source), start + 1)
    inside = any(isinstance(node, ast.FunctionDef) for node in names)
    if not inside and not isinstance(statement, (ast.Assign, ast.AnnAssign)):
        return None
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno
    return Mutant(
        file,
        ".".join(node.name for node in names),
        _one(old[start:stop]),
        _one(new[new_start:new_stop]),
        (statement.lineno, max(statement.lineno, last)),
        mutated,
    )


@functools.lru_cache(maxsize=4)
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


def _one(lines: list[str]) -> str:
    """Lines as one, without the spaces that Cosmic Ray leaves before numbers."""
    joined = " ".join(line.strip() for line in lines)
    joined = re.sub(r"(?<=[\[(]) |(?<=\w=) |(?<= ) +", "", joined)
    return re.sub(r"([\[(=]|[,:=] |return |else )- (?=[\d.])", r"\1-", joined)


def _innermost(tree: ast.Module, line: int) -> tuple[ast.stmt, list[ast.FunctionDef | ast.ClassDef]]:
    """The smallest statement that holds a line, and the classes and functions around it (or whose head it is)."""
    body: list[ast.stmt] = tree.body
    around: list[ast.FunctionDef | ast.ClassDef] = []
    while True:
        statement = next(s for s in body if _first(s) <= line <= (s.end_lineno or 0))
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            around.append(statement)
        inner = [s for s in ast.iter_child_nodes(statement) if isinstance(s, (ast.stmt, ast.ExceptHandler))]
        holding = [s for s in inner if _first(s) <= line <= (s.end_lineno or 0)]
        if not holding:
            return statement, around
        body = list(holding[0].body) if isinstance(holding[0], ast.ExceptHandler) else holding
        if not any(_first(s) <= line <= (s.end_lineno or 0) for s in body):
            return statement, around


def _first(statement: ast.AST) -> int:
    """The first line, decorators included."""
    decorators = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(d.lineno for d in decorators)])  # type: ignore[attr-defined]
