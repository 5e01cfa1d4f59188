"""Typed, keyword-only configuration: sections, YAML files, overrides, and errors that name the key.

Each component's section stands beside the component (`MAMLConfig` in algorithms/maml.py) and has a `build`
method; `pipeline.experiment` puts the sections together. Unknown keys are errors.
"""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo

from pipeline.errors import ConfigError
from pipeline.storage import Location, location

STORED = "stored"
CLOSE = 0.75  # how alike an unknown key is to one that is suggested for it, in 0…1


class Section(BaseModel):
    """A part of the configuration: immutable, unknown keys refused, defaults checked like given values."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


def one_of(sections: Sequence[type[Section]], key: str) -> Any:
    """The field type that accepts exactly one of these sections, told apart by the literal under `key`."""
    if len(sections) == 1:
        return sections[0]
    return Annotated[functools.reduce(operator.or_, sections), Field(discriminator=key)]


def read_yaml(path: str | Location) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises ConfigError: no such file, not YAML, or not a mapping of keys to values.
    """
    path = location(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file. The shipped ones lie in configs/.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values at the top level, got {type(content).__name__}.")
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The mapping with `dotted.key=value` overrides put in; values are read as YAML.

    Raises ConfigError: an override without `=`, or one that goes through a value that is not a section.
    """
    result = _deep_copy(content)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(f"--set {override}: write it as key=value, e.g. --set training.num_workers=2.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {override}: the value is not valid YAML; put it in quotes.") from None
        if isinstance(value, str):
            value = _number(value)
        put(result, dotted.strip(), value, source=f"--set {override}")
    return result


def put(content: dict[str, Any], dotted: str, value: Any, *, source: str) -> None:
    """Set a dotted key, in place; `sets[0].weight` is of the first section of a list.

    Raises ConfigError: it goes through a value that is not a section, or to one of a list that is not there.
    """
    *parents, last = dotted.split(".")
    section = content
    for parent in parents:
        name, bracket, number = parent.partition("[")
        inside = section.setdefault(name, {})
        if bracket:
            index = number.removesuffix("]")
            if not isinstance(inside, list) or not index.isdecimal() or int(index) >= len(inside):
                raise ConfigError(f"{source}: there is no {parent} in the file.")
            inside = inside[int(index)]
        if not isinstance(inside, dict):
            raise ConfigError(f"{source}: {parent} holds a value, not a section.")
        section = inside
    section[last] = value


def validate(section: type[SectionT], content: Mapping[str, Any], *, source: str, stored: bool = False) -> SectionT:
    """The content as a section. stored: a run or a model was made with it, perhaps by an older version (`is_stored`).

    Raises ConfigError: names `source`, each wrong key, what is wrong with it and, for an unknown key, the
    nearest known one.
    """
    try:
        return section.model_validate(content, context={STORED: stored})
    except ValidationError as error:
        problems = [_explain(section, detail) for detail in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(problems) + ".") from None


def is_stored(info: ValidationInfo) -> bool:
    """Whether what is validated is stored content, where keys without effect are no mistake to tell the user of."""
    return bool(info.context and info.context.get(STORED))


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys: {"training": {"steps": 5}} -> {"training.steps": 5}; in lists, sets[0].name."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                flat.update(flatten(item, f"{prefix}{key}[{number}]."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every dotted key whose value differs."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before.get(key, '(absent)')} -> {after.get(key, '(absent)')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _deep_copy(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _deep_copy(value) for key, value in content.items()}
    return [_deep_copy(value) for value in content] if isinstance(content, list) else content


def _number(text: str) -> Any:
    """YAML 1.1 reads 1e-3 as text (it wants 1.0e-3); people mean the number."""
    try:
        return float(text)
    except ValueError:
        return text


def _explain(section: type[Section], detail: Any) -> str:
    """One problem in the user's words: the dotted key, what is wrong, and the value that was given."""
    keys, around, inside = _locate(section, detail["loc"])
    name = ".".join(keys) or "the configuration"
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = [key for option in around for key in option.model_fields]
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=CLOSE)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"{name}: unknown key ({hint})"
    if kind == "missing":
        return f"{name}: missing, and it has no default"
    if kind == "union_tag_invalid":
        key = context["discriminator"].strip("'")
        return f"{name}.{key}: choose one of {context['expected_tags']} (got {context['tag']!r})"
    if kind == "union_tag_not_found":
        key = context["discriminator"].strip("'")
        choices = sorted(tag for option in inside for tag in _tags(option))
        return f"{name}.{key}: missing; choose one of {', '.join(choices)}"
    given = detail["input"]
    if kind in ("model_type", "model_attributes_type"):
        return f"{name}: should be a section with keys of its own (got {given!r})"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{name}: {message}" + ("" if isinstance(given, Mapping) else f" (got {given!r})")


def _locate(
    section: type[Section], location: Sequence[str | int]
) -> tuple[list[str], list[type[Section]], list[type[Section]]]:
    """The keys on the way to a problem, the sections that may hold the last key, and those that may stand under it.

    pydantic puts the tag of a discriminated union into the location as well; it is no key of the file.
    """
    keys: list[str] = []
    around, inside = [section], [section]
    for part in location:
        if isinstance(part, int):  # of a list
            keys[-1] += f"[{part}]"
            continue
        tagged = [option for option in inside if part in _tags(option)]
        if len(inside) > 1 and tagged:
            inside = tagged
            continue
        keys.append(str(part))
        around = inside
        fields = [option.model_fields[str(part)] for option in around if str(part) in option.model_fields]
        inside = [found for field in fields for found in _sections_in(field.annotation)]
    return keys, around, inside


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [member for argument in get_args(annotation) for member in _sections_in(argument)]


def _tags(option: type[Section]) -> set[str]:
    """The values by which a section of a union is told apart (its required one-valued literals)."""
    literals = [get_args(field.annotation) for field in option.model_fields.values() if field.is_required()]
    return {values[0] for values in literals if len(values) == 1 and isinstance(values[0], str)}
