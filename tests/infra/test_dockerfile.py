"""infra/docker/Dockerfile, parsed: there is no container engine in CI."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPOSITORY

DOCKERFILE = REPOSITORY / "infra" / "docker" / "Dockerfile"
KNOWN = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "CMD"}  # no ADD: it fetches addresses
SECRET = re.compile(r"(?i)(password|passwd|secret|token|credential|api_?key|access_?key)")


class Instruction(NamedTuple):
    word: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """Comments dropped, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [Instruction(word.upper(), " ".join(rest.split())) for word, _, rest in found]


def findings(parsed: list[Instruction]) -> list[str]:
    """What is wrong with a Dockerfile; [] where nothing is."""
    found = [f"unknown instruction {i.word}" for i in parsed if i.word not in KNOWN]
    users = [i.rest for i in parsed if i.word == "USER"]
    last_stage = max((n for n, i in enumerate(parsed) if i.word == "FROM"), default=-1)
    if not any(i.word == "USER" for i in parsed[last_stage:]):
        found.append("the last stage runs as root")
    found += [f"USER {user} is not a number above 0" for user in users if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)]
    for i in parsed:
        if i.word == "ARG" and SECRET.search(i.rest):
            found.append(f"a secret as a build argument: {i.rest}")
        if i.word == "ENV":
            pairs = re.findall(r"([A-Z_]+)=(\S+)", i.rest)
            found += [
                f"a secret in the environment: {name}"
                for name, value in pairs
                if SECRET.search(name + value) and (name, value) not in {("RAY_AUTH_MODE", "token")}
            ]
        if i.word == "RUN" and re.search(r"https?://|\bcurl\b|\bwget\s+-|--index-url|--extra-index-url", i.rest):
            found.append(f"fetches from an address: {i.rest[:60]}")
        if i.word == "RUN" and "pip install" in i.rest and "--constraint" not in i.rest and "--no-deps" not in i.rest:
            found.append(f"unpinned packages: {i.rest[:60]}")
    default = dict(i.rest.partition("=")[::2] for i in parsed if i.word == "ARG")
    for base in (i.rest.split()[0] for i in parsed if i.word == "FROM"):
        image = re.sub(r"\$\{(\w+)\}", lambda m: default.get(m[1], ""), base)
        if not re.fullmatch(r"python:3\.1[1-9]\.\d+-slim-[a-z]+", image):
            found.append(f"base image {image!r} is not a Python 3.11 or newer pinned to its patch version")
    return found


@pytest.fixture(scope="module")
def parsed() -> list[Instruction]:
    return instructions(DOCKERFILE.read_text())


def copied(parsed: list[Instruction]) -> list[str]:
    """What COPY takes from the checkout."""
    own = [i.rest.split() for i in parsed if i.word == "COPY" and "--from=" not in i.rest]
    return [source for words in own for source in words[:-1]]


