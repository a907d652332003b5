"""`python tiny.py --minutes 5` trains a small language model on stories and tells one.

You will know every part of a GPT; a memory, layers over words and a pointer, which help a small one
that has only minutes; the loop against the clock; how a model that only counts (ngram.py) teaches.

Axes: B windows of text in a batch, T bytes in a window, W words in it, C the model's width, H
attention heads, D = C / H, K kinds of context that the memory looks up, N words being spelled."""
import os
import time

START = time.monotonic()  # the budget counts everything, the slow imports below included
# PyTorch's threads spin while they wait for each other, which is slow beside another process.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import argparse
import contextlib
import ctypes
import io
import math
import shlex
import signal
import sys
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import END, Problem, notice
from ngram import NGram


# ---- 1. A GPT, the usual transformer, over bytes: --plain trains it ------------------------------

def norm(x):
    """Scale each vector to mean 0 and variance 1: LayerNorm (Ba et al. 2016) without a gain."""
    return F.layer_norm(x, (x.shape[-1],))


def rotate(x, angle):
    """Rotary positions (Su et al. 2021). x (..., T, D), angle (..., T, D/2) -> (..., T, D)
    Each pair of numbers, j and j + D/2, is turned by an angle that grows with the position. So
    the product of two vectors depends on the difference of their angles: on their distance."""
    a, b = x.chunk(2, -1)
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)


def angles(length, pairs):
    """For `rotate`: the first pair turns fast, the last slowly -> (length, pairs) radians"""
    return torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(pairs) / pairs)


