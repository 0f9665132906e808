"""Is a symbolic size, as torch.export writes it, harmless to parse? torch parses it with ``eval``."""

from __future__ import annotations

import ast
import re

_POWERS = {"Pow", "PowByNatural", "FloatPow"}
_FUNCTIONS = re.compile(
    "Integer|Float|Rational|Add|Mul|Min|Max|Eq|Ne|Mod|floor|ceiling|FloorDiv|ModularIndexing|Where|PythonMod"
    "|CleanDiv|CeilToInt|FloorToInt|CeilDiv|FloatTrueDiv|IntTrueDiv|TruncToFloat|TruncToInt|RoundToInt"
    "|ToFloat|Identity|Pow|PowByNatural|FloatPow"
)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
_SYMBOL = re.compile(r"[a-z]{1,2}\d{1,9}", re.ASCII)


def harmless(text: str) -> bool:
    """Whether ``text`` is a short expression of numbers, symbols and sympy's arithmetic, nothing else.

    Powers need a one-digit exponent, four at most: sympy computes them at once.
    """
    if len(text) > 1024:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    powers = sum(isinstance(node, ast.Pow) or getattr(node, "id", None) in _POWERS for node in ast.walk(tree))
    return powers <= 4 and _fits(tree.body)


def _fits(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=value):
            return isinstance(value, int | float) and abs(value) < 2**63
        case ast.Name(id=name):
            return bool(_SYMBOL.fullmatch(name))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _fits(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _fits(left) and _digit(right)
        case ast.BinOp(left=left, op=operator, right=right):
            return isinstance(operator, _OPERATORS) and _fits(left) and _fits(right)
        case ast.Compare(left=left, comparators=others):
            return _fits(left) and all(map(_fits, others))
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=flags):
            plain = all(
                isinstance(flag.value, ast.Constant) and type(flag.value.value) is bool for flag in flags
            )
            return bool(_SYMBOL.fullmatch(name)) and plain and all(flag.arg for flag in flags)
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(number))], keywords=flags):
            number_like = re.fullmatch(r"-?\d{1,20}(\.\d{0,40})?(e[+-]?\d{1,3})?", number, re.ASCII)
            return bool(number_like) and all(flag.arg == "precision" and _fits(flag.value) for flag in flags)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return (
                bool(_FUNCTIONS.fullmatch(name))
                and all(map(_fits, args))
                and (name not in _POWERS or bool(args and _digit(args[-1])))
            )
    return False


def _digit(node: ast.expr) -> bool:
    """Whether a power's exponent is a number from -9 to 9."""
    match node:
        case ast.Constant(value=int(value)):
            return abs(value) <= 9
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _digit(operand)
        case ast.Call(func=ast.Name(id="Integer"), args=[value]):
            return _digit(value)
    return False
