"""What curation kept at each step, and what it dropped by which rule, for the report."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from q3mega.config.stage import StageConfig
from q3mega.io import to_json
from q3mega.stages.common.stage import Stage

_Item = TypeVar("_Item")


class FilterReport:
    """Counts by step and by rule, and every dropped item.

    describe(item): what is kept of one that is dropped, as JSON.
    """

    def __init__(self, describe: Callable[[Any], dict[str, Any]]) -> None:
        self.describe = describe
        self.steps: dict[str, int] = {}
        self.drops: Counter[str] = Counter()
        self.dropped: list[dict[str, Any]] = []

    def step(self, name: str, items: Sequence[_Item]) -> None:
        """So many have come to this step."""
        self.steps[name] = len(items)

    def keep(self, kind: str, items: Sequence[_Item], rules: Iterable[str | None]) -> list[_Item]:
        """The items that no rule drops; `rules` names for each the one that does, or None."""
        kept = []
        for item, rule in zip(items, rules, strict=True):
            if rule is None:
                kept.append(item)
            else:
                self.drops[f"{kind}: {rule}"] += 1
                self.dropped.append({"rule": f"{kind}: {rule}", **self.describe(item)})
        return kept

    def write(self, stage: Stage[StageConfig]) -> None:
        """filter_report.json, drops.json and dropped.jsonl in data/."""
        stage.write("data/filter_report.json", self.steps)
        stage.write("data/drops.json", dict(self.drops))
        if stage.leads:
            text = "".join(f"{to_json(row)}\n" for row in self.dropped)
            (stage.data / "dropped.jsonl").write_text(text, encoding="utf-8")