class Attention(nn.Module):
    """Every position looks at those up to itself and gathers what they say (Vaswani et al. 2017).
    Each head makes three vectors of each position's vector: a query (what am I looking for?), a key
    (what am I?) and a value (what do I tell whoever finds me?). Softmax turns a query's products
    with all keys (over sqrt(D)) into weights; what the head finds is the values' weighted sum."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.out.weight)  # at step 0 a layer adds nothing

    def forward(self, x, angle):
        """x (B, T, C), angle (T, D/2) -> (B, T, C)"""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, -1)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        # Normed queries and keys (Henry et al. 2020) cannot grow: the learning rate can be high.
        q = rotate(norm(q), angle)
        k = rotate(norm(k), angle)
        # In one call, without a (T, T) matrix in memory (later: of keys after the query):
        #     score = (q @ k.mT / D**0.5).masked_fill(later, -math.inf)  # (B, H, T, T)
        #     y = score.softmax(-1) @ v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """One layer: look around (attention), then think, each position on its own (MLP; ReLU squared:
    So et al. 2021). Both are added to x (residual connections): a layer only has to say what
    changes, and gradients flow straight through."""
    def __init__(self, width, heads):
        super().__init__()
        self.attention = Attention(width, heads)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x, angle):
        x = x + self.attention(norm(x), angle)  # (B, T, C)
        hidden = F.relu(self.up(norm(x))).square()  # (B, T, 4 C)
        return x + self.down(hidden)


class GPT(nn.Module):
    """A transformer over bytes: embed each byte, let the layers look around, predict the next.
    width: a multiple of 2 x heads; context: the most bytes it can see at once."""
    def __init__(self, layers=3, heads=4, width=144, context=256):
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.zeros_(self.head.weight)  # at step 0 each byte has 1/256: 8 bits
        angle = angles(context + 1, width // heads // 2)  # WordGPT reads T + 1 bytes
        self.register_buffer("angle", angle, persistent=False)

    def think(self, x):
        """Run the layers. x (B, T, C), T at most context + 1 -> (B, T, C)"""
        T = x.shape[1]
        for block in self.blocks:
            x = block(x, self.angle[:T])
        return norm(x)

    def forward(self, ids, full=False):
        """How likely is each byte after the first? ids (B, T + 1) int64 -> log_p (B, T), nats (bits
        times ln 2), or with full (B, T, 256), of all bytes that could come; states (B, T, C)"""
        states = self.think(norm(self.embed(ids[:, :-1])))
        log_p = F.log_softmax(self.head(states).float(), -1)
        if full:
            return log_p, states
        return pick(log_p, ids[:, 1:]), states

    def next_byte(self, ids):
        """ids (1, n) int64 -> p (1, 256) of the byte after them. (Slow: reads all anew.)"""
        ids = ids[:, -self.context :].to(self.angle.device)
        log_p, _ = self(F.pad(ids, (0, 1)), full=True)  # the byte that is added is not looked at
        return log_p[:, -1].exp()


def pick(p, ids):
    """From each distribution the number of one byte: p (B, T, 256), ids (B, T) -> (B, T)"""
    return p.gather(2, ids[:, :, None])[:, :, 0]


# ---- 2. The model of words -----------------------------------------------------------------------
# Layers over bytes cost much, and five minutes are too short to learn spelling by attention. So
# here layers look at whole words, and everything smaller is left to a table, the memory. The map:
#     bytes      embedding + memory ---------------------> scale, shift -> head -> pointer
#                       | at the words' ends                  ^ of the last complete word
#     words             +-> layer -> layer --> thoughts ------+
#
# Digits, the apostrophe and UTF-8 beyond ASCII count as letters, too; but the first byte of a
# Chinese, Japanese or Korean character, 227 or more, as a space.
LETTER = [bytes([b]).isalnum() or b == ord("'") or 128 <= b < 227 for b in range(256)]
LETTER = torch.tensor(LETTER)  # (256,) bool
ODD = 6364136223846793005  # Knuth's, for MMIX; odd, so that multiplying mod 2^64 loses nothing
LONGEST_WORD = 24  # bytes of a word that its hash covers, and that are drawn at most


class Words(NamedTuple):
    """Where the words of a text are: `find_words`. A word is letters and the byte that closes it.
    A window's first byte counts as no letter. "|Once she, wen" (| is an END, _ a space):
        position   0  1  2  3  4  5  6  7  8  9  10 11 12 13
        byte       |  O  n  c  e  _  s  h  e  ,  _  w  e  n
        begin      0  1  1  1  1  1  6  6  6  6  10 11 11 11
        done       1  1  1  1  1  2  2  2  2  3  3  3  3  3
    The three complete words, the END itself being the first: end 0 5 9, size 0 4 3."""
    begin: torch.Tensor  # (B, T) where the word of each byte begins
    prefix: torch.Tensor  # (B, T) the hash of its letters up to this one, or of what is no letter
    done: torch.Tensor  # (B, T) how many words are complete. `_` alone is none
    end: torch.Tensor  # (B, W) the byte that closes each word
    size: torch.Tensor  # (B, W) how many letters each word has


# A byte looks up, in one large table, a vector for each of the contexts that it completes: the last
# byte, the last two ...; in "once she wen" also `wen`; `wen` after `she`; `wen` after `once she`;
# `wen`, two words after `once`. (In "once she " the space stands for `wen`: a byte that closes a
# word sees the whole word.) The hash (`contexts`) is the row (Svenstrup et al. 2017).
GRAMS = (1, 2, 3, 4, 5, 6, 8)  # lengths of contexts in bytes
KINDS = len(GRAMS) + 4  # and the four of words
COUNTER_BITS = 24  # a hash's highest 24 bits are its counter's index, the highest 19 its row's


class Memory(nn.Module):
    """A table with a vector for each context, by its hash, and its own optimizer.

    When a text is read again, a row that was learned nowhere but here gives away which byte came
    here, and the model learns to trust what says nothing about new text. So a row is used only if
    another place taught it, too. The first epoch counts how often a context comes:

        the first time          it is only counted: rare ones stay out (McMahan et al. 2013)
        again in that epoch     its row is used, and learns
        in later epochs         used, and learns on, if it came three times, say at places a, b, c:
                                b and c taught it, so in each of the three it knows another. (Of
                                two, a and b, only b taught it: at b it would recite that)
        on new text             used if it came at all (if once, its row is still 0)
    Contexts may share rows and counters: after 14 MB 41 % of new ones pass for known."""
    def __init__(self, width, rows):  # rows: a power of 2, at most 2^COUNTER_BITS
        super().__init__()
        self.first_epoch = True  # the training loop says when it is over
        self.shift = COUNTER_BITS - (rows.bit_length() - 1)  # counter >> shift is the row
        self.register_buffer("table", torch.zeros(rows, width))
        self.register_buffer("count", torch.zeros(2**COUNTER_BITS, dtype=torch.uint8))
        # The sum of a row's mean squared gradients. If it began at 0, a row's first step would be
        # equally long however small the gradient: a context seen twice would be trusted at once.
        self.register_buffer("squares", torch.full((rows,), 0.03))

    def forward(self, hashes):
        """hashes (..., K) int64 -> (..., C): the sum of the rows of the contexts that are known"""
        shape = hashes.shape[:-1]
        hashes = hashes.flatten(0, -2)  # (B T, K)
        counter = hashes >> (64 - COUNTER_BITS)  # the highest bits
        counter = counter % 2**COUNTER_BITS  # without the sign
        learning = torch.is_grad_enabled()
        needed = 1
        if learning and not self.first_epoch:
            needed = 3
        known = (self.count[counter] >= needed).to(self.table.dtype)  # (B T, K), 0 or 1
        row = counter >> self.shift
        out = F.embedding_bag(row, self.table, mode="sum", per_sample_weights=known)
        if learning:
            # As if `out` were a parameter (the table is none): `backward` ends here and leaves the
            # gradient of the sum, which is that of each of its rows, in out.grad, for `step`.
            out.requires_grad_()
            self.used = counter, known, out
        return out.view(*shape, -1)

    @torch.no_grad()
    def step(self, lr):
        """Learn from the gradient of the last look-up. (The loss was a mean over its positions.)
        Row-wise Adagrad (Duchi et al. 2011; one number per row: Naumov et al. 2019): the larger a
        row's gradients were, the smaller its steps. Rare contexts learn fast, common ones less."""
        counter, known, out = self.used
        gradient = out.grad * len(out)  # (B T, C); undo the mean (a window's last has no loss)
        square = gradient.square().mean(1)
        row = counter >> self.shift  # (B T, K)
        for k in range(row.shape[1]):  # one kind at a time: no (B T, K, C) array
            self.squares.index_add_(0, row[:, k], known[:, k] * square)
        rate = -lr * known * self.squares[row].rsqrt()
        for k in range(row.shape[1]):
            self.table.index_add_(0, row[:, k], rate[:, k, None] * gradient)
        if self.first_epoch:
            self.count[counter] = self.count[counter].clamp(max=254) + 1  # twice in a step: 1


