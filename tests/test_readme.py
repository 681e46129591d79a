"""What the README shows is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def shape(output: str) -> list[str]:
    """The output without its numbers, which depend on the machine, and without the spaces and lines that fit them."""
    lines = (re.sub("─+", "─", " ".join(line.split())) for line in output.strip().splitlines())
    return [re.sub(r"\d[\d,.]*", "0", line) for line in lines]


def in_shell(command: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-ec", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_transcript_is_what_the_first_command_prints(tmp_path):
    install, command = blocks(README, "bash")[0].strip().split(" && ")
    assert install == "pip install ."
    assert shape(in_shell(command, tmp_path)) == shape(blocks(README, "text")[0])


@pytest.mark.slow
def test_other_commands_run(tmp_path):
    (tmp_path / "mine.txt").write_text(README[:12000])
    commands = [
        block.strip() for block in blocks(README, "bash") if block.startswith("python -m ctde_jax")
    ]
    assert commands
    says = {
        "train": "test accuracy",
        "wire": "a round",
        "profile": "speed-up",
        "verify": "holds:",
        "export": "sha256",
        "execute": "probability",
    }
    for command in commands:
        name = re.search(r"ctde_jax\.(\w+)", command)[1]
        assert says[name] in in_shell(command, tmp_path)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_python_blocks_run(name):
    for block in blocks((ROOT / name).read_text(), "python"):
        exec(block, {})


def test_tree_names_every_folder():
    tree = blocks(README, "text")[-1]
    named = set(re.findall(r"^([\w.]+)/", tree, flags=re.MULTILINE))
    assert named == {"ctde_jax", "examples", "notebooks", "benchmarks", "tests", "docs", ".ci"}
    assert all((ROOT / name).is_dir() for name in named)


def test_ci_runs_the_test_command_of_the_readme():
    commands = [block.strip() for block in blocks(README, "bash") if "pytest" in block]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text()
