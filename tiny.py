"""Train a small language model on stories in a few minutes, on the machine at hand; read a story.

By the end of this file you know every part of a GPT (embedding, rotary positions, attention, MLP,
head), what helps a small one that has only minutes (a memory, layers over words, a pointer), how it
is trained against the clock instead of for a number of steps, and how a model that only counts
(ngram.py) can teach one that learns. The one command:

    python tiny.py --minutes 5

Sections 1 to 5 are the subject: the model, sampling, the optimizer, data and loss, the training
loop. Sections 6 to 9 are what a program owes its users; read them when you need them.

Axes: B windows of text in a batch, T bytes in a window (when generating, T new bytes of all L), W
words in it, C the model's width, H attention heads, D = C / H the width of a head, K kinds of
context that the memory looks up.
"""
import os
import time

START = time.monotonic()  # the budget counts everything, the slow imports below included

# PyTorch's threads spin while they wait for each other. Where another process is running, that
# makes steps take a third longer, and sometimes many times as long. Spinning for a shorter time
# costs 4 % when nothing else runs.
# (This must be set before `import torch`.)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import contextlib
import ctypes
import io
import json
import math
import shlex
import signal
import sys
import threading
import zlib
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import END, Problem, add_arguments, lock, notice, number, peak_memory, printable, save
from data import text_from
from ngram import NGram


# ---- 1. The model --------------------------------------------------------------------------------
# The whole is `GPT`, at the end of this section; its docstring is the map. In short: layers
# look at words, and everything smaller than a word is left to a table. (With --plain every byte is
# a word, and there is no table.)

def norm(x):
    """Scale each vector to mean 0 and variance 1: LayerNorm (Ba et al. 2016) without a gain."""
    return F.layer_norm(x, (x.shape[-1],))


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021). x (..., W, D); cos, sin (..., W, D/2) -> (..., W, D)

    Each pair of numbers, j and j + D/2, is turned by an angle that grows with the position. The
    product of a query and a key (see Attention) then depends on how far apart they are, not on
    where they are. (GPT makes the angles.)
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    """Every word looks at the words up to itself and gathers what they say (Vaswani et al. 2017).

    Each head makes three vectors of each word's vector: a query (what am I looking for?), a key
    (what am I?) and a value (what do I tell whoever finds me?). A word's score for an earlier one
    is its query times that one's key. Softmax turns the scores into attention weights, which sum to
    1, and what the head finds is the values' weighted sum.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)  # at step 0 a layer adds nothing and disturbs no gradient

    def forward(self, x, cos, sin, kv=None, slot=None):
        """x (B, W, C) -> (B, W, C)

        cos, sin (W, D/2): see rotate. For generation (skip it at first): kv, a KV cache, has room
        for the keys and values of S words, (2, B, S, H, D). The words of x go into it at `slot`,
        (B, W) int64, which says how many words of their text came before each (GPT.think_on), and
        see all up to themselves. cos and sin are those of each word's slot, (B, 1, W, D/2).
        """
        B, W, C = x.shape
        q, k, v = self.qkv(x).view(B, W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, W, D)
        # Normed queries and keys (Henry et al. 2020) cannot grow: the learning rate can be high.
        q, k = rotate(norm(torch.stack((q, k))), cos, sin)
        if kv is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            row = torch.arange(B, device=x.device)[:, None]
            kv[:, row, slot] = torch.stack((k, v)).transpose(2, 3)
            k, v = kv[:, :, : slot.max() + 1].transpose(2, 3)
            seen = torch.arange(k.shape[2], device=x.device) <= slot[:, None, :, None]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(y.transpose(1, 2).reshape(B, W, C))


class MLP(nn.Module):
    """Every word thinks about what it has seen, on its own. ReLU squared: So et al. 2021."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())  # (B, W, C) -> (B, W, 4 C) -> (B, W, C)


class Block(nn.Module):
    """One layer: look around, then think. Each part is added to x (residual connection), so that
    a layer only has to say what changes, and gradients flow straight through."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = Attention(width, heads)
        self.mlp = MLP(width)

    def forward(self, x, cos, sin, kv=None, slot=None):
        x = x + self.attention(norm(x), cos, sin, kv, slot)
        return x + self.mlp(norm(x))


# A small model sees too few bytes in five minutes to learn spelling and grammar by attention. So
# each position also looks up, in one large table, a vector for each of the contexts it stands in:
# "after the bytes ` wen`", "in a word that began `we`, after `she`", and so on. A context's row is
# its hash, collisions and all (hashed n-gram embeddings, Svenstrup et al. 2017), and a row that is
# not looked up costs nothing. Counting (ngram.py) keeps 256 counts for each context; here it is C
# numbers, which mean whatever helps the model.

GRAMS = (1, 2, 3, 4, 5, 6, 8)  # lengths of contexts in bytes; four more kinds are about words
KINDS = len(GRAMS) + 4
WORD = len(GRAMS)  # the kind "the word so far"
ODD = 6364136223846793005  # Knuth's, for MMIX; multiplying by an odd number mod 2^64 loses nothing
INVERSE = pow(ODD, -1, 2**64) - 2**64  # ODD * INVERSE = 1 modulo 2^64; as a signed int64
COUNTER_BITS = 24  # The highest 24 bits of a context's hash say which of 2^24 counters is its own
#                    (see Memory), the highest 19 of these (by default) which of 2^19 rows.


def is_letter(ids):
    """Which bytes belong to a word: letters, the apostrophe, all of UTF-8 beyond ASCII. -> bool"""
    lower = ids | 32
    ascii_letter = (lower >= ord("a")) & (lower <= ord("z"))
    return ascii_letter | (ids == ord("'")) | (ids >= 128)


def contexts(ids, T):
    """Hash the contexts that each of the last T bytes completes: ids (B, t) -> (B, T, K), int64.

    One number for each position and kind of context, equal where the contexts are equal. The
    rest is arithmetic; you may skip to Memory.
    """
    # The hash of bytes a..b-1 is the sum of (byte_j + 1) * ODD^(j-a), modulo 2^64 as int64 wraps
    # around. With the running sum S[i] of (byte_j + 1) * ODD^j over all j < i it is
    # (S[b] - S[a]) / ODD^a, and dividing is multiplying by INVERSE^a. So contexts of any length,
    # words too, are hashed at every position without a loop.
    #
    # `gap` holds the last position up to i that is not a letter, `last` the last that is one, or 0
    # where there is none (_ is a space):
    #
    #     i       0  1  2  3  4  5  6  7    From i = 7 backwards: the word so far begins after
    #     byte    _  s  h  e  _  w  e  n    gap[7] = 4; the word before it ends at last[4] = 3 and
    #     gap     0  0  0  0  4  4  4  4    begins after gap[3] = 0.
    #     last    0  1  2  3  3  5  6  7
    text = F.pad(ids, (max(GRAMS), 0), value=END)  # (B, L): a story begins after a few ENDs
    B, L = text.shape
    position = torch.arange(L, device=ids.device)
    # power[j] is ODD^(j+1) and inverse[a] is INVERSE^(a+1): the extra factors cancel.
    power = torch.full_like(position, ODD).cumprod(0)
    inverse = torch.full((L + 1,), INVERSE, device=ids.device).cumprod(0)
    S = F.pad(((text + 1) * power).cumsum(1), (1, 0))  # (B, L + 1)
    letter = is_letter(text)
    gap = torch.where(letter, 0, position).cummax(1).values
    last = torch.where(letter, position, 0).cummax(1).values
    now = position[L - T :].expand(B, T)

    def span(a, b):
        """The hash of bytes a..b-1; a, b (B, T)"""
        return (S.gather(1, b) - S.gather(1, a)) * inverse[a]

    edge = gap.gather(1, now)
    words = [span(edge + 1, now + 1)]  # the word so far; then the two words before it
    for _ in range(2):
        stop = last.gather(1, edge)
        edge = gap.gather(1, stop)
        words.append(span(edge + 1, stop + 1))
    # Where a word has just ended, the word so far is empty: its place takes the byte that ended it.
    # So there `pair` is about the whole word that has ended, `triple` about the last two.
    mark = text[:, L - T :].masked_fill(letter[:, L - T :], 0)
    # In "once she wen": `wen`; `wen` after `she`; `wen` after `once she`; `wen`, two words after
    # `once`. The small odd factors keep apart what would otherwise be the same sum.
    word = (words[0] * 3 + mark) * ODD
    pair = (word + words[1]) * ODD
    triple = (pair + words[2]) * ODD
    skip = word + 5 * words[2]
    found = [span(now + 1 - n, now + 1) for n in GRAMS] + [word, pair, triple, skip]
    kind = torch.arange(KINDS, device=ids.device) * INVERSE
    # `kind` (any K numbers would do) makes the same bytes in another kind another context.
    return (torch.stack(found, -1) ^ kind) * ODD


class Memory(nn.Module):
    """A table with a vector for each context (by hash) and its own optimizer.

    When a text is read a second time, a row that was learned nowhere but here gives away which byte
    came here, and the model learns to trust what says nothing about new text. So the rule is:
    a row is used, to look it up and to learn it, only where its context was seen somewhere else.
    The memory counts at how many steps of the first epoch each context was seen, and asks for

        first epoch     1 or more: the earlier steps were elsewhere
        later epochs    3 or more
        not training    1 or more

    Why 3? The first visit to a context only counts it; the second and third learn. With two visits,
    this place may be the only one that learned. With three, another did.

    Rare contexts, which are most, do not fill the table either (McMahan et al. 2013).

    The vectors of a position's contexts are added, so each receives the gradient of the sum.
    Autograd can therefore stop at the sum, and no gradient of the table's size is ever made.
    The optimizer is row-wise Adagrad (Duchi et al. 2011; one number per row: Naumov et al. 2019):
    the larger a row's gradients have been, the smaller its steps become, so that rare contexts
    learn fast and common ones settle.

    The contract: call it once, let `backward` of a loss that is a MEAN over positions run once,
    then call `step`. Set later_epoch when the text begins again. To go on after a break, keep
    `squares` as well, the optimizer's state (Run.save): state_dict leaves it out.
    """

    def __init__(self, width, rows):
        """rows: a power of 2, at most 2^COUNTER_BITS, or it raises ValueError. Counters are finer
        than rows: several contexts may share a row, but they should not make each other known."""
        super().__init__()
        if rows.bit_count() != 1 or rows > 2**COUNTER_BITS:
            raise ValueError(f"rows must be a power of 2, at most 2^{COUNTER_BITS}, not {rows}")
        self.later_epoch = False
        self.shift = COUNTER_BITS - (rows.bit_length() - 1)  # counter >> shift is the row
        self.register_buffer("table", torch.zeros(rows, width))
        self.register_buffer("count", torch.zeros(2**COUNTER_BITS, dtype=torch.uint8))
        # The sum of a row's mean squared gradients. If it began at 0, a row's first step would be
        # equally long however small the gradient: a context seen twice would be trusted at once.
        self.register_buffer("squares", torch.full((rows,), 0.03), persistent=False)

    def forward(self, hashes):
        """hashes (N, K) int64, of which the highest bits count (multiply small numbers by ODD) ->
        (N, C): the sum of the rows of the contexts that are known"""
        counter = (hashes >> (64 - COUNTER_BITS)) & (2**COUNTER_BITS - 1)  # the highest bits
        learning = torch.is_grad_enabled()
        needed = 1
        if learning and self.later_epoch:
            needed = 3
        known = (self.count[counter] >= needed).to(self.table.dtype)  # (N, K), 0 or 1
        row = counter >> self.shift
        out = F.embedding_bag(row, self.table, mode="sum", per_sample_weights=known)
        if learning:
            out.requires_grad_()  # a leaf: `backward` ends here and leaves the gradient in out.grad
            self.used = counter, known, out
        return out

    @torch.no_grad()
    def step(self, lr):
        """Learn from the gradient that the last look-up received."""
        counter, known, out = self.used
        gradient = all_processes(out.grad * len(out))  # (N, C); the loss is a mean: undo it
        counter = all_processes(counter)
        known = all_processes(known)
        row = (counter >> self.shift).flatten()
        square = known * gradient.square().mean(1, keepdim=True)  # (N, K)
        self.squares.index_add_(0, row, square.flatten())
        rate = -lr * known * self.squares[row].rsqrt().view_as(known)
        update = rate[:, :, None] * gradient[:, None]  # (N, K, C)
        self.table.index_add_(0, row, update.flatten(0, 1))
        if not self.later_epoch:
            # Assigned, not added: a context that comes twice in a step is counted once.
            self.count[counter] = self.count[counter].clamp(max=254) + 1


def all_processes(x):
    """Under torchrun the rows of x, (N, ...), from all processes; otherwise x itself."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def find_words(ids):
    """ids (B, L) int64 -> words_done (B, L): how many words are complete at each byte; end (B, W):
    the byte that completes each word, the first that is not a letter (0 where a text has fewer
    words).

        ids         O  n  c  e  _  s  h  e  ,  _  w  e  n
        words_done  0  0  0  0  1  1  1  1  2  2  2  2  2
        end         4, 8
    """
    letter = is_letter(ids)
    ends = ~letter & F.pad(letter[:, :-1], (1, 0)) | (ids == END)  # END after END ends one, too
    words_done = ends.cumsum(1)
    row, t = ends.nonzero(as_tuple=True)
    end = ids.new_zeros(len(ids), max(1, words_done.max()))
    end[row, words_done[row, t] - 1] = t
    return words_done, end


