"""What a caller asks for, in OpenAI's shape of a chat completion; what it cannot mean is refused.

A field that would change the reply and is not known here is refused. Others are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from spt_ds.config.generation import GenerateConfig
from spt_ds.display import holds_surrogate, shortened
from spt_ds.json_input import load_json

MAX_MESSAGES, MAX_STOPS, MAX_STOP_CHARACTERS = 1000, 16, 200
# Fields of OpenAI's that ask for something else than one plain reply.
REFUSED = (
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "audio",
    "prediction",
)


class Refused(Exception):
    """A request that cannot be answered: an HTTP status and an error of OpenAI's shape."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after  # seconds
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Ask:
    """One reply that is asked for."""

    persona: tuple[str, ...]  # sentences
    history: tuple[str, ...]  # turns, oldest first, the partner's last
    options: GenerateConfig
    stream: bool
    usage: bool  # whether a stream ends with the numbers of tokens
    seed: int | None  # what noise is keyed by, in place of the number of the request


class _Text(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Text]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class _StreamOptions(BaseModel):
    include_usage: StrictBool = False


_Count = Annotated[int, Field(ge=1, strict=True)]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")  # see REFUSED

    model: str | None = None
    messages: Annotated[list[_Message], Field(max_length=MAX_MESSAGES)]
    persona: str | list[str] = ""
    prompt_index: Annotated[int, Field(ge=0, strict=True)] | None = None
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: StrictInt | None = None
    n: Literal[1] | None = None
    stream: StrictBool | None = None
    stream_options: _StreamOptions | None = None
    response_format: dict[str, Any] | None = None


@dataclass(frozen=True)
class Rules:
    """What a server takes: the run's own options, and its limits."""

    name: str  # of the model
    prompts: int  # K
    options: GenerateConfig  # of the run
    max_tokens: int  # of one reply


def read_ask(content: bytes, rules: Rules) -> Ask:
    """Read the body of a request; raise Refused where it asks for what cannot be done."""
    body = _parsed(content)
    if body.model not in (None, rules.name):
        message = f"model {shortened(str(body.model))!r} is not served here; ask for {rules.name!r}"
        raise Refused(message, status=404, param="model", code="model_not_found")
    if body.prompt_index is not None and body.prompt_index >= rules.prompts:
        message = f"prompt_index: the bank has {rules.prompts}; give 0 to {rules.prompts - 1}"
        raise Refused(message, param="prompt_index", code="invalid_value")
    persona, history = _dialogue(body)
    for name, texts in (("persona", persona), ("messages", history)):
        if any(map(holds_surrogate, texts)):
            raise Refused(
                f"{name}: a text holds half a surrogate pair, which is no character",
                param=name,
                code="invalid_value",
            )
    usage = body.stream_options is not None and body.stream_options.include_usage
    options = _options(body, rules)
    return Ask(persona, history, options, bool(body.stream), usage, body.seed)


def _parsed(content: bytes) -> _Body:
    try:
        tree = load_json(content)
    except (ValueError, RecursionError) as error:
        text = shortened(str(error))
        raise Refused(f"the body is no JSON: {text}", code="invalid_json") from error
    if not isinstance(tree, dict):
        raise Refused("the body must be a JSON object with `messages`", code="invalid_json")
    for name in REFUSED:
        if tree.get(name) not in (None, False, 0, "none", [], {}):
            message = f"{name} is not known here; a reply is plain text without it"
            raise Refused(message, param=name, code="unsupported_parameter")
    try:
        body = _Body.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(f"{where}: {first['msg']}", param=where, code="invalid_value") from error
    if (body.response_format or {"type": "text"}).get("type") != "text":
        message = "response_format: only text is known here"
        raise Refused(message, param="response_format", code="unsupported_parameter")
    return body


def _dialogue(body: _Body) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Persona, a sentence a line, and turns."""
    lines = [line for m in body.messages if m.role in ("system", "developer") for line in _lines(m)]
    given = body.persona.splitlines() if isinstance(body.persona, str) else body.persona
    turns = [m for m in body.messages if m.role in ("user", "assistant")]
    for place, message in enumerate(reversed(turns)):
        if message.role != ("assistant" if place % 2 else "user"):
            raise Refused(
                "messages: turns of user and assistant must alternate and the user's be the last;"
                " join turns of one speaker",
                param="messages",
                code="invalid_value",
            )
    persona = [line.strip() for line in (*lines, *given) if line.strip()]
    return tuple(persona), tuple(message.text for message in turns)


def _lines(message: _Message) -> list[str]:
    return message.text.splitlines()


def _options(body: _Body, rules: Rules) -> GenerateConfig:
    asked = body.max_completion_tokens or body.max_tokens
    name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    if asked is not None and asked > rules.max_tokens:
        message = f"{name} is {asked}, this server gives {rules.max_tokens} at most"
        raise Refused(message, param=name, code="invalid_value")
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    changed: dict[str, Any] = {"stop": (*rules.options.stop, *stops), "perplexity": False}
    if asked is not None:
        changed["max_new_tokens"] = asked
    if body.prompt_index is not None:
        changed |= {"mode": f"fixed:{body.prompt_index}", "samples": 1}
    if body.temperature == 0:
        changed |= {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    elif body.temperature is not None:
        changed |= {"do_sample": True, "temperature": body.temperature}
    if body.top_p is not None and body.temperature != 0:
        changed["top_p"] = body.top_p
    try:
        return GenerateConfig.model_validate({**rules.options.model_dump(), **changed})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        message = f"does not fit the run's generate options: {first['msg']}"
        raise Refused(message, code="invalid_value") from error