class Pointer(nn.Module):
    """Copies words. To spell `Lily` letter by letter out of a vector takes long to learn; to point
    at the Lily that was read does not (pointer-sentinel mixture, Merity et al. 2016).

    Where a word begins, one softmax gives a share a_i to each earlier word i, and the rest, a_0
    (the sentinel's), to GPT.head, which spells. So the next word comes about in one of many *ways*:
    the head spells all of it, or a word is copied and the head spells what follows it (`played`
    after `play`, and the closing byte). A way that gives the letters so far has the weight

        a_0 p_head(the letters)    or    a_i p_head(those after word i)

    P(letters) is the sum of all these. The next byte is c with P(letters and c) / P(letters). Say
    that after "Lily saw Tim. " the shares are Lily 0.1, saw 0.1, Tim 0.3, head 0.5, and that the
    head gives `Ti` a probability of 0.02. After "Lily saw Tim. Ti" two ways are left:

        Tim    0.3             for the letter m: 0.3 / 0.31 = 97 %
        head   0.5 x 0.02      for all bytes, as the head sees fit

    After the m, Tim is complete: what follows is for the head to say, in both."""
    def __init__(self, width, context):
        super().__init__()
        pairs = width // 4
        self.query = nn.Linear(width, 2 * pairs + 1, bias=False)  # first, the sentinel's score
        self.key = nn.Linear(width, 2 * pairs, bias=False)
        nn.init.zeros_(self.query.weight)
        self.register_buffer("angle", angles(context + 2, pairs), persistent=False)

    def log_shares(self, states, done, thoughts, size):
        """For N words that begin: states (B, N, C) of the byte before each; done (B, N): how many
        words are complete there, of thoughts (B, W, C), size (B, W) -> log a_i (B, N, W + 1)"""
        query = self.query(states)
        key = self.key(thoughts)
        W = key.shape[1]
        key = rotate(key, self.angle[:W])  # as in attention: distance, in words, counts too
        asked = rotate(query[..., 1:], self.angle[done])
        score = asked @ key.mT / key.shape[-1] ** 0.5  # (B, N, W)
        readable = torch.arange(W, device=key.device) < done[:, :, None]
        fits = (size > 0) & (size <= LONGEST_WORD)  # a longer one's hash is not its own
        readable = readable & fits[:, None]
        score = score.masked_fill(~readable, -1e9)
        sentinel = query[..., :1] + 4  # e^4: at first as much as 55 words
        return torch.cat((sentinel, score), -1).log_softmax(-1)

    def log_ways(self, log_share, words, begin, typed, total):
        """The logarithms of the ways' weights, (B, N, W + 1). begin, typed (B, N): where N words
        begin, how many of their bytes are typed; total (B, ...): the sum of log p_head up to each
        byte, itself included. by_head is that of the bytes after `last`, which the way does not
        copy. After "|Lily saw Tim. Ti" (| is byte 0, so begin 15, typed 2):
                            head             |     Lily  saw   Tim
            size            0                0     4     3     3
            copied          0                0     2     2     2
            last            14               14    16    16    16   copied byte; none: begin - 1
            their_last      0                0     2     7     11   the same in the earlier word
            alike           yes              yes   no    no    yes
            exp(by_head)    p(Ti)            p(Ti) 1     1     1
            weight          a_0 p(Ti)        0     0     0     a_4  (| has no share)"""
        size = F.pad(words.size, (1, 0))  # the sentinel is a word of no letters
        their_begin = (F.pad(words.end, (1, 0)) - size).clamp(min=1)  # if of no letters: anywhere
        copied = torch.minimum(size[:, None], typed[:, :, None])  # (B, N, W + 1)
        last = begin[:, :, None] + copied - 1
        their_last = their_begin[:, None] + copied - 1
        # Copied letters must be the same: so must the hashes of as many. The head gives the rest.
        here = gather(words.prefix, last)
        alike = here == gather(words.prefix, their_last)
        alike = alike | (copied == 0)
        so_far = total.gather(1, begin + typed - 1)
        by_head = so_far[:, :, None] - gather(total, last)
        log_weight = log_share + by_head
        return log_weight.masked_fill(~alike, -math.inf)

    def log_next(self, states, thoughts, words, log_head):
        """The formula for all bytes of a text at once, each being the last typed of its word (N =
        T). words: of T + 1 bytes; log_head (B, T): of each after the first -> their log p (B, T)"""
        begin = words.begin[:, 1:]  # (B, T)
        position = torch.arange(1, 1 + begin.shape[1], device=begin.device)
        typed = position - begin + 1
        before = begin - 1  # the byte before the word
        done = words.done.gather(1, before)
        log_share = self.log_shares(take(states, before), done, thoughts, words.size)
        total = F.pad(log_head.cumsum(1), (1, 0))
        ways = self.log_ways(log_share, words, begin, typed, total)
        log_p = ways.logsumexp(-1)  # log P(letters and c), c being this byte
        shorter = previous(log_p) * (typed > 1)  # log P(letters); of no letters 0
        return log_p - shorter


def previous(x):
    """At each byte what x has at the byte before it, 0 at the first. (B, T) -> (B, T)"""
    return F.pad(x[:, :-1], (1, 0))


def gather(x, index):
    """From each text the numbers that its indices name: x (B, T), index (B, N, W) -> (B, N, W)"""
    return x.gather(1, index.flatten(1)).view_as(index)


def take(x, index):
    """From each text the vectors that its indices name: x (B, T, C), index (B, N) -> (B, N, C)"""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


