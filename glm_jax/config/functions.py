"""What can be done with any configuration: check, change, compare, fingerprint."""

import dataclasses
import difflib
import hashlib
import itertools
import json
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

# Metadata of a field that came later: at its default it is left out of the canonical form, and so of fingerprints,
# which therefore stay what they were before it existed.
SILENT_AT_DEFAULT = {"silent_at_default": True}


class ConfigError(ValueError):
    """A setting that breaks a rule. The message has the value, the rule and a way out."""


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def divides(part: str, size: int, whole: str, total: int) -> None:
    require(
        size > 0 and total % size == 0,
        f"{whole}={total} is not a multiple of {part}={size}; use a divisor of {total} for {part}",
    )


def check_choices(config: Any) -> None:
    """ConfigError where a field that is one of named values, or yes or no, has another: the command line knows them by itself, but
    recipes, sweeps and notebooks do not pass it."""
    for name, known in _choices(type(config)).items():
        value = getattr(config, name)
        require(
            value in known, f"{name}={value!r} is not among its values; {nearest(str(value), list(map(str, known)))}"
        )


@cache
def _choices(cls: type) -> dict[str, tuple]:
    """The values of each such field."""
    found = {}
    for name, hint in get_type_hints(cls).items():
        parts = (hint,) if get_origin(hint) is Literal else get_args(hint)  # alone, or one of a union
        named = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
        if named:
            found[name] = (*named, None) if type(None) in parts else tuple(named)
        elif hint is bool:
            found[name] = (False, True)
    return found


def nearest(name: str, known: list[str]) -> str:
    """A hint for an unknown name: the nearest known one, and all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(known)}"


def replace(config: Any, **changes: Any) -> Any:
    """A copy with dotted fields changed: `replace(run, **{"model.E": 32, "pretrain.0.tokens": 10**6})`.

    All of them together, in any order: each part of the configuration is rebuilt once, and only then checked.
    """
    return _replace(config, "", [(path.split("."), value) for path, value in changes.items()])


def _replace(config: Any, above: str, changes: list[tuple[list[str], Any]]) -> Any:
    """`config`, whose fields' paths begin with `above`, changed; a whole value is taken before what lies below it."""
    if isinstance(config, tuple):
        parts = {str(i): item for i, item in enumerate(config)}
    elif isinstance(config, dict):
        parts = config
    else:
        require(dataclasses.is_dataclass(config), f"{above[:-1]}: nothing lies below {type(config).__name__}")
        parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    new: dict[str, Any] = {}
    below: dict[str, list[tuple[list[str], Any]]] = {}
    for (key, *rest), value in changes:
        if key not in parts:
            raise ConfigError(f"{above}{key}: {_unknown(config, key, list(parts))}")
        if rest:
            below.setdefault(key, []).append((rest, value))
        else:
            new[key] = value
    for key, deeper in below.items():
        new[key] = _replace(new.get(key, parts[key]), f"{above}{key}.", deeper)
    if isinstance(config, tuple):
        return tuple((parts | new).values())
    return parts | new if isinstance(config, dict) else dataclasses.replace(config, **new)


def _unknown(config: Any, key: str, known: list[str]) -> str:
    if isinstance(config, tuple):
        return f"{key!r} is not an index below {len(config)}"
    if isinstance(config, dict):
        return f"there is no {key!r} to change; {nearest(key, known)}; to add one, give all of them"
    return f"{type(config).__name__} has no field {key!r}; {nearest(key, known)}"


def grid(baseline: Any, **axes: tuple) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every combination of the axes: yields (changes, config). `grid(run, **{"model.E": (16, 32)})`."""
    for values in itertools.product(*axes.values()):
        changes = dict(zip(axes, values, strict=True))
        yield changes, replace(baseline, **changes)


def canonical(config: Any) -> Any:
    """JSON-ready form with class names: what `fingerprint` hashes and a run writes beside its results."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {
            f.name: canonical(getattr(config, f.name))
            for f in dataclasses.fields(config)
            if not (f.metadata.get("silent_at_default") and getattr(config, f.name) == f.default)
        }
        return {"class": type(config).__name__, **fields}
    if isinstance(config, dict):
        return {key: canonical(config[key]) for key in sorted(config)}
    if isinstance(config, (tuple, list)):
        return [canonical(item) for item in config]
    return config


def fingerprint(config: Any) -> str:
    """Twelve hex digits of the canonical form's SHA-256, which is equal exactly where the configurations are, but for numbers: 1 and
    1.0 are equal, and written otherwise. Recipes have both where a float is meant, and results are kept under their names: whether
    two configurations are equal, `diff` says."""
    text = json.dumps(canonical(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of every leaf, as `replace` takes them."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        items = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    elif isinstance(config, dict):
        items = list(config.items())
    elif isinstance(config, tuple) and any(dataclasses.is_dataclass(item) for item in config):
        items = [(str(i), item) for i, item in enumerate(config)]
    else:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for name, value in items:
        flat |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flat


def diff(config: Any, baseline: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (baseline's value, this one's) where the two differ."""
    ours, theirs = flatten(config), flatten(baseline)
    return {
        path: (theirs.get(path), ours.get(path)) for path in {**theirs, **ours} if theirs.get(path) != ours.get(path)
    }
