"""Configuration: what is accepted, and that each refusal names the file, the key and what to do."""

import copy
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from pipeline import experiment, sweep
from pipeline.algorithms import ALGORITHMS
from pipeline.config import Section, apply_overrides, differences, flatten, one_of, read_yaml, validate
from pipeline.errors import ConfigError
from pipeline.models import MODELS
from pipeline.tasks import TASK_FAMILIES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

BASE: dict[str, Any] = {
    "name": "test",
    "task": {"family": "sinusoid"},
    "model": {"name": "mlp", "hidden": [8]},
    "algorithm": {"name": "maml", "inner_lr": 0.01},
    "training": {"steps": 10, "meta_batch_size": 4, "backend": "local"},
}

JARGON = (
    "pydantic",
    "Traceback",
    "validation error",
    "union_tag",
    "discriminator",
    "input tag",
    "extract",
    "instance of",
    "type=",
    "https://",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return path


def refusal(file: Path, *overrides: str) -> str:
    """The message of the ConfigError, checked for what every message must have."""
    with pytest.raises(ConfigError) as caught:
        experiment.load(file, overrides)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert message.endswith(".")
    assert "\n" not in message
    assert [word for word in JARGON if word in message] == [], message
    return message


# --- shipped files


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_load(path: Path) -> None:
    loaded = experiment.load(path)
    assert experiment.from_dict(loaded.to_dict(), source="again") == loaded


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("tune/*.yaml")), ids=lambda p: p.stem)
def test_shipped_sweeps_load(path: Path) -> None:
    assert sweep.load(path).trials()


def test_there_are_shipped_configurations() -> None:
    assert list(CONFIGS.glob("*.yaml"))
    assert list(CONFIGS.glob("tune/*.yaml"))


# --- reading and overriding


def test_overrides(file: Path) -> None:
    loaded = experiment.load(
        file,
        [
            "training.outer.outer_lr=1e-3",  # YAML 1.1 reads this as text
            "training.outer.gradient_clip=null",
            "training.steps=7",
            "training.use_gpu=false",
            "model.hidden=[16, 16]",
            "algorithm.first_order=true",
            "tracking.runs=/tmp/a=b",
            " seed =3",
            "seed=4",
        ],
    )
    assert loaded.training.outer.outer_lr == 0.001
    assert loaded.training.outer.gradient_clip is None
    assert loaded.training.steps == 7
    assert loaded.model.hidden == [16, 16] or loaded.model.hidden == (16, 16)
    assert loaded.algorithm.first_order is True
    assert loaded.tracking.runs == "/tmp/a=b"
    assert loaded.seed == 4, "the last one counts"


