"""How a chosen prompt travels to vLLM or SGLang, and how their streams are read.

| kind | what travels | who writes the template |
|---|---|---|
| vllm-embeds | every embedding up to the reply, to /v1/completions | this server |
| vllm-chat | the prompt's embeddings inside a message, to /v1/chat/completions | vLLM |
| sglang | every embedding up to the reply, to /generate | this server |
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from spt_ds.config.schema import Config
from spt_ds.data.template import system_text
from spt_ds.engine.router import Routed, Router
from spt_ds.errors import ConfigError
from spt_ds.serve.ask import Ask, Refused

PLACEHOLDER = "<prompt_embeds>"  # vLLM's own sign for the part; it refuses texts that hold it


@dataclass(frozen=True)
class Said:
    """What another server has said of a reply."""

    text: str = ""
    finish: str | None = None  # `stop` or `length`, at the end
    ended: bool = False  # by a token, not by a text
    tokens: int = 0


@dataclass(frozen=True)
class Kind:
    """One way to ask."""

    path: str
    body: Callable[[Ask, Routed, Router], dict[str, Any]]
    read: Callable[[dict[str, Any], Said], Said]


def kind_of(name: str, model: str | None, config: Config) -> Kind:
    """The way that `--upstream-kind` names; raise ConfigError where the run does not fit it."""
    if name == "sglang":
        return Kind("/generate", _sglang_body, _read_sglang)
    # vLLM knows a base by the name that it was started with, which is its path or hub id.
    named = {"model": model or config.model.base}
    if name == "vllm-embeds":
        return Kind("/v1/completions", lambda *of: named | _embeds_body(*of), _read_vllm)
    data = config.data
    fits = {
        f"prompts.position: {config.prompts.position} is not inside a message": (
            config.prompts.position in ("system", "last_turn")
        ),
        f"data.template: {data.template[:40]!r} is not the base's own": data.template == "chat",
        f"data.overflow: {data.overflow} cuts texts": data.overflow == "error",
    }
    found = [problem for problem, fine in fits.items() if not fine]
    if found:
        raise ConfigError(
            f"--upstream-kind vllm-chat: {'; '.join(found)}; use vllm-embeds, which sends all"
            " embeddings"
        )
    return Kind("/v1/chat/completions", lambda *of: named | _chat_body(*of), _read_vllm)


def packed(tensor: torch.Tensor) -> str:
    """A tensor as vLLM unpacks it: torch.save, base64."""
    file = io.BytesIO()
    # A copy: of a view the whole table would be saved.
    torch.save(tensor.detach().clone(), file)
    return base64.b64encode(file.getvalue()).decode()


def _vllm_options(ask: Ask, router: Router) -> dict[str, Any]:
    options = ask.options
    given: dict[str, Any] = {
        "max_tokens": options.max_new_tokens,
        "min_tokens": options.min_new_tokens,
        "stop": list(options.stop),
        "stop_token_ids": list(router.ends),
        "temperature": options.temperature if options.do_sample else 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.do_sample:
        given |= {"top_p": options.top_p, "top_k": options.top_k}
    return given if ask.seed is None else given | {"seed": ask.seed}


def _embeds_body(ask: Ask, routed: Routed, router: Router) -> dict[str, Any]:
    return {"prompt_embeds": packed(routed.beginning), **_vllm_options(ask, router)}


def _chat_body(ask: Ask, routed: Routed, router: Router) -> dict[str, Any]:
    config = router.config
    persona = ask.persona if config.data.persona else ()
    system = system_text(config.data.instructions, persona)
    history = ask.history[routed.dropped_turns :]
    if any(PLACEHOLDER in text for text in (system, *history)):
        raise Refused(f"a text holds {PLACEHOLDER}, which vLLM takes for a sign of its own")
    part = {"type": "prompt_embeds", "data": packed(routed.virtual)}
    roles = ["user" if (len(history) - n) % 2 else "assistant" for n in range(len(history))]
    messages: list[dict[str, Any]] = [
        {"role": role, "content": text.strip()} for role, text in zip(roles, history, strict=True)
    ]
    if config.prompts.position == "last_turn":
        if not messages:
            raise Refused("messages: give a user's turn, in which the prompt has its place")
        messages[-1]["content"] = [{"type": "text", "text": messages[-1]["content"]}, part]
        first: Any = system
    else:
        first = [part, {"type": "text", "text": system}] if system else [part]
    if first:
        messages.insert(0, {"role": "system", "content": first})
    return {"messages": messages, **_vllm_options(ask, router)}


def _read_vllm(event: dict[str, Any], said: Said) -> Said:
    """Add an event of either route: they differ in where the text is."""
    if "error" in event:
        raise ValueError("an error in the stream")
    if event.get("usage"):
        said = replace(said, tokens=int(event["usage"]["completion_tokens"]))
    for choice in event["choices"]:
        more = choice["delta"].get("content") if "delta" in choice else choice["text"]
        said = replace(said, text=said.text + (more or ""))
        if choice.get("finish_reason"):
            # The reason is a text where a text stopped it, and a token or nothing else.
            by_token = choice["finish_reason"] == "stop" and not isinstance(
                choice.get("stop_reason"), str
            )
            said = replace(said, finish=str(choice["finish_reason"]), ended=by_token)
    return said


def _sglang_body(ask: Ask, routed: Routed, router: Router) -> dict[str, Any]:
    options = ask.options
    sampling: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens,
        "min_new_tokens": options.min_new_tokens,
        "stop": list(options.stop),
        "stop_token_ids": list(router.ends),
        "temperature": options.temperature if options.do_sample else 0.0,
    }
    if options.do_sample:
        sampling |= {"top_p": options.top_p, "top_k": options.top_k or -1}
    rows = routed.beginning.float().tolist()
    return {"input_embeds": rows, "sampling_params": sampling, "stream": True}


def _read_sglang(event: dict[str, Any], said: Said) -> Said:
    about = event["meta_info"]
    # Its events hold all of the text so far.
    said = Said(text=event["text"], tokens=int(about["completion_tokens"]))
    reason = about.get("finish_reason")
    if reason:
        ended = reason["type"] == "stop" and not isinstance(reason.get("matched"), str)
        said = replace(said, finish=str(reason["type"]), ended=ended)
    return said
