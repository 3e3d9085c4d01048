"""A byte-level tokenizer with chat markers: token id = byte value, then the special tokens, then reserved ones."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
END_OF_TEXT_ID, TURN_START_ID, TURN_END_ID = 256, 257, 258
SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)

# ChatML, as the Qwen models use it: one block per message, and an open assistant block when the model shall answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _printable_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's table), mapped to the byte.

    Printable Latin-1 bytes stand for themselves; the others take the code points from 256 on, in byte order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


def byte_tokenizer(vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose every id below `vocab_size` is a token.

    Ids 0..255 are the bytes, 256..258 `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`, the rest `<|reserved_N|>`.
    A vocabulary without holes matters: an untrained model may write any id, and a server must turn it into text.

    Raises:
        ValueError: `vocab_size` has no room for the bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(f"vocab_size={vocab_size}: a byte-level vocabulary needs at least {SMALLEST_VOCAB} ids")
    raw = Tokenizer(models.BPE(vocab=_printable_alphabet(), merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    reserved = [f"<|reserved_{index}|>" for index in range(vocab_size - SMALLEST_VOCAB)]
    raw.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL_TOKENS, *reserved)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