class WordGPT(GPT):
    """A byte-level GPT that thinks in words. rows: of the memory, a power of 2, at most 2^24.

    The vector of a word is that of the byte that ends it, as the memory's contexts there include
    the whole word. There are five times fewer words than bytes, so two layers over words cost less
    than one over bytes. Within a word, the memory says what letters follow these letters, and the
    thought of the last complete word, what the story says, scales and shifts that (FiLM, Perez et
    al. 2018). Last, the pointer copies words. (The map: where section 2 begins.)"""
    def __init__(self, layers=2, heads=4, width=128, context=512, rows=2**19):
        super().__init__(layers, heads, width, context)
        self.memory = Memory(width, rows)
        self.film = nn.Linear(width, 2 * width, bias=False)
        nn.init.zeros_(self.film.weight)
        self.pointer = Pointer(width, context)

    def look_up(self, ids, words, n):
        """The vectors of the last n bytes: the embedding, and what the memory knows of their
        contexts. ids (B, T), Words -> (B, n, C)"""
        hashes = contexts(ids, words)[:, -n:]
        x = self.embed(ids[:, -n:])
        x = x + self.memory(hashes)
        return norm(x)

    def look_around(self, ids):
        """ids (B, T) -> Words; thoughts (B, W, C), what layers say of each word; film (B, W + 1,
        2 C), for the bytes after it; states (B, T, C). (A byte sees complete words only.)"""
        words = find_words(ids)  # section 6
        x = self.look_up(ids, words, ids.shape[1])  # (B, T, C)
        thoughts = self.think(take(x, words.end))
        and_none = F.pad(thoughts, (0, 0, 1, 0))  # before the first word: zeros
        film = self.film(and_none)  # row k: after k words
        scale, shift = take(film, words.done).chunk(2, -1)
        return words, thoughts, film, norm(x * (1 + scale) + shift)

    def forward(self, ids):
        """As GPT.forward: ids (B, T + 1) -> log_p (B, T), the states (B, T, C)"""
        words, thoughts, _, states = self.look_around(ids)
        states = states[:, :-1]
        head = F.log_softmax(self.head(states).float(), -1)  # (B, T, 256)
        log_head = pick(head, ids[:, 1:])  # (B, T)
        return self.pointer.log_next(states, thoughts, words, log_head), states

    # When sampling, a candidate for the next word completes no word before it ends. So while it is
    # spelled, all that the layers say stays the same: `read` computes it, `spell` has no attention.
    def read(self, ids):
        """Read a text, ids (1, n) int64, up to the word that has begun. -> what spell wants: bytes
        (1, T), Words, film (1, 1, 2 C), log_share (1, 1, W + 1); and the letters begun (1, t)"""
        ids = ids.to(self.angle.device)
        begin = n = ids.shape[1]
        while begin > max(1, n - LONGEST_WORD) and LETTER[ids[0, begin - 1]]:
            begin -= 1
        seen = ids[:, max(0, begin - self.context) : begin]
        words, thoughts, film, states = self.look_around(seen)
        done = words.done[:, -1:]  # (1, 1)
        log_share = self.pointer.log_shares(states[:, -1:], done, thoughts, words.size)
        return (seen, words, take(film, done), log_share), ids[:, begin:]

    def spell(self, reading, spelled):
        """What comes next in each of B candidates? spelled (B, t) int64: their t letters -> p (B,
        256). In turn: their states, the weights of their ways, the byte that each way says next."""
        seen, words, film, log_share = reading  # of one row, which serves all candidates
        B, t = spelled.shape
        T = seen.shape[1]
        ids = torch.cat((seen.expand(B, -1), spelled), 1)
        now = find_words(ids)
        scale, shift = film.chunk(2, -1)
        x = self.look_up(ids, now, t + 1)  # from the byte before the word on
        states = norm(x * (1 + scale) + shift)
        head = F.log_softmax(self.head(states).float(), -1)  # (B, t + 1, 256)
        log_head = pick(head[:, :t], spelled)
        total = F.pad(log_head.cumsum(1), (T, 0))  # (B, T + t), 0 for all that was seen
        begin = ids.new_full((B, 1), T)  # N = 1 word a candidate
        typed = ids.new_full((B, 1), t)
        now = now._replace(end=words.end, size=words.size)  # only seen words can be copied
        ways = self.pointer.log_ways(log_share, now, begin, typed, total)  # (B, 1, W + 1)
        share = ways[:, 0].softmax(-1)  # (B, W + 1), after "Ti": head 0.03, Tim 0.97
        to_head = share[:, :1]  # (B, 1)
        to_words = share[:, 1:]  # (B, W)
        goes_on = words.size > t  # (1, W), by a letter
        to_head = to_head + (to_words * ~goes_on).sum(1, keepdim=True)  # words that are complete
        their_next = words.end[0] - words.size[0] + t  # (W,) places in seen
        following = seen[0, their_next.clamp(max=T - 1)]  # (W,) of Tim the m (clamped: unused)
        p = to_head * head[:, -1].exp()  # (B, 256)
        return p.index_add(1, following, to_words * goes_on)

    def next_byte(self, ids):
        """ids (1, n) int64 -> p (1, 256) of the byte after them"""
        return self.spell(*self.read(ids))


# ---- 3. Sampling: one word after the other -------------------------------------------------------

TEMPERATURE = 0.3  # likelier words make better stories (README)
CANDIDATES = 16  # of which the next word is chosen
FLOOR = 3.0  # nats by which a candidate may be below the likeliest: a twentieth of its probability
OPENING = 50  # bytes of a story, prompt included, that have a temperature of their own:
OPENING_TEMPERATURE = 2.0  # thus not all stories begin alike


