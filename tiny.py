"""Train a small language model on stories within a few minutes, on the machine at hand, and hear one.

By the end of this file you know every part of a GPT (embedding, rotary positions, attention, MLP, head), how it is trained against the
clock instead of for a number of steps, and how a model that only counts (ngram.py) can teach one that learns. The one command:

    python tiny.py --minutes 5

Sections 1 to 5 are the subject: the model, the sampler, the optimizer, the loss, the step. Sections 6 to 10 are what a program owes those who
run it: a picture, checkpoints, the machine at hand, the run itself (`train`: one flat loop), the command.

Axes: B windows of text in a batch, T bytes in a window, C the model's width, H attention heads, D = C / H the width of a head.
"""
import time

START = time.monotonic()  # the budget counts everything, the slow imports below included

import argparse
import ctypes
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import END, Problem, add_arguments, peak_memory, printable, run, save, text_from
from ngram import NGram


# ---- 1. The model --------------------------------------------------------------------------------------------------------------------

def norm(x):
    """Scale each vector to mean 0 and variance 1 (LayerNorm, Ba et al. 2016), without a learned gain. RMSNorm took the same time here."""
    return F.layer_norm(x, (x.shape[-1],))


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): turn each pair of numbers by an angle that grows with the position, so that the product of a
    query and a key depends on how far apart they are, not on where they are. x (B, H, T, D); cos, sin (T, D/2) -> (B, H, T, D)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Block(nn.Module):
    """One layer: every byte looks at the bytes before it (attention), then thinks about what it saw (MLP). Vaswani et al. 2017, pre-norm.

    Each head makes three vectors of each byte's: a query (what am I looking for?), a key (what am I?) and a value (what do I tell who finds
    me?). A byte's score for an earlier one is its query x that one's key; softmax makes shares of the scores; by these it adds up the values.

    Half of the heads are plain ones (a single head is not). The others ask a question that stories ask all the time: where did the text look
    as it does now, and which byte came next there? That is an induction head (Olsson et al. 2022). A usual transformer needs two layers for
    it, one to carry each byte's vector to the next place, one to compare. Here those heads' keys are simply moved on by one byte, so that a
    byte is found by what stood before it; and what makes keys starts as a copy of what makes queries, so that what is alike is found from the
    first step:

        text        ...  L    i    l    y   ...  L    i    ?
        query                                         q     "i, in a word that begins with Li, ..."
        key              -    k(L) k(i) k(l)          :
                                   ^..................:     q is like k(i); the byte that stands there, l, is the answer

    This is how so small a net remembers whom a story is about. After 60 s: plain heads alone 1.108 bits per byte, half of each 1.045.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.plain = heads // 2  # so many heads are plain ones
        self.scale = (2 * heads / width) ** 0.5  # of query x key: sqrt(2 / D), sharper than the usual sqrt(1 / D), as one place must outweigh 500
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        q, k, _ = self.qkv.weight.data.view(3, heads, width // heads, width)
        k[self.plain :] = q[self.plain :]  # what looks alike is alike from the first step on
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.out.weight)  # at step 0 each layer adds nothing, so that the gradient reaches the embedding undisturbed
        nn.init.zeros_(self.down.weight)

    def forward(self, x, cos, sin, store=None, P=0):
        """x (B, T, C) -> (B, T, C). store (2, B, H, context + 1, D), zeros at first: keys and values of P earlier bytes, to which those of
        these T are added; the keys of the induction heads one place further right, where the last one waits for the next byte."""
        B, T, C = x.shape
        qkv = self.qkv(norm(x)).view(B, T, 3 * self.heads, C // self.heads).transpose(1, 2)  # (B, 3 H, T, D)
        qk, v = qkv.split((2 * self.heads, self.heads), 1)  # (B, 2 H, T, D), (B, H, T, D)
        # Normed queries and keys (QK-norm, Henry et al. 2020) cannot grow, which is what lets the learning rate be high.
        q, k = rotate(norm(qk), cos, sin).chunk(2, 1)  # each (B, H, T, D)
        plain, k = k.split((self.plain, self.heads - self.plain), 1)
        mask = None
        if store is None:
            k = torch.cat((plain, F.pad(k, (0, 0, 1, -1))), 1)  # along T: a 0 in front, for those who find nothing alike; the last one off
        else:
            store[0, :, : self.plain, P : P + T] = plain
            store[0, :, self.plain :, P + 1 : P + T + 1] = k
            store[1, :, :, P : P + T] = v
            k, v = store[:, :, :, : P + T]
            if P and T > 1:  # query t sees keys up to P + t; a single new byte sees all
                mask = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=P == 0 and T > 1, scale=self.scale)  # (B, H, T, D)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        h = F.relu(self.up(norm(x)))
        return x + self.down(h * h)  # ReLU squared: So et al. 2021


# A small net sees too few bytes in five minutes to learn spelling and grammar through attention. So each position also looks up, in one
# large table, a vector for each of the contexts that it stands in: "after the bytes ' wen'", "in a word that began 'we', after 'she'", ...
# A context's row is its hash, collisions and all (hashed n-gram embeddings, Svenstrup et al. 2017), and a row that is not looked up costs
# nothing. What counting (ngram.py) keeps for each context is 256 counts; here it is C numbers that mean whatever helps the net.

GRAMS = (1, 2, 3, 4, 5, 6, 8)  # contexts: so many bytes ...
KINDS = len(GRAMS) + 4  # ... and the word so far, alone; with the word before; with the two words before; with only the second word before
LETTER = np.array([b >= 128 or chr(b).isalpha() or chr(b) == "'" for b in range(256)])
MULTIPLIER, WRAP = 6364136223846793005, 2**64  # odd, from Knuth's MMIX; hashes are sums and products that wrap around at 2^64
POWERS, INVERSES = ([pow(base, i, WRAP) for i in range(4200)] for base in (MULTIPLIER, pow(MULTIPLIER, -1, WRAP)))
ARRAYS = np.array((POWERS, INVERSES), np.uint64)


def contexts_at(now, S, inverses, gap, end, mark):
    """Name the contexts that the byte at position `now` completes -> list of KINDS hashes. The same lines serve arrays of positions
    (`contexts`) and, for the one byte that a story grows by (`quick`), plain integers, which must then be taken modulo 2^64.

    The hash of bytes a..b-1 is the sum of (byte_j + 1) * MULTIPLIER^(j-a). S[i] is the sum of (byte_j + 1) * MULTIPLIER^j over all j < i; from
    it the hash is (S[b] - S[a]) * MULTIPLIER^-a: contexts of any length, words too, at every position, without a loop.
    gap[i] is the last position up to i that holds no letter, end[i] the last that holds a letter; mark[i] is the byte if it is no letter, else 0:

        i          0  1  2  3  4  5  6  7     From now = 7 backwards: the word so far stands behind gap[7] = 4; the word before it
        byte          s  h  e     w  e  n     ends at end[4] = 3 and stands behind gap[3] = 0.
        gap        0  0  0  0  4  4  4  4
        end        .  1  2  3  3  5  6  7     The odd factors 3 and 5 only keep apart what would else be the same sum.
    """
    span = lambda a, b: (S[b] - S[a]) * inverses[a]  # hash of bytes a..b-1
    edge = gap[now]
    words = [span(edge + 1, now + 1) * 3 + mark[now]]  # the word so far; at a gap, which byte makes it
    for _ in range(2):
        stop = end[edge]  # where the word before that gap ends
        edge = gap[stop]  # the gap before that word
        words.append(span(edge + 1, stop + 1))
    word, one, two = words[0] * MULTIPLIER, words[1], words[2]
    pair = (word + one) * MULTIPLIER
    found = [span(now + 1 - n, now + 1) for n in GRAMS] + [word, pair, (pair + two) * MULTIPLIER, word + 5 * two]
    return [(hash ^ POWERS[kind]) * POWERS[2] for kind, hash in enumerate(found)]  # the same hash in another kind is another context


def prefixes(ids):
    """What `contexts_at` needs to know of texts, for all positions: ids (B, t) uint8 -> S, gap, end, mark, each (B * L,), row after row.
    L is t + 9: before each beginning stand 8 ENDs, which are no letters, and behind each end a spare column, which only S uses."""
    B, t = ids.shape
    text = np.zeros((B, t + max(GRAMS) + 1), np.uint8)
    text[:, -t - 1 : -1] = ids
    at, letter = np.arange(text.size).reshape(text.shape), LETTER[text]
    S = np.zeros(text.shape, np.uint64)
    np.cumsum((text[:, :-1] + np.uint64(1)) * ARRAYS[0, : len(at[0]) - 1], 1, out=S[:, 1:])
    gap = np.maximum.accumulate(np.where(letter, 0, at).ravel())
    end = np.maximum.accumulate(np.where(letter, at, at[:, :1]).ravel())  # the row's first position, which is no letter: none
    return S.ravel(), gap, end, np.where(letter, 0, text).ravel()


def contexts(ids, T):
    """The contexts that each of the last T bytes completes: ids (B, t) uint8 -> (B, T, KINDS) uint64, evenly spread over all 64 bits."""
    S, gap, end, mark = prefixes(ids)
    L = len(S) // len(ids)
    now = np.arange(len(S)).reshape(-1, L)[:, -1 - T : -1]  # (B, T)
    return np.stack(contexts_at(now, S, np.tile(ARRAYS[1, :L], len(ids)), gap, end, mark), -1)


SLOTS = 24  # bits of a context's hash by which it is counted


class Memory(nn.Module):
    """A table with a vector for each context (by hash), learned with an optimizer of its own.

    When a text is read a second time, the row of a context that stood in one place only gives away which byte came there, and the net learns to
    trust what says nothing about new text. So the first reading counts in how many places each context stood (a step counts once), and a
    row is neither looked up nor learned where its context was not seen elsewhere: in the first reading, once before; in later ones, whose
    counts include the very place that is read, in two others. (Contexts share counters as they share rows, so some are taken for known that
    are not.) Nor do rare contexts, which are most, fill the table (admission by count: McMahan et al. 2013). After 100 s on 4.8 MB, read 1.6
    times: 1.024 bits per byte without this, 0.996 with it.

    The vectors of a position's contexts are added, so the gradient of the sum is the gradient of each: nothing needs to go through autograd,
    no gradient of the table's size or sparse tensor is ever made. Row-wise Adagrad (Duchi et al. 2011; one number per row as in DLRM, Naumov
    et al. 2019): the more a row has been pushed, the smaller its steps, so that rare contexts learn fast and common ones settle.
    """

    def __init__(self, width, rows):
        super().__init__()
        self.bits = rows.bit_length() - 1
        self.again = False  # whether the text to learn from has been read before
        self.register_buffer("table", torch.zeros(rows, width))
        self.register_buffer("count", torch.zeros(2**SLOTS, dtype=torch.uint8))  # places where a context stood, up to 255
        # The sum of a row's mean squared gradients. If it began at 0, a row's first step would be as long however small the gradient: what stood
        # in two places would be believed at once.
        self.register_buffer("pushed", torch.full((rows,), 0.03), persistent=False)

    def forward(self, hashes):
        """hashes (N, KINDS) uint64 -> (N, C) the sum of the rows of those that are known"""
        slots = torch.from_numpy((hashes >> np.uint64(64 - SLOTS)).astype(np.int64)).to(self.table.device)
        learning = torch.is_grad_enabled()
        known = (self.count[slots] >= (3 if learning and self.again else 1)).to(self.table.dtype)  # (N, KINDS), 0 or 1
        out = F.embedding_bag(slots >> (SLOTS - self.bits), self.table, mode="sum", per_sample_weights=known)
        if learning:
            self.used = slots, known, out.requires_grad_()  # a leaf: `backward` ends here and leaves the gradient in out.grad
        return out

    @torch.no_grad()
    def step(self, lr):
        """Learn from the gradient that the last look-up received."""
        slots, known, out = self.used
        gradient = out.grad * len(out)  # of each position's own loss: `backward` was given the mean
        slots, known, gradient = together(slots), together(known), together(gradient)
        rows = slots >> (SLOTS - self.bits)
        self.pushed.index_add_(0, rows.flatten(), (known * gradient.square().mean(1, keepdim=True)).flatten())
        rate = -lr * known * self.pushed[rows].rsqrt()  # (N, KINDS)
        self.table.index_add_(0, rows.flatten(), (rate[:, :, None] * gradient[:, None]).flatten(0, 1))
        if not self.again:
            self.count[slots] = self.count[slots].clamp(max=254) + 1


def together(x):
    """Under torchrun: the rows of x from all processes; else x itself. (N, ...) -> (processes x N, ...)"""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def ask(ngram, ids, T):
    """What an NGram says after each of the last T bytes of ids (B, t), the rows being stories from their END on. -> (B, T, 256)"""
    B, t = ids.shape
    text = F.pad(ids.cpu(), (0, 1), value=END).to(torch.uint8).numpy()  # asked about: END in the last column; no context reaches across
    at = (t + 1) * np.arange(B)[:, None] + np.arange(t - T + 1, t + 1)
    return torch.from_numpy(ngram.probs(text.ravel(), at.ravel())).view(B, T, 256)


class GPT(nn.Module):
    """A byte-level GPT with a memory. rows: of the memory, a power of 2, at most 2^SLOTS.

    residual: learn only what a counting model does not know (Li et al. 2022): logits = net + alpha x log p_ngram, where the net sets alpha
    for each byte. At step 0 the net says nothing and alpha is 1: it *is* the n-gram, and training can only improve on it. Such a model
    needs `ngram` (an NGram) wherever it goes.
    """

    def __init__(self, layers=1, heads=2, width=96, context=512, rows=2**19, residual=False):
        super().__init__()
        self.config = dict(layers=layers, heads=heads, width=width, context=context, rows=rows, residual=residual)
        self.context, self.residual, self.ngram = context, residual, None
        self.byte = nn.Embedding(256, width)
        self.memory = Memory(width, rows)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.zeros_(self.head.weight)  # step 0 predicts 1/256 for every byte: 8 bits per byte
        if residual:
            self.alpha = nn.Linear(width, 1)
            nn.init.zeros_(self.alpha.weight)
            nn.init.ones_(self.alpha.bias)
        pairs = width // heads // 2
        angle = torch.arange(context)[:, None] * 10000.0 ** (-torch.arange(pairs) / pairs)  # (T, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids, cache=None, ngram=None):
        """ids (B, T) int64, T <= context -> logits (B, T, 256) float32 for the byte after each one, in nats, and the states (B, T, C) that
        they were read from.

        cache: a dict, empty at first, that remembers what later bytes need of earlier ones (bytes, keys, values), so that a text can be fed
        piece by piece, each byte once; at most `context` bytes in all (ValueError).
        ngram (B, T, 256): what the n-gram says about the byte after each one, probabilities; asked here if a residual model is not given it.
        """
        seen = torch.cat((cache["ids"], ids), 1) if cache else ids  # (B, P + T)
        (B, T), end, device = ids.shape, seen.shape[1], self.cos.device
        if end > self.context:
            raise ValueError(f"{end} bytes do not fit the context of {self.context}")
        hashes = contexts(seen.to(torch.uint8).cpu().numpy(), T).reshape(-1, KINDS)
        x = norm(self.byte(ids.to(device)) + self.memory(hashes).view(*ids.shape, -1))  # (B, T, C)
        if cache is not None:
            if not cache:
                D = x.shape[-1] // self.config["heads"]
                cache["layers"] = [x.new_zeros(2, B, self.config["heads"], self.context + 1, D) for _ in self.blocks]
            cache["ids"] = seen
        for i, block in enumerate(self.blocks):
            x = block(x, self.cos[end - T : end], self.sin[end - T : end], cache and cache["layers"][i], end - T)
        states = norm(x)
        logits = self.head(states)
        if self.residual:
            ngram = ask(self.ngram, seen, T) if ngram is None else ngram
            logits = logits + self.alpha(states) * ngram.to(device).clamp(min=1e-6).log()
        return logits.float(), states


# ---- 2. Telling: one byte after the other --------------------------------------------------------------------------------------------

@torch.inference_mode()
def generate(model, prompts, temperature=1.0, top_p=1.0, generator=None, fuse=None):
    """Continue several prompts at once, without end: yields a list of B integers, the next byte of each story, one list per byte.

    prompts: list of B bytes objects; each story's END is put before it. The first list is the byte after the shortest prompt; where a
    prompt is longer, its own bytes come first. fuse: a function (p (B, 256), states (B, T, C) of the bytes just fed, ids (B, t)) -> p,
    that may change the probabilities (sample.py).

    Each byte is fed once (cache). When the context is full, its second half is fed again as a new one: a byte then costs twice as
    much on average, however long the story, and sees between half a context and a whole one, as in `evaluate`.
    """
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    ids = torch.tensor([[END, *prompt[:shortest]] for prompt in prompts])  # (B, t)
    alone = len(prompts) == 1 and not (fuse or model.residual) and model.cos.device.type == "cpu"
    room = 0  # bytes that the context still takes
    while True:
        if not room:
            cache, room, advance = {}, model.context, None
            new = ids if ids.shape[1] <= model.context else ids[:, -model.context // 2 :]
        if advance:
            logits = advance(new.item())[None]
        else:
            logits, states = model(new, cache, ask(model.ngram, ids, new.shape[1]) if model.residual else None)
            logits = logits[:, -1].cpu()  # (B, 256)
            advance = quick(model, cache) if alone else None
        room -= new.shape[1]
        if fuse:
            logits = fuse(F.softmax(logits, -1), states, ids).clamp(min=1e-30).log()
        byte = choose(logits, temperature, top_p, generator)  # (B,)
        t = ids.shape[1] - 1
        for b, prompt in enumerate(prompts) if t < longest else ():
            if t < len(prompt):
                byte[b] = prompt[t]
        new = byte[:, None]
        ids = torch.cat((ids, new), 1)
        yield byte.tolist()


def choose(logits, temperature=1.0, top_p=1.0, generator=None):
    """Draw a byte from each row. logits (B, 256), nats -> (B,) int64. temperature 0 takes the likeliest; top_p < 1 draws from the likeliest
    bytes that together have that probability (nucleus sampling, Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = F.softmax(logits / temperature, -1, dtype=torch.float64)
    if top_p < 1:
        p, byte = p.sort(-1, descending=True)
        p[p.cumsum(-1) - p >= top_p] = 0  # what comes before a byte is already enough
    # Lay the probabilities end to end, as long as they are, and throw a dart: it hits each byte as often as it should.
    ends = p.cumsum(-1)
    dart = ends[:, -1:] * torch.rand(len(p), 1, generator=generator, dtype=p.dtype)
    hit = torch.searchsorted(ends, dart, right=True).clamp(max=255)  # (B, 1)
    return (hit if top_p == 1 else byte.gather(1, hit))[:, 0]


def stories(model, prompts, length=1000, temperature=0.45, top_p=1.0, seed=1, fuse=None):
    """The prompts continued up to END or `length` bytes in all, side by side. list of bytes -> list of bytes

    temperature: 0.45 as blind readers liked these stories better than those at 0.6, those better than at 0.8, those better than at 1.
    """
    told, going = [bytearray(prompt[: min(map(len, prompts))]) for prompt in prompts], [True] * len(prompts)
    for step in generate(model, prompts, temperature, top_p, torch.Generator().manual_seed(seed), fuse):
        for b, byte in enumerate(step):
            going[b] = going[b] and byte != END and len(told[b]) < length
            if going[b]:
                told[b].append(byte)
        if not any(going):
            return [bytes(story) for story in told]


def quick(model, cache):
    """Go on with the one story in a cache, on a CPU. -> a function: its next byte, an integer -> logits (256,)

    It is GPT.forward once more, in NumPy, for the sake of speed alone. PyTorch takes some four microseconds to call anything, and one byte
    needs a hundred small calls, so that nearly all the time went into calling; NumPy takes one, plain integers for the contexts even less.
    """
    weight = {name: p.numpy() for name, p in model.state_dict().items()}
    H, shift, P = model.config["heads"], SLOTS - model.memory.bits, cache["ids"].shape[1]
    S, gap, end, mark = (array.tolist() for array in prefixes(cache["ids"].to(torch.uint8).numpy()))
    del gap[-1], end[-1], mark[-1]
    D = len(model.cos[0]) * 2
    cos = torch.cat((model.cos, model.cos), 1).numpy()  # (context, D): `rotate` is x * cos + (x with its halves exchanged) * sin
    sin = torch.cat((model.sin, -model.sin), 1).numpy()
    halves = np.roll(np.arange(D), D // 2)
    centred = lambda w: w - w.mean(-2, keepdims=True)  # a norm takes the mean off what it gets: done once here, no norm below need do it
    blocks = []
    for i, block in enumerate(model.blocks):
        to_qkv, out, up, down = (weight[f"blocks.{i}.{name}.weight"] for name in ("qkv", "out", "up", "down"))
        to_qk, to_v = np.split(to_qkv.reshape(3 * H, D, -1), [2 * H])
        to_qkv = np.concatenate((centred(to_qk), to_v)).reshape(to_qkv.shape)
        blocks.append((block.plain, block.scale, *cache["layers"][i][:, 0].numpy(), to_qkv, centred(out), up, centred(down)))
    rms_norm = lambda x: x / math.sqrt(x @ x / len(x) + 1e-5)

    def advance(byte):
        nonlocal P
        now, letter = len(gap), LETTER[byte]
        S.append(S[now] + (byte + 1) * POWERS[now])
        gap.append(gap[-1] if letter else now)
        end.append(now if letter else end[-1])
        mark.append(0 if letter else byte)
        slots = [hash % WRAP >> 64 - SLOTS for hash in contexts_at(now, S, INVERSES, gap, end, mark)]
        rows = [slot >> shift for slot in slots if weight["memory.count"][slot]]
        x = weight["byte.weight"][byte] + np.add.reduce(weight["memory.table"][rows], 0)  # (C,)
        x = rms_norm(x - np.add.reduce(x) / len(x))
        for plain, scale, K, V, to_qkv, out, up, down in blocks:
            qkv = (to_qkv @ rms_norm(x)).reshape(3 * H, D)
            qk, v = qkv[: 2 * H], qkv[2 * H :]
            qk = qk / np.sqrt(np.add.reduce(qk * qk, 1, keepdims=True) / D + 1e-5)
            qk = qk * cos[P] + qk[:, halves] * sin[P]
            q, k = qk[:H], qk[H:]
            K[:plain, P], K[plain:, P + 1], V[:, P] = k[:plain], k[plain:], v  # as in Block.forward
            share = np.exp((K[:, : P + 1] @ q[:, :, None])[:, :, 0] * scale)  # (H, P + 1); normed vectors: no overflow
            y = (share[:, None] @ V[:, : P + 1])[:, 0] / np.add.reduce(share, 1, keepdims=True)
            x = x + out @ y.ravel()
            h = np.maximum(up @ rms_norm(x), 0)
            x = x + down @ (h * h)
        P += 1
        return torch.from_numpy(weight["head.weight"] @ rms_norm(x))

    return advance


# ---- 3. The optimizer ----------------------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024): every direction of a weight matrix moves by the same amount, not only
    the few that dominate the gradient. For matrices inside the net; embeddings and the head are better off with Adam.

    Newton-Schulz in float32 (torch.optim.Muon uses bfloat16, very slow on a CPU without such units), all matrices of a shape in one batch.
    """

    def __init__(self, parameters, lr=0.02, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for w in group["params"]:
                shapes.setdefault(w.shape, []).append(w)
            for shape, weights in shapes.items():
                for w in weights:
                    self.state[w].setdefault("momentum", torch.zeros_like(w)).lerp_(w.grad, 1 - group["momentum"])
                update = torch.stack([w.grad.lerp(self.state[w]["momentum"], group["momentum"]) for w in weights])  # (matrices, rows, columns)
                update = orthogonalize(update) * max(1, shape[0] / shape[1]) ** 0.5
                for w, u in zip(weights, update):
                    w.sub_(u, alpha=group["lr"])


def orthogonalize(x):
    """Push all singular values of each matrix towards 1 with five Newton-Schulz steps (coefficients: Jordan et al. 2024). (n, r, c) float32

    x -> a x + b (x x') x + c (x x')^2 x leaves the singular vectors alone and sends each singular value s to a s + b s^3 + c s^5.
    """
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.mT


# ---- 4. What is trained on, and how it is judged -------------------------------------------------------------------------------------

READINGS = 2  # A run ends when it has read its text so often, for then it begins to learn it by heart: 1 MB, 1.14 bpb then, 1.56 after five
LEAST = 250_000  # A text of fewer bytes is read more often, as far as this one would be: 160 kB, 1.58 bpb after three readings, 1.71 after two


class Batches:
    """Windows of the text, in an order drawn anew for each reading, and what the teacher says about them. Made one ahead by a thread, while the
    net computes.

    All of the text is read before any of it is read again. (Windows drawn at random with replacement have shown two thirds of the text
    when they are as long as all of it, and much of that twice: after 100 s on 4.8 MB 1.081 bits per byte, 1.034 without replacement.)

    rank, world: this is one of `world` processes and reads its own part of the text. step: the first to be made.
    """

    def __init__(self, text, batch, context, teacher, seed, rank=0, world=1, step=0):
        self.text = np.concatenate((np.zeros(1, np.uint8), text))  # END before the first story as before all others
        self.batch, self.context, self.teacher, self.seed, self.step = batch, context, teacher, (seed, rank), step
        self.low, self.high = ((len(self.text) - context) * r // world for r in (rank, rank + 1))
        self.per_reading = max(1, (len(self.text) - context) // world // (context * batch))  # steps that read the text once
        self.most = READINGS * max(self.per_reading, LEAST // world // (context * batch))  # steps after which a run against the clock ends
        self.pool = ThreadPoolExecutor(1)
        self.next = self.drawn = None

    def make(self, taught):
        """-> bytes (B, T + 1) int64; the teacher's distributions (B, T, 256) float32 or None"""
        reading, part = divmod(self.step, self.per_reading)
        if reading != self.drawn:  # a function of seed and reading alone, so that a run can be resumed anywhere
            random, self.drawn = np.random.default_rng((*self.seed, reading)), reading
            windows = np.arange(self.low + random.integers(min(self.context, self.high - self.low)), self.high, self.context)
            self.order = np.resize(random.permutation(windows), self.per_reading * self.batch)
        at = self.order[part * self.batch :][: self.batch]
        self.step += 1
        position = at[:, None] + np.arange(self.context + 1)  # (B, T + 1)
        window = torch.from_numpy(self.text[position].astype(np.int64))
        if not taught:
            return window, None
        # The teacher has counted this very text; asked plainly it would recite it, hence leave_one_out. Its text has no END in front.
        q = self.teacher.probs(self.text[1:], position[:, 1:].ravel() - 1, leave_one_out=True)
        return window, torch.from_numpy(q).view(self.batch, self.context, 256)

    def get(self, taught):
        """The next batch; `taught` says whether it (and, as far as is known, the one after it) needs the teacher."""
        window, teacher = self.next.result() if self.next else self.make(taught)
        self.next = self.pool.submit(self.make, taught)
        return window, teacher if taught else None


def distillation_loss(logits, target, teacher, weight):
    """(1 - weight) x cross-entropy to the byte that came + weight x cross-entropy to the teacher's distribution (Hinton et al. 2015).

    One byte says what came; the teacher's 256 probabilities say what else could have come and how likely, so each position teaches more. That is
    worth something while the student knows less than the teacher; here that is soon over (README, "A teacher").
    logits (N, 256) nats, target (N,) int64, teacher (N, 256) probabilities -> scalar, nats per byte
    """
    return (1 - weight) * F.cross_entropy(logits, target) + weight * F.cross_entropy(logits, teacher)


@torch.no_grad()
def windows(model, text, every=1, batch=16):
    """Let the model read text, (n,) uint8, so that each byte is predicted once, after at least half a context where there are so many bytes:
    windows overlap by half and only their second half counts (in the first window, all). every: read one window in `every`, for a quick look.

    Yields, for b windows at a time: given (b, T) int64; came (b, T), the bytes to be predicted; at (b, T), where in text those stand;
    asked (b, T) bool, which of them count; logits (b, T, 256) and states (b, T, C) on the CPU. No random numbers are used: looking changes nothing.
    """
    T = model.context
    padded = torch.from_numpy(np.concatenate((np.zeros(1, np.uint8), text, np.zeros(T, np.uint8))).astype(np.int64))
    starts = np.arange(0, max(1, len(text) - T // 2), T // 2)[::every]
    for i in range(0, len(starts), batch):
        start = torch.from_numpy(starts[i : i + batch])[:, None]
        at = start + torch.arange(T)
        asked = (at < len(text)) & ((at >= start + T // 2) | (start == 0))
        ngram = None
        if model.residual:  # it has the whole text to the left, as in training
            ngram = torch.from_numpy(model.ngram.probs(text, at.clamp(max=len(text)).flatten().numpy())).view(*at.shape, 256)
        logits, states = model(padded[at], ngram=ngram)
        yield padded[at], padded[at + 1], at, asked, logits.cpu(), states.cpu()


def evaluate(model, text, every=1):
    """Bits per byte of text, (n,) uint8, read as `windows` does."""
    nats = count = 0
    for _, came, _, asked, logits, _ in windows(model, text, every):
        loss = F.cross_entropy(logits[asked], came[asked], reduction="none")
        nats, count = nats + loss.double().sum().item(), count + len(loss)
    return nats / count / math.log(2)


# ---- 5. A step, and when it is the last ----------------------------------------------------------------------------------------------

MEMORY_RATE = 0.4  # 0.05, with a sum begun at 0: 0.889 bpb after five minutes instead of 0.878
DISTILL_WEIGHT = 0.6
PAUSE = 30.0  # a step that takes longer, and ten times as long as any before, was slept through


def optimizers(model):
    """Muon for the matrices inside, AdamW for what leads in and out. (The memory has its own, Memory.step.)"""
    found = [
        Muon(model.blocks.parameters(), lr=0.02),
        torch.optim.AdamW([p for name, p in model.named_parameters() if "blocks" not in name], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0,
                          fused=True),
    ]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def learning_rate(progress):
    """Full speed for half the budget, then down to 0 in a straight line; 0 <= progress <= 1 -> factor for every optimizer's rate."""
    return min(1.0, 2 * (1 - progress))


def learn(net, opts, window, teacher, factor):
    """One step on window (B, T + 1) with what the teacher says of its bytes, (B, T, 256) or None; factor: of all rates.

    net: a GPT, or one in DistributedDataParallel. -> loss, nats per byte; None if a gradient is no number: then nothing is changed
    """
    model = getattr(net, "module", net)
    logits, _ = net(window[:, :-1], ngram=teacher)  # (B, T, 256)
    logits, target = logits.flatten(0, 1), window[:, 1:].flatten().to(logits.device)  # (B * T, 256), (B * T,)
    if teacher is None or model.residual:
        loss = F.cross_entropy(logits, target)
    else:
        loss = distillation_loss(logits, target, teacher.flatten(0, 1).to(logits.device), DISTILL_WEIGHT)
    loss.backward()
    finite = torch.stack([p.grad.sum() for p in model.parameters()]).isfinite().all()
    for optimizer in opts:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if finite:
        model.memory.step(MEMORY_RATE * factor)
    return loss.detach() if finite else None


class Clock:
    """Seconds of the budget that are gone. A laptop that slept, or a process that was stopped, has not trained: such a gap does not count."""

    def __init__(self, start):
        self.start, self.seen, self.longest = start, None, 0.0

    def __call__(self):
        return time.monotonic() - self.start

    def tick(self):
        """Call it once a step. -> the seconds that were slept through, usually 0"""
        now = time.monotonic()
        gap, self.seen = now - (self.seen or now), now
        if gap > max(PAUSE, 10 * self.longest):
            self.start += gap
            return gap
        self.longest = max(self.longest, gap)
        return 0.0


# ---- 6. Showing what happens ---------------------------------------------------------------------------------------------------------

def scales(curve, level):
    """The highest and lowest bpb, the last second, and how far down a bpb is drawn, from 0 (top) to 1; logarithmic, as the fall is steep."""
    values = [b for _, b in curve] + ([level] if level else [])
    top, low = max(values), min(values)
    return top, low, max(curve[-1][0], 1e-9), lambda b: math.log(top / b) / max(math.log(top / low), 1e-9)


def picture(curve, level, width=64, height=12):
    """The learning curve for the terminal. curve: [(seconds, bpb), ...]; level: the n-gram's bpb, drawn as a line, or None. -> str"""
    top, low, end, down = scales(curve, level)
    row = lambda b: round((height - 1) * down(b))
    grid = [[" "] * (width + 1) for _ in range(height)]
    if level:
        grid[row(level)] = ["-"] * (width + 1)
    for seconds, b in curve:
        grid[row(b)][round(width * seconds / end)] = "o"
    names = {0: f"{top:.2f}", height - 1: f"{low:.2f}"} | ({row(level): f"n-gram {level:.2f}"} if level else {})
    lines = [f"{names.get(i, ''):>12} |{''.join(line)}" for i, line in enumerate(grid)]
    return "\n".join(["bits per byte", *lines, f"{'':>12} +{'-' * width}", f"{'':>13}0{f'{end:.0f} s':>{width}}"])


def svg(curve, level):
    """The same as a picture file, (seconds, bpb) points -> SVG text."""
    top, low, end, down = scales(curve, level)
    x, y = lambda s: 60 + 520 * s / end, lambda b: 20 + 240 * down(b)
    points = " ".join(f"{x(s):.1f},{y(b):.1f}" for s, b in curve)
    parts = [f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="2"/>']
    parts += [f'<circle cx="{x(s):.1f}" cy="{y(b):.1f}" r="3" fill="#06c"/>' for s, b in curve]
    parts += [f'<text x="52" y="{y(b) + 4:.0f}" text-anchor="end">{b:.2f}</text>' for b in (top, low)]
    if level:
        parts.append(f'<path d="M60 {y(level):.1f}H580" stroke="#c60" stroke-dasharray="6 4"/>')
        parts.append(f'<text x="580" y="{y(level) - 6:.0f}" text-anchor="end" fill="#c60">n-gram {level:.3f}</text>')
    parts.append('<path d="M60 20V260H580" fill="none" stroke="#888"/>')
    parts.append(f'<text x="320" y="285" text-anchor="middle">validation bits per byte over {end:.0f} seconds</text>')
    body = "\n".join(parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="600" height="300" font-family="sans-serif" font-size="13">\n'
            f'<rect width="600" height="300" fill="white"/>\n{body}\n</svg>\n')


# ---- 7. The checkpoint ---------------------------------------------------------------------------------------------------------------

VERSION = 2  # of the file


def save_checkpoint(out, model, facts, recipe, training=None):
    """Write out/model.pt: plain tensors, numbers and text. The file is always a whole one, old or new (data.save).

    training: what --resume needs to go on. Without it the run is over; the memory, which is most of the file, is then kept in half
    precision, which costs less than 0.0001 bits per byte (0.9930 before and after).
    """
    weights = {name: w if training or name != "memory.table" else w.half() for name, w in model.state_dict().items()}
    content = io.BytesIO()
    torch.save({"version": VERSION, "config": model.config, "weights": weights, "facts": facts, "recipe": recipe, "training": training}, content)
    save(os.path.join(out, "model.pt"), content.getbuffer())


def load_checkpoint(out, device="cpu"):
    """The model in the folder `out` -> (GPT, {"facts", "recipe", "training"}). Raises Problem if there is none or it is not one of ours."""
    path = os.path.join(out, "model.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # only: a file from elsewhere cannot run code
        if checkpoint["version"] != VERSION:
            raise Problem(f"{path} was written by another version of tiny.py ({checkpoint['version']}, not {VERSION}); train again with --out {out}")
        model = GPT(**checkpoint["config"])
        model.load_state_dict(checkpoint.pop("weights"))
        if model.residual:
            model.ngram = NGram.load(os.path.join(out, "ngram.npz"))
        return model.to(device), {name: checkpoint[name] for name in ("facts", "recipe", "training")}
    except FileNotFoundError as error:
        raise Problem(f"no {os.path.basename(error.filename)} in {out}; train a model first: python tiny.py --minutes 5 --out {out}") from None
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise Problem(f"cannot read {path}: {error.strerror}; name another folder with --out") from None
    except Problem:
        raise
    except Exception as error:
        raise Problem(f"{path} is not a checkpoint of tiny.py ({type(error).__name__}); train again with --out {out}") from None


def set_aside(out):
    """If the folder holds a run, rename it to out.1 (.2, ...): a run is never overwritten."""
    if not os.path.exists(os.path.join(out, "model.pt")):
        return
    n = 1
    while os.path.exists(f"{out.rstrip(os.sep)}.{n}"):
        n += 1
    try:
        os.rename(out, f"{out.rstrip(os.sep)}.{n}")
    except OSError as error:
        raise Problem(f"{out} holds a run and cannot be renamed ({error.strerror}); name another folder with --out") from None
    print(f"NOTICE: {out} held a run; it is now in {out.rstrip(os.sep)}.{n}", file=sys.stderr)


# ---- 8. The machine ------------------------------------------------------------------------------------------------------------------

def prepare_cpu():
    """Two things that cost nothing. Numbers below 10^-38 become 0: most processors take a hundred times as long for them (44 -> 35 ms a step).

    And glibc keeps blocks that were freed. Else it returns those of a megabyte and more to the system at once, and each step fetches them
    anew, emptied page by page: 2,000 page faults a step, a fifth of the time. Elsewhere than on Linux that does nothing.
    """
    torch.set_flush_denormal(True)
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, at its maximum of 32 MB
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> torch.device. Raises Problem if it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if not there[name]:
        raise Problem(f"--device {name}: there is none here; use --device cpu, or leave the option out")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name != "cpu" and (reason := fault(device)):
        print(f"NOTICE: {name} is not used: {reason}", file=sys.stderr)
        return torch.device("cpu")
    return device


def fault(device):
    """What goes wrong there in two steps that go right on the CPU -> str, "" if nothing. (Some versions of PyTorch have no embedding_bag on
    MPS, and wrong numbers without an error have been seen there too.)"""
    losses = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        net, window = GPT(layers=2, width=32, context=64, rows=2**10), torch.randint(1, 256, (4, 65))
        for p in [*net.parameters(), net.memory.table]:
            nn.init.normal_(p, std=0.2)
        net.memory.count.fill_(1)  # all contexts are known
        try:
            opts = optimizers(net.to(place))
            losses.append([float(learn(net, opts, window, None, 1.0) or math.nan) for _ in range(2)])
        except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
            return str(error).splitlines()[0]
    same = all(abs(there - here) < 0.01 * here for here, there in zip(*losses))
    return "" if same else "it computes another loss than the CPU for the same batch"


# How large a net, and how many bytes to a step? In a few minutes many small steps teach more than few large ones, until they no longer fill the
# cores: after 60 s 2,048 bytes a step had 1.040 bpb, 4,096 1.024; in another sitting 4,096 1.061, 8,192 1.064. Where each size is best: README,
# "How large a net?". `large` is an estimate.
SIZES = {
    "small": dict(layers=1, heads=2, width=96, context=512, batch=8),
    "medium": dict(layers=1, heads=2, width=128, context=512, batch=8),
    "large": dict(layers=4, heads=4, width=256, context=512, batch=16),
}
ENOUGH = 4000  # a larger size must get so many steps


def sized(args, name):
    """A size's settings, with those the user gave instead. -> dict"""
    return {key: getattr(args, key) or value for key, value in SIZES[name].items()}


def pick_size(args, text, device, seconds):
    """The largest size of which this machine makes ENOUGH steps in `seconds`, by timing a few of each, and the text is long enough for so many.
    -> settings, the reason"""
    if args.size != "auto":
        return sized(args, args.size), f"size {args.size}, as asked"
    if args.steps or dist.is_initialized():
        return sized(args, "small"), "size small, as always with --steps and with several processes"
    chosen, told = "small", []
    for name in SIZES:
        setting = sized(args, name)
        model = GPT(**{key: setting[key] for key in ("layers", "heads", "width", "context")}).to(device)
        opts, batches, took = optimizers(model), Batches(text, setting["batch"], setting["context"], None, 0), []
        for _ in range(5):
            began = time.monotonic()
            loss = learn(model, opts, *batches.get(False), 1.0)
            loss is None or loss.item()  # wait for a GPU
            took.append(time.monotonic() - began)
        steps = min(seconds / sorted(took)[1], batches.most)
        told.append(f"{name} {steps:,.0f}")
        if steps < ENOUGH:
            break
        chosen = name
    return sized(args, chosen), f"size {chosen}; steps that fit: {', '.join(told)}; more than small needs {ENOUGH:,}"


def processes():
    """Join the processes that torchrun started, if it did. -> this one's rank, how many there are"""
    if "RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(minutes=10))
    return dist.get_rank(), dist.get_world_size()


def agreed(progress, stop):
    """What the first process says about the progress, and whether any of them was told to stop: none may wait for one that has ended."""
    if not dist.is_initialized():
        return progress, stop
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    said = torch.tensor([progress if dist.get_rank() == 0 else 0.0, stop], dtype=torch.float64, device=device)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return said[0].item(), bool(said[1])


# ---- 9. One run ----------------------------------------------------------------------------------------------------------------------

SHOW = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)  # at these parts of the training: evaluate, continue PROMPT
PROMPT = b"Once upon a time, there was a little"
JUDGED = 300_000  # bytes of the validation text that the closing figures are about
SAVE_EVERY = 60.0  # seconds after which the state of the training is saved
PATIENCE = 10  # steps in a row with gradients that are no numbers, after which training stops


def train(args):
    """One run, from the text to the closing figures; under torchrun one of several processes that share the work."""
    rank, world = processes()
    prepare_cpu()
    device = pick_device(args.device)
    say = (lambda *words: None) if args.quiet or rank else (lambda *words: print(*words, flush=True))
    if rank:
        dist.barrier()  # the first process downloads, the others find the file
    text = text_from(args, least=(args.context or max(size["context"] for size in SIZES.values())) + 1)
    if world > 1 and not rank:
        dist.barrier()
    clock = Clock(START + text.waited)
    budget, judged = 60 * args.minutes, text.valid[:JUDGED]
    data_id = f"{len(text.train)} bytes, crc32 {zlib.crc32(text.train):08x}"
    path = lambda name: os.path.join(args.out, name)
    if args.resume:
        model, before = load_checkpoint(args.out, device)
        before = before["training"]
        if not before:
            raise Problem(f"the run in {args.out} is complete; train another with --out, or hear it: python sample.py --out {args.out}")
        if before["data"] != data_id:
            raise Problem(f"the training text is not the one of the run in {args.out}: {data_id} instead of {before['data']}; "
                          "name that one with --data")
    elif not rank:
        set_aside(args.out)
        save(path("log.jsonl"), b"")  # a folder that cannot be written is found out now, not in the end
    say(f"{text.source}: {len(text.train):,} bytes to learn from, {len(judged):,} to be judged on")

    # The n-gram first: it takes seconds, tells the first story, and is a level for the net to beat. Where it is neither a teacher nor a part of
    # the model it need not know all of the text: it gets 3 MB a minute, some 3% of the time, and the level is that of so much text.
    ngram = level = None
    if args.order:
        counted = text.train if args.distill or args.residual else text.train[: int(3e6 * max(1, args.minutes))]
        ngram = (args.resume and model.ngram) or NGram(args.order).fit(counted)
        level = ngram.bits_per_byte(judged)
        say(f"\n{clock():6.1f} s  n-gram of order {args.order}, {len(counted) / 1e6:.0f} MB counted: {level:.3f} bits per byte")
        say(printable(ngram.generate(PROMPT, 300, 0.8, args.seed).decode("utf-8", "replace")))

    if args.resume:
        reason = f"going on with step {before['now']['step'] + 1:,} of the run in {args.out}"
    else:
        setting, reason = pick_size(args, text.train, device, budget - clock())
        vars(args).update(setting)
        torch.manual_seed(args.seed)
        model = GPT(args.layers, args.heads, args.width, args.context, residual=args.residual).to(device)
        if args.residual:
            model.ngram = ngram
            if not rank:
                ngram.save(path("ngram.npz"))
    computed = sum(p.numel() for p in model.parameters())
    parameters = computed + model.memory.table.numel()
    say(f"\n{clock():6.1f} s  net of {computed:,} parameters and a memory of {model.memory.table.numel():,} on {device}, "
        f"{torch.get_num_threads()} threads\n{'':9}{reason}")
    opts = optimizers(model)
    net = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    begun = 0 if args.steps else clock() / budget
    now = dict(step=0, spent=0.0, trained=0.0, curve=[], reserve=0.01 * budget, loss=8.0, skipped=0,  # reserve: seconds kept for the end
               looked=0.0, show=[begun + (1 - begun) * part for part in SHOW])  # looked: seconds that showing took; a tenth at most
    if args.resume:
        now = before["now"]
        model.memory.pushed.copy_(before["pushed"])
        for optimizer, state in zip(opts, before["optimizers"]):
            optimizer.load_state_dict(state)
        torch.set_rng_state(before["torch_random"])
        clock.start = time.monotonic() - now["spent"]  # setting up once more is free
    batches = Batches(text.train, args.batch, args.context, ngram, args.seed, rank, world, now["step"])

    seen = lambda: now["step"] * args.batch * args.context * world

    def facts(bpb):
        return dict(val_bpb=round(bpb, 4), ngram_bpb=level and round(level, 4), seconds=round(clock(), 1), steps=now["step"],
                    bytes_seen=seen(), parameters=parameters, device=str(device), seed=args.seed, out=args.out)

    def keep():
        """Save the state of the training, so that --resume can go on from here."""
        now["spent"] = clock()
        training = dict(now=now, data=data_id, pushed=model.memory.pushed, optimizers=[optimizer.state_dict() for optimizer in opts],
                        torch_random=torch.get_rng_state())
        save_checkpoint(args.out, model, facts(now["curve"][-1][1] if now["curve"] else 8.0), vars(args), training)

    stop = []  # Ctrl-C or SIGTERM: stop after this step, judge, save. A second one leaves at once

    def interrupt(number, frame):
        stop.append(number)
        signal.signal(number, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)

    saved, bad = time.monotonic(), 0
    bar = tqdm(total=args.steps or round(budget), unit=" steps" if args.steps else "s", file=sys.stderr,
               disable=args.quiet or rank or not sys.stderr.isatty(), bar_format="{l_bar}{bar}| {n:.0f}/{total}{unit}{postfix}")
    while True:
        progress = now["step"] / args.steps if args.steps else max(clock() / (budget - now["reserve"]), now["step"] / batches.most)
        progress, stopped = agreed(progress, bool(stop))
        if progress >= 1 or stopped:
            break
        began = clock()
        window, teacher = batches.get(args.residual or progress < args.distill)
        model.memory.again = now["step"] >= batches.per_reading
        loss = learn(net, opts, window, teacher, args.rate * learning_rate(progress))
        now["step"] += 1
        if slept := clock.tick():
            say(f"{clock():6.1f} s  slept through {slept:.0f} s, which do not count")
        now["trained"] += max(0.0, clock() - began)
        bad = bad + 1 if loss is None else 0
        now["skipped"] += loss is None
        if bad == PATIENCE:
            if not rank:
                keep()
            raise Problem(f"{bad} steps in a row had gradients that are no numbers, so nothing was learned since step {now['step'] - bad:,}; "
                          f"the model before them is saved in {args.out}; train again with --rate {args.rate / 2:g}")
        if now["step"] % 20 == 0 and loss is not None:
            now["loss"] += 0.1 * (loss.item() / math.log(2) - now["loss"])
            bar.n = now["step"] if args.steps else min(clock(), bar.total)
            bar.set_postfix_str(f" loss {now['loss']:.3f} bits, {seen() / now['trained'] / 1e3:.0f} kB/s")
        if rank == 0 and now["show"] and progress >= now["show"][0] and (args.steps or now["looked"] <= 0.1 * clock()):
            began = clock()
            now["curve"].append((clock(), evaluate(model, judged, every=4)))
            # To keep back for the end: a whole evaluation, saving, a story. (Of a very short budget a quarter, whatever it will take.)
            now["reserve"] = min(4 * (clock() - began) + 1, 0.25 * budget)
            now["show"] = [part for part in now["show"] if part > progress]
            said = printable(stories(model, [PROMPT], 120, seed=args.seed)[0].decode("utf-8", "replace")).replace("\n", " ")
            bar.clear()
            say(f"{clock():6.1f} s  step {now['step']:6,}  {now['curve'][-1][1]:.3f} bits per byte | {said}")
            row = dict(seconds=round(clock(), 1), step=now["step"], bytes=seen(), train_bits=round(now["loss"], 4), bpb=round(now["curve"][-1][1], 4),
                       rates=[group["lr"] for optimizer in opts for group in optimizer.param_groups], bytes_per_second=round(seen() / now["trained"]))
            with open(path("log.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            now["looked"] += clock() - began
        if rank == 0 and time.monotonic() - saved > SAVE_EVERY:
            keep()
            saved = time.monotonic()
    bar.close()
    if rank:
        return  # the first process does the rest

    val = evaluate(model, judged, every=8 if stopped else 1)
    if stopped:
        keep()
        print(f"\ninterrupted after {now['step']:,} steps at about {val:.3f} bits per byte; all is saved in {args.out}\n"
              f"go on: python tiny.py --resume {args.out}\nhear it: python sample.py --out {args.out}")
        sys.exit(128 + stop[0] if stop else 1)
    now["curve"].append((clock(), val))
    told = facts(val)
    save_checkpoint(args.out, model, told, vars(args))
    save(path("curve.svg"), svg(now["curve"], level).encode())
    story = printable(stories(model, [b"Once upon a time"], 1000, seed=args.seed)[0].decode("utf-8", "replace"))
    say(f"\n{picture(now['curve'], level)}\n")
    told |= dict(seconds=round(clock(), 1), share_of_time_in_steps=round(now["trained"] / clock(), 3), skipped_steps=now["skipped"],
                 peak_memory_mb=round(peak_memory() / 1e6))
    for key, value in told.items():
        print(f"{key}: {'none' if value is None else value}")
    say(f"\n{story}\n\nmore: python sample.py --out {args.out}")
    if not args.steps and now["step"] >= batches.most:
        print(f"NOTICE: the text was read {seen() / len(text.train):.1f} times in {clock():.0f} s; then a net begins to learn it by heart, so the "
              "run ended. Longer runs need more text: --data, --megabytes", file=sys.stderr)


# ---- 10. The command, and many runs --------------------------------------------------------------------------------------------------

def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        usage="python tiny.py [options]",
        description="Train a byte-level language model on stories against the clock, watch it learn, read a story.",
        epilog="example: python tiny.py --minutes 5 --data stories.txt --out run1",
    )
    parser.add_argument("--minutes", type=float, default=5, metavar="M", help="the budget; all but the download counts (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="train for so many steps instead, exactly repeatable")
    parser.add_argument("--distill", type=float, default=0.0, metavar="PART",
                        help="of the budget in which the n-gram teaches, 0 to 1 (default: %(default)g)")
    parser.add_argument("--residual", action="store_true", help="learn what the n-gram does not know; it stays inside")
    parser.add_argument("--order", type=int, default=12, metavar="N", help="of the n-gram; 0: do not count one (default: %(default)s)")
    parser.add_argument("--size", choices=("auto", *SIZES), default="auto", metavar="SIZE",
                        help=f"of the net: {', '.join(SIZES)}, or auto: by timing (default: %(default)s)")
    for name, what in (("layers", "blocks"), ("heads", "attention heads"), ("width", "numbers per position"), ("context", "bytes in a window"),
                       ("batch", "windows in a step")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} (default: as --size)")
    parser.add_argument("--rate", type=float, default=1.0, metavar="R", help="of learning, times what is usual (default: %(default)g)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, metavar="N", help="instead N whole runs, seeds 1 to N, and how far they lie apart")
    parser.add_argument("--sweep", type=int, metavar="N", help="instead N runs of settings drawn at random, in sweep.tsv")
    parser.add_argument("--resume", metavar="DIR", help="go on with an interrupted run, with its options")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the closing figures")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", metavar="NAME",
                        help="auto, cpu, cuda, mps (default: %(default)s)")
    parser.add_argument("--out", default="out", metavar="DIR", help="where the model goes (default: %(default)s)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.resume:  # the run's own options; what is given beside must agree with them
        run = load_checkpoint(args.resume)[1]["recipe"]
        parser.set_defaults(**dict.fromkeys(vars(args)))
        for name, value in vars(parser.parse_args(argv)).items():
            if name not in ("resume", "quiet", "out") and value not in (None, run[name]):
                raise Problem(f"--{name} {value} differs from the run in {args.resume}, which has {run[name]}; leave it out")
        return argparse.Namespace(**run | {"resume": args.resume, "out": args.resume, "quiet": args.quiet})
    if not 0 < args.minutes < math.inf:
        raise Problem(f"--minutes {args.minutes:g}: give a number above 0, such as 5")
    if args.steps is not None and args.steps < 1:
        raise Problem(f"--steps {args.steps}: give at least 1")
    if not 0 <= args.distill <= 1:
        raise Problem(f"--distill {args.distill:g}: give a part of the budget, from 0 (no teacher) to 1")
    if not 0 <= args.order <= 255:
        raise Problem(f"--order {args.order}: give 0 (no n-gram) to 255; 12 is usual")
    if args.order == 0 and args.distill > 0:
        raise Problem("--order 0 leaves no teacher: leave out --distill")
    if args.residual and (args.order == 0 or args.distill > 0):
        raise Problem("--residual has the n-gram inside: leave out --order 0 and --distill")
    if not 0 < args.rate < math.inf:
        raise Problem(f"--rate {args.rate:g}: give a number above 0; 1 is usual")
    for name in ("layers", "heads", "width", "batch", "seeds", "sweep"):
        if (given := getattr(args, name)) is not None and given < 1:
            raise Problem(f"--{name} {given}: give at least 1")
    if args.context is not None and (not 16 <= args.context <= 4096 or args.context % 2):
        raise Problem(f"--context {args.context}: give an even number from 16 to 4096")
    for name in [args.size] if args.size in SIZES else SIZES:
        setting = sized(args, name)
        if setting["width"] % (2 * setting["heads"]):
            raise Problem(f"--width {setting['width']}: give a multiple of 2 x --heads, {2 * setting['heads']}")
    return args


DRAWN = dict(width=(32, 48, 64, 96, 128), layers=(1, 1, 2, 3), heads=(1, 1, 2), context=(128, 256, 512, 1024), batch=(2, 4, 8, 16),
             rate=(0.5, 1.0, 2.0), seed=(1, 2, 3))


def settings(count, seed=0):
    """`count` settings drawn at random (random search finds good settings sooner than a grid: Bergstra & Bengio 2012). -> list of dicts"""
    draw = np.random.default_rng(seed)
    return [{name: values[draw.integers(len(values))] for name, values in DRAWN.items()} for _ in range(count)]


def several(args, argv):
    """--seeds and --sweep: whole runs, one after the other, each a process of its own as if it were started by hand; a line each in a .tsv
    file as they end. A line that is there already is not run again, so that an interrupted sweep goes on, and a longer one adds to it."""
    known = argparse.ArgumentParser(allow_abbrev=False)
    known.add_argument("--seeds"), known.add_argument("--sweep")
    options = known.parse_known_args(argv)[1]
    wanted = settings(args.sweep) if args.sweep else [dict(seed=seed) for seed in range(1, args.seeds + 1)]
    path, columns = "sweep.tsv" if args.sweep else f"{args.out}-seeds.tsv", ["val_bpb", "steps", "seconds", *wanted[0], "options"]
    row_of, lines = lambda facts: "\t".join(str(facts[name]) for name in columns), ["\t".join(columns)]
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
        if lines[:1] != ["\t".join(columns)]:
            raise Problem(f"{path} is no table of such runs; move it away")
    done = {tuple(line.split("\t")[3:]): line for line in lines[1:]}
    table = []
    with tempfile.TemporaryDirectory() as scratch:
        for setting in tqdm(wanted, "runs", file=sys.stderr, disable=not sys.stderr.isatty()):
            key = (*map(str, setting.values()), " ".join(options))
            if key not in done:
                out = scratch if args.sweep else f"{args.out}-seed{setting['seed']}"
                command = [sys.executable, __file__, *options, *(f"--{name}={value}" for name, value in setting.items()), "--out", out]
                result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
                if result.returncode:
                    raise Problem(f"the run with {setting} failed: {result.stderr.strip().splitlines()[-1]}")
                facts = dict(re.findall(r"^(\w+): (\S+)$", result.stdout, re.MULTILINE)) | setting | {"options": " ".join(options)}
                done[key] = row_of(facts)
                lines.append(done[key])
                save(path, ("\n".join(lines) + "\n").encode())
                tqdm.write(done[key])
            table.append(done[key].split("\t"))
    bpb = np.array([float(row[0]) for row in table])
    print("\t".join(columns[:-1]))
    for i in bpb.argsort():
        print("\t".join(table[i][:-1]))
    spread = bpb.std(ddof=min(1, len(bpb) - 1))
    print(f"\n{len(bpb)} runs: {bpb.mean():.4f} ± {spread:.4f} bits per byte, best {bpb.min():.4f}, worst {bpb.max():.4f}")
    for i, name in enumerate(columns[3:-1], 3):  # what each value did, whatever else was drawn with it
        values = sorted({row[i] for row in table}, key=float)
        print(f"{name}: " + ", ".join(f"{value} {np.median(bpb[[row[i] == value for row in table]]):.3f}" for value in values))


def main(argv=None):
    args = parse_arguments(argv)
    try:
        several(args, sys.argv[1:] if argv is None else argv) if args.seeds or args.sweep else train(args)
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        raise Problem(f"another process has ended, so this one stops ({str(error).splitlines()[0]}); the state last saved is in {args.out}: "
                      f"run the same command with --resume {args.out}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
