"""Tokenizers of the small backbones that are pretrained here: special tokens, vocabularies, byte pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# As in BART and in T5, but for <mask>; T5's decoder starts from padding.
BART_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
T5_TOKENS = ("<pad>", "</s>", "<unk>", "<mask>")
UNKNOWN = "<unk>"


def word_tokenizer(words: Iterable[str], special_tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Whole words, in alphabetical order after the special tokens."""
    vocabulary = {word: index for index, word in enumerate([*special_tokens, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap_tokenizer(tokenizer, special_tokens)


def byte_pair_tokenizer(texts: Iterable[str], size: int, special_tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of texts as they are, cut at spaces.

    Args:
        texts: to learn from.
        size: entries of the vocabulary.
        special_tokens: the first entries.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return _learn_byte_pairs(tokenizer, texts, size, special_tokens)


def sentence_tokenizer(texts: Iterable[str], size: int, special_tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte pairs of texts in lower case; every letter and digit is known, and a text ends with </s>.

    Args:
        texts: to learn from.
        size: entries of the vocabulary.
        special_tokens: the first entries.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    end = ("</s>", list(special_tokens).index("</s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    letters = [chr(code) for code in range(33, 127)]
    return _learn_byte_pairs(tokenizer, texts, size, special_tokens, letters)


def wrap_tokenizer(tokenizer: Tokenizer, special_tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """Transformers' tokenizer around one of the library tokenizers."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if "<s>" in special_tokens else None,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token=UNKNOWN,
        mask_token="<mask>",
    )


def _learn_byte_pairs(
    tokenizer: Tokenizer, texts: Iterable[str], size: int, special_tokens: Sequence[str], alphabet: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special_tokens), initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap_tokenizer(tokenizer, special_tokens)
