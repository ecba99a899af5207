"""Targets that are one file: configurations and dialogues."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from hypothesis import strategies as st

from spt_ds import chat, cli
from spt_ds.config.load import load_config
from spt_ds.data import readers
from spt_ds.data.encode import Encoder
from spt_ds.data.readers import read
from spt_ds.data.sources import build_store
from spt_ds.errors import DataError
from spt_ds.placement.ds_check import plan_of_file
from spt_ds.placement.estimate import BaseShape
from spt_ds.shipped import ds_config_path
from spt_ds.sweep.cells import load_cells
from tests.fuzz.inputs import Document, documents, edited_bytes, json_lines, pack, texts, unpack
from tests.fuzz.judge import Target
from tests.helpers.tokenizers import byte_tokenizer

CONFIG = {
    "name": "x",
    "model": {"base": "embedded", "base_bits": 16, "quant": {"skip_modules": ["lm_head"]}},
    "method": {"type": "spt", "lora": {"rank": 4}},
    "prompts": {"count": 2, "tokens": 2, "init": "text", "init_texts": ["a", "b"]},
    "losses": {"tau_gold": 0.5, "head_chunk_mib": 16},
    "data": {"train": "embedded:train", "max_tokens": 64, "cache_dir": None},
    "optim": {"betas": [0.9, 0.99], "lr": 1e-3},
    "generate": {"mode": "noise:0.5", "top_p": 0.5, "do_sample": True},
}
CONFIG_TEXT = b"""\
# a comment
name: demo
model: {base: embedded, base_bits: 32}
prompts:
  count: 4
  init_texts: []
data: &d
  train: embedded:train
  max_tokens: 128
