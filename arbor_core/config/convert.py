"""Plain values, as JSON or YAML has them: read, merged and converted to structs.

Errors speak of the keys as the user typed them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from arbor_core.types import ConfigError

T = TypeVar("T")


def load_yaml(path: Path, *, resolve: bool = True) -> dict[str, Any]:
    """One YAML file as Hydra reads it (`yaml.safe_load` would read 1e-5 as text).

    Args:
        resolve: Whether to put values in place of interpolations (`${...}`).

    Raises:
        ConfigError: it is not YAML, or not a mapping.
    """
    from omegaconf import DictConfig, OmegaConf  # here: workers convert values, but read no YAML

    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # yaml and omegaconf raise many kinds
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        what = f"line {mark.line + 1}: {problem}" if mark and problem else str(error).splitlines()[0]
        raise ConfigError(f"{path}: {what}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return dict(OmegaConf.to_container(loaded, resolve=resolve, throw_on_missing=resolve))  # type: ignore[arg-type]


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, key by key, as plain data."""
    both = dict(base)
    for key, value in over.items():
        mine = both.get(key)
        both[key] = merged(mine, value) if isinstance(value, Mapping) and isinstance(mine, Mapping) else value
    return both


def renamed(values: Mapping[str, Any], type_: type, where: str = "") -> tuple[dict[str, Any], list[str]]:
    """Values for a struct under the present names of its keys (see its `former_keys`), and warnings of former names.

    Raises:
        ConfigError: a key has different values under both names.
    """
    found, warnings = dict(values), []
    for former, present in getattr(type_, "former_keys", {}).items():
        if former not in found:
            continue
        value, other = found.pop(former), found.get(present)
        if value is not None and other is not None and value != other:
            path = f"{where}.{former}" if where else former
            message = f"'{path}' is the former name of '{present}', and they differ: give only '{present}'."
            raise ConfigError(message, path=path, code="conflicting_parameters")
        found[present] = other if value is None else value
        warnings.append(f"'{former}' is called '{present}' now: the former name will be removed in a later version.")
    return found, warnings


def stored(values: Mapping[str, Any], type_: type) -> dict[str, Any]:
    """The configuration of a job that may be of an earlier version: keys under their present names, and what those mean
    that there were none of (`former_values` of the struct)."""
    return {**getattr(type_, "former_values", {}), **renamed(values, type_)[0]}


def typed(values: Any, type_: type[T], where: str) -> T:
    """Plain values as a struct.

    Raises:
        ConfigError: with the key as the user typed it (`where` is put before msgspec's path), the nearest key for an
            unknown one, and OpenAI's code for the kind of mistake.
    """
    try:
        return msgspec.convert(values, type_, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise explained(str(error), type_, where) from None


def _decode(wanted: Any, value: Any) -> Any:
    if wanted is Path and isinstance(value, str):
        return Path(value).expanduser()
    raise TypeError(f"expected {wanted.__name__}, got {type(value).__name__}")


_AT = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"(?:unknown|required) field `(?P<name>[^`]*)`")


def explained(message: str, type_: Any, where: str) -> ConfigError:
    """msgspec's message as an error that speaks of the user's key path."""
    match = _AT.fullmatch(message)
    what, path = (match["what"], match["path"] or "$") if match else (message, "$")
    path = path.replace("[...]", "")  # msgspec does not say which key of a dict it was
    path = path.replace("$", where, 1) if where else path.removeprefix("$").removeprefix(".")
    if field := _FIELD.search(what):
        full = f"{path}.{field['name']}" if path else field["name"]
        if "unknown field" in what:
            hint = nearest(field["name"], type_, path.removeprefix(where).strip("."))
            return ConfigError(f"Unknown parameter: '{full}'.{hint}", path=full, code="unknown_parameter")
        return ConfigError(f"Missing required parameter: '{full}'.", path=full, code="missing_required_parameter")
    if what.startswith("Invalid enum value"):
        found = _type_at(type_, path.removeprefix(where).strip("."))
        if any(True for _ in _literals(found)):
            what = f"{what}: {choices(found)}"
    return ConfigError(f"Invalid '{path}': {what}.", path=path, code=_code(what))


def _code(what: str) -> str:
    """OpenAI's word for a bound that was passed, a wrong type, or a wrong value."""
    if bound := re.search(r"Expected `(?P<type>int|float)[^`]*` (?P<op><=|<|>=|>)", what):
        kind = "integer" if bound["type"] == "int" else "decimal"
        return f"{kind}_{'above_max' if bound['op'].startswith('<') else 'below_min'}_value"
    if re.search(r"Expected `[^`]*`, got `", what):
        return "invalid_type"
    return "invalid_value"


def nearest(name: str, type_: Any, inside: str = "") -> str:
    """A hint for a misspelled key of a struct, or nothing."""
    struct = _struct_of(_type_at(type_, inside))
    known = [f.encode_name for f in msgspec.structs.fields(struct)] if struct else []
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def choices(type_: Any) -> str:
    """What a type with literal values takes, for people."""
    words = [repr(value) for value in _literals(type_) if value is not None]
    numbers = {int, float} & set(_leaves(type_))
    return f"expected {'a number, or ' if numbers else ''}{'one of ' if len(words) > 1 else ''}{', '.join(words)}"


def _type_at(type_: Any, inside: str) -> Any:
    """The type of the value at a path (`a.b`) in a struct; None where there is none."""
    for part in filter(None, inside.split(".")):
        struct = _struct_of(type_)
        fields = {f.encode_name: f.type for f in msgspec.structs.fields(struct)} if struct else {}
        type_ = fields.get(part)
    return type_


def _struct_of(type_: Any) -> Any:
    return next((t for t in _leaves(type_) if _is_struct(t)), None)


def _literals(type_: Any) -> Iterator[Any]:
    if get_origin(type_) is Literal:
        yield from get_args(type_)
    else:
        for part in get_args(type_):
            yield from _literals(part)


def _leaves(type_: Any) -> Iterator[Any]:
    """The types that a union is made of."""
    parts = get_args(type_)
    if get_origin(type_) is Annotated:
        yield from _leaves(parts[0])
    elif parts and get_origin(type_) in (Union, UnionType):
        for part in parts:
            yield from _leaves(part)
    else:
        yield type_


def key_paths(type_: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a struct as `a.b`."""
    for field in msgspec.structs.fields(type_):
        yield prefix + field.encode_name
        if struct := _struct_of(field.type):
            yield from key_paths(struct, f"{prefix}{field.encode_name}.")


def _is_struct(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)
