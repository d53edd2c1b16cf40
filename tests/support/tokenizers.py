"""A tokenizer of the tiny models: one character for each id, so that every id has a text and every such text its ids."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tests.support.families import VOCAB_SIZE

CHARACTERS = "".join(map(chr, range(33, 127))) + "".join(map(chr, range(0x3B1, 0x3B1 + VOCAB_SIZE - 94)))
CHAT = "{% for m in messages %}{{ m.role }}:{{ m.content }}/{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


@functools.cache
def letters() -> PreTrainedTokenizerFast:
    """The tokenizer. A chat is `role:content/` of each message, and ends with `a:`."""
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(CHARACTERS)}, []))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHAT)
