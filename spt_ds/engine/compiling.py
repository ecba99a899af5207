"""Decides whether the base's decoder layers are compiled; all ranks do it, or none."""

from __future__ import annotations

import time

import torch

from spt_ds import dist
from spt_ds.config.method import SUFFIX_POSITIONS, TRAIN_THE_BASE
from spt_ds.config.schema import Config
from spt_ds.engine.session import Session
from spt_ds.errors import ConfigError, ModelError
from spt_ds.log import fallback, get_logger
from spt_ds.model.attention import AMPERE
from spt_ds.model.backbone import Backbone
from spt_ds.model.compiled import check_compiled, compile_layers, leave_eager
from spt_ds.model.loading import first_line
from spt_ds.placement.choose import Placement

WORTH_STEPS = 200  # to compile takes about as long as many steps


def refuse_shards(config: Config, placement: Placement) -> None:
    """Raise ConfigError where compiled layers are asked for and the base is sharded."""
    if config.model.compile == "on" and placement.zero.stage == 3:
        raise ConfigError(
            "model.compile: on needs the whole base on each rank, and this run shards it; set"
            " engine.placement: replicate and leave a DeepSpeed file of stage 3 out, or set"
            " model.compile: auto"
        )


def compile_base(session: Session, steps: int) -> None:
    """Compile the layers of the base as `model.compile` says, for a run of so many steps.

    A compiler that fails on any rank leaves them as they are on all ranks, with a warning, and
    raises ModelError on all under `engine.strict` where `on` was asked for.
    """
    config, asked = session.config, session.config.model.compile
    if asked == "off":
        return
    why_not = _why_not(session, steps) if asked == "auto" else ""
    # GPUs may differ from host to host.
    if told := _first(why_not):
        get_logger().info(f"compiled layers: none (auto; {told})")
        return
    start_s = time.monotonic()
    problem = _first(_problem(session))
    if problem:
        session.backbone(leave_eager)
        strict = config.engine.strict and asked == "on"
        fallback(f"model.compile: {asked}", "off", problem, strict=strict, error=ModelError)
        return
    # From here on a rank may compute a graph eagerly that it cannot compile: no rank waits for it.
    torch._dynamo.config.suppress_errors = True
    why = "as configured" if asked == "on" else f"auto; a run of {steps} steps"
    took_s = time.monotonic() - start_s
    get_logger().info(f"compiled layers: all, made and compared in {took_s:.0f} s ({why})")


def _why_not(session: Session, steps: int) -> str:
    """Why compiled layers would not pay, or cannot be; empty where they do."""
    config, device = session.config, session.world.device
    if session.sharding.on:
        return "the base is sharded"
    if config.model.uncompilable:
        return config.model.uncompilable
    if config.method.type in TRAIN_THE_BASE:
        return f"method.type: {config.method.type} trains weights of the base"
    if device.type != "cuda":
        return "they pay on a GPU"
    if torch.cuda.get_device_capability(device) < AMPERE:
        return "they pay on GPUs of compute capability 8.0 or more"
    if steps < WORTH_STEPS:
        return f"a run of {steps} steps, they pay from {WORTH_STEPS} on"
    return ""


def _first(text: str) -> str:
    """The first rank's text that is not empty, on every rank."""
    return next(filter(None, dist.gather_json(text)), "")


def _problem(session: Session) -> str:
    """Compile and compare on this rank; return what went wrong, if anything."""
    suffix = session.config.prompts.position in SUFFIX_POSITIONS

    def attempt(inner: Backbone) -> None:
        if not compile_layers(inner):
            raise ModelError(f"{type(inner.lm).__name__} does not name its decoder layers")
        check_compiled(inner, suffix=suffix)

    try:
        session.backbone(attempt)
    except Exception as error:  # a compiler fails as a dozen unrelated classes
        return first_line(error)
    return ""
