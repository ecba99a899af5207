"""Reads a YAML file or a shipped recipe and applies overrides; one error reports every problem."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from spt_ds.config.legacy import upgrade
from spt_ds.config.schema import Config
from spt_ds.display import shortened, shown
from spt_ds.errors import ConfigError
from spt_ds.log import say_once
from spt_ds.yaml_input import load_yaml as yaml_tree

Model = TypeVar("Model", bound=BaseModel)
PROBLEMS = 40  # that one error lists
MAX_FILE_BYTES = 4 << 20  # the largest shipped recipe has 2 kB


# Folders of the shipped recipes, and what the recipes in each are for.
PURPOSES = {
    "start": "to try it on a laptop",
    "methods": "what trains, on any base: --set model.base=...",
    "tasks": "a label, a score or an answer to choose, with files of your own",
    "bases": "published language models, with data of your own",
}


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(_recipes())


def recipe_list() -> str:
    """Return the shipped recipes by purpose, each with the first line of its file."""
    recipes = _recipes()
    width = max(map(len, recipes))
    lines: list[str] = []
    for folder, purpose in PURPOSES.items():
        lines += ["", f"{purpose}:"] if lines else [f"{purpose}:"]
        for name, (group, text) in sorted(recipes.items()):
            if group == folder:
                lines.append(f"  {name:<{width}}  {text.partition(chr(10))[0].removeprefix('# ')}")
    return "\n".join(lines)


def _recipes() -> dict[str, tuple[str, str]]:
    """Folder and text of each shipped recipe, by name."""
    root = resources.files("spt_ds") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): (folder, entry.read_text(encoding="utf-8"))
        for folder in PURPOSES
        for entry in (root / folder).iterdir()
        if entry.name.endswith(".yaml")
    }


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file or a recipe, apply `key.path=value` overrides and validate.

    Raises ConfigError with every problem found: unknown keys with the nearest known one, wrong
    types with the key path, syntax errors with `file:line`. Keys of 0.1.0 mean what they meant.
    """
    name, text = _read(source)
    tree = _parse(name, text)
    old = upgrade(tree, overwrite=False)
    for override in overrides:
        _apply(tree, override)
        # After each override: of an old and a new name of one option the later one counts.
        old += upgrade(tree, overwrite=True)
    if old:
        say_once(f"{name}: keys of 0.1.0 are read as what they mean now: {', '.join(old)}")
    return _validate(name, tree, Config)


def load_yaml(path: Path, model: type[Model]) -> Model:
    """Read a YAML file of another schema as strictly; ConfigError with every problem."""
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such file; give a YAML file")
    return _validate(str(path), _parse(str(path), _text(path)), model)


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> str:
    """Return the JSON schema of the YAML file, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2)


def _read(source: str) -> tuple[str, str]:
    recipes = _recipes()
    names = sorted(recipes)
    # os.path answers False where a name is too long or holds a NUL; pathlib raises.
    if (
        Path(source).suffix in (".yaml", ".yml")
        or os.path.isfile(source)
        or (os.path.exists(source) and source not in names)
    ):
        if not os.path.isfile(source):
            raise ConfigError(
                f"{source}: no such configuration file; give a YAML file or one of {names}"
            )
        return source, _text(Path(source))
    if source not in names:
        near = difflib.get_close_matches(source, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(names)}"
        raise ConfigError(f"no file and no recipe is called {shown(source)}; {hint}")
    return f"recipe {source}", recipes[source][1]


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; no configuration")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); look at its owner"
        ) from error


def _parse(name: str, text: str) -> dict[str, Any]:
    try:
        tree = yaml_tree(text)
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
    option = f"--set {shortened(override)}"
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{option}: expected key.path=value, such as losses.tau_gold=0.5")
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if child is None:
            child = node[key] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{option}: {shortened(key)} is a value, not a section")
        node = child
    try:
        node[keys[-1]] = yaml_tree(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option}: {shown(text)} is not a YAML value: {error}") from error


def _validate(name: str, tree: dict[str, Any], model: type[Model]) -> Model:
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = list(dict.fromkeys(_describe(item, model) for item in error.errors()))
        lines = "\n".join(f"  {problem}" for problem in problems[:PROBLEMS])
        if len(problems) > PROBLEMS:
            lines += f"\n  ... and {len(problems) - PROBLEMS} more"
        raise ConfigError(
            f"{name}: {len(problems)} problem(s) in the configuration\n{lines}"
        ) from error


def _describe(item: Any, model: type[BaseModel]) -> str:
    # A union adds the name of its branch, in parentheses, which is no key.
    place = [part for part in item["loc"] if not str(part).startswith("(")]
    path = ".".join(shortened(str(part)) for part in place) or "(whole file)"
    if item["type"] == "extra_forbidden":
        parent = _section(place[:-1], model)
        known = list(parent.model_fields) if parent else []
        near = difflib.get_close_matches(str(item["loc"][-1]), known, 1)
        elsewhere = [p for p in key_paths(model) if p.rsplit(".", 1)[-1] == str(item["loc"][-1])]
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        # A key of this very name in another section is likelier meant than a similar one here.
        if elsewhere:
            hint = f"did you mean {elsewhere[0]!r}?"
        return f"{path}: unknown key; {hint}"
    if item["type"] == "value_error":  # a section's own check, which says what it got
        return f"{path}: {item['ctx']['error']}"
    got = "" if item["type"] == "missing" or not item["loc"] else f", got {shown(item['input'])}"
    return f"{path}: {item['msg']}{got}"


def _section(loc: Sequence[Any], model: type[BaseModel]) -> type[BaseModel] | None:
    for key in loc:
        if isinstance(key, int):
            continue  # the place in a list of sections
        field = model.model_fields.get(key)
        kinds = _kinds(field.annotation) if field else ()
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return None
        model = inner[0]
    return model


def _kinds(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


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
    """Return the leaves of nested mappings by their dotted path; an option is one leaf."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        inner = isinstance(value, Mapping) and path not in _OPTIONS
        leaves |= flatten(value, f"{path}.") if inner else {path: value}
    return leaves


_OPTIONS = frozenset(key_paths(Config))
