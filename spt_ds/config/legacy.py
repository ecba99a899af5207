"""Reads the keys of 0.1.0 as what they mean now, so that old run folders and files stay usable."""

from __future__ import annotations

from typing import Any

# Old key, new key, and what each old value became (None: it stays as it is). A value that is not in
# the table stays where it is: the schema takes it or refuses it there.
Values = dict[str | bool, bool | str | list[str]]
MOVED: tuple[tuple[str, str, Values | None], ...] = (
    ("prompts.init", "reference.unit_normal_prompts", {"reference": True}),
    (
        "retriever.activation",
        "reference.jumping_activation",
        {"softplus": False, "reference": True},
    ),
    ("retriever.pool", "reference.padded_pool", {"context": False, "padded_text": True}),
    ("retriever.pool_length_tokens", "reference.pool_length_tokens", None),
    (
        "prompts.placement",
        "prompts.position",
        {"prefix": "before_text", "suffix": "before_reply"},
    ),
    ("losses.mask", "reference.nonzero_mask", {"target": False, "nonzero": True}),
    ("log.tensorboard", "log.trackers", {True: ["tensorboard"], False: []}),
)


def upgrade(tree: dict[str, Any], *, overwrite: bool) -> list[str]:
    """Replace the old keys of a parsed configuration, in place; return `old (now new)` for each.

    Where the new key is given too, an old one replaces it with `overwrite`, as a later `--set`
    does; otherwise it stays, and the schema refuses it.
    """
    replaced = []
    for old, new, values in MOVED:
        section, _, key = old.partition(".")
        new_section, _, new_key = new.partition(".")
        source, target = tree.get(section), tree.get(new_section, {})
        if not isinstance(source, dict) or key not in source or not isinstance(target, dict):
            continue
        value = source[key]
        known = values is None or (isinstance(value, str | bool) and value in values)
        if known and (overwrite or new_key not in target):
            del source[key]
            tree[new_section] = {**target, new_key: value if values is None else values[value]}
            replaced.append(f"{old} (now {new})")
    return replaced
