"""Reads a YAML file or a recipe, applies overrides, and reports every problem in one error."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from spt_ds.config.schema import Config
from spt_ds.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    folder = resources.files("spt_ds") / "recipes"
    return sorted(
        entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read `source` (a YAML file or a recipe's name), apply `key.path=value` overrides and
    validate.

    Raises ConfigError with every problem found: unknown keys with the nearest known one, wrong
    types with the key path, syntax errors with `file:line`.
    """
    name, text = _read(source)
    tree = _parse(name, text)
    for override in overrides:
        _apply(tree, override)
    return _validate(name, tree, Config)


def load_yaml(path: Path, model: type[Model]) -> Model:
    """Read a YAML file of another schema as strictly as a configuration; raise ConfigError with
    every problem.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a YAML file")
    return _validate(str(path), _parse(str(path), _text(path)), model)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> str:
    """Return the JSON schema of the YAML file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)


def _read(source: str) -> tuple[str, str]:
    path = Path(source)
    names = recipe_names()
    if (
        path.suffix in (".yaml", ".yml")
        or path.is_file()
        or (path.exists() and source not in names)
    ):
        if not path.is_file():
            raise ConfigError(
                f"{source}: no such configuration file; give a YAML file or one of {names}"
            )
        return source, _text(path)
    if source not in names:
        near = difflib.get_close_matches(source, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(names)}"
        raise ConfigError(f"no file and no recipe is called {source!r}; {hint}")
    return f"recipe {source}", (resources.files("spt_ds") / "recipes" / f"{source}.yaml").read_text(
        encoding="utf-8"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
        ) from error


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and, as YAML 1.2, reads 1e-3 as a number and `off`
    as a word.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own name and form
        first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:bool" or first in "tTfF"]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if not isinstance(
            key_node, yaml.ScalarNode
        ):  # no option is called by a list, and a list cannot be hashed
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a word", key_node.start_mark
            )
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _load_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_StrictLoader)  # a SafeLoader: builds plain data only


def _parse(name: str, text: str) -> dict[str, Any]:
    try:
        tree = _load_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}:{line}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{name}:{line}: not valid YAML: control character U+{error.character:04X}; remove it"
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{name}:1: expected sections such as `model:`, got {type(tree).__name__}"
        )
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: expected key.path=value, such as losses.tau_gold=0.5")
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {key} is a value, not a section")
        node = child
    try:
        node[keys[-1]] = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: {text!r} is not a YAML value: {error}") from error


def _validate(name: str, tree: dict[str, Any], model: type[Model]) -> Model:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = list(dict.fromkeys(_describe(item, model) for item in error.errors()))
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"{name}: {len(problems)} problem(s) in the configuration\n{lines}"
        ) from error


def _describe(item: Any, model: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in item["loc"]) or "(whole file)"
    if item["type"] == "extra_forbidden":
        parent = _section(item["loc"][:-1], model)
        known = list(parent.model_fields) if parent else []
        near = difflib.get_close_matches(str(item["loc"][-1]), known, 1)
        elsewhere = [p for p in key_paths(model) if p.rsplit(".", 1)[-1] == str(item["loc"][-1])]
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        if elsewhere:
            hint = f"did you mean {elsewhere[0]!r}?"
        return f"{path}: unknown key; {hint}"
    if item["type"] == "value_error":  # a section's own check, which says what it got
        return f"{path}: {item['ctx']['error']}"
    got = "" if item["type"] == "missing" or not item["loc"] else f", got {item['input']!r}"
    return f"{path}: {item['msg']}{got}"


def _section(loc: Sequence[Any], model: type[BaseModel]) -> type[BaseModel] | None:
    for key in loc:
        if isinstance(key, int):
            continue  # the place in a list of sections
        field = model.model_fields.get(key)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return None
        model = inner[0]
    return model


def key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every option of the schema."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from key_paths(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def options_of(config: BaseModel, mode: Literal["python", "json"] = "python") -> dict[str, Any]:
    """Return the value of every option by its dotted path; in `json` mode as JSON would hold it."""
    return flatten(config.model_dump(mode=mode))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted path."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return leaves
