"""What runs in the sandbox around a program and around its tests.

A function is never called where its tests are: the program runs in one process and gets calls as
literals, the tests run in another and see nothing of the program but the literals that come back.
"""

# What both processes share: values as literals, those of subclasses (Counter) as their base's.
_PLAIN = """
import ast, math, os, sys
sys.setrecursionlimit(10_000)
class Infinity:
    def __init__(self, value):
        self.text = "1e999" if value > 0 else "-1e999"
    def __repr__(self):
        return self.text
def plain(value):
    if isinstance(value, float) and math.isinf(value):
        return Infinity(value)
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, (kind, frozenset) if kind is set else kind):
            return kind(map(plain, value))
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value
"""

# Names that sites of exercises have imported for a class Solution or a function, by module; those
# that a program uses and nobody else defines are imported.
_USUAL = {
    "bisect": "bisect_left bisect_right insort insort_left insort_right",
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "copy": "deepcopy",
    "datetime": "timedelta",
    "functools": "cache cached_property cmp_to_key lru_cache partial reduce wraps",
    "heapq": "heapify heappop heappush heappushpop heapreplace nlargest nsmallest",
    "itertools": "accumulate chain combinations combinations_with_replacement count cycle "
    "dropwhile groupby islice pairwise permutations product repeat starmap takewhile zip_longest",
    "math": "ceil comb factorial floor gcd hypot inf isqrt lcm log log10 log2 perm pi prod sqrt",
    "operator": "attrgetter itemgetter mul xor",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits",
    "typing": "Any Callable DefaultDict Deque Dict FrozenSet Generator Generic Iterable Iterator "
    "List Literal Mapping NamedTuple Optional Sequence Set Tuple Type TypeVar Union",
    **dict.fromkeys(("decimal", "fractions", "json", "os", "random", "re", "sys", "time"), ""),
}

# What a program's process does: reads the program, then a line with the arguments of each call.
# Descriptors are moved first, so that what the program prints does not get between the results.
# A program that ends itself or wants input, in a demonstration, has defined its function by then.
_SERVE = f"""{_PLAIN}
calls, results = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
with open(os.devnull, "r+b", buffering=0) as nothing:
    os.dup2(nothing.fileno(), 0)
    os.dup2(nothing.fileno(), 1)
import builtins
def names_of(code):
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, type(code)):
            yield from names_of(part)
def provide(space, code):
    homes = {{name: module for module, names in {_USUAL!r}.items() for name in names.split()}}
    for name in set(names_of(code)):
        if hasattr(builtins, name) or name in space:
            continue
        if name in homes:
            space[name] = getattr(__import__(homes[name]), name)
        elif name in {set(_USUAL)!r}:
            space[name] = __import__(name)
def target():
    owner, _, name = ENTRY.rpartition(".")
    if not owner and name in space or "Solution" not in space:
        return space[name] if not owner else getattr(space[owner.removesuffix("()")](), name)
    return getattr(space[owner.removesuffix("()") or "Solution"](), name)
module = sys.modules["program"] = type(sys)("program")
space = module.__dict__
exec(compile(PROMPT, "prompt.py", "exec"), space)
code = compile(PROGRAM, "main.py", "exec")
provide(space, code)
try:
    exec(code, space)
except (SystemExit, EOFError):
    pass
for line in calls:
    try:
        given, named = ast.literal_eval(line)
        answer = ("returned", plain(target()(*given, **named)))
    except Exception as error:
        answer = ("raised", type(error).__name__ + ": " + str(error)[:200])
    print(repr(answer), file=results, flush=True)
"""

# What the tests' process does. A result is a literal or nothing: objects of the program's own
# classes, which could be equal to everything, have no way to get here.
_ASK = f"""{_PLAIN}
results, calls = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
def candidate(*given, **named):
    print(repr((plain(given), plain(named))), file=calls, flush=True)
    line = results.readline()
    if not line:
        raise SystemExit("the program ended")
    how, value = ast.literal_eval(line)
    if how == "raised":
        raise RuntimeError(value)
    return value
space = {{"__name__": "tests"}}
exec(compile(PROMPT, "prompt.py", "exec"), space)
space[ENTRY.rpartition(".")[2]] = candidate  # a few of HumanEval's tests call it by its name
exec(compile(CHECK, "check.py", "exec"), space)
space["check"](candidate)
"""

# The check of a table of calls. JSON knows no tuples, no sets and no numbers as keys: they count as
# what JSON makes of them.
_TABLE = """
import math
def same(got, result):
    if isinstance(result, (list, tuple)):
        if isinstance(got, set):
            return len(got) == len(result) and got == set(map(frozen, result))
        if not isinstance(got, (list, tuple)) or len(got) != len(result):
            return False
        return all(map(same, got, result))
    if isinstance(result, dict) and isinstance(got, dict):
        if any(isinstance(key, str) for key in result):
            got = {key if isinstance(key, str) else repr(key): got[key] for key in got}
        return got.keys() == result.keys() and all(same(got[k], result[k]) for k in result)
    numbers = all(isinstance(v, (int, float)) for v in (got, result))
    if numbers and got != result and (ALL_NUMBERS or isinstance(result, float)):
        try:
            return math.isclose(got, result, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
        except OverflowError:  # an integer that no float can hold
            return False
    return got == result
def frozen(value):
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value
def check(candidate):
    for number, (given, named, result) in enumerate(CALLS, 1):
        got = candidate(*given, **named)
        if not same(got, result):
            raise SystemExit(f"call {number} returned {got!r:.60} for {result!r:.60}")
"""

# What a row's own checker says of all that the program has printed.
_JUDGE = """
space = {"__name__": "checker"}
exec(compile(CHECKER, "checker.py", "exec"), space)
for number, (stdin, printed, expected) in enumerate(CASES, 1):
    if not space["check"](stdin, printed, expected):
        raise SystemExit(f"test {number}: the checker refuses {printed[:40]!r}")
"""


def serving(program: str, entry_point: str, prompt: str) -> str:
    """A program whose function answers calls on its input, one a line."""
    return f"PROGRAM, ENTRY, PROMPT = {program!r}, {entry_point!r}, {prompt!r}\n{_SERVE}"


def asking(check: str, entry_point: str, prompt: str) -> str:
    """The program that runs `check(candidate)`, whose calls go out and come back as lines."""
    return f"CHECK, ENTRY, PROMPT = {check!r}, {entry_point!r}, {prompt!r}\n{_ASK}"


def table(calls: str, absolute: float, relative: float, all_numbers: bool) -> str:
    """The check of calls, literals of (arguments, named arguments, result).

    all_numbers: the tolerance is for integers, too.
    """
    settings = f"ABSOLUTE, RELATIVE, ALL_NUMBERS = {absolute!r}, {relative!r}, {all_numbers!r}"
    return f"CALLS = {calls}\n{settings}\n{_TABLE}"


def judging(checker: str, cases: str) -> str:
    """The program that runs a row's checker on literals of (stdin, printed, expected)."""
    return f"CHECKER, CASES = {checker!r}, {cases}\n{_JUDGE}"
