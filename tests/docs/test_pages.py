"""The pages say what is so: their blocks are parsed and run, their links lead somewhere."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from q3mega.cli import command_parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROSE = [page for page in PAGES if "benchmarks" not in page.parts and page.name != "settings.md"]
LONGEST_LINE = 130
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")
PLACEHOLDER = r"\b(RUN|UNTIED|TIED|HF|FOLDER)\b"  # what a reader puts in
NAME = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def commands(page: Path) -> list[str]:
    """Lines of unnamed and shell blocks that call q3mega, without what the shell does with them."""
    text = "\n".join(blocks(page, "", "sh", "bash", "console")).replace("\\\n", " ")
    lines = (line.strip().removeprefix("$ ") for line in text.splitlines())
    return [line for line in lines if re.match(r"(\.venv/bin/)?q3mega ", line)]


@pytest.mark.parametrize("page", PAGES, ids=NAME)
def test_every_block_of_data_is_that_data(page):
    for text in blocks(page, "json", "jsonl"):
        for part in text.splitlines() if "\n{" in text.strip() else [text]:
            json.loads(part)
    for text in blocks(page, "yaml"):
        assert yaml.safe_load(text)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_every_block_of_python_runs(page, tmp_path):
    for text in blocks(page, "python"):
        compile(text, str(page), "exec")
    runnable = [text for text in blocks(page, "python") if not re.search(PLACEHOLDER, text)]
    text = "\n".join(runnable)  # one after the other, as a reader takes them
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda p: p.name)
def test_every_command_is_one(page):
    parser = command_parser()
    for line in commands(page):
        line = re.split(r"\s#|[|;&>]", line)[0]
        if any(sign in line for sign in ("[", "...")) and "'" not in line:
            continue  # a synopsis
        words = shlex.split(line)[1:]
        arguments, rest = parser.parse_known_args(words)
        assert not [word for word in rest if word.startswith("-")], line
        assert not rest or hasattr(arguments, "overrides"), line


@pytest.mark.parametrize("page", PAGES, ids=NAME)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target, anchor in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path = page.parent / target
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            kept = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor[1:] in kept, f"{target}{anchor}"


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_lines_fit_a_screen(page):
    text = BLOCK.sub("", page.read_text())
    long = [x for x in text.splitlines() if len(x) > LONGEST_LINE and not x.startswith("|")]
    assert not long


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_the_architecture_has_no_rooms(page):
    assert not re.search(r"\b(our rooms|the house|floors)\b", page.read_text(), re.IGNORECASE)
