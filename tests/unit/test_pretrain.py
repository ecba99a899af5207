"""The tools that make the shipped dialogues and the shipped base, on small made-up sources."""

from __future__ import annotations

import csv
import json
import lzma
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spt_ds.errors import DataError
from spt_ds.tools import demo_dialogues, pretrain_base, pretrain_text
from spt_ds.tools.demo_dialogues import (
    COLUMNS,
    Conversation,
    families,
    read_conversations,
    sentence_key,
    split,
)

WORDS = [
    "hiking",
    "tea",
    "chess",
    "baking",
    "jazz",
    "surfing",
    "painting",
    "reading",
    "gardening",
    "dancing",
    "skiing",
]


def persona(person: int) -> list[str]:
    return [f"I am person {person}.", f"I love {WORDS[person % len(WORDS)]} the way {person} does."]


def conversation_rows(people: int, turns: int = 8) -> list[list[str]]:
    """Rows of a CSV in which each person talks with the next two."""
    rows = []
    for one in range(people):
        for other in ((one + 1) % people, (one + 2) % people):
            text = "\n".join(
                f"User {n % 2 + 1}: I like {WORDS[(one + n) % len(WORDS)]}, you?"
                for n in range(turns)
            )
            rows.append(["\n".join(persona(one)), "\n".join(persona(other)), text])
    return rows


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(COLUMNS), *rows])
    return path


def write_text(path: Path) -> Path:
    talk = "\n".join(
        f"Have you seen film {n}?\nYes, {word} in it was great!" for n, word in enumerate(WORDS)
    )
    path.write_bytes(lzma.compress("\n\n".join([talk] * 8).encode()))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_name_slots_are_filled_and_odd_conversations_left_out(tmp_path: Path) -> None:
    good = (
        "User 1: Hi, I'm [User 1's name].\n\nUser 2:  I'm  [your name], [User 1's name]!\nUser"
        " 1: \n"
    )
    bad = [
        "User 1: hi\nUser 1: again",
        "User 1: I live in [city].\nUser 2: ok",
        "Alice: hi\nUser 2: hi",
        "User 1: hi",
    ]
    rows = [["I run.", "I swim.", text] for text in [good, *bad]]
    (only,) = read_conversations([write_csv(tmp_path / "spc.csv", rows)])
    opening, answer = only.turns
    first, second = opening[len("Hi, I'm ") : -1], answer[len("I'm ") :].partition(",")[0]
    assert first != second
    assert {first, second} <= set(demo_dialogues._NAMES)
    assert answer == f"I'm {second}, {first}!"
    assert (only.id, only.opener(0), only.opener(1)) == ("spc-00000", "self", "partner")


def test_family_reaches_through_shared_sentences() -> None:
    def talk(name: str, one: tuple[str, ...], two: tuple[str, ...]) -> Conversation:
        return Conversation(name, (one, two), ("hi", "ho"), 0)

    found = families(
        [
            talk("a", ("I run.", "I swim."), ("I bake.",)),
            talk("b", ("i swim", "I read."), ("I paint.",)),
            talk("c", ("I read!",), ("I cook.",)),
        ]
    )
    assert found["a"][0] == found["b"][0] == found["c"][0]
    assert len({found["a"][0], found["a"][1], found["b"][1], found["c"][1]}) == 4


@pytest.mark.parametrize("seed", range(5))
def test_split_keeps_every_person_on_one_side(tmp_path: Path, seed: int) -> None:
    conversations = read_conversations([write_csv(tmp_path / "spc.csv", conversation_rows(60))])
    chosen = split(conversations, {"train": 20, "valid": 6, "test": 6}, seed)
    assert {name: len({c.id for c in part}) for name, part in chosen.items()} == {
        "train": 20,
        "valid": 6,
        "test": 6,
    }
    people = [
        {sentence_key(s) for c in part for user in c.personas for s in user}
        for part in chosen.values()
    ]
    assert not any(one & other for one, other in [*pairwise(people), (people[0], people[2])])


def test_split_that_cannot_be_met_is_refused(tmp_path: Path) -> None:
    conversations = read_conversations([write_csv(tmp_path / "spc.csv", conversation_rows(6))])
    with pytest.raises(DataError, match="asked for"):
        split(conversations, {"train": 20, "valid": 6, "test": 6}, 0)


def test_documents_follow_the_template_and_end_with_a_reply() -> None:
    talk = Conversation(
        "a", (("I run.", "I swim."), ("I bake.",)), ("Hi, you!", "Ho.", "He.", "Hu."), 1
    )
    rng = random.Random(0)
    seen = {pretrain_text.render(talk, rng) for _ in range(300)}
    assert "given persona: I run. I swim.; context: Q: Hi, you! R: Ho." in seen
    assert "given persona: i run. i swim.; context: Q: hi , you ! R: ho . Q: he . R: hu ." in seen
    assert "given persona: I bake.; context: R: Hi, you! Q: Ho. R: He." in seen
    assert "given persona: I bake.; context: Q: Ho. R: He." in seen
    assert all(text.rpartition(": ")[0].endswith(" R") for text in seen)
    assert pretrain_text.render(("Yes.", "No."), rng).startswith("context: ")


def test_rows_make_every_token_a_target_once() -> None:
    batches = list(pretrain_base.rows(iter(range(13)), batch=2, length=3))
    assert [tuple(batch.shape) for batch in batches] == [(2, 4), (2, 4)]
    assert torch.cat([batch[:, 1:].flatten() for batch in batches]).tolist() == list(range(1, 13))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with all sources, and the arguments of a run on them that takes seconds."""
    folder = tmp_path_factory.mktemp("pretrain")
    table = write_csv(folder / "spc.csv", conversation_rows(60))
    demo = [
        "--csv",
        str(table),
        "--out",
        str(folder / "demo"),
        "--train",
        "20",
        "--valid",
        "4",
        "--test",
        "4",
    ]
    demo_dialogues.main(demo)
    shape = (
        "--vocab 400 --hidden 32 --intermediate 64 --layers 1 --heads 2 --rows 2 --row-tokens 64"
        " --warmup-steps 2"
    )
    args = [
        "--text",
        str(write_text(folder / "talk.txt.xz")),
        "--persona-csv",
        str(table),
        *shape.split(),
    ]
    args += [
        "--demo",
        str(folder / "demo"),
        "--out",
        str(folder / "base"),
        "--state",
        str(folder / "state.pt"),
    ]
    return folder, [*args, "--device", "cpu", "--lr", "0.01"]


def test_pools_hold_no_demo_dialogue_and_nobody_of_valid_and_test(
    sources: tuple[Path, list[str]],
) -> None:
    folder, _ = sources
    pools = pretrain_text.load_pools(
        [folder / "talk.txt.xz"], [folder / "spc.csv"], folder / "demo", 0.1, 0
    )
    talks = [
        talk for talk in [*pools.persona, *pools.held_persona] if isinstance(talk, Conversation)
    ]
    assert len(talks) > 20
    train, valid, test = (read(folder / "demo" / f"{name}.jsonl") for name in demo_dialogues.SPLITS)
    assert not {talk.id for talk in talks} & {record["id"] for record in [*train, *valid, *test]}
    by_id = {c.id: c for c in read_conversations([folder / "spc.csv"])}
    held = {s for record in [*valid, *test] for user in by_id[record["id"]].personas for s in user}
    assert not held & {s for talk in talks for user in talk.personas for s in user}
    assert not set(map(id, pools.general)) & set(map(id, pools.held_general))


def test_run_resumes_and_its_output_loads(sources: tuple[Path, list[str]]) -> None:
    folder, args = sources
    pretrain_base.main([*args, "--max-steps", "4", "--export-minutes", "0"])
    first = json.loads((folder / "base" / "pretraining.json").read_text())
    pretrain_base.main([*args, "--max-steps", "60", "--resume"])
    last = json.loads((folder / "base" / "pretraining.json").read_text())
    assert (first["steps"], last["steps"], last["tokens"]) == (4, 60, 60 * 2 * 64)
    for kind in ("held_out_persona", "held_out_general"):
        assert last[kind]["perplexity_per_token"] < 0.5 * first[kind]["perplexity_per_token"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    text = "given persona: I ski.; context: Q: ¿Qué? 🙂 R:"
    ids = tokenizer(text)["input_ids"]
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == text
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_resume_without_state_is_refused(sources: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, args = sources
    with pytest.raises(DataError, match="--state"):
        pretrain_base.main([*args, "--state", str(tmp_path / "none.pt"), "--resume"])


def test_demo_folder_without_its_files_is_refused(
    sources: tuple[Path, list[str]], tmp_path: Path
) -> None:
    _, args = sources
    with pytest.raises(DataError, match=r"train\.jsonl"):
        pretrain_base.main([*args, "--demo", str(tmp_path)])


def test_unreadable_text_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.txt.xz"
    broken.write_bytes(b"not xz")
    with pytest.raises(DataError, match=r"broken\.txt\.xz"):
        list(pretrain_text.read_talks(broken))