def test_overrides_leave_the_given_mapping_alone() -> None:
    content = {"training": {"outer": {"outer_lr": 1.0}}}
    result = apply_overrides(content, ["training.outer.outer_lr=2.5e-4", "new.section.key=x"])
    assert result == {"training": {"outer": {"outer_lr": 2.5e-4}}, "new": {"section": {"key": "x"}}}
    assert content == {"training": {"outer": {"outer_lr": 1.0}}}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("-2E5", -2e5), ("1e3x", "1e3x"), ("'on'", "on"), ("", None)]
)
def test_override_values(text: str, value: object) -> None:
    assert apply_overrides({}, [f"key={text}"]) == {"key": value}


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("training.steps", "key=value"),
        ("=3", "key=value"),
        ("training.steps=[1", "not valid YAML"),
        ("training.steps.more=3", "steps holds a value, not a section"),
        ("name.first=3", "name holds a value, not a section"),
    ],
)
def test_bad_overrides(file: Path, override: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment.load(file, [override])
    assert str(caught.value).startswith(f"--set {override}: ")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("name: a\ntask: [1, 2\nmodel: 3\n", "line 3"),
        ("name: a\n\ttask: 1\n", "line 2"),
        ("name: a: b\n", "line 1"),
        ("- 1\n- 2\n", "expected keys and values at the top level, got list"),
        ("", "got NoneType"),
        ("just words", "got str"),
        ("name: \x00", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert what in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such configuration file"):
        read_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        read_yaml(tmp_path / "binary.yaml")


# --- refusals


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.stepz=3", ["training.stepz", "unknown key", "did you mean steps?"]),
        ("trainin=3", ["trainin", "did you mean training?"]),
        ("training.outer.outer_rate=1", ["training.outer.outer_rate", "did you mean outer_lr?"]),
        ("task.k_shots=1", ["task.k_shots", "did you mean k_shot?"]),
        ("algorithm.inner_rl=1", ["algorithm.inner_rl", "did you mean inner_lr?"]),
        ("model.hiden=[1]", ["model.hiden", "did you mean hidden?"]),
        ("evaluation.qqqq=1", ["evaluation.qqqq", "known here", "test_episodes"]),
        ("training.steps=many", ["training.steps", "integer", "'many'"]),
        ("training.steps=2.5", ["training.steps", "integer", "2.5"]),
        ("training.steps=-1", ["training.steps", "greater than or equal to 0", "-1"]),
        ("training.outer.outer_lr=-0.1", ["training.outer.outer_lr", "greater than 0", "-0.1"]),
        ("training.outer.outer_lr=nan", ["training.outer.outer_lr", "finite", "nan"]),
        ("training.use_gpu=maybe", ["training.use_gpu", "'maybe'"]),
        ("seed=-1", ["seed", "-1"]),
        ("name=a b", ["name", "'a b'"]),
        ("name=../up", ["name", "'../up'"]),
        ("training.outer.optimizer=adm", ["training.outer.optimizer", "adam", "adamw", "sgd", "'adm'"]),
        ("training=null", ["training", "None"]),
        ("training=3", ["training", "3"]),
        ("model.hidden=[8, x]", ["model.hidden[1]", "integer", "'x'"]),
        ("task={}", ["task", "family"]),
        ("task=3", ["task", "3"]),
    ],
)
def test_refusals_name_key_value_and_remedy(file: Path, override: str, parts: list[str]) -> None:
    message = refusal(file, override)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("key", "sections"),
    [("task.family", TASK_FAMILIES), ("model.name", MODELS), ("algorithm.name", ALGORITHMS)],
)
def test_wrong_kind_lists_the_allowed_ones(file: Path, key: str, sections: tuple[type[Section], ...]) -> None:
    message = refusal(file, f"{key}=nonsense")
    tag = key.split(".")[1]
    allowed = [section.model_fields[tag].annotation.__args__[0] for section in sections]  # type: ignore[union-attr]
    assert "'nonsense'" in message
    assert key in message
    assert [name for name in allowed if name not in message] == []


@pytest.mark.parametrize("section", ["task", "model", "algorithm", "training", "name"])
def test_missing_section_is_named(file: Path, section: str) -> None:
    file.write_text(yaml.safe_dump({key: value for key, value in BASE.items() if key != section}))
    assert f"{section}: missing" in refusal(file)


def test_missing_section_is_named_even_if_a_value_has_its_name(file: Path) -> None:
    content = {key: value for key, value in BASE.items() if key != "model"} | {"name": "model"}
    file.write_text(yaml.safe_dump(content))
    assert "model: missing" in refusal(file)


def test_every_problem_is_told_at_once(file: Path) -> None:
    message = refusal(file, "training.steps=-1", "seed=x", "algorithm.inner_lr=0")
    assert all(key in message for key in ("training.steps", "seed", "algorithm.inner_lr"))


def test_more_workers_than_tasks_are_refused(file: Path) -> None:
    message = refusal(file, "training.num_workers=5", "training.backend=processes")
    assert "num_workers (5)" in message
    assert "meta_batch_size (4)" in message
    message = refusal(file, "training.num_workers=2")
    assert "backend local has one worker" in message
    assert experiment.load(file, ["training.num_workers=4", "training.backend=processes"]).training.num_workers == 4


def test_sections_cannot_be_changed_later(file: Path) -> None:
    loaded = experiment.load(file)
    with pytest.raises(ValueError, match="frozen"):
        loaded.seed = 3


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "maml", "sinusoid", "training", "name"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "family", "outer", "steps", "task", "hidden", "1", ""]), inner, max_size=4
        )
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    key=st.sampled_from(
        [*BASE, *flatten(BASE), "evaluation", "training.outer", "unknown", "task.unknown", "model.x.y"]
    ),
    value=json_values,
)
def test_whatever_is_wrong_is_a_config_error(key: str, value: Any) -> None:
    content = copy.deepcopy(BASE)
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    try:
        validate(experiment.Experiment, content, source="a.yaml")
    except ConfigError as error:
        assert str(error).startswith("a.yaml: ")  # noqa: PT017


