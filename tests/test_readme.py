"""What the README tells a newcomer to type works."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [
    line.split("#")[0].split("&&")[-1].strip()
    for block in blocks("sh")
    for line in block.splitlines()
    if "python -m bench" in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist_with_their_options(command):
    from bench.__main__ import app

    found = get_command(app)
    words = shlex.split(command)[3:]
    while hasattr(found, "commands"):
        assert words[0] in found.commands
        found = found.commands[words.pop(0)]
    options = {name for p in found.params for name in (*p.opts, *p.secondary_opts)}
    assert {word for word in words if word.startswith("--")} <= options


def test_python_examples_run(tmp_path, monkeypatch):
    """As printed, but for the size of the data and the number of epochs."""
    monkeypatch.chdir(tmp_path)
    smaller = {
        'source="phantom"': 'source="phantom", phantom_sizes=(24, 12, 8)',
        "tsm_epochs=3": "tsm_epochs=1, stage1_epochs=1, stage2_epochs=1",
    }
    code = "\n".join(blocks("python"))
    for printed, small in smaller.items():
        assert printed in code
        code = code.replace(printed, small)
    names: dict[str, Any] = {}
    exec(code, names)
    assert (tmp_path / "my-model" / "vitask.json").is_file()
    alone = names["model"].predict("breastmnist", names["images"], exemplar=False)
    np.testing.assert_allclose(alone.sum(1), 1)


def test_results_have_their_place():
    begin, end = README.find("<!-- results:begin -->"), README.find("<!-- results:end -->")
    assert 0 < begin < end


def test_pictures_and_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []
