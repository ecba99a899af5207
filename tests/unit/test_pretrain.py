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

from benchmarks.embedded_base import dialogues, documents, measure, pretrain
from benchmarks.embedded_base.batches import Layout, Packer
from benchmarks.embedded_base.dialogues import (
    COLUMNS,
    Conversation,
    families,
    read_conversations,
    sentence_key,
    split,
)
from benchmarks.embedded_base.network import Shape, initial_weights, logits, to_llama
from benchmarks.embedded_base.team import Plan
from spt_ds.data.dialogue import Example
from spt_ds.errors import DataError

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
    assert {first, second} <= set(dialogues._NAMES)
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


TALK = Conversation(
    "a", (("I run.", "I swim."), ("I bake.",)), ("Hi, you!", "Ho.", "He.", "Hu."), 1
)
POOLS = documents.Pools(
    [TALK],
    [("I own two dogs. Yes.", "My cat is ill", "Oh no."), ("Hi.", "I came by boat. Where is it?")],
    [],
    [],
    ["I like tea."],
    ["I own two dogs.", "I came by boat.", "My cat is ill."],
    ["I", "own", "two", "dogs.", "boat."],
)


def drawn(kind: str, count: int = 400) -> list[documents.Document]:
    rng = random.Random(0)
    return [documents.draw(POOLS, kind, rng) for _ in range(count)]


def head(document: documents.Document) -> str:
    return "".join(document.head)


def test_documents_follow_the_template_and_end_with_a_reply() -> None:
    seen = {document.text for document in drawn("persona", 1000)}
    assert "given persona: I run. I swim.; context: Q: Hi, you! R: Ho." in seen
    assert "given persona: i run. i swim.; context: Q: hi , you ! R: ho . Q: he . R: hu ." in seen
    assert "given persona: I bake.; context: R: Hi, you! Q: Ho. R: He." in seen
    assert "given persona: I bake.; context: Q: Ho. R: He." in seen
    for kind in documents.KINDS:
        assert all(document.turns[-1][0] == " R:" for document in drawn(kind))
    assert all(document.text.startswith("context: ") for document in drawn("plain"))


def test_personas_are_shuffled_thinned_and_mixed_and_never_the_partners() -> None:
    seen = {head(document) for document in drawn("persona", 1000)}
    for part in ("I swim. I run.; ", "persona: I run.; ", "I like tea."):
        assert any(part in text for text in seen)
    for text in seen:
        assert ("i bake." in text.lower()) != (
            "i run." in text.lower() or "i swim." in text.lower()
        )


def test_most_persona_dialogues_end_with_a_reply_about_the_persona() -> None:
    turns = ("Hello.", "Hi.", "Fine?", "Yes.", "Dogs?", "I walk my dogs.", "Ok.", "Bye.")
    talk = Conversation("d", (("I cook.",), ("I have two dogs.",)), turns, 0)
    pools = documents.Pools([talk], [], [], [])
    rng = random.Random(0)
    drawn = [documents.draw(pools, "persona", rng) for _ in range(1000)]
    own = [document for document in drawn if "dogs" in head(document)]
    about = sum("dogs" in document.turns[-1][1] for document in own)
    assert 0.6 < about / len(own) < 0.8


def test_words_that_everybody_uses_say_nothing_about_a_persona() -> None:
    assert documents.content_words(["I really love my two Dogs."]) == {"dogs"}


def test_strangers_share_no_sentence() -> None:
    people = (("a.", "b."), ("b.", "c."), ("d.",), ("e.",), ("f.",), ("g.",))
    dialogues = [
        Example(id=str(n), dialogue_id=str(n), turn=0, persona=lines, history=(), response="x")
        for n, lines in enumerate(people)
    ]
    assert measure.strangers(dialogues, 0) == [("d.",), ("e.",), ("f.",)]
    assert measure.strangers(dialogues, 5) == [("a.", "b."), ("b.", "c."), ("d.",)]


def test_a_borrowed_persona_is_what_the_owner_says() -> None:
    pairs = [
        (head(document).lower(), "".join(document.turns[-1]).lower())
        for document in drawn("borrowed")
    ]
    boats = [text for text, reply in pairs if "boat" in reply]
    assert len(boats) > 50
    assert sum("i came by boat." in text for text in boats) > 0.7 * len(boats)
    cats = [text for text, reply in pairs if "my cat" in reply]
    assert any("my cat is ill." in text for text in cats)
    assert any("my cat is ill." not in text for text in cats)


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ("I have a dog now. Do you?", ["I have a dog now."]),
        ("Well. My cat is very old", ["My cat is very old."]),
        ("I agree with you on that.", []),
        ("I do.", []),
        ("You know I run a lot.", []),
    ],
)
def test_statements(turn: str, said: list[str]) -> None:
    assert documents.statements(turn) == said


def test_echo_says_its_lines_again() -> None:
    for document in drawn("echo", 50):
        assert all(text.strip() in head(document) for _, text in document.turns)


@pytest.fixture(scope="module")
def packer() -> Packer:
    texts = [document.text for kind in documents.KINDS for document in drawn(kind, 100)]
    tokenizer = pretrain.train_tokenizer(texts, 300, 128)
    layout = Layout(
        rows=4,
        row_tokens=96,
        long_every=3,
        long_tokens=192,
        shares=(1, 1, 1, 1),
        head_importance=0.25,
        partner_importance=0.5,
    )
    return Packer(POOLS, tokenizer, layout, seed=0)