def choose(p, temperature=1.0, generator=None):
    """Draw from each row of p, (N, n) probabilities -> (N,) int64. A temperature below 1 favours
    what is likely; 0 takes the likeliest."""
    if temperature < 1e-6:  # dividing by less would overflow
        return p.argmax(-1)
    log_p = p.double().log()
    p = F.softmax(log_p / temperature, -1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def next_word(model, ids, temperature, generator=None):
    """Draw the next word, up to the byte that ends it. model: a WordGPT, or what has its read
    and spell; ids (1, n) int64: the text; temperature above 0 -> (m,) int64

    A temperature per byte is not a temperature per word. Say `park` has 0.25, and four words with b
    have 0.08 each. Sharpened byte by byte, b (0.32) beats p (0.25), and the story goes on with a
    word that is not the likeliest. What we want is a word with a probability proportional to
    p(word)^(1/temperature). Candidates drawn from the model as it is come in proportion to p(word).
    One is kept in proportion to the rest, p(word)^(1/temperature - 1), at 0.3 `park` 0.25^2.3,
    the others 0.08^2.3 (importance resampling, Rubin 1987; exact with infinitely many). At 2 it is
    p^-0.5: rare words are favoured, but those below FLOOR dropped (min-p, Nguyen et al. 2024)."""
    reading, begun = model.read(ids)
    spelled = begun.repeat(CANDIDATES, 1)  # (B, t)
    log_p = torch.zeros(CANDIDATES)  # of each candidate, nats
    length = torch.full((CANDIDATES,), 0)
    going = torch.full((CANDIDATES,), True)  # not ended; those that have grow on, unused
    while going.any() and length.max() < LONGEST_WORD:
        p = model.spell(reading, spelled).cpu()  # (B, 256)
        byte = choose(p, generator=generator)  # (B,)
        spelled = torch.cat((spelled, byte[:, None].to(spelled.device)), 1)
        drawn = p.gather(1, byte[:, None])[:, 0]
        log_p += going * drawn.log()
        length += going
        going &= LETTER[byte]
    weight = log_p * (1 / temperature - 1)  # (B,)
    weight[log_p < log_p.max() - FLOOR] = -math.inf
    chance = weight.softmax(0)
    kept = choose(chance[None], generator=generator)[0]
    return spelled[kept, begun.shape[1] :][: length[kept]].cpu()


@torch.inference_mode()
def generate(model, prompt, length=1000, temperature=TEMPERATURE, generator=None):
    """Continue a prompt, bytes, by `length` bytes or to END. Yields pieces as they come: words if
    the model has words and 0 < temperature < 1. model: a GPT, or what has its next_byte."""
    by_word = hasattr(model, "spell") and 1e-6 < temperature < 1
    ids = torch.tensor([[END, *prompt]])  # a story begins after an END
    while length > 0:
        if by_word:
            heat = temperature
            if ids.shape[1] <= OPENING:
                heat = OPENING_TEMPERATURE
            new = next_word(model, ids, heat, generator)
        else:
            new = choose(model.next_byte(ids).cpu(), temperature, generator)
        ids = torch.cat((ids, new[None]), 1)
        piece, end, _ = bytes(new.tolist()).partition(bytes([END]))
        yield piece[:length]
        length -= len(piece)
        if end:
            return


# ---- 4. What is trained on -----------------------------------------------------------------------

EPOCHS = 4  # a run ends after this many
LEAST = 250_000  # bytes; on a shorter text a run ends only after the steps that these would take


class Batches:
    """Windows of the text, and the teacher's view of them. They are drawn without replacement, anew
    for each epoch: all of the text is read before any of it again (unless the teacher teaches)."""
    def __init__(self, text, batch, context, seed, teacher=None):
        """text: (n,) uint8, n > context; teacher: an NGram of its second half, if it teaches"""
        self.text = np.append(np.uint8(END), text)  # END before the first story
        self.batch = batch
        self.context = context
        self.seed = seed
        self.teacher = teacher
        self.starts = len(self.text) - context  # places where a window may begin
        self.step_bytes = context * batch
        self.per_epoch = max(1, self.starts // self.step_bytes)  # steps
        self.last_step = EPOCHS * max(self.per_epoch, LEAST // self.step_bytes)
        self.epoch = None

    def get(self, step, taught=False):
        """-> ids (B, T + 1) int64; the teacher's distributions (B, T, 256) float32, or None. It
        depends on seed and step alone, so that a run can be resumed anywhere."""
        epoch = step // self.per_epoch
        place = step % self.per_epoch * self.batch
        if epoch != self.epoch:
            self.epoch = epoch
            random = np.random.default_rng((self.seed, epoch))
            first = random.integers(min(self.context, self.starts))  # other windows in each epoch
            windows = np.arange(first, self.starts, self.context)
            windows = random.permutation(windows)
            self.order = np.resize(windows, self.per_epoch * self.batch)  # repeats a few if needed
        start = self.order[place : place + self.batch]  # (B,)
        if taught:  # it has counted the second half, and would recite it: read in the first
            start = start % max(1, self.starts // 2 - self.context)
        position = start[:, None] + np.arange(self.context + 1)  # (B, T + 1)
        ids = self.text[position].astype(np.int64)
        ids = torch.from_numpy(ids)
        if not taught:
            return ids, None
        q = self.teacher.probs(self.text, position[:, 1:].ravel())
        return ids, torch.from_numpy(q).view(self.batch, self.context, 256)


def distillation_loss(log_p, target, teacher, weight):
    """(1 - weight) x cross-entropy to the target + weight x cross-entropy to the teacher's
    distribution (Hinton et al. 2015). log_p (B, T, 256), nats; target (B, T) int64; teacher
    (B, T, 256), probabilities -> scalar, nats per byte (a nat is 1 / ln 2 bits)
    One target says what came. The teacher's 256 probabilities say what else could have come and how
    likely, so each position teaches more, as long as the student knows less than the teacher."""
    hard = -pick(log_p, target).mean()
    soft = -(teacher * log_p).sum(-1).mean()
    return (1 - weight) * hard + weight * soft


# ---- 5. Training ---------------------------------------------------------------------------------

MEMORY_RATE = 0.4
DISTILL_WEIGHT = 0.6  # of the teacher in the loss, while it teaches
LOOKS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1)  # progress at which to look
PROMPT = b"Once upon a time, there was a little"
ORDER = 12  # of the n-gram that is counted first
SAVE_EVERY = 60.0  # seconds


def make_optimizers(model):
    """Muon, which moves every direction of a matrix by the same amount (section 6), for the layers;
    Adam for all around them. (Memory.step is the third.)"""
    outside = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    muon = Muon(model.blocks.parameters(), lr=0.02)
    adam = torch.optim.Adam(outside, lr=3e-3, betas=(0.9, 0.95), fused=True)
    return [muon, adam]


def train_step(model, optimizers, ids, teacher, factor):
    """One step. ids (B, T + 1); teacher (B, T, 256) or None; factor: of all peak learning rates.
    -> loss, nats per byte"""
    ids = ids.to(model.angle.device)
    if teacher is None:
        log_p, _ = model(ids)  # (B, T)
        loss = -log_p.mean()
    else:
        log_p, _ = model(ids, full=True)  # (B, T, 256)
        loss = distillation_loss(log_p, ids[:, 1:], teacher.to(ids.device), DISTILL_WEIGHT)
    loss.backward()
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * factor
        optimizer.step()
        optimizer.zero_grad()
    if isinstance(model, WordGPT):
        model.memory.step(MEMORY_RATE * factor)
    return loss.detach()


def train(args, start):
    """Train one model. start: the second at which the budget begins. -> the figures, a dict"""
    text = data.load(args, least=args.context + 1)
    start += text.waited  # seconds of download do not count
    valid = text.valid[: int(min(300_000, 1000 + 60_000 * args.minutes))]
    say(f"{text.source}: {len(text.train):,} bytes to learn from, {len(valid):,} to validate on")
    teacher, ngram_bpb = count_ngram(args, text.train, valid)  # it tells the first story
    torch.manual_seed(args.seed)
    model = new_model(vars(args)).to(args.device)
    optimizers = make_optimizers(model)
    batches = Batches(text.train, args.batch, args.context, args.seed, teacher)
    state = dict(step=0, spent=0.0, next_look=LOOKS[0], loss=8.0)  # what a checkpoint must hold
    run = Run(args, text, model, optimizers, state)  # saves; with --resume it restores, too
    if args.resume:
        start = time.monotonic() - state["spent"]  # setting up again was free
    # The last evaluation and story need 1.5 seconds for each minute, with --plain twice that.
    seconds = 60 * args.minutes - 1.5 * (1 + args.plain) * min(5, args.minutes)
    with stop_signals() as stop, tqdm(total=100, disable=None, leave=False) as bar:
        while True:
            # From 0 to 1: the part of the time or of EPOCHS, whichever is larger; or of --steps.
            state["spent"] = time.monotonic() - start
            progress = max(state["spent"] / seconds, state["step"] / batches.last_step)
            if args.steps:
                progress = state["step"] / args.steps
            if progress >= 1 or stop:
                break
            ids, distributions = batches.get(state["step"], taught=progress < args.distill)
            if not args.plain:
                model.memory.first_epoch = state["step"] < batches.per_epoch
            factor = args.rate * min(1.0, 2 * (1 - progress))  # full for half, then down to 0
            loss = train_step(model, optimizers, ids, distributions, factor)
            bits = loss.item() / math.log(2)
            if not math.isfinite(bits):
                raise Problem("training diverged: try a smaller --rate")
            state["loss"] += 0.05 * (bits - state["loss"])  # the mean of some twenty steps
            state["step"] += 1
            bar.update(round(100 * progress) - bar.n)
            if progress >= state["next_look"]:
                state["next_look"] = min(part for part in LOOKS if part > progress)
                look(model, valid, state, args.seed)  # evaluate, continue PROMPT
            if time.monotonic() - run.saved > SAVE_EVERY:
                run.save()
        if stop:
            run.leave(stop[0])  # save, say how to go on, exit
        saved = run.save(finished=True)
        look(model, valid, state, args.seed)
        bpb = round(evaluate(model, valid), 4)
        facts = dict(val_bpb=bpb, ngram_bpb=ngram_bpb, steps=state["step"])
        return run.finish(facts, saved, start)


# ==================================================================================================
# You may stop reading here and go on in sample.py. Arithmetic, Muon, checkpoints, options follow.
# ==================================================================================================

# ---- 6. Words and contexts in numbers, bits per byte, Muon ---------------------------------------

def find_words(ids):
    """ids (B, T) int64 -> Words. A text with fewer words than another has zeros in their place."""
    B, T = ids.shape
    letter = LETTER.to(ids.device)[ids]
    letter[:, 0] = False  # the window may begin within a word, of which nothing is known
    # Horner's rule: a letter more makes the hash times ODD, plus that letter. All bytes do this
    # together: in `ab` after round 1 b has the hash of `b`, after round 2 that of `ab`.
    prefix = torch.zeros_like(ids)
    for _ in range(LONGEST_WORD):
        prefix = (previous(prefix) * ODD + ids + 1) * letter
    prefix = torch.where(letter, prefix, ids - 256)  # a mark is no letter's hash
    position = torch.arange(T, device=ids.device).expand(B, T)
    last_mark = position.masked_fill(letter, 0).cummax(1).values  # the last byte that is no letter
    begin = previous(last_mark + 1)
    closes = ~letter & previous(letter)
    closes = closes | (ids == END)  # an END ends a story's last word, if only ""
    done = closes.cumsum(1)
    row, at = closes.nonzero(as_tuple=True)
    end = ids.new_zeros(B, max(1, done.max()))
    end[row, done[row, at] - 1] = at  # of row's first word, done is 1 (zeros: never copied)
    size = end - begin.gather(1, end)
    return Words(begin, prefix, done, end, size)


def contexts(ids, words):
    """Hash the contexts that each byte completes: ids (B, T), Words -> (B, T, K) int64."""
    text = F.pad(ids, (max(GRAMS), 0), value=END)  # END stands before the window
    found = []
    h = torch.zeros_like(text)
    for n in range(1, max(GRAMS) + 1):
        h = previous(h) * ODD + text + 1  # Horner's rule again: the last n bytes
        if n in GRAMS:
            found.append(h[:, max(GRAMS) :])
    whole = words.prefix.gather(1, (words.end - 1).clamp(min=0))  # (B, W), of complete words
    whole = whole * (words.size > 0)
    whole = (whole ^ (whole >> 32)) * ODD  # else `ab` after `cd` were `ac` after `bd`: the same sum
    whole = F.pad(whole, (2, 0))  # two empty words come first: word k stands at k + 2
    one = whole.gather(1, words.done + 1)  # the last complete word, number done - 1
    two = whole.gather(1, words.done)  # the one before it
    pair = words.prefix * ODD + one
    triple = pair * ODD + two
    skip = words.prefix * ODD + two
    found += [words.prefix, pair, triple, skip]
    kind = torch.arange(KINDS, device=ids.device) << 56  # the same bytes in another kind differ
    found = torch.stack(found, -1) + kind
    return found * ODD  # this carries every bit to the highest ones


def evaluation_windows(text, context, batch=16):
    """Cut text, (n,) uint8, so that each byte is scored once, and with at least half a context: the
    windows overlap by half, and only their second half is scored (in the first window, all).
    Yields ids (b, T + 1) int64; scored (b, T) bool, about ids[:, 1:]."""
    half = context // 2
    padded = np.concatenate((np.zeros(1), text, np.zeros(context)))
    padded = torch.from_numpy(padded.astype(np.int64))
    starts = torch.arange(0, max(1, len(text) - half), half)
    for start in starts[:, None].split(batch):  # (b, 1)
        at = start + torch.arange(context + 1)  # (b, T + 1); padded[at + 1] is text[at]
        scored = (at >= start + half) | (start == 0)
        scored &= at < len(text)
        yield padded[at], scored[:, :-1]


@torch.no_grad()
def evaluate(model, text):
    """Bits per byte of text, (n,) uint8: the mean of -log2 p(byte)."""
    found = []
    for ids, scored in evaluation_windows(text, model.context):
        log_p, _ = model(ids.to(model.angle.device))
        found.append(log_p.cpu()[scored])
    nats = -torch.cat(found).double().mean()
    return nats.item() / math.log(2)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024), so that every direction of a
    matrix moves alike. (torch.optim.Muon computes in bfloat16, which is slow on many CPUs.)"""
    def __init__(self, parameters, lr=0.02, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                state = self.state[w]
                if "average" not in state:
                    state["average"] = torch.zeros_like(w)
                # The running mean of the gradients, and Nesterov's look one step ahead of it.
                average = state["average"].lerp_(w.grad, 1 - group["momentum"])
                ahead = w.grad.lerp(average, group["momentum"])
                update = orthogonalize(ahead)
                tall = max(1, w.shape[0] / w.shape[1])
                w.sub_(update, alpha=group["lr"] * tall**0.5)  # Jordan's factor


def orthogonalize(x):
    """Push all singular values of a matrix x (r, c) towards 1 with five Newton-Schulz steps:
    x -> a x + b (x x') x + c (x x')^2 x leaves the singular vectors alone and sends each singular
    value s to a s + b s^3 + c s^5. With Jordan's a, b, c 0.1 becomes .34 .99 .71 1.11 .71."""
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.T).T  # the smaller product x x'
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        change = -4.7750 * gram + 2.0315 * gram @ gram
        x = 3.4445 * x + change @ x
    return x


# ---- 7. A run and its options --------------------------------------------------------------------

def say(words):
    """Print. That nobody can read it is no reason to stop a run."""
    with contextlib.suppress(OSError, ValueError):  # a full disk, a terminal that is closed
        tqdm.write(data.printable(words))  # above the progress bar
        sys.stdout.flush()


def count_ngram(args, text, valid):
    """Count an n-gram and let it tell the first story. -> NGram, its bits per byte"""
    counted = text[len(text) // 2 :]  # a teacher's half, see Batches.get
    if args.distill == 0:
        counted = text[: int(3e6 * min(5, args.minutes))]
    ngram = NGram(ORDER).fit(counted)
    bpb = ngram.bits_per_byte(valid)
    say(f"n-gram of order {ORDER}, {len(counted):,} bytes counted: {bpb:.3f} bits per byte")
    story = ngram.generate(PROMPT, 300, 0.8, args.seed)
    say(f"{story.decode('utf-8', 'replace')}\n")
    return ngram, round(bpb, 4)


def tell(model, prompt, length, seed):
    """A story, from random numbers of its own: it changes nothing in the training. -> str"""
    generator = torch.Generator().manual_seed(seed)
    story = prompt + b"".join(generate(model, prompt, length, generator=generator))
    return story.decode("utf-8", "ignore")  # without a character that was cut off


def look(model, valid, state, seed):
    """Evaluate on an eighth of the validation text, continue PROMPT, say what came out."""
    bpb = evaluate(model, valid[: len(valid) // 8])
    story = tell(model, PROMPT, 40, seed).replace("\n", " ")
    say(f"{state['spent']:6.1f} s  step {state['step']:6,}  training {state['loss']:.3f}, "
        f"new text {bpb:.3f} bits per byte | {story}")


class Run:
    """Where a run is saved, and how it goes on."""
    def __init__(self, args, text, model, optimizers, state):
        self.model = model
        self.optimizers = optimizers
        self.state = state
        self.saved = time.monotonic()
        free = ("resume", "out", "device", "data", "valid", "megabytes", "keep")  # may differ
        self.options = {name: x for name, x in vars(args).items() if name not in free}
        self.options |= dict(text=zlib.crc32(text.train), valid=zlib.crc32(text.valid))
        if args.resume is None:
            self.out = new_folder(args.out)
            return
        self.out = args.resume
        _, content = load_checkpoint(self.out)
        if content["optimizers"] is None:
            raise Problem(f"the run in {self.out} is complete; train another without --resume")
        for name, value in self.options.items():
            if (old := content["options"].get(name)) != value:
                raise Problem(f"{self.out} began with {name} {old}: give the same options and text")
        model.load_state_dict(content["weights"])
        for optimizer, kept in zip(optimizers, content["optimizers"]):
            optimizer.load_state_dict(kept)
        state.update(content["state"])

    def save(self, finished=False):
        """Write model.pt, a whole file or none; a full disk stops no training. -> is it written?"""
        self.saved = time.monotonic()
        weights = self.model.state_dict()
        content = dict(weights=weights, options=self.options, state=self.state, optimizers=None)
        if finished:
            for name in {"memory.table"} & weights.keys():  # most of the file
                weights[name] = weights[name].half()  # this costs less than 0.0001 bits
        else:
            content["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        buffer = io.BytesIO()
        torch.save(content, buffer)
        try:
            data.save(os.path.join(self.out, "model.pt"), buffer.getbuffer())
            return True
        except OSError as error:
            notice(f"no checkpoint was written: {error}")
            return False

    def leave(self, number):
        """The run was asked to stop, by a signal: save it, say how to go on."""
        if self.save():
            command = shlex.join([*sys.argv[1:], "--resume", self.out])
            say(f"\ninterrupted after {self.state['step']:,} steps; all is saved\n"
                f"go on: python tiny.py {command}")
        sys.exit(128 + number)

    def finish(self, facts, saved, start):
        """Tell a story, say the figures. -> the figures, a dict"""
        length = int(160 * min(5, self.options["minutes"]))
        story = tell(self.model, b"Once upon a time", length, self.options["seed"])
        say(f"\n{story}\n")
        facts["seconds"] = round(time.monotonic() - start, 1)
        for name, value in facts.items():
            say(f"{name}: {value}")
        if not saved:
            raise Problem(f"the model is not in {self.out}: see above")
        say(f"\nmore stories: python sample.py --out {self.out}")
        return facts


@contextlib.contextmanager
def stop_signals():
    """-> a list, to which Ctrl-C, SIGTERM and a closed terminal append; the same again kills"""
    stop = []
    def remember(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as nohup asks
            signal.signal(number, remember)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # a notebook lives on


def new_folder(out):
    """Make the folder `out`, or if that is there out-2, out-3, ... -> its name"""
    name = out = os.path.normpath(out)
    n = 1
    while os.path.exists(name):
        n += 1
        name = f"{out}-{n}"
    os.makedirs(name)
    say(f"the model goes to {name}")
    return name


def load_checkpoint(out):
    """The folder of a run -> GPT or WordGPT, the content of its file, a dict. Raises Problem."""
    path = os.path.join(out, "model.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # it cannot run code
        model = new_model(content["options"])
        model.load_state_dict(content["weights"])
        return model, content
    except OSError as error:
        raise Problem(f"cannot read {path}: {error.strerror}; train first: tiny.py") from None
    except Exception:  # whatever a damaged or foreign file leads to
        raise Problem(f"{path} is not a checkpoint of this tiny.py; train again") from None


def prepare_cpu():
    """Save a third of the time: numbers below 10^-38, a hundred times as slow on most processors,
    become 0; and glibc (on Linux) keeps freed blocks, which each step would else fetch anew."""
    torch.set_flush_denormal(True)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its maximum of 32 MB
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# In a few minutes many small steps teach more than few large ones.
DEFAULT = dict(layers=2, heads=4, width=128, context=512, batch=8, rate=1.0)
PLAIN = dict(layers=3, heads=4, width=144, context=256, batch=8, rate=1.0)


def new_model(options):
    """-> a GPT of the sizes in a dict of options: that of words, with --plain the usual one"""
    sizes = [options[name] for name in ("layers", "heads", "width", "context")]
    if options["plain"]:
        return GPT(*sizes)
    return WordGPT(*sizes)


def main(argv=None, start=None):
    """start: the second (time.monotonic) at which the budget begins, otherwise now"""
    parser = argparse.ArgumentParser(
        usage="python tiny.py [options]", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a byte-level language model on stories against the clock.",
        epilog="example: python tiny.py --minutes 5 --data stories.txt --out run1")
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, help="for everything but downloads")
    add("--steps", type=int, help="train for so many steps instead, exactly repeatable")
    add("--plain", action="store_true", help="the usual transformer, over bytes")
    add("--distill", type=float, default=0.0, help="with --plain: the n-gram's part of the time")
    sizes = parser.add_argument_group("sizes", "layers, heads, width of the transformer; context: "
        "bytes in a window; batch: windows in a step; rate: a factor of all learning rates")
    for name, value in DEFAULT.items():
        sizes.add_argument(f"--{name}", type=type(value), default=argparse.SUPPRESS,
                           help=f"(default: {value}, with --plain {PLAIN[name]})")
    add("--seed", type=int, default=1, help="of all random numbers")
    add("--resume", metavar="DIR", help="go on with the run in DIR; give its other options again")
    add("--device", default="cpu", help="cpu, cuda or mps")
    add("--out", default="out", metavar="DIR", help="where the model goes")
    data.add_arguments(parser)
    args = parser.parse_args(argv)
    for name, value in [DEFAULT, PLAIN][args.plain].items():
        vars(args).setdefault(name, value)
    whole = [x for x in vars(args).values() if type(x) is int]
    if not min(args.rate, args.minutes, *whole) > 0:
        parser.error("give numbers above 0")
    if args.width % (2 * args.heads) or args.context % 2:
        parser.error("--width must be a multiple of 2 x heads, --context even")
    if args.device != "cpu" and not torch.accelerator.is_available():
        parser.error("PyTorch finds no GPU: leave --device out")
    if not 0 <= args.distill <= args.plain:
        parser.error("--distill is a part of the time, 0 to 1, and needs --plain")
    prepare_cpu()
    return train(args, start or time.monotonic())


if __name__ == "__main__":
    data.run(lambda: main(start=START))
