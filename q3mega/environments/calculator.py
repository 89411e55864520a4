"""The calculator: it walks a syntax tree of four operators and evaluates nothing else."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

MAX_VALUE = 10**12  # of any intermediate result, either sign
_EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,60}")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(expression: str) -> str:
    """The exact value of an expression in integers, + - * / and parentheses; "error: ..." else.

    At most 60 characters and 10^12 in any intermediate value. A fraction is rounded to 6 digits.
    """
    if not _EXPRESSION.fullmatch(expression):
        return "error: use up to 60 of 0-9 + - * / ( )"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return "error: the numbers are too large"
    except (SyntaxError, ValueError):
        return "error: not an expression in + - * / and parentheses"
    return str(value.numerator if value.denominator == 1 else round(float(value), 6))


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        value = Fraction(node.value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:  # a power, a floor division, a call such as 2(3), a tuple
        raise ValueError
    if abs(value) > MAX_VALUE:
        raise OverflowError
    return value