def test_micro_batches_depend_on_their_number_alone(packer: Packer) -> None:
    first = packer.micro_batch(0)
    assert [tuple(packer.micro_batch(n)[0].shape) for n in range(3)] == [(4, 97), (4, 97), (2, 193)]
    assert all(torch.equal(a, b) for a, b in zip(first, packer.micro_batch(0), strict=True))
    assert not torch.equal(first[0], packer.micro_batch(1)[0])


def test_rows_hold_whole_documents_as_the_tokenizer_reads_them(packer: Packer) -> None:
    tokenizer = packer._tokenizer
    count = 0
    for number in range(10):
        rows, _ = packer.micro_batch(number)
        for row in rows.tolist():
            for text in str(tokenizer.decode(row)).split("<bos>")[1:]:
                text, end, rest = text.partition("<eos>")
                assert end
                assert not rest.replace("<pad>", "")
                assert text.startswith(("context:", "given persona: "))
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert any(row[at : at + len(ids) + 2] == [1, *ids, 2] for at in range(len(row)))
                count += 1
    assert count > 40


def test_importance_of_what_is_learned(packer: Packer) -> None:
    """Persona little, replies wholly; not what precedes BOS, nor the marker after a reply."""
    seen = {}
    for number in range(6):
        rows, importance = packer.micro_batch(number)
        assert not importance[rows[:, 1:] <= 1].any()
        assert (importance[rows[:, 1:] == 2] == 1).all()
        for row, weights in zip(rows[:, 1:].tolist(), importance.tolist(), strict=True):
            words = [packer._tokenizer.decode([token]) for token in row]
            for place in range(1, len(words)):
                if words[place] == ":" and words[place - 1] in (" Q", " R"):
                    seen[words[place - 1]] = weights[place]
                if "persona" in words[place]:
                    seen["persona"] = weights[place]
    assert seen == {" Q": 0.0, " R": 1.0, "persona": 0.25}


def test_network_equals_llama() -> None:
    shape = Shape(
        vocab=60,
        hidden=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_size=16,
        intermediate=48,
        max_position=64,
    )
    weights = {name: value * 3 for name, value in initial_weights(shape, 0).items()}
    ids = torch.randint(60, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = to_llama(weights, shape)(ids).logits.flatten(0, 1)
        got = logits(weights, ids, shape)
        swapped = logits({**weights, "0.qkv": weights["0.qkv"].flip(0)}, ids, shape)
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(swapped, want, atol=1e-2)


def test_learning_rate_rises_stays_and_falls() -> None:
    plan = Plan(
        tokens=1000,
        micro_batches=1,
        matrix_rate=1.0,
        other_rate=1.0,
        warmup_tokens=100,
        decay_share=0.2,
        weight_decay=0.0,
        log_every=1,
        save_minutes=1.0,
    )
    assert plan.rate(0) < 0.02
    assert [plan.rate(tokens) for tokens in (100, 500, 800, 900, 1000)] == [1, 1, 1, 0.5, 0]


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
    dialogues.main(demo)
    shape = (
        "--vocab 400 --hidden 32 --intermediate 64 --layers 1 --heads 2 --rows 2 --row-tokens 64"
        " --kv-heads 1 --head-size 16 --long-every 3 --max-position 128 --micro-batches 3"
        " --warmup-tokens 500 --matrix-lr 0.02 --other-lr 0.02 --workers 2"
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
    return folder, args


def test_pools_hold_no_demo_dialogue_and_nobody_of_valid_and_test(
    sources: tuple[Path, list[str]],
) -> None:
    folder, _ = sources
    pools = documents.load_pools(
        [folder / "talk.txt.xz"], [folder / "spc.csv"], folder / "demo", 0.1, 0
    )
    talks = [
        talk for talk in [*pools.persona, *pools.held_persona] if isinstance(talk, Conversation)
    ]
    assert len(talks) > 20
    train, valid, test = (read(folder / "demo" / f"{name}.jsonl") for name in dialogues.SPLITS)
    assert not {talk.id for talk in talks} & {record["id"] for record in [*train, *valid, *test]}
    by_id = {c.id: c for c in read_conversations([folder / "spc.csv"])}
    held = {s for record in [*valid, *test] for user in by_id[record["id"]].personas for s in user}
    assert not held & {s for talk in talks for user in talk.personas for s in user}
    assert not set(map(id, pools.general)) & set(map(id, pools.held_general))


@pytest.mark.slow
def test_run_resumes_and_its_output_loads(sources: tuple[Path, list[str]]) -> None:
    folder, args = sources
    pretrain.main([*args, "--tokens", "4e3"])
    first = json.loads((folder / "base" / "pretraining.json").read_text())
    pretrain.main([*args, "--tokens", "60e3", "--resume"])
    last = json.loads((folder / "base" / "pretraining.json").read_text())
    assert 4e3 <= first["tokens"] < 6e3
    assert 60e3 <= last["tokens"] < 62e3
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
        pretrain.main([*args, "--state", str(tmp_path / "none.pt"), "--resume"])


def test_demo_folder_without_its_files_is_refused(
    sources: tuple[Path, list[str]], tmp_path: Path
) -> None:
    _, args = sources
    with pytest.raises(DataError, match=r"train\.jsonl"):
        pretrain.main([*args, "--demo", str(tmp_path)])


def test_unreadable_text_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.txt.xz"
    broken.write_bytes(b"not xz")
    with pytest.raises(DataError, match=r"broken\.txt\.xz"):
        list(documents.read_talks(broken))