def take(x, index):
    """From each text the vectors that its indices name: x (B, N, C), index (B, T) -> (B, T, C)"""
    row = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return F.embedding(row + index, x.flatten(0, 1))


def extend(cache, name, new):
    """Append new (B, T, ...) to what the cache has under that name -> all of it, (B, P + T, ...)"""
    if cache is None:
        return new
    if name in cache["bytes"]:
        new = torch.cat((cache["bytes"][name], new), 1)
    cache["bytes"][name] = new
    return new


class Pointer(nn.Module):
    """Copies words. To spell `Lily` letter by letter out of a vector takes long to learn; to point
    at the Lily that was read does not (pointer-sentinel mixture, Merity et al. 2016).

    Where a word begins, one softmax gives a share a_i to each earlier word i and the rest, a_0 (the
    sentinel), to the head, which spells. So a word begins with the letters `prefix` with

        P(prefix) = a_0 p_head(prefix) + the sum of the a_i of all words that begin with it

    and the next letter is c with P(prefix + c) / P(prefix). (A word that is complete gives its
    share to the head, which says what follows it.) With every letter, words that do not begin so
    drop out, and those that do gain weight against the head. Say that after "Lily saw Tim. " the
    shares are Lily 0.1, saw 0.1, Tim 0.3, head 0.5, and the head gives `Ti` a probability of 0.02.
    After "Lily saw Tim. Ti" that leaves

        Tim    0.3             for the letter m
        head   0.5 x 0.02      for all bytes, as the head sees fit: 3 % of the sum

    This class does not divide by P(prefix): the softmax of the loss, or of sampling, does.
    """

    def __init__(self, width):
        super().__init__()
        self.query = nn.Linear(width, width // 2 + 1, bias=False)  # one more: the sentinel's score
        self.key = nn.Linear(width, width // 2, bias=False)
        nn.init.zeros_(self.query.weight)

    def forward(self, p, states, words, ids, prefix_hash, words_done, end, cache=None):
        """What comes after each of the last T of L bytes. -> (B, T, 256), to be normalised

        p (B, T, 256): what the head predicts; states (B, T, C): of these T bytes; words (B, W, C):
        the states of the words; ids (B, L); prefix_hash (B, L): of the word so far; words_done,
        end: from find_words.

        Where "Lily saw Tim. Ti" ends, two letters are typed, and of the three words
            first 0 5 9   size 4 3 3   next_at 2 7 11   fits 0 0 1   next_byte l w m
        """
        B, T, _ = states.shape
        L = ids.shape[1]
        # 1. Where does each word begin, and how many letters of the next one are typed?
        position = torch.arange(L, device=ids.device)
        gap = torch.where(is_letter(ids), -1, position).cummax(1).values  # (B, L): last non-letter
        first = gap.gather(1, (end - 1).clamp(min=0)) + 1  # (B, W): each word's first letter
        size = (end - first).clamp(min=0)[:, None]  # (B, 1, W): how many letters it has
        gap = gap[:, L - T :]
        typed = (position[L - T :] - gap)[:, :, None]  # (B, T, 1): letters of the word so far
        before_word = gap.clamp(min=0)  # (B, T): the byte before it

        # 2. The shares, made at the byte before the word, of the words that were complete there.
        query = take(extend(cache, "query", self.query(states)), before_word)  # (B, T, C/2 + 1)
        score = query[..., 1:] @ self.key(words).mT / self.key.out_features**0.5  # (B, T, W)
        word = torch.arange(end.shape[1], device=ids.device)
        read = word < words_done[:, L - T :, None]  # (B, T, W)
        score = score.masked_fill(~read | (size == 0), -1e9)
        score = torch.cat((query[..., :1] + 4, score), -1)  # + 4: at first as much as 55 words
        share = score.softmax(-1)  # (B, T, W + 1)

        # 3. Which words begin with the letters so far, and which byte comes next in each?
        next_at = (first[:, None] + typed).clamp(max=L - 1)  # (B, T, W)
        before = (next_at - 1).clamp(min=0).flatten(1)
        # (At `before` stands the hash of as many first letters of that word as are typed.)
        alike = prefix_hash.gather(1, before).view_as(next_at) == prefix_hash[:, L - T :, None]
        fits = (typed == 0) | alike & (typed <= size)
        next_byte = ids.gather(1, next_at.flatten(1)).view_as(next_at)
        share_fits = share[..., 1:] * fits
        is_whole = typed >= size  # typed in full: its share goes to the head

        # 4. The head's share, times the probability that it gave to the letters so far. (cache["p"]
        # is what it said last time, about the first byte of ids that is new.)
        p_came = p[:, :-1].gather(2, ids[:, L - T + 1 :, None])[:, :, 0]
        p_came = F.pad(p_came, (1, 0), value=1.0)
        if cache is not None:
            if "p" in cache:
                p_came = cache["p"].gather(1, ids[:, L - T :])
            cache["p"] = p[:, -1]
        # With the logarithms of all bytes summed up, a difference is that of the letters between.
        total = extend(cache, "log_p", p_came.clamp(min=1e-12).log()).cumsum(1)
        log_prefix = total[:, L - T :] - total.gather(1, before_word)
        to_head = share[..., 0] * log_prefix.clamp(min=-25).exp()
        to_head = to_head + (share_fits * is_whole).sum(-1)
        to_words = (share_fits * ~is_whole).to(p.dtype)
        return (to_head[:, :, None] * p).scatter_add(2, next_byte, to_words)


class GPT(nn.Module):
    """A byte-level GPT that thinks in words.

    width: a multiple of 2 x heads; context: even; rows: of the memory, a power of 2; plain: the
    usual transformer instead. Every byte is a word, there is no memory and no pointer.

    Bytes make long texts, so layers over bytes cost much. Here they see words only. The vector of a
    word is that of the byte that ends it, as the memory's contexts there include the whole word.
    There are five times fewer positions, so two layers cost less than one over bytes. Within a
    word, spelling is left to what is cheap: the memory says what letters follow these letters, and
    the state of the last complete word, what the story says, scales and shifts that (FiLM, Perez et
    al. 2018). Last, the pointer copies words.

        bytes      embedding + memory ---------------------> scale, shift -> head -> pointer
                          | at the words' ends                  ^ of the last complete word
        words             +-> layer -> layer --> states --------+

    Nothing stops at the END between two stories: what stands before it is seen, as in most GPTs,
    and the model has to learn to ignore it.
    """

    def __init__(self, layers=2, heads=4, width=128, context=512, rows=2**19, plain=False):
        super().__init__()
        self.config = dict(layers=layers, heads=heads, width=width, context=context, rows=rows,
                           plain=plain)
        self.context = context
        self.byte = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.zeros_(self.head.weight)  # at step 0 it predicts 1/256 for every byte: 8 bits
        self.memory = None
        if not plain:
            self.memory = Memory(width, rows)
            self.film = nn.Linear(width, 2 * width, bias=False)
            nn.init.zeros_(self.film.weight)
            self.pointer = Pointer(width)
        pairs = width // heads // 2
        frequency = 10000.0 ** (-torch.arange(pairs) / pairs)
        angle = torch.arange(context)[:, None] * frequency  # (context, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids, cache=None):
        """ids (B, T) int64 -> logits (B, T, 256) float32 for the byte after each one, and the
        states (B, T, C) that they were computed from.

        cache: None, or what new_cache returned, so that a text can be fed piece by piece, each byte
        once: first any number of bytes, then one at a time. Raises ValueError for anything else,
        and where more than `context` bytes come together.
        """
        ids = ids.to(self.cos.device)
        B, T = ids.shape
        L = T
        if cache is not None and "ids" in cache["bytes"]:
            L += cache["bytes"]["ids"].shape[1]
        if L > self.context or L > T > 1:  # several bytes at once only into an empty cache
            raise ValueError(f"{T} bytes after {L - T} do not fit the context of {self.context}")
        seen = extend(cache, "ids", ids)  # (B, L)
        x = self.byte(ids)  # (B, T, C)
        if self.memory is None:
            position = torch.arange(L, device=ids.device).expand(B, L)  # every byte is a word
            states = self.think(norm(x), position + 1, position, cache)[:, -T:]
            return self.head(states).float(), states
        hashes = contexts(seen, T)  # (B, T, K)
        words_done, end = find_words(seen)
        x = norm(x + self.memory(hashes.flatten(0, 1)).view(B, T, -1))
        words = self.think(x, words_done, end, cache)  # (B, W + 1, C)
        # Row 0 of `words` is zeros, so row `words_done` is that of the last complete word.
        scale, shift = take(self.film(words), words_done[:, L - T :]).chunk(2, -1)
        states = norm(x * (1 + scale) + shift)
        p = self.head(states).float().softmax(-1)
        prefix_hash = extend(cache, "prefix_hash", hashes[:, :, WORD])
        p = self.pointer(p, states, words[:, 1:], seen, prefix_hash, words_done, end, cache)
        return (p + 1e-30).log(), states  # whose softmax is p, normalised

    def think(self, x, words_done, end, cache):
        """Run the layers over the words: x (B, T, C) -> the states of all W words, (B, W + 1, C);
        before them a row of zeros, for bytes before the first word."""
        if cache is not None:
            return self.think_on(x, words_done, end, cache)
        W = end.shape[1]
        w = take(x, end)  # (B, W, C)
        for block in self.blocks:
            w = block(w, self.cos[:W], self.sin[:W])
        return F.pad(norm(w), (0, 0, 1, 0))

    def think_on(self, x, words_done, end, cache):
        """The same in generation (training never comes here): only words that the last T bytes
        complete go through the layers.

        Some texts may complete a word while others do not. Say two have 3 words, so `before` is
        [[3], [3]], and the next byte is a space in the first, a letter in the second. Then slot is
        [[3], [3]]: both go through the layers as their fourth word, and what comes out of the
        second's, which has not ended, will be overwritten when it has.
        """
        B, T, _ = x.shape
        L = words_done.shape[1]
        before = words_done.new_zeros(B, 1)  # words that were complete before
        if L > T:
            before = words_done[:, L - T - 1 : L - T]
        new = (words_done[:, -1:] - before).max()  # new words in the text with most of them
        if new > 0:
            slot = before + torch.arange(new, device=x.device)  # (B, new): their numbers
            at = end.gather(1, slot.clamp(max=end.shape[1] - 1)) - (L - T)
            w = take(x, at.clamp(min=0))  # (B, new, C)
            cos = self.cos[slot][:, None]  # (B, 1, new, D/2)
            sin = self.sin[slot][:, None]
            for block, kv in zip(self.blocks, cache["layers"]):
                w = block(w, cos, sin, kv, slot)
            row = torch.arange(B, device=x.device)[:, None]
            cache["words"][row, slot + 1] = norm(w)
        return cache["words"][:, : end.shape[1] + 1]

    def new_cache(self, B):
        """An empty cache for B texts: room for the words' states and for each layer's keys and
        values (KV cache). What is kept of each byte joins them in `extend`."""
        H = self.config["heads"]
        C = self.config["width"]
        room = [self.cos.new_zeros(2, B, self.context, H, C // H) for _ in self.blocks]
        return {"bytes": {}, "words": self.cos.new_zeros(B, self.context + 1, C), "layers": room}

    def rewind(self, cache, row, length):
        """Make every text of the cache the first `length` bytes of the text in that row."""
        B = len(cache["words"])
        for name, x in cache["bytes"].items():
            cache["bytes"][name] = x[row, :length].expand(B, *x[row, :length].shape)
        for x in (cache["words"][None], *cache["layers"]):  # (1 or 2, B, words, ...)
            x[:, :, : length + 1] = x[:, row, None, : length + 1].clone()
        # Where anything was cut off this is about a byte that is no longer there. But then a word
        # has just ended, and the pointer uses it within a word only.
        if "p" in cache:
            cache["p"] = cache["p"][row].expand(B, -1)


# ---- 2. Sampling: one word after the other -------------------------------------------------------

def choose(logits, temperature=1.0, top_p=1.0, generator=None):
    """Draw from each row. logits (B, n), nats -> (B,) int64

    temperature below 1 favours what is likely; 0 takes the likeliest. top_p < 1 draws from the
    likeliest bytes that together have that probability (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature <= 1e-6:  # dividing by less would overflow
        return logits.argmax(-1)
    p = F.softmax(logits / temperature, -1, dtype=torch.float64)
    if top_p < 1:
        ordered, byte = p.sort(-1, descending=True)
        enough = ordered.cumsum(-1) - ordered >= top_p  # likelier bytes have that much already
        p = p.scatter(1, byte, ordered.masked_fill(enough, 0))
    return torch.multinomial(p, 1, generator=generator)[:, 0]


LONGEST_WORD = 24  # bytes that are drawn before a candidate is chosen, at most
TEMPERATURE = 0.45  # a blind judge preferred it to 0.6 (README)


@torch.inference_mode()
def generate(model, prompt, temperature=1.0, top_p=1.0, candidates=8, generator=None, fuse=None):
    """Continue a prompt, without end: yields the bytes of one word after the other.

    A temperature per byte is not a temperature per word. Say `park` has 0.25, and four words with b
    have 0.08 each. Sharpened byte by byte, b (0.32) beats p (0.25), and the story goes on with a
    word that is not the likeliest. What we want is a word with a probability proportional to
    p(word)^(1/t), for a temperature t between 0 and 1. Drawing several candidates from the model as
    it is, each up to the byte that ends the word, gives p(word); keeping one of them in proportion
    to p(word)^(1/t - 1) multiplies that to p(word)^(1/t), exactly so with infinitely many
    candidates (importance resampling, Rubin 1987).

    model: a GPT, or what has its forward, context, new_cache and rewind. prompt: bytes; END is put
    before it. top_p: of each byte. candidates: with 1 the temperature is each byte's (as it is at
    t = 0 and t >= 1). fuse: a function that may change the probabilities (sample.py): p (B, 256),
    states (B, L, C) of the bytes in the context, ids (B, n) all so far -> p.

    When the context is nearly full, its last three quarters are fed again as a new one, so that
    every byte sees at least that much, however long the text.
    """
    by_word = candidates > 1 and 1e-6 < temperature < 1
    B = 1
    byte_temperature = temperature
    if by_word:
        B = candidates
        byte_temperature = 1.0
    longest = min(LONGEST_WORD, model.context // 4)
    ids = torch.tensor([[END, *prompt]]).repeat(B, 1)  # (B, n): the text, the same in each row
    cache = None
    fed = 0  # bytes in the cache: all of the text (or its end) but `new`
    while True:
        if cache is None or fed + longest > model.context:
            cache = model.new_cache(B)
            new = ids
            if ids.shape[1] + longest > model.context:
                new = ids[:, -3 * model.context // 4 :]
            fed = 0
        log_p = torch.zeros(B)  # of each candidate, nats
        length = torch.zeros(B, dtype=torch.int64)
        going = torch.ones(B, dtype=torch.bool)
        begin = ids.shape[1]
        while going.any() and ids.shape[1] < begin + longest:
            logits, states = model(new, cache)
            fed += new.shape[1]
            logits = logits[:, -1].cpu().nan_to_num()  # (B, 256); NaN if training diverged
            if fuse is not None:
                states = extend(cache, "states", states)
                logits = fuse(F.softmax(logits, -1), states, ids).clamp(min=1e-30).log()
            new = choose(logits, byte_temperature, top_p, generator)[:, None]  # (B, 1)
            ids = torch.cat((ids, new), 1)
            log_p += going * logits.log_softmax(-1).gather(1, new)[:, 0]
            length += going
            going &= is_letter(new[:, 0])
        if by_word:
            row = choose(log_p[None] * (1 / temperature - 1), generator=generator).item()
            end = begin + length[row].item()
            fed -= ids.shape[1] - end  # the last byte of the chosen word is `new`, fed next
            ids = ids[row, :end].repeat(B, 1)
            model.rewind(cache, row, fed)
        new = ids[:, -1:]  # drawn, but not fed yet
        yield bytes(ids[0, begin:].tolist())


def continuation(model, prompt, length, *options):
    """Yields the words after a prompt, bytes, to END or to `length` bytes. options: of generate"""
    for word in generate(model, prompt, *options):
        text = word.split(bytes([END]))[0][:length]
        yield text
        length -= len(text)
        if len(text) < len(word) or length == 0:
            return


def write_story(model, prompt, length=1000, temperature=TEMPERATURE, top_p=1.0, candidates=8,
                generator=None, fuse=None):
    """Continue a prompt to END or to `length` bytes in all. -> bytes"""
    prompt = prompt[:length]
    left = length - len(prompt)
    options = temperature, top_p, candidates, generator, fuse
    return prompt + b"".join(continuation(model, prompt, left, *options))


# ---- 3. The optimizer ----------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024): every direction of a weight
    matrix moves by the same amount, not only the few that dominate the gradient.

    For the matrices inside a net; embeddings and the head are better off with Adam. Raises
    ValueError for anything that is not a matrix. (torch.optim.Muon computes in bfloat16, which is
    very slow on CPUs without such units.)
    """

    def __init__(self, parameters, lr=0.02, momentum=0.95):
        parameters = list(parameters)
        for w in parameters:
            if w.ndim != 2:
                raise ValueError(f"Muon is for matrices, not for a shape of {tuple(w.shape)}")
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(w)
                # The running mean of the gradients, and Nesterov's look one step ahead of it.
                momentum = state["momentum"].lerp_(w.grad, 1 - group["momentum"])
                update = orthogonalize(w.grad.lerp(momentum, group["momentum"]))
                size = max(1, w.shape[0] / w.shape[1]) ** 0.5  # Jordan's, for tall matrices
                w.sub_(update, alpha=group["lr"] * size)


def orthogonalize(x):
    """Push all singular values of a matrix x (r, c) towards 1 with five Newton-Schulz steps.

    x -> a x + b (x x') x + c (x x')^2 x leaves the singular vectors alone and sends each singular
    value s to a s + b s^3 + c s^5. With Jordan's coefficients five times that take nearly any s
    between 0 and 1 to about 1.
    """
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.T).T  # the smaller product x x'
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


# ---- 4. What is trained on, and how it is judged -------------------------------------------------

EPOCHS = 2  # a run ends after this many: then overfitting sets in
LEAST = 250_000  # bytes; on a shorter text a run ends only after the steps that these would take


class Batches:
    """Windows of the text, in an order drawn anew for each epoch, and the teacher's view of them.

    Windows are drawn without replacement: all of the text is read before any of it is read again
    (but for what is left over at the end of an epoch, less than a batch).
    (Drawn with replacement, a third of the text is still unseen when as much as all was read.)
    text: (n,) uint8. rank, world: this is one of `world` processes and reads its part of the text
    (alone: 0, 1).
    """

    def __init__(self, text, batch, context, seed, teacher=None, rank=0, world=1):
        self.text = np.concatenate((np.zeros(1, np.uint8), text))  # END before the first story
        self.batch = batch
        self.context = context
        self.seed = (seed, rank)
        self.teacher = teacher
        starts = len(self.text) - context
        self.low = starts * rank // world
        self.high = starts * (rank + 1) // world
        self.step_bytes = context * batch * world
        self.per_epoch = max(1, starts // self.step_bytes)  # steps
        self.last_step = EPOCHS * max(self.per_epoch, LEAST // self.step_bytes)
        self.epoch = None

    def get(self, step, taught=False):
        """-> ids (B, T + 1) int64; the teacher's distributions (B, T, 256) float32, or None

        It depends on seed and step alone, so that a run can be resumed anywhere."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            random = np.random.default_rng((*self.seed, epoch))
            # Windows begin elsewhere in each epoch.
            first = self.low + random.integers(min(self.context, self.high - self.low))
            windows = random.permutation(np.arange(first, self.high, self.context))
            self.order = np.resize(windows, self.per_epoch * self.batch)  # repeats a few if needed
        start = self.order[place * self.batch : (place + 1) * self.batch]  # (B,)
        position = start[:, None] + np.arange(self.context + 1)  # (B, T + 1)
        ids = torch.from_numpy(self.text[position].astype(np.int64))
        if not taught:
            return ids, None
        # The teacher has counted this very text; asked plainly it would recite it: leave one out.
        # Its text has no END in front, hence the 1.
        target = position[:, 1:].ravel() - 1
        q = self.teacher.probs(self.text[1:], target, leave_one_out=True)
        return ids, torch.from_numpy(q).view(self.batch, self.context, 256)


def distillation_loss(logits, target, teacher, weight):
    """(1 - weight) x cross-entropy to the target + weight x cross-entropy to the teacher's
    distribution (Hinton et al. 2015). -> scalar, nats per byte (a nat is 1 / ln 2 bits)

    One target says what came. The teacher's 256 probabilities say what else could have come and how
    likely, so each position teaches more: as long as the student knows less than the teacher. Off
    unless --distill is given: it has made no stories better here (README).
    logits (N, 256) nats, target (N,) int64, teacher (N, 256) probabilities
    """
    hard = F.cross_entropy(logits, target)
    soft = F.cross_entropy(logits, teacher)
    return (1 - weight) * hard + weight * soft


@torch.no_grad()
def evaluation_windows(model, text, every=1, batch=16):
    """Read text, (n,) uint8, so that each byte is scored once, with at least half a context
    before it wherever the text has that much: windows overlap by half, and only their second half
    is scored (in the first window, all). every: one window in `every`, for a quick look.

    Yields, for b windows at a time, on the CPU: ids (b, T) int64; target (b, T), the byte after
    each; at (b, T), where the targets stand: target = text[at]; scored (b, T) bool; logits
    (b, T, 256); states (b, T, C). No random numbers are used: evaluating changes nothing.
    """
    T = model.context
    padded = np.concatenate((np.zeros(1, np.uint8), text, np.zeros(T, np.uint8)))
    padded = torch.from_numpy(padded.astype(np.int64))
    starts = torch.arange(0, max(1, len(text) - T // 2), T // 2)[::every]
    for start in starts.split(batch):
        start = start[:, None]  # (b, 1)
        at = start + torch.arange(T)
        scored = (at < len(text)) & ((at >= start + T // 2) | (start == 0))
        ids = padded[at]
        logits, states = model(ids)
        yield ids, padded[at + 1], at, scored, logits.cpu(), states.cpu()


def evaluate(model, text, every=1):
    """Bits per byte of text, (n,) uint8: the mean of -log2 p(byte)."""
    nats = 0.0
    count = 0
    for _, target, _, scored, logits, _ in evaluation_windows(model, text, every):
        loss = F.cross_entropy(logits[scored], target[scored], reduction="none")
        nats += loss.double().sum().item()
        count += len(loss)
    return nats / count / math.log(2)


# ---- 5. Training ---------------------------------------------------------------------------------

MEMORY_RATE = 0.4
DISTILL_WEIGHT = 0.6  # of the teacher in the loss, while it teaches
PROMPT = b"Once upon a time, there was a little"


def make_optimizers(model):
    """Muon for the layers' matrices, Adam for all around them. (Memory.step is the third.)"""
    outside = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    muon = Muon(model.blocks.parameters(), lr=0.02)
    adam = torch.optim.Adam(outside, lr=3e-3, betas=(0.9, 0.95), fused=True)
    return [muon, adam]


def schedule(progress):
    """Full speed for half the budget, then down to 0 in a straight line. 0 <= progress <= 1 -> the
    factor for every optimizer's peak learning rate. How many steps fit into the budget is not known
    beforehand, so a schedule over steps could not end at 0."""
    return min(1.0, 2 * (1 - progress))


def train_step(net, optimizers, ids, teacher, factor):
    """One step. net: a GPT, or one in DistributedDataParallel; ids (B, T + 1); teacher (B, T, 256)
    or None; factor: of all learning rates. -> loss, nats per byte

    A NaN or infinite gradient changes nothing, and the loss that is returned is NaN.
    """
    model = getattr(net, "module", net)
    logits, _ = net(ids[:, :-1])  # (B, T, 256)
    logits = logits.flatten(0, 1)
    target = ids[:, 1:].flatten().to(logits.device)
    if teacher is None:
        loss = F.cross_entropy(logits, target)
    else:
        teacher = teacher.flatten(0, 1).to(logits.device)
        loss = distillation_loss(logits, target, teacher, DISTILL_WEIGHT)
    loss.backward()
    # A sum is NaN or infinite if any of its numbers is.
    gradients = torch.stack([p.grad.sum() for p in model.parameters() if p.grad is not None])
    finite = gradients.isfinite().all()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if not finite:
        return loss.detach() * math.nan
    if model.memory is not None:
        model.memory.step(MEMORY_RATE * factor)
    return loss.detach()


def train(args, start, before=None):
    """Train one model, from the text to the closing figures. -> the figures, a dict

    args: the options; start: the second (time.monotonic) at which the budget begins; before: with
    --resume the model and the checkpoint to go on from.
    """
    prepare_cpu()  # two switches (section 8)
    device = pick_device(args.device)
    rank, world = join_processes(device)
    text = text_from(args, least=args.set.get("context", 512) + 1)
    clock = Clock(start + text.waited)  # seconds of download do not count
    run = Run(args, text, rank, world, clock, before)
    teacher = run.count_ngram()  # the first story, a baseline, and the teacher if there is one
    model = run.make_model(device)
    optimizers = make_optimizers(model)
    setting = run.state["setting"]  # sizes, batch, rate (section 8)
    batches = Batches(text.train, setting["batch"], model.context, args.seed, teacher, rank, world)
    net = model
    if world > 1:
        net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    with contextlib.closing(run):
        run.begin(model, optimizers, batches)
        # The fraction of the budget that is gone, or of two epochs, whichever is larger.
        while (progress := run.progress()) < 1:
            step = run.state["step"]
            ids, distributions = batches.get(step, taught=progress < args.distill)
            if model.memory is not None:
                model.memory.later_epoch = step >= batches.per_epoch
            factor = setting["rate"] * schedule(progress)
            loss = train_step(net, optimizers, ids, distributions, factor)
            run.count(loss)  # steps, the progress bar, NaN
            if run.time_to_look():
                run.look()  # evaluate, continue PROMPT
            if time.monotonic() - run.saved > SAVE_EVERY:
                run.save()
        return run.finish()


# ==================================================================================================
# You may stop reading here. What follows is what a program owes its users: a clock, checkpoints, a
# safe Ctrl-C, the machine at hand, a picture, options. The subject goes on in sample.py.
# ==================================================================================================


# ---- 6. One run: its clock, looks, checkpoints, end ----------------------------------------------

LOOKS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)  # progress at which to evaluate
VALIDATED = 300_000  # bytes of the validation text that the figures are about
SAVE_EVERY = 60.0  # seconds
MOST_NANS = 10  # steps in a row without a finite gradient; then training stops
PAUSE = 10.0  # seconds without a tick: the process was stopped, or the laptop asleep


class Clock:
    """Seconds of the budget that are gone. A laptop that sleeps, or a process that is stopped, does
    nothing meanwhile, so such a pause does not count, wherever it falls. A thread asks the clock
    every second: if for longer than PAUSE nobody has, the whole process stood still."""

    def __init__(self, start):
        self.start = start
        self.asked = time.monotonic()
        self.lock = threading.Lock()
        threading.Thread(target=self.tick, daemon=True).start()

    def __call__(self):
        with self.lock:
            now = time.monotonic()
            if now - self.asked > PAUSE:
                self.start += now - self.asked
            self.asked = now
            return now - self.start

    def tick(self):
        while True:
            time.sleep(1)
            self()


class Run:
    """What a training run keeps beside the model; `state` is what a checkpoint must hold of it."""

    def __init__(self, args, text, rank, world, clock, before):
        self.args = args
        self.text = text
        self.valid = text.valid[:VALIDATED]
        self.checksums = [zlib.crc32(text.train), zlib.crc32(text.valid)]
        self.rank = rank
        self.world = world  # processes
        self.clock = clock
        self.before = before
        self.length = round(400 * min(2, args.minutes))  # bytes of the story at the end
        self.baseline = None  # the n-gram's bits per byte
        self.log = None
        self.handlers = {}
        self.signal = None
        self.bad_steps = 0  # in a row
        self.saved = time.monotonic()
        self.state = dict(step=0, progress=0.0, loss=8.0, skipped=0, looks=0, looked=0.0, curve=[],
                          reserve=0.6 * args.minutes)  # seconds kept for the end
        if before is not None:
            self.state = self.check(before[1]["training"])
        self.say(f"{text.source}: {len(text.train):,} bytes to learn from, "
                 f"{len(self.valid):,} to validate on")

    def check(self, training):
        """Whether an interrupted run can go on: was it about this text? -> its state"""
        if training is None:
            raise Problem(f"the run in {self.args.out} is complete; train another without --resume")
        if training["checksums"] != self.checksums:
            raise Problem(f"the text is not the one that the run in {self.args.out} began with; "
                          "name that one with --data and --valid")
        if training["world"] != self.world:
            raise Problem(f"this run has {training['world']} processes; go on with as many, by "
                          f"torchrun --nproc_per_node={training['world']} tiny.py --resume ...")
        return training["state"]

    def say(self, words):
        """Print. That nobody reads it any more is no reason to stop training."""
        if self.rank == 0:
            try:
                print(printable(words), flush=True)
            except OSError as error:
                if not isinstance(error, BrokenPipeError):
                    notice(f"cannot print: {error.strerror}; no more is shown")
                mute(1)

    def count_ngram(self):
        """Count an n-gram and let it tell the first story. A teacher must know all of the text; for
        a baseline 3 MB a minute are enough, some 3 % of the time. -> the teacher, NGram, or None"""
        args = self.args
        if args.order == 0:
            return None
        counted = self.text.train
        if args.distill == 0:
            counted = counted[: int(min(15e6, 3e6 * max(1, args.minutes)))]
        ngram = NGram(args.order).fit(counted)
        self.baseline = round(ngram.bits_per_byte(self.valid), 4)
        self.say(f"\n{self.clock():6.1f} s  n-gram of order {args.order}, "
                 f"{len(counted) / 1e6:.0f} MB counted: {self.baseline:.3f} bits per byte")
        self.say(readable(ngram.generate(PROMPT, 300, 0.8, args.seed)))
        if args.distill == 0:
            return None
        return ngram

    def make_model(self, device):
        """-> a new GPT of the right size, or the one that the interrupted run had"""
        if self.before is None:
            setting = setting_of(self.args)
            self.state["setting"] = setting
            torch.manual_seed(self.args.seed)
            model = new_model(setting, self.args.plain)
        else:
            model = self.before[0]
            self.say(f"\ngoing on with step {self.state['step'] + 1:,}")
        weights = sum(p.numel() for p in model.parameters())
        memory = 0
        if model.memory is not None:
            memory = model.memory.table.numel()
        self.parameters = weights + memory
        self.say(f"\n{self.clock():6.1f} s  {weights:,} weights and a memory of {memory:,} on "
                 f"{device}, {torch.get_num_threads()} threads")
        return model.to(device)

    def begin(self, model, optimizers, batches):
        """The last thing before the first step: the folder, signals, what --resume restores."""
        self.model = model
        self.optimizers = optimizers
        self.batches = batches
        # The first process writes; it holds the log as long as it runs.
        if self.rank == 0 and self.before is None:
            self.take_folder()
        elif self.rank == 0:
            self.log = lock(os.path.join(self.args.out, "log.jsonl"))
            ended = self.before[1]["written"] != time_written(self.args.out)
            if self.log is None or ended:
                raise Problem(f"the run in {self.args.out} is still going; wait for it to end")
        if threading.current_thread() is threading.main_thread():  # no other may ask for signals
            self.handlers = {n: signal.signal(n, self.interrupt) for n in STOP_SIGNALS}
        hidden = self.rank > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=100, disable=hidden, bar_format="{l_bar}{bar}| {elapsed}{postfix}")
        if self.before is not None:
            training = self.before[1]["training"]
            if model.memory is not None:
                model.memory.squares.copy_(training["squares"])
            for optimizer, state in zip(optimizers, training["optimizers"]):
                optimizer.load_state_dict(state)
            torch.set_rng_state(training["random"])
            self.clock.start = time.monotonic() - training["spent"]  # setting up again was free

    def interrupt(self, number, frame):
        """Ctrl-C, SIGTERM, a closed terminal: stop after this step. A second one stops at once."""
        self.signal = number
        if number in (signal.SIGINT, signal.SIGTERM):
            for second in (signal.SIGINT, signal.SIGTERM):
                signal.signal(second, self.handlers.get(second, signal.SIG_DFL))
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this step; once more: at once\n")
        else:
            signal.signal(number, signal.SIG_IGN)  # the terminal is gone, and may say so twice
            for descriptor in filter(os.isatty, (1, 2)):
                mute(descriptor)

    def progress(self):
        """The part of the run that is over; 1 ends it.

        It is what the clock says, or the epochs where they end sooner. It never falls, and it grows
        by no more than 0.05 a step: whatever has held up the run, the learning rate falls to 0.
        """
        state = self.state
        if self.args.steps:
            progress = state["step"] / self.args.steps
        else:
            seconds = 60 * self.args.minutes - state["reserve"]
            progress = max(self.clock() / seconds, state["step"] / self.batches.last_step)
            if state["step"] > 0:
                progress = np.clip(progress, state["progress"], state["progress"] + 0.05).item()
        state["progress"], self.stopped = agree(progress, self.signal is not None)
        if self.stopped:
            return 1.0
        return state["progress"]

    def count(self, loss):
        """A step is over. loss: nats per byte, NaN if nothing was learned. Raises Problem after
        MOST_NANS such steps in a row."""
        state = self.state
        state["step"] += 1
        if loss.isnan():
            state["skipped"] += 1
            self.bad_steps += 1
        else:
            self.bad_steps = 0
            state["loss"] += 0.01 * (loss.item() / math.log(2) - state["loss"])
        if self.bad_steps == MOST_NANS:
            self.save()
            raise Problem(f"{MOST_NANS} steps in a row had NaN or infinite gradients; the model "
                          f"from before is in {self.args.out}. Train with a lower --set rate=0.5")
        self.bar.n = round(100 * state["progress"])
        self.bar.set_postfix_str(f" step {state['step']:,}, loss {state['loss']:.3f} bits", False)
        self.bar.update(0)

    def time_to_look(self):
        """At each of LOOKS; against the clock no more than a tenth of the time may go into it."""
        state = self.state
        if self.rank > 0 or state["progress"] < (*LOOKS, math.inf)[state["looks"]]:
            return False
        return self.args.steps is not None or state["looked"] <= 0.1 * self.clock()

    def look(self):
        """Evaluate, continue PROMPT, write a line of the log."""
        state = self.state
        state["looks"] = sum(part <= state["progress"] for part in LOOKS)
        began = self.clock()
        bpb = evaluate(self.model, self.valid, every=8)
        evaluated = self.clock()
        story = self.story(PROMPT, 80, candidates=1)
        each_byte = (self.clock() - evaluated) / (80 - len(PROMPT))
        # The end needs a whole evaluation, a longer story, for each byte of which eight candidates
        # take three times as long as one, and half a second for the checkpoint. (It never gets more
        # than a quarter of the budget.) A look is short, and a hiccup in it counts many times over:
        # hence the mean of this estimate and the one before.
        needed = 8 * (evaluated - began) + 3 * self.length * each_byte + 0.5
        needed = (needed + state["reserve"]) / 2
        state["reserve"] = min(needed, 15 * self.args.minutes)
        state["curve"].append((began, bpb))
        line = story.replace("\n", " ")
        self.bar.clear()
        self.say(f"{began:6.1f} s  step {state['step']:6,}  {bpb:.3f} bits per byte | {line}")
        row = dict(seconds=began, step=state["step"], bpb=bpb, train_bits=state["loss"],
                   factor=schedule(state["progress"]))
        with suppressed("cannot write the log"):
            self.log.write(json.dumps(row).encode() + b"\n")
            self.log.flush()
        state["looked"] += self.clock() - began

    def story(self, prompt, length, candidates=8):
        """The run's seed decides which story it is. It is cut off where the budget ends. -> str"""
        generator = torch.Generator().manual_seed(self.args.seed)
        options = length - len(prompt), TEMPERATURE, 1.0, candidates, generator
        story = prompt
        for word in continuation(self.model, prompt, *options):
            story += word
            if not self.args.steps and self.clock() > 60 * self.args.minutes:
                break
        return readable(story)

    def take_folder(self):
        """Make a folder that is this run's alone, and hold its log."""
        self.args.out = new_folder(self.args.out, "log.jsonl")
        self.log = lock(os.path.join(self.args.out, "log.jsonl"))

    def keep_folder(self):
        """If the folder was moved away, even if another run has made one of its name since, go on
        in a new one."""
        log = os.path.join(self.args.out, "log.jsonl")
        if os.path.exists(log) and os.path.samestat(os.stat(log), os.fstat(self.log.fileno())):
            return
        self.take_folder()

    def save(self):
        """Save the state of the training, so that --resume can go on from here. A full disk is no
        reason to stop: there may be room again by the end. -> whether it is saved"""
        self.saved = time.monotonic()
        if self.rank > 0:
            return False
        squares = getattr(self.model.memory, "squares", None)
        training = dict(state=self.state, spent=self.clock(), checksums=self.checksums,
                        world=self.world, random=torch.get_rng_state(), squares=squares,
                        optimizers=[optimizer.state_dict() for optimizer in self.optimizers])
        with suppressed("no checkpoint was written"):
            self.keep_folder()
            facts = dict(text_crc32=self.checksums[0])
            save_checkpoint(self.args, self.model, facts, training)
            return True
        return False

    def finish(self):
        """The end: --resume, or the closing figures. -> the figures, a dict"""
        self.bar.close()
        if self.rank > 0:
            return {}
        facts = {}
        saved = False
        if self.stopped:
            saved = self.save()
        else:
            facts = self.conclude()
        out = shlex.quote(self.args.out.replace(os.sep, "/"))
        start = "python"
        if self.world > 1:
            start = f"torchrun --nproc_per_node={self.world}"
        if facts:
            self.say(f"\nmore stories: python sample.py --out {out}")
        if saved:
            self.say(f"\ninterrupted after {self.state['step']:,} steps; all is saved in {out}\n"
                     f"go on: {start} tiny.py --resume {out}")
        elif self.stopped:
            notice(f"interrupted; --resume {out} goes on from what was saved before, if anything")
        if self.stopped or self.signal is not None:
            sys.exit(128 + (self.signal or signal.SIGTERM))
        return facts

    def close(self):
        """Give back what `begin` took: a notebook lives on."""
        with suppressed("cannot write the log"):
            if self.log is not None:
                self.log.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def conclude(self):
        """Evaluate, save, tell a story. -> the closing figures, a dict"""
        state = self.state
        bpb = evaluate(self.model, self.valid)
        state["curve"].append((self.clock(), bpb))
        bytes_seen = state["step"] * self.batches.step_bytes
        facts = dict(val_bpb=round(bpb, 4), ngram_bpb=self.baseline, steps=state["step"],
                     bytes_seen=bytes_seen, skipped_steps=state["skipped"], seed=self.args.seed,
                     parameters=self.parameters, device=str(self.model.cos.device),
                     text_crc32=self.checksums[0])
        failure = None
        try:
            self.keep_folder()
            save_checkpoint(self.args, self.model, facts)
        except Problem as problem:
            failure = str(problem)  # first the figures
            if os.path.exists(os.path.join(self.args.out, "model.pt")):
                reason = failure.partition(";")[0]
                out = shlex.quote(self.args.out)
                failure = f"{reason}; free some space, then go on with --resume {out}"
        story = self.story(b"Once upon a time", self.length)
        self.say(f"\n{picture(state['curve'])}\n\n{story}\n")
        facts["peak_memory_mb"] = round(peak_memory() / 1e6)
        facts["seconds"] = round(self.clock(), 1)
        for name, value in facts.items():
            self.say(f"{name}: {value}")
        self.warn(bpb, bytes_seen / len(self.text.train))
        if failure is not None:
            raise Problem(failure)
        return facts

    def warn(self, bpb, epochs):
        """What the figures do not say by themselves."""
        step = self.state["step"]
        on_the_clock = not self.args.steps
        read_twice = on_the_clock and step >= self.batches.last_step
        if on_the_clock and step < 20 and not read_twice:
            notice(f"only {step} steps were made: set-up took the time; give more --minutes")
        elif not bpb < 8:
            notice("this is worse than knowing nothing (8 bits per byte): training diverged. Train "
                   "with a lower rate, such as --set rate=0.5")
        elif read_twice:
            notice(f"the run ended when it had read its text {epochs:.1f} times: overfitting sets "
                   "in. Longer runs need more text: --data, --megabytes")
        seconds = self.clock()
        if on_the_clock and seconds > 63 * self.args.minutes:
            notice(f"this took {seconds:.1f} s instead of {60 * self.args.minutes:.1f}: counting "
                   "(--order), a step or evaluating was too slow for so short a run")


STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # a closed terminal; Windows has no such signal, nohup ignores it
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        STOP_SIGNALS.append(signal.SIGHUP)


def readable(story):
    """bytes -> str for a terminal"""
    return printable(story.decode("utf-8", "replace"))


def mute(descriptor):
    """Nobody reads stdout (1) or stderr (2) any more: drop what is written from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextlib.contextmanager
def suppressed(words):
    """A file that cannot be written, as the disk is full, is reported and stops no training."""
    try:
        yield
    except (OSError, Problem) as problem:
        notice(f"{words} ({problem})")


def picture(curve):
    """The learning curve, [(seconds, bpb), ...], as a bar a line, logarithmic. -> str"""
    low = min((bpb for _, bpb in curve if bpb < 99), default=1)
    lines = ["bits per byte"]
    for seconds, bpb in curve:
        bar = "?"  # NaN
        if bpb < 99:
            above = math.log((bpb + 1e-9) / (low + 1e-9))  # a constant text may have 0 bits
            bar = "=" * min(70, round(1 + 25 * above))
        lines.append(f"{seconds:6.0f} s  {bpb:.3f}  {bar}")
    return "\n".join(lines)


# ---- 7. The folder of a run and its checkpoint ---------------------------------------------------

VERSION = 4  # of the file


def new_folder(out, first):
    """Make the folder `out` with the empty file `first` in it, or if the folder has something in it
    out-2, out-3, ...: no run ever touches what another has written. -> its name"""
    name = out = os.path.normpath(out)
    n = 1
    while True:
        try:
            os.makedirs(name, exist_ok=True)
            if not os.listdir(name):
                open(os.path.join(name, first), "x").close()  # of two that try, one succeeds
                break
        except FileExistsError:
            pass
        except OSError as error:
            raise Problem(f"cannot write {name}: {error.strerror}; name another --out") from None
        if os.path.basename(out) in (".", ".."):
            raise Problem(f"--out {out} is not empty; name a folder for the run alone")
        n += 1
        name = f"{out}-{n}"
    if n > 1:
        notice(f"{out} is taken; this run goes to {name}")
    return name


def save_checkpoint(args, model, facts, training=None):
    """Write model.pt into the run's folder: plain tensors, numbers and text, a whole file or none.

    training: what --resume needs to go on. Without it the run is over, and the memory, which is
    most of the file, is kept in half precision (this costs less than 0.0001 bits per byte).
    """
    weights = model.state_dict()
    if training is None and model.memory is not None:
        weights["memory.table"] = weights["memory.table"].half()
    # The folder's number in its file system stays when it is moved and is another for whoever gets
    # a copy: files that the recipe names are opened only where the run was made.
    folder = None
    with contextlib.suppress(OSError):  # `save` says what is wrong, if anything
        os.makedirs(args.out, exist_ok=True)
        folder = os.stat(args.out).st_ino
    content = dict(version=VERSION, config=model.config, weights=weights, facts=facts,
                   recipe=vars(args), training=training, folder=folder)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with buffer.getbuffer() as written:
        save(os.path.join(args.out, "model.pt"), written)


def time_written(out):
    """When the checkpoint in the folder `out` was written, nanoseconds"""
    return os.stat(os.path.join(out, "model.pt")).st_mtime_ns


def load_checkpoint(out, device="cpu"):
    """The model in the folder `out` -> GPT, {"facts", "recipe", "training", "made_here", "written"}

    made_here: whether this very folder was written by a run. Raises Problem if there is no model or
    it is not one of ours.
    """
    path = os.path.join(out, "model.pt")
    shown = printable(path)
    try:
        written = time_written(out)
        content = torch.load(path, map_location="cpu", weights_only=True)  # it cannot run code
        weights = content.pop("weights")
        config = content["config"]
        small = config["layers"] <= len(weights) and 8 <= config["context"] <= 4096
        kinds = {type(content["facts"]), type(content["recipe"])}
        if content["version"] != VERSION or not small or kinds != {dict}:
            raise ValueError("not ours")
        # Nothing is built whose size the file itself does not have; on "meta" nothing is allocated.
        with torch.device("meta"):
            expected = {name: w.shape for name, w in GPT(**config).state_dict().items()}
        if expected != {name: w.shape for name, w in weights.items() if w.is_contiguous()}:
            raise ValueError("not ours")
        model = GPT(**config)
        model.load_state_dict(weights)
        here = os.stat(out).st_ino
        content["made_here"] = type(content["folder"]) is int and content["folder"] == here
        content["written"] = written
    except FileNotFoundError:
        if os.path.exists(os.path.join(out, "runs.tsv")):
            raise Problem(f"{out} holds several runs; name one of them: {out}/1") from None
        raise Problem(f"no {shown}; train a model first: python tiny.py --minutes 5") from None
    except OSError as error:
        raise Problem(f"cannot read {shown}: {error.strerror}; name the folder of a run") from None
    except Exception:  # whatever a damaged or foreign file leads to
        raise Problem(f"{shown} is not a checkpoint of this tiny.py; train again") from None
    return model.to(device), content


# ---- 8. The machine ------------------------------------------------------------------------------

# How large a model, and how many bytes in a step? In a few minutes many small steps teach more than
# few large ones. rate: a factor for all learning rates. --set changes any of these.
DEFAULT = dict(layers=2, heads=4, width=128, context=512, batch=8, rate=1.0)
PLAIN = dict(layers=3, heads=4, width=144, context=256, batch=8, rate=1.0)


def setting_of(args):
    """The sizes of the model and of a batch, and the rate. -> dict like DEFAULT"""
    if args.plain:
        return PLAIN | args.set
    return DEFAULT | args.set


def new_model(setting, plain=False):
    """-> a GPT with the sizes of a setting"""
    sizes = setting["layers"], setting["heads"], setting["width"], setting["context"]
    return GPT(*sizes, plain=plain)


def prepare_cpu():
    """Two things that cost nothing and save a third of the time. Numbers below 10^-38 become 0:
    most processors take a hundred times as long for them.

    And glibc keeps blocks that were freed. Otherwise it returns those of a megabyte and more to the
    system at once, and each step fetches them anew, emptied page by page. (Linux only.)
    """
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its maximum of 32 MB
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def try_steps(device):
    """Train a new model for five steps -> seconds that a step takes, the last loss"""
    torch.manual_seed(0)
    model = new_model(DEFAULT).to(device)
    optimizers = make_optimizers(model)
    ids = torch.randint(1, 256, (DEFAULT["batch"], DEFAULT["context"] + 1))
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        loss = train_step(model, optimizers, ids, None, 1.0).item()  # item() waits for a GPU
        seconds.append(time.monotonic() - began)
    return sorted(seconds)[1], loss


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> torch.device. A GPU must compute what the CPU does, and
    where it was not asked for ('auto') be faster. Raises Problem if there is none."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun, each with its own GPU
    available = {"cuda": torch.cuda.device_count() >= processes and torch.cuda.is_available(),
                 "mps": processes == 1 and torch.backends.mps.is_available()}
    gpu = name
    if name == "auto":
        gpu = next((gpu for gpu in available if available[gpu]), "cpu")
    if gpu == "cpu":
        return torch.device("cpu")
    if not available[gpu]:
        raise Problem(f"--device {gpu}: there is none here for each process; use --device cpu")
    device = torch.device(gpu)
    if gpu == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    here, right_loss = try_steps("cpu")
    try:
        there, loss = try_steps(device)
    except (RuntimeError, TypeError) as error:  # an operation that is missing there
        notice(f"{gpu} is not used: {str(error).splitlines()[0]}")
        return torch.device("cpu")
    notice(f"a step takes {1e3 * here:.0f} ms on the CPU, {1e3 * there:.0f} ms on {gpu}")
    if not abs(loss - right_loss) < 0.01 * right_loss:  # wrong numbers without an error were seen
        notice(f"{gpu} is not used: it computes another loss than the CPU")
        return torch.device("cpu")
    if name == "auto" and here < there and "RANK" not in os.environ:  # torchrun: all decide alike
        return torch.device("cpu")
    return device


def join_processes(device):
    """Join the processes that torchrun started, if it did. -> this one's rank, their number"""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    backend = "gloo"
    if device.type == "cuda":
        backend = "nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    return dist.get_rank(), dist.get_world_size()


def agree(progress, stop):
    """What the first process says about the progress, and whether any of them was told to stop:
    none may wait for one that has ended."""
    if not dist.is_initialized():
        return progress, stop
    device = "cpu"
    if dist.get_backend() == "nccl":
        device = "cuda"
    if dist.get_rank() > 0:
        progress = 0.0
    both = torch.tensor([progress, stop], dtype=torch.float64, device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return both[0].item(), bool(both[1])


# ---- 9. The command, and many runs ---------------------------------------------------------------

def override(word):
    """argparse's type for --set: "width=64" -> ("width", 64)"""
    name, _, value = word.partition("=")
    if name not in DEFAULT:
        raise argparse.ArgumentTypeError(f"give NAME=N, of {', '.join(DEFAULT)}")
    if name == "rate":
        return name, number(float, 0, 1e30, above=True)(value)
    return name, number(int, 1, 4096)(value)


def parse_arguments(argv=None):
    """-> the options; the model and checkpoint to go on from, or None"""
    parser = argparse.ArgumentParser(
        usage="python tiny.py [options]", allow_abbrev=False,
        description="Train a byte-level language model on stories against the clock.",
        epilog="example: python tiny.py --minutes 5 --data stories.txt --out run1")
    add = parser.add_argument
    add("--minutes", type=number(float, 1e-3, 1e6), default=5.0, metavar="M",
        help="for everything but downloads (default: 5)")
    add("--steps", type=number(int, 1), metavar="N",
        help="train for N steps instead, exactly repeatable")
    add("--distill", type=number(float, 0, 1), default=0.0, metavar="PART",
        help="of the time in which the n-gram teaches, 0 to 1 (default: 0)")
    add("--order", type=number(int, 0, 255), default=12, metavar="N",
        help="of the n-gram; 0: count none (default: 12)")
    add("--plain", action="store_true",
        help="the usual transformer: layers over bytes, no memory, no pointer")
    add("--set", type=override, nargs="+", action="extend", default=[], metavar="NAME=N",
        help=f"change {', '.join(DEFAULT)} (rate: a factor)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=1, metavar="N", help="(default: 1)")
    series = parser.add_mutually_exclusive_group().add_argument
    series("--seeds", type=number(int, 2), metavar="N",
        help="N runs, seeds 1 to N: how much is luck?")
    series("--sweep", type=number(int, 2), metavar="N", help="N runs of settings drawn at random")
    add("--resume", metavar="DIR", help="go on with an interrupted run, with its options")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", metavar="NAME",
        help="auto, cpu, cuda, mps (default: auto)")
    add("--out", default="out", metavar="DIR", help="where the model goes (default: out)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    args.set = dict(args.set)
    if args.resume is not None:
        return resumed(args, parser, argv)
    if args.distill and not args.order:
        parser.error("--order 0 leaves no teacher: leave out --distill")
    setting = setting_of(args)
    chosen = "width" in args.set or not args.sweep  # --sweep draws a width that fits
    unfit = chosen and setting["width"] % (2 * setting["heads"])
    if unfit or setting["context"] not in range(8, 4097, 2):
        parser.error("--set: width must be a multiple of 2 x heads, context even and at least 8")
    return args, None


def trusted_recipe(out, checkpoint, args):
    """A run's options; if it was made elsewhere, without the files that they name. -> dict"""
    recipe = dict(checkpoint["recipe"])
    if not checkpoint["made_here"]:
        if recipe["data"] and not args.data:
            raise Problem(f"the run in {out} was made elsewhere; name its text with --data, and "
                          "with --valid if it had one")
        recipe |= {"valid": None, "cache": args.cache}
    return recipe


def resumed(args, parser, argv):
    """The run's own options; where its text lies, and what computes, may be given anew."""
    model, checkpoint = load_checkpoint(args.resume)
    recipe = trusted_recipe(args.resume, checkpoint, args)
    parser.set_defaults(**dict.fromkeys(vars(args)))
    given = {name: x for name, x in vars(parser.parse_args(argv)).items() if x is not None}
    for name in given.keys() - {"resume", "data", "valid", "cache", "device"}:
        parser.error(f"--resume goes on with the run's own options: leave out --{name}")
    options = recipe | given | {"out": args.resume}
    return argparse.Namespace(**options), (model, checkpoint)


DRAWN = dict(width=(32, 48, 64, 96, 128), layers=(1, 1, 2, 3), heads=(1, 2, 4),
             context=(128, 256, 512, 1024), batch=(2, 4, 8, 16), rate=(0.5, 1.0, 2.0))


def several(args):
    """Whole runs, each with its whole budget: --seeds, or --sweep, which draws settings at random
    (that finds good ones sooner than a grid: Bergstra & Bengio 2012). A line each in runs.tsv."""
    draw = np.random.default_rng(0)
    changes = [dict(seed=seed) for seed in range(1, (args.seeds or 0) + 1)]
    for _ in range(args.sweep or 0):
        drawn = {name: draw.choice(values).item() for name, values in DRAWN.items()}
        drawn |= args.set
        pairs = max(1, drawn["width"] // (2 * drawn["heads"]))  # heads that are given must fit
        drawn["width"] = 2 * drawn["heads"] * pairs
        changes.append({"set": drawn})
    folder = new_folder(args.out, "runs.tsv")
    scores = []
    lines = []
    for i, change in enumerate(changes, 1):
        one = {"out": os.path.join(folder, str(i)), "seeds": None, "sweep": None}
        run_args = argparse.Namespace(**vars(args) | change | one)
        try:
            facts = train(run_args, time.monotonic())
        except Problem as problem:  # such as a text that is too short for this context
            notice(f"{problem} (run {i} of {len(changes)}: {change})")
            continue
        scores.append(facts["val_bpb"])
        lines.append(f"{facts['val_bpb']}\t{facts['steps']} steps\t{one['out']}\t{change}")
        save(os.path.join(folder, "runs.tsv"), "\n".join(lines).encode())
    if len(scores) < 2:
        raise Problem("fewer than two runs came to their end: see above")
    spread = np.std(scores, ddof=1)
    print("\n" + "\n".join(sorted(lines)))
    print(f"\n{len(lines)} runs: {np.mean(scores):.4f} ± {spread:.4f} bits per byte, "
          f"best {min(scores)}, worst {max(scores)}")


def main(argv=None, start=None):
    """start: the second (time.monotonic) at which the budget begins, otherwise now"""
    if start is None:
        start = time.monotonic()
    args, before = parse_arguments(argv)
    if args.seeds or args.sweep:
        if "RANK" in os.environ:
            raise Problem("--seeds and --sweep run in one process: start them without torchrun")
        return several(args)
    try:
        train(args, start, before)
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        raise Problem(f"{str(error).splitlines()[0]} (has another process ended? The state last "
                      f"saved is in {args.out}: run the command again with --resume)") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    data.run(lambda: main(start=START))