# --- unions, flatten, differences


class Circle(Section):
    kind: Literal["circle"]
    radius: float = Field(gt=0)


class Square(Section):
    kind: Literal["square"]
    side: float = Field(gt=0)


class Drawing(Section):
    shape: one_of([Circle, Square], "kind")  # type: ignore[valid-type]
    only: one_of([Circle], "kind") | None = None  # type: ignore[valid-type]


def test_one_of_picks_by_its_key() -> None:
    drawn = validate(Drawing, {"shape": {"kind": "square", "side": 2}}, source="a.yaml")
    assert drawn.shape == Square(kind="square", side=2)


def test_unknown_key_in_a_union_is_looked_for_in_the_chosen_section() -> None:
    """`side` is a key of the other section: it must not be proposed."""
    with pytest.raises(ConfigError, match=r"^a\.yaml: .*shape\.sidee: unknown key \(known here: kind, radius\)"):
        validate(Drawing, {"shape": {"kind": "circle", "radius": 1, "sidee": 2}}, source="a.yaml")


def test_range_in_a_union_is_named_without_the_tag() -> None:
    with pytest.raises(ConfigError, match=r"^a\.yaml: shape\.radius: .*greater than 0 \(got -1\)\.$"):
        validate(Drawing, {"shape": {"kind": "circle", "radius": -1}}, source="a.yaml")


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [2, {"e": 3}]}, "f": {}, "g": None}) == {
        "a.b.c": 1,
        "a.d": [2, {"e": 3}],
        "f": {},
        "g": None,
    }


nested = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(
        st.integers(0, 2), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, min_size=1), max_leaves=5
    ),
)


@settings(max_examples=50, deadline=None)
@given(old=nested, new=nested)
def test_differences_are_those_of_the_flat_mappings(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert differences(old, old) == []
    changed = {line.split(":")[0] for line in differences(old, new)}
    a, b = flatten(old), flatten(new)
    assert changed == {key for key in a | b if (key in a, a.get(key)) != (key in b, b.get(key))}
    assert (changed == set()) == (old == new)


def test_differences_show_both_values() -> None:
    old = {"training": {"steps": 5, "outer": {"outer_lr": 0.1}}, "same": 1, "gone": 2}
    new = {"training": {"steps": 6, "outer": {"outer_lr": 0.1}}, "same": 1, "come": [1]}
    assert differences(old, new) == ["come: (absent) -> [1]", "gone: 2 -> (absent)", "training.steps: 5 -> 6"]


RECORDS = [path for path in sorted(CONFIGS.glob("**/*.yaml")) if path.name != "published.yaml"]  # others' results


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_shipped_configurations_are_records(path: Path) -> None:
    """A header with command, hardware, time and expected result, with nothing left to fill in."""
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    assert [word for word in ("command", "hardware", "time", "expected") if f"#   {word}" not in text] == []
    for document in (text, (CONFIGS.parent / "README.md").read_text()):
        assert not re.search(r"\b(TODO|EXPECTED|(DEMO|OMNI|SIN)_[A-Z0-9]+)\b", document)


@pytest.mark.parametrize(
    "keys",
    [
        {"algorithm": {"name": "reptile", "inner_lr": 0.1, "recompute_inner_steps": True}},
        {"algorithm": {"name": "reptile", "inner_lr": 0.1, "inner_betas": [0.9, 0.999]}},
        {"algorithm": {"name": "imaml", "inner_lr": 0.1, "eval_regularization": 50.0}},
        {"algorithm": {"name": "maml", "inner_lr": 0.1}, "outer": {"momentum": 0.9}},
    ],
    ids=["recompute", "betas", "eval_regularization", "momentum"],
)
def test_what_older_versions_accepted_is_refused_in_a_users_file_and_read_in_a_stored_one(keys: dict[str, Any]) -> None:
    content = {
        "name": "x",
        "task": {"family": "sinusoid"},
        "model": {"name": "mlp"},
        "algorithm": keys["algorithm"],
        "training": {"steps": 1, "outer": keys.get("outer", {})},
    }
    with pytest.raises(ConfigError):
        experiment.from_dict(content, source="test")
    assert experiment.from_dict(content, source="test", stored=True).name == "x"
