"""Options of decoding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from spt_ds.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class GenerateConfig(Section):
    """Decoding of replies for evaluation and chat."""

    mode: Annotated[
        str, Field(pattern=r"^(select|fuse|rank|random|fixed:\d+|noise:\d*\.?\d+)$")
    ] = "select"
    """Prompt of each example: highest score, fused logits of all, the reply that is most like those
    of all prompts (rank), random, always k, or highest score under noise.
    """
    samples: PositiveInt = 1
    """Replies of each prompt among which `mode: rank` chooses; above 1 needs `do_sample: true`."""
    max_new_tokens: PositiveInt = 32
    """Longest reply in tokens."""
    batch_size: PositiveInt | Literal["auto"] = 16
    """Examples decoded together on one rank; `auto`: as many as its memory holds, of up to 256
    replies."""
    do_sample: bool = False
    """Sample instead of greedy decoding."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    top_k: NonNegativeInt = 0
    """Sample among the k likeliest tokens; 0: among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of sampling."""
    num_beams: PositiveInt = 1
    """Beams; 1 is greedy."""
    length_penalty: float = 1.0
    """Power of the length by which a beam's log-likelihood is divided; above 0 favours long
    replies.
    """
    min_new_tokens: NonNegativeInt = 0
    """Shortest reply in tokens."""
    repetition_penalty: PositiveFloat = 1.0
    """Above 1 makes tokens that the reply has already less likely (CTRL, Keskar et al. 2019)."""
    no_repeat_ngram_size: NonNegativeInt = 0
    """No n tokens come twice in one reply; 0: they may."""
    clean: Literal["auto", "spt", "none"] = "auto"
    """How a reply is cut from what was generated: `spt` at the first `R:`, `Q:`, `Summary:`, colon
    or line end, as the paper's scores do; `none` not at all; `auto` is `spt` with `data.template:
    spt` and else `none`.
    """
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a reply, which is cut before the first of them."""
    choices: Literal["none", "sum", "mean"] = "none"
    """Answer with the likeliest of the example's choices (see `data.choices`) instead of text that
    is generated: by the log-likelihood of the whole answer with its end (`sum`), or by that a token
    (`mean`), which does not favour short answers. `none` generates.
    """
    perplexity: bool = False
    """Also measure the loss of the reference reply under the chosen prompt."""

    @model_validator(mode="after")
    def _fits(self) -> GenerateConfig:
        if self.do_sample and self.num_beams > 1:
            raise ValueError(
                "do_sample and num_beams exclude one another; set num_beams: 1, or do_sample: false"
            )
        if self.reads_every_prompt and self.num_beams > 1:
            raise ValueError(
                f"mode: {self.mode} decodes the rows of one example together and cannot beam; set"
                " num_beams: 1"
            )
        if self.samples > 1 and not (self.mode == "rank" and self.do_sample):
            raise ValueError(
                f"samples is {self.samples}, which acts only with mode: rank and do_sample: true"
            )
        if self.mode == "fuse" and self.perplexity:
            raise ValueError(
                "perplexity is not defined for mode: fuse; use the fusion loss of training"
            )
        if self.choices != "none":
            self._check_choices()
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, max_new_tokens only"
                f" {self.max_new_tokens}"
            )
        # An option that would do nothing is refused: who sets it expects an effect.
        needs = {
            "temperature": "do_sample: true",
            "top_k": "do_sample: true",
            "top_p": "do_sample: true",
            "length_penalty": "num_beams above 1",
        }
        for name, need in needs.items():
            idle = not self.do_sample if "sample" in need else self.num_beams == 1
            if idle and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {getattr(self, name)}, which acts only with {need}")
        return self

    def _check_choices(self) -> None:
        if self.reads_every_prompt:
            raise ValueError(
                f"choices: {self.choices} asks one prompt of each example, and mode: {self.mode}"
                " all of them; set mode: select, or choices: none"
            )
        for name in ("do_sample", "num_beams", "stop", "clean", "min_new_tokens"):
            if (given := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is {given}, which acts only on text that is generated; set choices:"
                    " none, or leave it out"
                )

    @property
    def reads_every_prompt(self) -> bool:
        """Whether each reply comes from rows under all prompts of the bank."""
        return self.mode in ("fuse", "rank")
