"""A run for vLLM with `--enable-prompt-embeds`: its tensors, and a router that asks the server.

The server holds the base. The router holds the tokenizer, the embedding table, the bank and the
retriever, chooses a prompt as the run does, and sends virtual tokens as embeddings. Legend: K
prompts, P virtual tokens, D embedding size, T tokens of a text.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils.hub import cached_file

from spt_ds.config.load import dump_config
from spt_ds.config.schema import Config
from spt_ds.data.encode import Encoder
from spt_ds.data.template import system_text
from spt_ds.engine.reply_text import before_stop, rule_of
from spt_ds.engine.session import train_style
from spt_ds.errors import ConfigError, DataError, ModelError
from spt_ds.evaluate.text_metrics import cleaned
from spt_ds.export.hub_folder import public_config
from spt_ds.export.run_files import Trained, write_new
from spt_ds.json_input import read_json
from spt_ds.model.base_files import base_path, stored_shapes, weight_files
from spt_ds.model.loading import load_base_config, load_tokenizer, new_lm
from spt_ds.model.reference import functions_of
from spt_ds.model.retriever import Retriever
from spt_ds.model.weight_names import aliases, model_names
from spt_ds.run.folder import RunFolder

TENSORS, TABLE, CLIENT = "prompts.safetensors", "table.json", "client.py"
# Places inside a message, which a content part of a chat completion can take.
IN_A_MESSAGE = ("system", "last_turn")


@dataclass(frozen=True)
class Request:
    """What to post, and which prompt was chosen by which scores."""

    path: str
    body: dict[str, Any]
    prompt: int
    scores: tuple[float, ...]  # [K]


def export_vllm(run: Trained, out: Path, base: str | None) -> None:
    """Write tensors, configuration, where the embedding table is, a client and how to start.

    Raises ConfigError for what a server cannot answer with one prompt, ModelError for a base whose
    embeddings are more than a table.
    """
    _check(run)
    public = public_config(run.config, base)
    table = _table_of(run.config)
    held = {**run.tensors, "bank.weight": run.bank}
    tensors = {name: tensor.contiguous().clone() for name, tensor in held.items()}

    def fill(part: Path) -> None:
        save_file(tensors, part / TENSORS, metadata={"format": "pt"})
        RunFolder(part).config.write_text(dump_config(public), encoding="utf-8")
        (part / TABLE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
        source = resources.files("spt_ds") / "export" / "vllm_client.py"
        with resources.as_file(source) as file:
            shutil.copy(file, part / CLIENT)
        (part / "README.md").write_text(_recipe(public), encoding="utf-8")

    write_new(out, fill)


def _check(run: Trained) -> None:
    config = run.config
    if config.generate.mode != "select" or config.generate.do_sample:
        raise ConfigError(
            f"{run.folder}: generate.mode is {config.generate.mode} and generate.do_sample"
            f" {config.generate.do_sample}; the client sends the best prompt and asks for the"
            " likeliest tokens: --set generate.mode=select --set generate.do_sample=false"
        )
    if config.reference.padded_pool:
        raise ConfigError(
            f"{run.folder}: reference.padded_pool scores a text by its padding, which no request"
            " has; --set reference.padded_pool=false scores the context, and may choose otherwise"
        )


def _table_of(config: Config) -> dict[str, Any]:
    """In which file of the base the embedding table is, and under which name."""
    path = base_path(config.model.base)
    with torch.device("meta"):
        lm = new_lm(load_base_config(config.model))
    table = lm.get_input_embeddings()
    if type(table) is not nn.Embedding:
        raise ModelError(
            f"model.base: the embeddings of {path} are {type(table).__name__}, more than a table;"
            " the client cannot make them"
        )
    if table.embedding_dim != lm.config.get_text_config().hidden_size:
        raise ModelError(
            f"model.base: the embeddings of {path} have {table.embedding_dim} numbers, its layers"
            f" {lm.config.get_text_config().hidden_size}; vLLM takes embeddings of the layers' size"
            " alone"
        )
    own = next(
        names
        for names in aliases(lm)
        if dict(lm.named_parameters(remove_duplicate=False))[names[0]] is table.weight
    )
    for file in weight_files(path, config.model.revision, pickled=False):
        shapes = stored_shapes(path, [file])
        for key, (name, _) in model_names(lm, shapes, path).items():
            if name in own:
                return {"file": Path(file).name, "tensor": key, "shape": list(shapes[key])}
    raise ModelError(f"model.base: {path} holds no embedding table in its safetensors files")


class Router:
    """Chooses prompts and makes requests; it holds no layer of the base."""

    def __init__(self, folder: Path, overrides: Sequence[str] = ()) -> None:
        """Open what `export_vllm` wrote, with overrides such as `model.base=FOLDER`.

        Raises SptError where folder or base cannot be read.
        """
        config = self.config = RunFolder(folder).load_config(overrides)
        self.tokenizer = load_tokenizer(config.model)
        self._encoder = Encoder(self.tokenizer, config.data.max_tokens, train_style(config))
        try:
            where = read_json(folder / TABLE)
            tensors = load_file(folder / TENSORS)
            file = cached_file(
                base_path(config.model.base), where["file"], revision=config.model.revision
            )
            with safe_open(str(file), framework="pt") as handle:
                self.table = handle.get_tensor(where["tensor"])
        except Exception as error:  # files of others fail as a dozen unrelated classes
            raise DataError(
                f"{folder}: cannot be read ({type(error).__name__}: {error}); give what `spt-ds"
                " export vllm` wrote, and the base that it names"
            ) from error
        # As precise as the run: the server rounds to its own.
        self._dtype = torch.float32 if config.model.base_bits == 32 else torch.bfloat16
        self.bank = tensors.pop("bank.weight")
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        learned = config.retriever.keys == "learned"
        self._retriever = Retriever(
            self.bank.shape[2],
            shared=config.retriever.projections == "shared",
            keys=len(self.bank) if learned else 0,
            activation=functions_of(config.reference, pad).activation,
        )
        weights = {name.removeprefix("retriever."): tensor for name, tensor in tensors.items()}
        self._retriever.load_state_dict(weights, strict=False)

    def request(
        self, model: str, persona: Sequence[str], history: Sequence[str], prompt: int | None = None
    ) -> Request:
        """Make the request for a reply to the last turn; `prompt` is used instead of the choice.

        `model` is the server's name of the base. A prompt inside a message is a content part where
        the server's template writes the run's text; else the whole text is sent as embeddings.
        """
        options = self.config.generate
        context = self._encoder.context(
            "dialogue", tuple(persona), tuple(history), options.max_new_tokens
        )
        text = self.table[torch.tensor(context.context_ids)].to(self._dtype)
        with torch.no_grad():
            scores = self._retriever(self.bank, text.float().mean(dim=0, keepdim=True))[:, 0]
        chosen = int(scores.argmax()) if prompt is None else prompt
        virtual = self.bank[chosen].to(text.dtype)
        body: dict[str, Any] = {"model": model, "max_tokens": options.max_new_tokens}
        body |= {"temperature": 0.0, "stop_token_ids": list(self._encoder.template.ends)}
        body["stop"] = list(options.stop)
        part = {"type": "prompt_embeds", "data": _encoded(virtual)}
        turns = tuple(history)[context.dropped_turns :]
        messages = self._messages(context.persona, turns)
        if messages and self._server_writes(messages, context.context_ids):
            path = "/v1/chat/completions"
            whole = messages[0 if self.config.prompts.position == "system" else -1]["content"]
            whole[whole.index(_PLACE)] = part
            body["messages"] = messages
            body["chat_template_kwargs"] = dict(self.config.data.template_variables)
        else:
            path, at = "/v1/completions", context.prompt_at
            body["prompt_embeds"] = _encoded(torch.cat([text[:at], virtual, text[at:]]))
        return Request(path, body, chosen, tuple(scores.tolist()))

    def reply(self, answer: dict[str, Any]) -> str:
        """The reply in the server's answer, cut as the run cuts it."""
        choice = answer["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return cleaned(before_stop(text, self.config.generate.stop), rule_of(self.config)).strip()

    def _messages(self, persona: Sequence[str], turns: Sequence[str]) -> list[dict[str, Any]]:
        """The messages in parts, with `_PLACE` where the prompt is to be; empty where it is in none
        of them or the run's template is not the base's.
        """
        data, position = self.config.data, self.config.prompts.position
        if position not in IN_A_MESSAGE or data.template != "chat" or not turns:
            return []
        system = system_text(data.instructions, persona)
        parts = [("system", [_text(system)])] if system else []
        for number, turn in enumerate(turns):
            role = "user" if (len(turns) - number) % 2 else "assistant"
            parts.append((role, [_text(turn.strip())]))
        if position == "last_turn":
            parts[-1][1].append(_PLACE)
        elif system:
            parts[0][1].insert(0, _PLACE)
        else:
            parts.insert(0, ("system", [_PLACE]))
        return [{"role": role, "content": content} for role, content in parts]

    def _server_writes(self, messages: list[dict[str, Any]], ids: list[int]) -> bool:
        """Whether the base's template makes the run's `ids` of messages in parts.

        It does not where it takes no parts, no system message, or writes today's date.
        """
        variables: dict[str, Any] = self.config.data.template_variables
        try:
            own: Any = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, **variables
            )
        except (TemplateError, TypeError):  # a text and a list cannot be added
            return False
        return bool(own == ids)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


