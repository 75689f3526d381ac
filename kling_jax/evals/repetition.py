"""Whether a model repeats itself in the dynamics that it writes: distinct n-grams, self-BLEU, repeats, perplexity."""

import collections
import math
from collections.abc import Sequence

import numpy as np


def words(text: str) -> list[str]:
  """Lower-case words; punctuation at their ends is dropped."""
  return [word for word in (piece.strip(".,;:!?\"'") for piece in text.lower().split()) if word]


def distinct(texts: Sequence[str], n: int = 2) -> float:
  """Distinct-n (Li et al., 2016): different n-grams over all n-grams of all texts; nan where there are none."""
  grams = [gram for text in texts for gram in _grams(words(text), n)]
  return len(set(grams)) / len(grams) if grams else float("nan")


def repeat_rate(texts: Sequence[str], scope: str = "last") -> float:
  """Share of texts, from the second on, that equal the one before ("last") or any before ("any"), word for word."""
  if scope not in ("last", "any"):
    raise ValueError(f"scope {scope!r}: legal are 'last' and 'any'")
  said = [tuple(words(text)) for text in texts]
  if len(said) < 2:
    return float("nan")
  return float(np.mean([said[k] in (said[k - 1 : k] if scope == "last" else said[:k]) for k in range(1, len(said))]))


def self_bleu(texts: Sequence[str], n: int = 4) -> float:
  """Self-BLEU (Zhu et al., 2018): mean BLEU of each text against all others; 1 where all are alike, nan below two."""
  if len(texts) < 2:
    return float("nan")
  said = [words(text) for text in texts]
  return float(np.mean([bleu(text, said[:k] + said[k + 1 :], n) for k, text in enumerate(said)]))


def bleu(text: Sequence[str], references: Sequence[Sequence[str]], n: int = 4) -> float:
  """BLEU (Papineni et al., 2002) of one text in words, orders 1 to n with equal weight.

  Orders that the text is too short for are left out; an order without a match counts as half a match, so that one
  missing order does not hide the others (Chen and Cherry, 2014, method 1).
  """
  logs = []
  for order in range(1, min(n, len(text)) + 1):
    counts = collections.Counter(_grams(text, order))
    most: collections.Counter[tuple[str, ...]] = collections.Counter()
    for reference in references:
      most |= collections.Counter(_grams(reference, order))
    matched = sum(min(count, most[gram]) for gram, count in counts.items())
    logs.append(math.log((matched or 0.5) / sum(counts.values())))
  if not logs:
    return 0.0
  closest = min((abs(len(reference) - len(text)), len(reference)) for reference in references)[1]
  brevity = min(0.0, 1 - closest / len(text))
  return math.exp(brevity + sum(logs) / len(logs))


def perplexity(log_probability_L: np.ndarray, mask_L: np.ndarray) -> float:
  """exp of the mean negative log-probability (natural) of the tokens where the mask is true; nan without any."""
  chosen = np.asarray(log_probability_L, np.float64)[np.asarray(mask_L, bool)]
  return float(np.exp(-chosen.mean())) if chosen.size else float("nan")


def _grams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
  return [tuple(text[k : k + n]) for k in range(len(text) - n + 1)]
