"""Extraction likelihood: how much of a sequence its own prefixes bring back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loku.evaluation.greedy import GreedyReader, cache_bytes, check_input_ids
from loku.fila.progress import progress
from loku.inference import evaluation_mode

_CACHE_BYTES = 1 << 30
_MOST_ROWS = 256


def extraction_likelihood(
    model: nn.Module,
    input_ids: Tensor,
    n: int = 10,
    *,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> Tensor:
    """EL_n of each sequence x of T tokens (Jang et al., arXiv 2210.01504, section 3.1).

    EL_n = 1/(T - n) * sum over i = 1..T-n of OVERLAP_n(f(x_<=i), x_>i), where f continues the prefix greedily to
    length T, and OVERLAP_n(a, b) is the number of n-grams in the list of a's that are in the set of b's, over the
    number of b's. For greater i the suffix has no n-gram. The continuation has length T, whatever tokens it meets:
    an end-of-sequence token does not end it.

    It is never computed for each prefix: where the likeliest next token is the true one, a prefix's continuation is
    that token and the continuation of the prefix one longer. One pass over the whole sequence finds the positions
    where the model errs, and only from those it is run freely, in rows that begin from the keys and values of that
    pass. What remains is exact up to rounding: where two tokens are as likely as each other to rounding, the choice
    may depend on the batch, as it does for ``model.generate``.

    Args:
        input_ids: (N, T) integers, T > n.
        n: tokens of an n-gram.
        batch_size: sequences at once, whose keys and values are held. Their continuations run in as many rows as have
            1 GiB of keys and values, but in no fewer than batch_size and no more than 256.

    Returns:
        (N,) float64 in [0, 1], on the CPU.

    Raises:
        ValueError: input_ids has another shape, T <= n, or exceeds the model's context; n or batch_size is not
            positive; the model keeps no keys and values of all tokens.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n and batch_size must be positive, got {n} and {batch_size}")
    check_input_ids(model, input_ids, n + 1)
    with evaluation_mode(model) as device:
        parts = progress(input_ids.split(batch_size), f"EL_{n}", "batch", show_progress_bar)
        reader = GreedyReader(model)
        return torch.cat([_extraction_likelihood(reader, part.to(device, torch.int64), n).cpu() for part in parts])


def _extraction_likelihood(reader: GreedyReader, input_ids: Tensor, n: int) -> Tensor:
    length = input_ids.shape[1]
    predicted, cache = reader.predictions_and_cache(input_ids)
    errs = first_error(predicted, input_ids)[:, 1 : length - n + 1]  # (N, T - n): where prefix i = 1..T-n goes wrong
    position, sequence = torch.unique(torch.stack([errs, _rows_like(errs)]).flatten(1), dim=1)
    position, sequence = position[position < length], sequence[position < length]
    overlap = torch.ones(errs.shape, dtype=torch.float64, device=errs.device)  # of a prefix that goes wrong nowhere
    grams = torch.arange(length - n, 0, -1, device=errs.device)  # of the suffix of prefix i = 1..T-n
    count = max(len(input_ids), min(_MOST_ROWS, _CACHE_BYTES * len(input_ids) // cache_bytes(cache)))
    for begin in range(0, len(position), count):
        at, of = position[begin : begin + count], sequence[begin : begin + count]
        truth, rows = input_ids[of], torch.arange(len(at), device=at.device)
        tokens = truth.clone()
        tokens[rows, at] = predicted[of, at - 1]
        continued = reader.continuations(tokens, at + 1, cache, of, start=at[0].item())
        shares = common_ngrams(continued, truth, n)[:, 1:].double() / grams
        row, prefix = (errs[of] == at[:, None]).nonzero(as_tuple=True)
        overlap[of[row], prefix] = shares[row, prefix]
    return overlap.mean(1)


def first_error(predicted: Tensor, input_ids: Tensor) -> Tensor:
    """(N, T): the first position from each on whose token is not the predicted one, T where there is none.

    predicted: (N, T - 1), of tokens 2..T. The first token is predicted by nothing, and no error.
    """
    length = input_ids.shape[1]
    position = torch.arange(1, length, device=input_ids.device)
    wrong = torch.where(predicted == input_ids[:, 1:], length, position)
    wrong = torch.cat([wrong.new_full((len(wrong), 1), length), wrong], dim=1)
    return wrong.flip(1).cummin(1).values.flip(1)


def common_ngrams(continuation: Tensor, truth: Tensor, n: int) -> Tensor:
    """(R, T - n + 1): for each i, how many n-grams of continuation[i:] are n-grams of truth[i:], both (R, T)."""
    windows = truth.shape[1] - n + 1
    same = continuation[:, :, None] == truth[:, None, :]
    equal = same[:, :windows, :windows]
    for shift in range(1, n):
        equal = equal & same[:, shift : shift + windows, shift : shift + windows]
    start = torch.arange(windows, device=truth.device)
    latest = torch.where(equal, start, -1).amax(2)  # where truth has this n-gram for the last time
    counts_up_to = torch.minimum(start, latest)  # this n-gram counts for every i up to here
    histogram = latest.new_zeros(len(truth), windows + 1)
    histogram.scatter_add_(1, counts_up_to + 1, torch.ones_like(counts_up_to))
    return histogram[:, 1:].flip(1).cumsum(1).flip(1)


def _rows_like(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)[:, None].expand_as(x)
