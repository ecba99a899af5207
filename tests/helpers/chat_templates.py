"""Chat templates of well-known bases, each with a tiny tokenizer that has its special tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# From 3.1 on the system message begins with the date.
LLAMA_3_1 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\n' }}"
    "{{- 'Today Date: ' + date_string + '\n\n' }}{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
_CHATML_TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
_CHATML_REPLY = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SMOLLM_2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    f"<|im_end|>\n' }}}}{{% endif %}}{_CHATML_TURN}{{% endfor %}}{_CHATML_REPLY}"
)
QWEN_2_5 = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{%- else %}"
    "{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n' }}{%- endif %}{%- for message in messages %}"
    "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first)"
    " or (message.role == 'assistant' and not message.tool_calls) %}"
    f"{_CHATML_TURN}{{%- endif %}}{{%- endfor %}}{_CHATML_REPLY}"
)
# The last reply, and only that one, begins with an empty thought.
QWEN_3 = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- elif message.role == 'assistant' %}{%- set content = message.content %}"
    "{%- if '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.last %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
_GEMMA_TURN = (
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    f"{{% for message in messages %}}{_ALTERNATE}{_GEMMA_TURN}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Puts the system message at the head of the first turn by itself.
GEMMA_3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}"
    f"{{%- for message in loop_messages -%}}{_ALTERNATE}{_GEMMA_TURN}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
MISTRAL = (
    f"{{{{ bos_token }}}}{{% for message in messages %}}{_ALTERNATE}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
# Writes the system message into the last turn, but only while that is the last message.
MISTRAL_3 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}"
    f"{{%- endif %}}{{{{- bos_token }}}}{{%- for message in loop_messages %}}{_ALTERNATE}"
    "{%- if message['role'] == 'user' %}{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{%- else %}"
    "{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}"
    "{{- ' ' + message['content'] + eos_token}}{%- endif %}{%- endfor %}"
)

_SENTENCES = [
    "given persona: i like dogs. i work at night.; system user assistant model",
    "hi, how are you? i am fine, you? hello there, what do you do for a living?\n\ni teach music.",
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nYou are a helpful assistant",
]


@dataclass(frozen=True)
class Family:
    """One base's way to write a dialogue."""

    template: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    end: str  # the token that ends a turn
    after: str = ""  # what follows it in a dialogue that goes on
    system: bool = True  # has a system role
    strict: bool = False  # the partner must open
    pieces: bool = False  # SentencePiece-like
    whole: bool = True  # a finished reply is written as its beginning promises
    rstrip: tuple[str, ...] = ()  # special tokens that swallow blanks behind them

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tiny tokenizer with the family's special tokens and template."""
        tokenizer = _pieces() if self.pieces else _bytes()
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, rstrip=t in self.rstrip) for t in self.specials]
        )
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=self.bos,
            eos_token=self.eos,
            additional_special_tokens=list(self.specials),
        )
        fast.chat_template = self.template
        return fast


_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_TURNS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
FAMILIES = {
    "llama-3": Family(LLAMA_3, _HEADERS, _HEADERS[0], _HEADERS[3], _HEADERS[3]),
    "llama-3.1": Family(LLAMA_3_1, _HEADERS, _HEADERS[0], _HEADERS[3], _HEADERS[3]),
    "smollm2": Family(SMOLLM_2, _IM, _IM[0], _IM[1], _IM[1], "\n"),
    "qwen-2.5": Family(QWEN_2_5, _IM, None, _IM[2], _IM[1], "\n"),
    "qwen-3": Family(QWEN_3, _IM, None, _IM[2], _IM[1], "\n"),
    "gemma": Family(GEMMA, _TURNS, "<bos>", "<eos>", "<end_of_turn>", "\n", False, True, True),
    "gemma-3": Family(GEMMA_3, _TURNS, "<bos>", "<eos>", "<end_of_turn>", "\n", True, True, True),
    "mistral": Family(MISTRAL, ("<s>", "</s>"), "<s>", "</s>", "</s>", "", False, True, True),
    "mistral-3": Family(
        MISTRAL_3,
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "<s>",
        "</s>",
        "</s>",
        strict=True,
        pieces=True,
        whole=False,
    ),
    "stripping": Family(
        SMOLLM_2, _IM, _IM[0], _IM[1], _IM[1], "\n", rstrip=("<|im_start|>", "<|im_end|>")
    ),
}


def _bytes() -> Tokenizer:
    """Byte-level BPE: every text has ids, and they decode to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer


def _pieces() -> Tokenizer:
    """SentencePiece-like BPE: blanks are letters, and the first word of a text gets one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<unk>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer
