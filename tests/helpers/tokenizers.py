"""Small tokenizers of the three families in use, and one that breaks the encoder's assumption."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spt_ds.data.dialogue import Example
from spt_ds.data.encode import Encoded, Encoder

_SENTENCES = [
    (
        "given persona: i like dogs. i work at night.; context: Q: hi, how are you? R: i am fine,"
        " you? Q: good R: hello"
    ),
    "context: Q: what do you do for a living? R: i teach music. Q: that is nice",
]


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Encoded:
    """Encode one example as the stream of a data set encodes it."""
    return Encoder(tokenizer, max_tokens).example(example)


def byte_tokenizer(bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: the id of a byte is its value, `<s>` is 256, `</s>` 257."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token=bos)


def trained_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, as OPT and GPT-2 have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="</s>")


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-like BPE, as Llama-2 has: blanks are letters of the words, the text's first
    word gets one too.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        _SENTENCES,
        trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """Joins a colon with the blank after it, so no prefix of a text has ids of its own."""
    letters = {letter: place for place, letter in enumerate("QRabc :")}
    tokenizer = Tokenizer(models.BPE(vocab={**letters, ": ": 7}, merges=[(":", " ")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
