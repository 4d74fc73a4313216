"""Tokenizers that frame and decode texts as those of known families do."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import tiny


def framed(before: str, after: str = "", **special: str) -> PreTrainedTokenizerFast:
    """Create the byte tokenizer with special tokens around each text.

    Args:
        before: Tokens before the text, separated by spaces.
        after: Tokens after the text, separated by spaces.
        special: Special tokens by their names in `transformers`, such as ``bos_token``.
    """
    tokenizer = tiny.tokenizer()
    tokens = [*before.split(), *after.split()]
    tokenizer.add_special_tokens(special or {"bos_token": tokens[0]})
    extra = [token for token in tokens if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(extra, special_tokens=True)
    ids = tokenizer.get_vocab()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=[*before.split(), "$A", *after.split()],
        pair=[*before.split(), "$A", "$B:1", *after.split()],
        special_tokens=[(token, ids[token]) for token in dict.fromkeys(tokens)],
    )
    return tokenizer


FRAMED = {
    "bos": lambda: framed("<bos>"),  # Llama, Gemma
    "two": lambda: framed("[gMASK] <sop>", bos_token="<sop>"),  # GLM
    "eos in front": lambda: framed("<|endoftext|>", bos_token="<|endoftext|>"),  # OPT
    "eos behind": lambda: framed("<bos>", "<|endoftext|>"),
    "eos behind alone": lambda: framed("", "<|endoftext|>", bos_token="<bos>"),
    "another behind": lambda: framed("<bos>", "<sep>"),
}


def llama2() -> PreTrainedTokenizerFast:
    """Create a SentencePiece tokenizer that behaves like Llama 2's, over bytes and some words.

    A space is added in front of a text and removed from the front of decoded text.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁", "a"), ("r", "e")]
    words = [*pieces, *letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(
        models.BPE(
            vocab={word: number for number, word in enumerate(words)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def joining() -> PreTrainedTokenizerFast:
    """Create the byte tokenizer with merges of line ends and following white space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ġ"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), (":", "Ġ"), ("ĊĠ", "ĠĠ")]
    words = [*tiny.SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(
        models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=tiny.SPECIAL[0],
        pad_token=tiny.SPECIAL[0],
        additional_special_tokens=tiny.SPECIAL[1:],
        chat_template=tiny.CHAT_TEMPLATE,
    )


def scripted(tokenizer: PreTrainedTokenizerFast, *rows: list[int]) -> LlamaForCausalLM:
    """Create a model that predicts, after each token of a row, the row's next token."""
    config = tiny.llama_config(layers=1)
    config.vocab_size = len(tokenizer)
    model = LlamaForCausalLM(config).eval()
    pairs = [pair for row in rows for pair in zip(row, row[1:], strict=False)]
    assert len({first for first, _ in pairs}) == len(pairs) <= config.hidden_size
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        for place, (first, following) in enumerate(pairs):
            model.model.embed_tokens.weight[first, place] = 1.0
            model.lm_head.weight[following, place] = 1.0
    return model


def bytes_first(**settings: object) -> PreTrainedTokenizerFast:
    """Create the byte tokenizer in Llama 3's style: token 0 is ``!``, without a padding token."""
    backend = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    words = [word for word in backend["model"]["vocab"] if word not in tiny.SPECIAL]
    words.sort(key=lambda word: (word != "!", word))
    backend["model"]["vocab"] = {word: n for n, word in enumerate([*words, *tiny.SPECIAL])}
    for token in backend["added_tokens"]:
        token["id"] = backend["model"]["vocab"][token["content"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        eos_token=tiny.SPECIAL[0],
        additional_special_tokens=tiny.SPECIAL[1:],
        chat_template=tiny.CHAT_TEMPLATE,
    )
