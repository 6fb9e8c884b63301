"""A subword tokenizer trained on one's own text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from factorformer.errors import DataError
from factorformer.progress import Progress, silent
from factorformer.tasks.architectures import Task

PAD, EOS, BOS, MASK = "<pad>", "</s>", "<s>", "<mask>"
SPECIAL = (PAD, EOS, BOS)
"""Special tokens in the order of their ids, as in T5 and fairseq the padding first."""

CHUNK = 1000
"""Texts that are encoded between two reports of progress."""


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, progress: Progress = silent, *, task: Task = "translation"
) -> PreTrainedTokenizerFast:
    r"""Byte-level BPE (Radford et al. 2019; Sennrich et al. 2016): merges of bytes that the text itself suggests.

    Words and punctuation are split before merging, so that "door" and "door," share a token. Every byte is a token:
    no text is unknown, and decoding gives back exactly what was encoded, case and spaces included. What looks like a
    special token in a text is read as the characters it is made of.

    Texts of a translation end with `</s>`. A causal model goes on with what it is given, so nothing is appended; its
    texts also begin where another ends, as in GPT-2. A masked one reads `<s> text </s>`, as RoBERTa does, and has one
    token more to hide others with: `<mask>` in a text is then that token.

    Args:
        texts: raw text, e.g. the lines of both languages of a translation for a joint vocabulary.
        vocabulary: number of tokens, the 256 bytes and the special tokens `<pad>` (0), `</s>` (1), `<s>` (2) included.
        progress: progress callback, called with the number of texts read.
        task: of the model that reads the tokens.

    Raises:
        DataError: no text, or a vocabulary that is too small for the bytes or too large for the text.

    Example:
        >>> tokenizer = train_tokenizer(["to be, or not to be"] * 2, 268)
        >>> tokenizer.convert_ids_to_tokens(tokenizer("to be")["input_ids"])
        ['to', 'Ġbe', '</s>']
        >>> tokenizer.decode(tokenizer("Übung </s>")["input_ids"], skip_special_tokens=True)
        'Übung </s>'
        >>> tokenizer = train_tokenizer(["to be, or not to be"] * 2, 269, task="masked")
        >>> tokenizer.convert_ids_to_tokens(tokenizer("to <mask>")["input_ids"])
        ['<s>', 'to', 'Ġ', '<mask>', '</s>']
    """
    special = [*SPECIAL, MASK] if task == "masked" else [*SPECIAL]
    smallest = len(special) + 256  # every byte is a token, and nothing is merged
    if vocabulary < smallest:
        raise DataError(
            f"a vocabulary of {vocabulary} tokens is too small: {smallest} are taken by the bytes and special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _Counted(texts, progress)
    tokenizer.train_from_iterator(counted, trainer)
    if not counted.characters:
        raise DataError("there is no text to train a tokenizer on")
    if tokenizer.get_vocab_size() < vocabulary:
        raise DataError(
            f"the text gives a vocabulary of {tokenizer.get_vocab_size()} tokens, all its words merged, and not of "
            f"{vocabulary}: ask for fewer tokens or give more text"
        )
    single = f"{BOS} $A {EOS}" if task == "masked" else f"$A {EOS}"
    ids = [(token, special.index(token)) for token in (EOS, BOS)]
    frame = processors.TemplateProcessing(single=single, pair=f"{single} $B:1 {EOS}:1", special_tokens=ids)
    plain = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = plain if task == "causal" else processors.Sequence([plain, frame])
    names = {"mask_token": MASK, "cls_token": BOS, "sep_token": EOS} if task == "masked" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=EOS if task == "causal" else BOS,
        **names,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        split_special_tokens=task != "masked",
    )


def token_ids(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    progress: Progress,
    phase: str,
    *,
    target: bool = False,
    **options: Any,
) -> list[npt.NDArray[np.int32]]:
    """Token ids of each text.

    Args:
        tokenizer: called with a part of the texts at a time.
        texts: to encode.
        progress: progress callback, called with the number of texts done.
        phase: name of the phase reported to `progress`.
        target: whether these are what is to be written, for which some tokenizers have another vocabulary or mark.
        options: of the tokenizer.
    """
    ids: list[npt.NDArray[np.int32]] = []
    for start in range(0, len(texts), CHUNK):
        given = {"text_target" if target else "text": list(texts[start : start + CHUNK])}
        encoded = tokenizer(**given, **options)["input_ids"]
        ids += [np.asarray(row, np.int32) for row in encoded]  # lists take nine times the memory
        progress(phase, len(ids), len(texts))
    return ids


class _Counted:
    """Texts on their way to the trainer, counted for the progress callback as they pass."""

    def __init__(self, texts: Iterable[str], progress: Progress) -> None:
        self.texts, self.progress, self.characters = texts, progress, 0

    def __iter__(self) -> Iterator[str]:
        total = len(self.texts) if isinstance(self.texts, Sized) else None
        done = 0
        for done, text in enumerate(self.texts, 1):
            self.characters += len(text)
            yield text
            if done % CHUNK == 0:
                self.progress("tokenizer", done, total)
        self.progress("tokenizer", done, done)