_PLACE = _text("")


def _encoded(embeddings: torch.Tensor) -> str:
    """[T, D] as vLLM reads it: what torch.save writes, in base64."""
    buffer = io.BytesIO()
    torch.save(embeddings.contiguous().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _recipe(config: Config) -> str:
    position, tokens = config.prompts.position, config.prompts.tokens
    sends = (
        f"""Where the base's template takes messages in parts and makes the run's text of them, a
request is a chat completion with {tokens} virtual tokens as a content part. Elsewhere it is a
completion that carries the whole text as embeddings."""
        if position in IN_A_MESSAGE
        else f"""Each request is a completion that carries the whole text as embeddings. A prompt at
`{position}` is in no message, so no content part can hold it."""
    )
    return f"""# Soft prompts for vLLM

Made by `spt-ds export vllm`. vLLM itself was not run with this folder. A test sends these requests
to a server of its own, which reads embeddings as vLLM 0.33's source does.

    vllm serve {config.model.base} --enable-prompt-embeds --chat-template-content-format openai
    python {CLIENT} --url http://127.0.0.1:8000 --persona "i ski." "hi, what do you do?"

The client needs spt_ds, and no GPU. `{TENSORS}` holds the bank [K, P, D] and the retriever.
`{TABLE}` says where the base keeps its embedding table. `config.yaml` is the run's.

{sends}

* vLLM refuses a text with the literal `<prompt_embeds>` in it.
* The server reads embeddings with torch.load. Offer its port to this client alone.
* A base in 16 bits rounds as the server's kernels do, so a reply may differ in a word.
* Prefix caching compares blocks of tokens. Look at whether your version of vLLM tells two prompts
  apart, or switch it off.
"""
