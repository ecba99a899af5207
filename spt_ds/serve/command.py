"""`spt-ds serve RUN`: an HTTP server in OpenAI's shape, with a page to talk to the run."""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from spt_ds.display import shown
from spt_ds.errors import ConfigError
from spt_ds.log import flush_output, say_loading, show
from spt_ds.run.command import add_overrides, at_least, run_command

if TYPE_CHECKING:
    from spt_ds.config.schema import Config
    from spt_ds.serve.answers import Answers, Meters
    from spt_ds.serve.guard import Guard

KEY = "SPT_API_KEY"
LEAST_KEY = 16  # characters
NEEDED = ("fastapi", "uvicorn", "prometheus_client", "httpx")
KINDS = ("vllm-embeds", "vllm-chat", "sglang")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="spt-ds serve", description="Serve a trained run over HTTP, in OpenAI's shape."
    )
    parser.add_argument("run", type=Path, help="run folder of a training")
    parser.add_argument("--checkpoint", default="best", help="best, last, or the number of a step")
    parser.add_argument("--host", default="127.0.0.1", help=f"others need a key in {KEY}")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--name", help="name of the model; default: that of the folder")
    parser.add_argument("--rows", type=at_least(1), default=64, help="replies that grow together")
    parser.add_argument("--queue", type=at_least(1), default=256, help="requests that may wait")
    parser.add_argument(
        "--max-tokens",
        type=at_least(1),
        help="of one reply; default: half of data.max_tokens, or generate.max_new_tokens if more",
    )
    parser.add_argument("--max-body-kib", type=at_least(1), default=256, help="of one request")
    parser.add_argument("--request-seconds", type=at_least(1), default=120, help="of one request")
    parser.add_argument(
        "--grace-seconds", type=at_least(0), default=30, help="for running replies after SIGTERM"
    )
    parser.add_argument(
        "--upstream", metavar="URL", help="inference server that has the base; none is loaded here"
    )
    parser.add_argument(
        "--upstream-kind", choices=KINDS, default=KINDS[0], help="how prompts get to it"
    )
    parser.add_argument("--upstream-model", metavar="NAME", help="the base's name there")
    add_overrides(parser, "override an option, such as generate.max_new_tokens=64")
    return run_command(parser, argv, _serve)


def _serve(args: argparse.Namespace) -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"spt-ds serve needs {', '.join(missing)}; install the extra:"
            " pip install 'spt-ds[serve]'"
        )
    from spt_ds.serve.guard import Guard, is_local

    if args.upstream and not args.upstream.startswith(("http://", "https://")):
        raise ConfigError(f"--upstream {shown(args.upstream)}: give an address, http://HOST:PORT")
    key, local = os.environ.get(KEY) or None, is_local(args.host)
    if key is not None and (len(key) < LEAST_KEY or not key.isascii() or not key.isprintable()):
        raise ConfigError(f"{KEY}: give {LEAST_KEY} or more printable ASCII characters")
    if key is None and not local:
        raise ConfigError(
            f"--host {shown(args.host)}: others reach this address; set a key in {KEY} that they"
            " have to give, or leave --host out for this machine alone"
        )
    # Bound before anything is loaded: a port that is taken must not cost minutes.
    listener = _bound(args.host, args.port)
    with listener:
        say_loading()
        from spt_ds.serve.answers import Meters

        meters = Meters()
        answers = _answers(args, meters)
        guard = Guard(meters, key, local, args.max_body_kib << 10)
        _run(args, listener, answers, meters, guard)


def _bound(host: str, port: int) -> socket.socket:
    try:
        if not 0 <= port < 1 << 16:
            raise OSError("no such port")
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # With its protocol: asyncio switches Nagle's delay off only where a socket names TCP. With
        # it a reply of two writes waits 40 ms for the caller's acknowledgement.
        listener = socket.socket(*family[:3])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(family[4])
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--host {shown(host)} --port {port}: no socket can be opened ({why}); give others"
        ) from error
    return listener


def _answers(args: argparse.Namespace, meters: Meters) -> Answers:
    from spt_ds.api import open_run
    from spt_ds.serve.ask import Rules
    from spt_ds.serve.batcher import Batcher, Limits

    limits = Limits(args.rows, args.queue, args.request_seconds)

    def rules(config: Config) -> Rules:
        options, name = config.generate, args.name or args.run.resolve().name
        most = args.max_tokens or max(options.max_new_tokens, config.data.max_tokens // 2)
        return Rules(name, config.prompts.count, options, most)

    if args.upstream:
        from spt_ds.engine.router import open_router
        from spt_ds.serve.upstream import Upstream
        from spt_ds.serve.upstream_kinds import kind_of

        router = open_router(args.run, args.checkpoint, args.overrides)
        kind = kind_of(args.upstream_kind, args.upstream_model, router.config)
        return Upstream(router, rules(router.config), limits, meters, kind, args.upstream)
    session = open_run(args.run, args.checkpoint, args.overrides)
    return Batcher(session, rules(session.config), limits, meters)


def _run(
    args: argparse.Namespace,
    listener: socket.socket,
    answers: Answers,
    meters: Meters,
    guard: Guard,
) -> None:
    import uvicorn

    from spt_ds.serve.app import create_app

    address = listener.getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"http://{host}:{address[1]}"

    class Server(uvicorn.Server):
        """Refuses new work after a signal and ends when what runs has ended; a second ends it now.

        uvicorn would close its socket at once: callers would see a refused connection, no reason.
        """

        until = float("inf")

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            show(f"spt-ds serve: {url} answers as {answers.rules.name}; Ctrl-C ends it")
            flush_output()

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if guard.stopping:
                self.should_exit = self.force_exit = True
            guard.stopping = True
            self.until = time.monotonic() + args.grace_seconds

        async def on_tick(self, counter: int) -> bool:
            if guard.stopping and (not guard.under_way or time.monotonic() > self.until):
                self.should_exit = True
            return await super().on_tick(counter)

    config = uvicorn.Config(
        create_app(answers, meters, guard),
        log_config=None,
        access_log=False,  # nothing of a request is kept
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=5,
        # Longer than clients keep a connection (httpx: 5 s), so that none asks on a closed one.
        timeout_keep_alive=75,
        limit_concurrency=4 * (args.rows + args.queue),
    )
    Server(config).run(sockets=[listener])
