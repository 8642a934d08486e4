"""Data that every one of the models can learn, made anew for each step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

VOCABULARY = 32
SPECIAL = 4
"""The first tokens are padding, beginning, end and mask."""
CLASSES = 4
LENGTH = 16
IMAGE = 32


def language(rows: int, length: int | None = None) -> Tensor:
    """Return sentences (rows, length) of a language in which each word decides the next one, nine times out of ten."""
    length = LENGTH if length is None else length
    words = VOCABULARY - SPECIAL
    sentence = torch.randint(words, (rows, length))
    keep = torch.rand(rows, length) < 0.9
    for t in range(1, length):
        sentence[:, t] = torch.where(keep[:, t], (5 * sentence[:, t - 1] + 3) % words, sentence[:, t])
    return sentence + SPECIAL


def masked(rows: int, mask: int = 3) -> tuple[Tensor, Tensor]:
    """Return sentences in which three of twenty words are masked, and the labels: -100 where nothing is asked."""
    sentence = language(rows)
    hidden = torch.rand(sentence.shape) < 0.15
    hidden[:, 1] = True  # at least one a row
    return sentence.masked_fill(hidden, mask), sentence.masked_fill(~hidden, -100)


def sorted_by_first(rows: int) -> tuple[Tensor, Tensor]:
    """Return sentences and their classes, which the first word decides."""
    sentence = language(rows)
    return sentence, (sentence[:, 0] - SPECIAL) % CLASSES


def by_word(rows: int) -> tuple[Tensor, Tensor]:
    """Return sentences and a class for each word, which the word before it decides."""
    sentence = language(rows)
    return sentence, sentence.roll(1, 1) % CLASSES


def spans(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return sentences with two marks, and where the marks are."""
    sentence = language(rows)
    start = torch.randint(1, LENGTH // 2, (rows,))
    end = torch.randint(LENGTH // 2, LENGTH, (rows,))
    row = torch.arange(rows)
    sentence[row, start], sentence[row, end] = 1, 2
    return sentence, start, end


def reversed_copy(rows: int, length: int = 8) -> tuple[Tensor, Tensor]:
    """Return sentences and what is to be said: the same, backwards."""
    sentence = language(rows, length)
    return sentence, sentence.flip(1)


def stripes(rows: int, size: int = IMAGE) -> tuple[Tensor, Tensor]:
    """Return pictures (rows, 3, size, size) of noisy stripes and their classes: direction and width."""
    label = torch.randint(CLASSES, (rows,))
    grid = torch.arange(size, dtype=torch.get_default_dtype())
    x, y = grid.expand(size, size), grid.expand(size, size).T
    along = torch.where((label % 2 == 0)[:, None, None], x, y)
    period = torch.where(label < 2, 4.0, 16.0)[:, None, None]
    wave = torch.sin(2 * math.pi * (along / period + torch.rand(rows, 1, 1)))
    return (wave[:, None] + 0.3 * torch.randn(rows, 3, size, size)), label


def tones(rows: int, length: int = 1600) -> tuple[Tensor, Tensor]:
    """Return sounds (rows, length) and their classes: the pitch."""
    label = torch.randint(CLASSES, (rows,))
    time = torch.arange(length) / 16000
    pitch = 200.0 * 2.0**label
    sound = torch.sin(2 * math.pi * (pitch[:, None] * time + torch.rand(rows, 1)))
    return sound + 0.1 * torch.randn(rows, length), label


def mel(rows: int, bins: int, frames: int) -> tuple[Tensor, Tensor]:
    """Return spectrograms (rows, frames, bins) with one loud band, and which one it is."""
    label = torch.randint(CLASSES, (rows,))
    band = (torch.arange(bins) * CLASSES // bins)[None, None] == label[:, None, None]
    return band + 0.3 * torch.randn(rows, frames, bins), label


def sines(rows: int, length: int) -> Tensor:
    """Return series (rows, length): sines of a period of 12 with noise."""
    time = torch.arange(length)
    return torch.sin(2 * math.pi * (time / 12 + torch.rand(rows, 1))) + 0.1 * torch.randn(rows, length)