def test_it_keeps_the_rules(parsed: list[Instruction]) -> None:
    assert findings(parsed) == []
    assert sum(i.word == "FROM" for i in parsed) == 2


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("USER 1000:1000", "", "runs as root"),
        ("USER 1000:1000", "USER 0:0", "not a number above 0"),
        ("USER 1000:1000", "USER metapipe", "not a number above 0"),
        ("WORKDIR /work", "ADD https://example.org/x.tar /work", "unknown instruction ADD"),
        ("WORKDIR /work", "ARG REGISTRY_PASSWORD", "a secret as a build argument"),
        ("WORKDIR /work", "ENV AWS_SECRET_ACCESS_KEY=abc", "a secret in the environment"),
        ("--constraint infra/constraints.txt", "", "unpinned packages"),
        ("slim-bookworm", "slim", "base image"),
    ],
)
def test_the_rules_catch_planted_faults(old: str, new: str, says: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    assert any(says in finding for finding in findings(instructions(text.replace(old, new))))


def test_variants_are_a_build_argument(parsed: list[Instruction]) -> None:
    assert Instruction("ARG", "VARIANT=cpu") in parsed
    install = next(i.rest for i in parsed if i.word == "RUN" and "$VARIANT" in i.rest)
    assert "cpu) export UV_TORCH_BACKEND=cpu ;;" in install
    assert "cuda) ;;" in install
    assert "exit 2" in install  # any other


def test_the_shell_in_it_parses(parsed: list[Instruction]) -> None:
    for i in parsed:
        if i.word == "RUN":
            done = subprocess.run(["sh", "-n", "-c", i.rest], capture_output=True, text=True)
            assert done.returncode == 0, (i.rest, done.stderr)


def test_ray_asks_for_a_token_in_the_image(parsed: list[Instruction]) -> None:
    env = " ".join(i.rest for i in parsed if i.word == "ENV")
    assert "RAY_AUTH_MODE=token" in env
    assert "MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false" in env


def packages(parsed: list[Instruction]) -> set[str]:
    """Debian's packages in the last stage."""
    last_stage = max(n for n, i in enumerate(parsed) if i.word == "FROM")
    text = " ".join(i.rest for i in parsed[last_stage:] if i.word == "RUN")
    return {word for found in re.findall(r"apt-get install ([^&]*)", text) for word in found.split() if word[0] != "-"}


def test_rays_launcher_finds_what_it_calls(parsed: list[Instruction]) -> None:
    """`ray up` copies by rsync, and its head starts workers by ssh, from within the container."""
    assert {"openssh-client", "rsync"} <= packages(parsed)


def test_a_login_shell_finds_our_commands(parsed: list[Instruction], tmp_path: Path) -> None:
    """`ray up` runs every command in one, and Debian's /etc/profile sets PATH anew before it reads profile.d."""
    from ray.autoscaler._private.command_runner import _with_interactive

    assert _with_interactive("ray start")[:2] == ["bash", "--login"]
    (run,) = (i.rest for i in parsed if i.word == "RUN" and "/etc/profile.d/" in i.rest)
    (step,) = (step for step in run.split(" && ") if "/etc/profile.d/" in step)
    script = tmp_path / "metapipe.sh"
    written = step.replace("/etc/profile.d/metapipe.sh", shlex.quote(str(script)))
    subprocess.run(["/bin/sh", "-c", written], check=True, env={"PATH": "/the/builders"})
    debians = "/usr/local/bin:/usr/bin:/bin"
    shown = subprocess.run(
        ["/bin/sh", "-c", f'. {shlex.quote(str(script))}; echo "$PATH"'],
        env={"PATH": debians},
        capture_output=True,
        text=True,
    )
    (image_path,) = (m[1] for i in parsed if i.word == "ENV" and (m := re.search(r"(?:^| )PATH=(\S+):\$PATH", i.rest)))
    assert shown.stdout.strip() == f"{image_path}:{debians}"


def test_what_it_copies_exists_and_is_let_through(parsed: list[Instruction]) -> None:
    rules = [r for r in (REPOSITORY / ".dockerignore").read_text().splitlines() if r and not r.startswith("#")]
    assert rules[0] == "*"  # nothing goes to the builder but what is named
    let_through = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    sources = copied(parsed)
    assert all((REPOSITORY / source).exists() for source in sources), sources
    assert set(sources) == let_through
    assert (REPOSITORY / "infra" / "mlflow" / "serve.sh").stat().st_mode & 0o111


def test_the_package_builds_from_what_is_copied(parsed: list[Instruction], tmp_path: Path) -> None:
    """The same build that the image does."""
    checkout = tmp_path / "build"
    for source in copied(parsed):
        into = checkout / source
        into.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / source).is_dir():
            shutil.copytree(REPOSITORY / source, into, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(REPOSITORY / source, into)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(tmp_path), "."], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    ours = [p for folder in ("pipeline", "jobs") for p in (REPOSITORY / folder).rglob("*.py")]
    assert {str(p.relative_to(REPOSITORY)) for p in ours} <= set(names)
