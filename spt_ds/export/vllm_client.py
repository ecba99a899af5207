"""Asks a vLLM server for one reply: chooses the prompt here, sends it as embeddings.

    python client.py --url http://127.0.0.1:8000 --persona "i ski." "hi, what do you do?"

The server is started with `--enable-prompt-embeds`. Turns are given oldest first, the last one is
answered. A key for the server comes from the environment variable VLLM_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from spt_ds.errors import SptError
from spt_ds.export.vllm import Request, Router


def main() -> int:
    """Print the reply and which prompt gave it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("turns", nargs="+", help="the dialogue, the partner's turn last")
    parser.add_argument("--persona", action="append", default=[], help="a sentence; often")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--model", help="the server's name of the base; default: model.base")
    parser.add_argument("--base", help="folder of the base, where it is not at the hub")
    parser.add_argument("--prompt", type=int, help="this prompt instead of the best one")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds")
    args = parser.parse_args()
    overrides = [f"model.base={json.dumps(args.base)}"] if args.base else []
    try:
        router = Router(Path(__file__).resolve().parent, overrides)
        model = args.model or router.config.model.base
        request = router.request(model, args.persona, args.turns, args.prompt)
        reply = router.reply(post(args.url, request, args.timeout))
    except (SptError, OSError, ValueError, LookupError) as error:
        print(f"client: {error}", file=sys.stderr)
        return 2
    scores = " ".join(f"{score:.3f}" for score in request.scores)
    print(f"{reply}\n  [prompt {request.prompt}; scores {scores}]")
    return 0


def post(url: str, request: Request, timeout: float) -> dict[str, Any]:
    """Send a request; raise OSError with what the server said where it refuses."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    sent = urllib.request.Request(
        url.rstrip("/") + request.path, json.dumps(request.body).encode(), headers
    )
    try:
        with urllib.request.urlopen(sent, timeout=timeout) as answer:
            told: dict[str, Any] = json.load(answer)
            return told
    except urllib.error.HTTPError as error:
        text = error.read(2000).decode("utf-8", "replace")
        raise OSError(f"{url}: the server answered {error.code}: {text}") from error


if __name__ == "__main__":
    raise SystemExit(main())