train: {max_steps: 3, seed: 0x10}
generate: {mode: 'fixed:1'}
"""
SWEEP = {
    "name": "s",
    "configs": ["demo", {"config": "demo", "name": "b", "set": {"prompts.count": 2}}],
    "set": {"train.max_steps": 1},
    "grid": {"train.seed": [0, 1], "losses.tau_gold": [0.5, 1.0], "data.cache_dir": ["a"]},
}
DEEPSPEED = {
    "train_batch_size": "auto",
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "cpu", "pin_memory": True, "buffer_size": 1e8},
        "stage3_max_live_parameters": 1e9,
        "zero_hpz_partition_size": "auto",
        "offload_optimizer": {"device": "none"},
    },
}
PARLAI = (
    b"1 your persona: i ski.\n2 partner's persona: i swim.\n3 hi\thello\t\ta|b\n4 and you?\tfine\n"
    b"1 __SILENCE__\thi\n2 hello\tbye\n"
)
CSV = (
    b"user 1 personas,user 2 personas,Best Generated Conversation\n"
    b'"i ski.\ni swim.",i read.,"User 1: hi\nUser 2: hello, you\nUser 1: bye"\n'
    b'i sing.,i run.,"*User 1:* hi\n\nUser 2: yes"\n'
)
EXAMPLES = [
    {"persona": ["i ski."], "history": ["hi"], "response": "hello", "id": "a", "turn": 1},
    {"persona": [], "history": [], "response": "hi", "dialogue_id": "d", "turn": 0},
    {"persona": ["i ski."], "turns": ["hi", "hello", "bye"], "first_speaker": "partner"},
]
TALK = [
    {"role": "system", "content": "i ski."},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": "hello"},
]
MESSAGES = [
    {"messages": TALK, "id": "a", "persona": "i swim.\ni row."},
    {"messages": [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "yes"}]},
]
COMPLETIONS = [
    {"persona": ["i ski."], "prompt": "what?", "completion": "that"},
    {"prompt": TALK[:2], "completion": TALK[2:]},
]
COLUMNS = {"persona": "profile", "prompt": "q: 1", "completion": "a"}
BY_COLUMN = [{"profile": "i ski.\ni swim.", "q: 1": "what?", "a": "that", "prompt": 1}]
ROWS = b'id,profile,"q: 1",a\n1,"i ski.\ni swim.",what?,that\n2,"[""i run.""]",[x] so,yes\n'
LAMP = {
    "x_questions.json": json.dumps(
        [
            {"id": "1", "input": "score?", "profile": [{"id": 7, "text": "good", "score": "5"}]},
            {"id": "2", "input": "and\nthis?", "profile": []},
        ],
        indent=1,
    ).encode(),
    "x_outputs.json": json.dumps(
        {"task": "LaMP_3", "golds": [{"id": "1", "output": "5"}, {"id": "2", "output": 1}]}
    ).encode(),
}
PERSONAMEM = {
    "questions_x.csv": (
        b"persona_id,question_id,user_question_or_message,correct_answer,all_options,"
        b"shared_context_id,end_index_in_shared_context\n"
        b"""0,q0,What do I like?,(b),"['(a) tea', ""(b) it's skis""]",c,2\n"""
        b"""0,q1,"Well,\nwhat?",(a),"[""(a) yes"", ""(b) no""]",c,0\n"""
    ),
    "shared_contexts_x.jsonl": json_lines([{"c": [TALK[0], *TALK[2:]]}]),
}
SPC_ROW = {
    "user 1 personas": "i ski.\ni swim.",
    "user 2 personas": "i read.",
    "Best Generated Conversation": "User 1: hi\nUser 2: yes",
}


def configuration(content: bytes, folder: Path) -> int:
    path = folder / "x.yaml"
    path.write_bytes(content)
    return cli.main(["config", str(path)])


def override(content: bytes, folder: Path) -> int:
    """Each line is one `--set`."""
    words = content.decode("utf-8", "surrogateescape").split("\n")
    return cli.main(["config", "demo", *(f"--set={word}" for word in words)])


def sweep(content: bytes, folder: Path) -> None:
    path = folder / "sweep.yaml"
    path.write_bytes(content)
    load_cells(path)


@functools.cache
def _shape() -> BaseShape:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
    return BaseShape.from_config(sizes)


def deepspeed(content: bytes, folder: Path) -> None:
    path = folder / "ds.json"
    path.write_bytes(content)
    plan_of_file(str(path), load_config("demo"), _shape(), 2)


@functools.cache
def _tokenizer() -> Any:
    return byte_tokenizer()


def _read(
    name: str, content: bytes, folder: Path, columns: Mapping[str, str] = readers.NO_COLUMNS
) -> None:
    """Read a file as training does: into a store, whose rows hold the texts of the reader."""
    path = folder / name
    path.write_bytes(content)
    examples = list(read(str(path), columns=columns))
    store = build_store(
        str(path),
        _tokenizer(),
        max_tokens=4096,
        columns=columns,
        cache_dir=str(folder / "cache"),
    )
    assert len(store) == len(examples)
    last = store[len(examples) - 1]
    assert (tuple(last["persona"]), tuple(last["history"]), last["response"]) == (
        examples[-1].persona,
        examples[-1].history,
        examples[-1].response,
    )


def _beside(good: Mapping[str, bytes], content: bytes, folder: Path) -> None:
    """Read a source of two files, of which the input holds one or both."""
    files = unpack(content, dict(good))
    first, second = good
    if second in files:
        (folder / second).write_bytes(files[second])
    _read(first, files.get(first, b""), folder)


def _pair(good: Mapping[str, bytes]) -> Document:
    """Files near the good ones: one of the two is edited."""
    return st.sampled_from(sorted(good)).flatmap(
        lambda name: edited_bytes(good[name]).map(lambda text: pack({name: text}))
    )


def hub(content: bytes, folder: Path) -> None:
    """Records as a data set of the hub gives them: whatever Python can hold, as a literal."""
    with mock.patch.object(readers, "load_hub", return_value=_literal(content)):
        encoder = Encoder(_tokenizer(), 4096)
        for example in read("hub:x"):
            encoder.example(example)
            example.id.encode(), example.dialogue_id.encode()


def _literal(content: bytes) -> Iterator[Any]:
    try:
        rows = ast.literal_eval(content.decode())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise DataError("no literal") from error
    # A data set gives its rows as dictionaries with names for keys.
    for row in rows if isinstance(rows, list) else [rows]:
        if isinstance(row, dict):
            yield {str(key): value for key, value in row.items()}


def persona(content: bytes, folder: Path) -> None:
    path = folder / "persona.txt"
    path.write_bytes(content)
    chat.read_persona(path)


def literal(tree: Any) -> bytes:
    """What Python can hold, as a literal."""
    return repr(tree).encode("utf-8", "replace")


RECORDS = [
    *EXAMPLES,
    *MESSAGES,
    *COMPLETIONS,
    SPC_ROW,
    {"persona": (b"i",), "history": {"hi"}, "response": b"x", "turn": 1.5},
]

TARGETS = [
    Target(
        "configuration",
        documents(CONFIG)
        | documents(CONFIG, dump=lambda tree: yaml.safe_dump(tree).encode())
        | texts(CONFIG_TEXT),
        configuration,
    ),
    Target(
        "override",
        texts(b"losses.tau_gold=0.5", b"prompts={count: 2}\ntrain.seed=3", b"name=[a, b]\nx.y=1"),
        override,
    ),
    Target("sweep", documents(SWEEP), sweep, share=0.5),
    Target(
        "deepspeed",
        documents(DEEPSPEED) | texts(ds_config_path("zero3_offload_nvme").read_bytes()),
        deepspeed,
    ),
    Target("parlai", texts(PARLAI), functools.partial(_read, "x.txt")),
    Target("csv", texts(CSV), functools.partial(_read, "x.csv")),
    Target("jsonl", documents(EXAMPLES, dump=json_lines), functools.partial(_read, "x.jsonl")),
    Target(
        "text", texts(PARLAI, CSV, json_lines(EXAMPLES)), functools.partial(_read, "x"), share=0.5
    ),
    Target("messages", documents(MESSAGES, dump=json_lines), functools.partial(_read, "x.jsonl")),
    Target(
        "completions", documents(COMPLETIONS, dump=json_lines), functools.partial(_read, "x.jsonl")
    ),
    Target(
        "columns",
        documents(BY_COLUMN, dump=json_lines),
        functools.partial(_read, "x.jsonl", columns=COLUMNS),
        share=0.5,
    ),
    Target("rows", texts(ROWS), functools.partial(_read, "x.csv", columns=COLUMNS)),
    Target("lamp", _pair(LAMP), functools.partial(_beside, LAMP)),
    Target("personamem", _pair(PERSONAMEM), functools.partial(_beside, PERSONAMEM)),
    Target("hub", documents(EXAMPLES, RECORDS, dump=literal), hub),
    Target("persona", texts(b"\xef\xbb\xbfi ski.\n\ni swim.\n"), persona, share=0.5),
]
