"""The command line: names of today, settings, help."""

import pytest

from q3mega.cli import command_parser, main
from q3mega.cli.arguments import RENAMED_COMMANDS
from q3mega.config.reference import page, stage_page


@pytest.mark.parametrize(("old", "new"), RENAMED_COMMANDS.items())
def test_an_old_command_is_answered_with_its_name_today(capsys, old, new):
    with pytest.raises(SystemExit) as ended:
        main([old, "folder"])
    assert ended.value.code == 2
    assert f"{old} is called {new} now" in capsys.readouterr().err


def test_settings_prints_the_reference(capsys):
    assert main(["settings"]) == 0
    assert capsys.readouterr().out == page()
    assert main(["settings", "mode_fusion"]) == 0
    assert capsys.readouterr().out == stage_page("mode_fusion")
    assert main(["settings", "fusion"]) == 2
    assert "the nearest is mode_fusion" in capsys.readouterr().err


def test_every_command_says_what_it_does(capsys):
    (group,) = command_parser()._subparsers._group_actions
    assert {choice.dest for choice in group._choices_actions} == set(group.choices)
    assert all(choice.help for choice in group._choices_actions)
