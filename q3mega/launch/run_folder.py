"""The folder of a run: which recipe it holds, and what of that may change between two starts.

What a run is are the fields that shape its result. The others (`sections.Change`) may have new
values at each start: recipe.yaml then holds those, and recipe.1.yaml, recipe.2.yaml, ... what it
held before.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from q3mega.config.recipe import Recipe
from q3mega.config.secrets import redacted
from q3mega.config.section import Change, leaves
from q3mega.errors import UserError
from q3mega.io import atomic_write, exclusive_lock

_Changes = dict[Change | None, list[str]]


@contextmanager
def held(recipe: Recipe, run_dir: Path) -> Iterator[list[str]]:
    """Hold the folder, which is made, with this recipe in it; yields what to tell of its changes.

    UserError when another process holds it, when it holds another run or cannot be written.
    """
    in_use = (
        f"run folder {run_dir} is in use by process {{holder}}: wait for it, or choose another "
    )
    _make(run_dir)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_lock(run_dir / ".lock", in_use + "--run-dir"))
        except OSError as error:
            raise _unwritable(run_dir, error) from None
        yield keep(recipe, run_dir)


def keep(recipe: Recipe, run_dir: Path) -> list[str]:
    """Put the recipe into the folder, which is made; what to tell of its changes."""
    changed = compare(recipe, run_dir)
    path = run_dir / "recipe.yaml"
    _make(run_dir)
    try:
        if path.exists() and changed and _computed(run_dir):
            former = (run_dir / f"recipe.{n}.yaml" for n in count(1))
            with atomic_write(next(p for p in former if not p.exists())) as unfinished:
                unfinished.write_bytes(path.read_bytes())
        if changed or not path.exists():
            recipe.dump(path)
    except OSError as error:
        raise _unwritable(run_dir, error) from None
    return list(_sentences(changed))


def compare(recipe: Recipe, run_dir: Path) -> _Changes:
    """Changes against the folder's recipe; UserError when they make another run of it.

    A recipe that nothing was computed with binds nobody.
    """
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        return {}
    try:
        before = Recipe.load(path)
    except UserError as error:
        if not _computed(run_dir):
            return {None: [str(error)]}
        raise UserError(f"{path}, which this run began with: {error}") from None
    changed = changes(before, recipe)
    if (fixed := changed.get(None)) and _computed(run_dir):
        raise UserError(
            f"{path} holds another recipe: {_few(fixed)}; choose another --run-dir to change it"
        )
    return changed


def changes(before: Recipe, now: Recipe) -> _Changes:
    """`path (old -> new)` of every field that differs, by what that does to the result."""
    old, new = ({path: (v, mark) for path, v, mark in leaves(r)} for r in (before, now))
    order = "order of stages"
    old[order], new[order] = (list(before.stages), None), (list(now.stages), None)
    changed: _Changes = defaultdict(list)
    for path in old | new:
        (was, mark), (is_now, _) = (side.get(path, (None, None)) for side in (old, new))
        mark = mark if path in old else new[path][1]
        if was == is_now:
            continue
        if mark is Change.MOVED and None in (was, is_now):
            mark = None
        changed[mark].append(redacted(f"{path} ({was} -> {is_now})"))
    return dict(changed)


def _few(changed: list[str]) -> str:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(changed[:3]) + more


def _sentences(changed: _Changes) -> Iterator[str]:
    rounding = changed.get(Change.ROUNDING, [])
    others = changed.get(Change.NOTHING, []) + changed.get(Change.MOVED, [])
    if rounding:
        yield (
            f"since the last start {_few(rounding)} changed: sums are taken in another order, "
            "so low bits, and samples drawn from now on, are not those of an uncut run"
        )
    if others:
        yield f"since the last start {_few(others)} changed, which no result depends on"


def _computed(run_dir: Path) -> bool:
    """Has any stage left more than a log?"""
    folders = [run_dir / "tokenizer", *run_dir.glob("[0-9][0-9]-*")]
    return any(p.is_file() and p.name != "log.txt" for folder in folders for p in folder.rglob("*"))


def _make(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir} cannot be made: {error.strerror}") from None


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(
        f"run folder {run_dir} cannot be written: {error.strerror}; choose another --run-dir"
    )
