"""The reference of settings: every field is described, and the page is what the code says."""

from pathlib import Path

import pytest

from q3mega.config.recipe import Recipe
from q3mega.config.reference import _inner_sections, page, stage_page
from q3mega.config.stages import STAGES
from q3mega.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
SECTIONS = {Recipe, *STAGES.values(), *_inner_sections(Recipe, *STAGES.values())}


@pytest.mark.parametrize("section", sorted(SECTIONS, key=lambda s: s.__name__))
def test_every_field_has_one_sentence(section):
    for name, field in section.model_fields.items():
        assert field.description and field.description.endswith("."), name


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text() == page(), "python -m q3mega.config.reference > docs/settings.md"


def test_a_stage_has_its_sections_and_an_unknown_one_is_refused():
    text = stage_page("reasoning_rl")
    for words in ("| clip_high | number | 0.28 |", "RolloutServers", "| tries | integer | 4 |"):
        assert words in text
    with pytest.raises(UserError, match="reasoning-rl is not a stage, the nearest is reasoning_rl"):
        stage_page("reasoning-rl")
