"""Tiny random models and a tokenizer, made in memory, so that tests need no download."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2, as in SmolLM2: unknown, start of a turn (BOS), end of a turn (EOS and padding)."""

SYSTEM = "You are a helpful assistant."

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = (
    "The quick brown fox jumps over the lazy dog while 1234567890 people watch from the river bank.",
    "In 1942 the United States shall produce 60,000 planes, 45,000 tanks and 20,000 anti-aircraft guns.",
    "Context information is below. Given the context information and not prior knowledge, answer the query.",
    "A chunk's keys and values are computed once, stored, and found again when the question is asked.",
    "You are a helpful assistant. system user assistant: question, answer, context, document, chapter.",
    "Nothing is so hard that it cannot be said simply; what was learned on Monday is known on Friday.",
    "The library opens at nine o'clock, the museum at ten, and the old harbour never closes at all.",
)
"""What the tokenizer's merges are learned from. Any other text is encoded too (byte level), into more tokens."""


@cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 480 tokens with SmolLM2's special tokens and template; round-trips any text."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_llama(*, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random fp32 Llama of 3 layers, 4 heads on 2 KV heads of 16 dims, for `tiny_tokenizer`'s vocabulary.

    Weights are drawn larger than usual (0.08), so that attention is not uniform and positions matter.

    Args:
        seed: Same seed, same weights. The global random state is left as it was.
        **overrides: Fields of `LlamaConfig`.
    """
    settings: dict[str, Any] = {
        "vocab_size": 480,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.08,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | overrides)))
    return model.float().eval()


def save_tiny(directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write `tiny_llama` and `tiny_tokenizer` to `directory`, as `from_pretrained` reads them; returns `directory`."""
    tiny_llama(seed=seed, **overrides).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def text_of(num_tokens: int, *, seed: int = 0) -> str:
    """Readable filler of at least `num_tokens` tokens, different for every seed."""
    words = " ".join(CORPUS).split()
    generator = torch.Generator().manual_seed(seed)
    picked = [words[int(i)] for i in torch.randint(len(words), (num_tokens,), generator=generator)]
    return f"Passage {seed}: " + " ".join(picked) + "."


def save_tiny_encoder(directory: Path) -> Path:
    """Write a tiny random BERT with `tiny_tokenizer`, to stand in for the embedding model; returns `directory`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = BertModel(
            BertConfig(
                vocab_size=480,
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                initializer_range=0.5,
                pad_token_id=2,
            )
        )
    encoder.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
