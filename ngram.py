"""Count bytes, predict bytes: n-gram models in numpy, up to interpolated modified Kneser-Ney.

By the end of this file you know how a language model is made by counting alone, why it must keep some probability for what it has never
seen, why it asks "after how many different contexts have I met this byte?" instead of "how often?", and how to do all of it for tens of
millions of n-grams in a few seconds without a Python loop over bytes. The one command:

    python ngram.py --data stories.txt        counts, scores several orders on held-out text, writes a story

Terms (Chen & Goodman, "An empirical study of smoothing techniques for language modeling", 1999): an *n-gram* is n bytes in a row, its
first n-1 bytes are the *context* h, its last byte the *follower* w; the model's *order* is the longest n it uses. Axes: N positions asked
about, E n-grams that follow the contexts of those positions, 256 byte values. The class needs numpy alone and can be copied with this file.
"""
import argparse
import os
import sys
import time

import numpy as np

END = 0  # the byte between stories; no context reaches back beyond it
DENSE = 3  # orders 1..3 have so few contexts (some thousand) that their distributions are worked out once and kept as a table


# ---- 1. From counts to probabilities -------------------------------------------------------------------------------------------------
# Count how often each byte w followed each context h: c(h w). The obvious model is p(w | h) = c(h w) / c(h), and it is useless: any text
# has something new in it, the model says 0, and one 0 makes the whole text impossible (infinitely many bits). So every byte seen must give
# up a little for those not seen. All the models here have one form:
#
#       p_n(w | h) = (c(h w) - discount) / denominator  +  handed / denominator * p_{n-1}(w | h without its farthest byte)
#
# What was taken from the counts is what is handed down to the next shorter context, so each distribution sums to 1; below order 1 stands
# the uniform distribution, 1/256. "the quick brown f" may be new, but "brown f" was seen, and if not, "n f". They differ in how much to
# hand down, and in what a count is.

SMOOTHINGS = ("maximum-likelihood", "add-k", "jelinek-mercer", "witten-bell", "absolute", "kneser-ney", "modified-kneser-ney")


def smooth(smoothing, count, first, learned):
    """Say what each count gives up. count (E,) int64: the n-grams of N contexts, side by side; first (N,): where each context's begin.

    learned: what `fit` found out about this order. -> discount (E,), handed (N,), denominator (N,)
    """
    total = np.add.reduceat(count, first)  # c(h)
    if smoothing == "maximum-likelihood":  # nothing: what was never seen is impossible
        return 0, np.zeros(len(first), np.float32), total
    if smoothing == "add-k":  # as if each of the 256 bytes had been seen k times more; 1/256 of that is p_0 (Laplace, with k = 1)
        k = 0.01
        return 0, np.full(len(first), 256 * k, np.float32), total + 256 * k
    if smoothing == "jelinek-mercer":  # one weight per order, learned: how far this order is to be trusted (Jelinek & Mercer 1980)
        return count * (1 - learned[0]), total * (1 - learned[0]), total
    if smoothing == "witten-bell":  # "something new" is an event too; it happened once for each different follower (Witten & Bell 1991)
        different = np.add.reduceat((count > 0).astype(np.int64), first)
        return 0, different, total + different
    # Absolute discounting (Ney, Essen & Kneser 1994) and both Kneser-Neys: every count gives up a constant, as text not yet seen repeats
    # an n-gram that was seen c times not c but about c - 0.75 times as often. Modified Kneser-Ney has three constants, for 1, 2 and more.
    discount = learned[np.minimum(count, 3)]
    return discount, np.add.reduceat(discount, first), total


def discounts(count, smoothing):
    """The constants, from how many n-grams were counted once, twice, ...: (n-grams,) -> what a count of 0, 1, 2, and 3 or more gives up.

    They estimate by how much a count in one half of a text is above that in the other half (Chen & Goodman 1999, equations 17 and 26).
    Kept between 0.01 and c: a discount of 0 would let unseen bytes have probability 0, one above c would make a probability negative.
    """
    n = np.bincount(np.minimum(count, 5), minlength=6).astype(float)
    y = n[1] / max(1, n[1] + 2 * n[2])
    if smoothing == "modified-kneser-ney":
        found = [c - (c + 1) * y * n[c + 1] / max(1, n[c]) for c in (1, 2, 3)]
    else:
        found = [y, y, y]
    return np.array([0] + [min(max(d, 0.01), c) for c, d in zip((1, 2, 3), found)], np.float32)


# And Kneser-Ney's question (1995). A shorter context matters most where the longer one knows little. "Francisco" is frequent, so after an
# unknown "my " a plain count offers it; but it was only ever met after "San ". What counts below the top order is therefore not how often
# w followed h, but after how many *different* bytes "h w" was met, its continuation count:
#
#       text:   San Francisco, San Francisco, San Francisco, my dog, a dog, the dog
#       counts:                      " F": 3, " d": 3         how often?
#       continuation counts:         " F": 1, " d": 3         after how many different bytes?  (n; y, a, e)
#
# In bytes: "h w" gets 1 for every different byte that stands before it somewhere. Sweep the models (--sweep) to see what that is worth.


# ---- 2. Contexts as numbers ----------------------------------------------------------------------------------------------------------
# A context of any length becomes one 64-bit number, so that "the same context" is "the same number":
#
#       hash(context of t bytes before i) = sum over s = 1..t of (data[i-s] + 1) * ODD^s      modulo 2^64
#
# One byte more is one term more; taking the farthest byte away again is one subtraction. Counting uses both directions.

ODD = 0x9E3779B97F4A7C15  # multiplying by an odd number modulo 2^64 loses nothing; this one is 2^64 / golden ratio (Knuth)
POWERS = [np.uint64(pow(ODD, s, 2**64)) for s in range(256)]


def byte_before(data, positions, t):
    """The byte t places before each position; END where the data has not begun yet. (N,) uint8 -> (N,) uint8."""
    byte = data[np.maximum(positions - t, 0)]
    byte[positions < t] = END
    return byte


def context_hashes(data, positions, longest):
    """Yield for t = 1..longest the hash of the t bytes before each position (N,) uint64, and whether byte t was still in the story (N,) bool.
    They are the same two arrays each time, changed in place: copy what is to be kept.

    Beyond the END that a story starts with there is padding that adds nothing: a story's first bytes are predicted from the beginnings of
    all other stories (the "<s>" of the literature), never from the last words of the story that happens to stand before it.
    """
    h, inside = np.zeros(len(positions), np.uint64), np.ones(len(positions), bool)
    for t in range(1, longest + 1):
        byte = byte_before(data, positions, t)
        h += (byte + np.uint64(1)) * POWERS[t] * inside
        yield h, inside
        inside &= byte != END


def mix(h):
    """Spread a hash evenly over its 64 bits: look-ups use the high bits as an address, and a sum of products is too regular for that."""
    h = (h ^ (h >> np.uint64(32))) * POWERS[2]
    return (h ^ (h >> np.uint64(32))) * POWERS[1]


def runs(sorted_array):
    """Where each run of equal values begins in a sorted array. (n,) -> (number of distinct values,) int64."""
    new = np.ones(len(sorted_array), bool)
    np.not_equal(sorted_array[1:], sorted_array[:-1], out=new[1:])
    return np.flatnonzero(new)


# ---- 3. One order's counts -----------------------------------------------------------------------------------------------------------

class Counts:
    """The n-grams of one order: for every context its followers and how often each was counted.

    Layout, with the followers of one context side by side and the contexts in the order of their hashes:

        bucket  (2^bits + 1,) uint32   the hash's top bits -> where contexts with these bits begin
        tag     (contexts,)   uint32   32 more bits of the hash, to tell the one or two contexts of a bucket apart
        start   (contexts + 1,) uint32 where a context's followers begin
        byte    (n-grams,)    uint8    the follower
        count   (n-grams,)    uint8 to uint32, as the largest needs: its count

    Hashes are spread evenly, so the top bits alone lead to within a place or two (at worst about eight) of the right context: no binary
    search, no collisions to chain. A wrong context passes for the right one once in 2^32 look-ups.
    """
    __slots__ = "bits", "bucket", "tag", "start", "byte", "count"

    def __init__(self, keys):
        """keys: (n,) uint64, one per counted event, 56 bits of context hash and 8 bits of follower; sorted here, in place."""
        keys.sort()  # equal n-grams now stand together, and so do the n-grams of one context
        first = runs(keys)
        self.count = np.diff(np.append(first, len(keys)))
        self.count = self.count.astype(np.min_scalar_type(self.count.max()))  # counts of long n-grams fit 16 bits
        keys = keys[first]
        self.byte = keys.astype(np.uint8)
        keys >>= np.uint64(8)
        self.start = runs(keys).astype(np.uint32)
        keys = keys[self.start]  # one per context now
        self.start = np.append(self.start, np.uint32(len(self.byte)))
        self.bits = max(1, int(len(keys)).bit_length())
        self.tag = keys.astype(np.uint32)
        self.bucket = np.searchsorted(keys >> np.uint64(56 - self.bits), np.arange(2**self.bits + 1, dtype=np.uint64)).astype(np.uint32)

    def find(self, h):
        """The index of each context with (mixed) hash h, or -1 if it was never counted. (N,) uint64 -> (N,) int64."""
        top = (h >> np.uint64(64 - self.bits)).astype(np.int64)
        tag = (h >> np.uint64(8)).astype(np.uint32)
        at, end = self.bucket[top].astype(np.int64), self.bucket[top + 1]
        found = np.full(len(h), -1)
        left = np.flatnonzero(at < end)
        while len(left):  # as often as the fullest bucket has contexts, for ever fewer positions
            hit = self.tag[at[left]] == tag[left]
            found[left[hit]] = at[left[hit]]
            left = left[~hit]
            at[left] += 1
            left = left[at[left] < end[left]]
        return found


def distinct(keys):
    """The index of one event of each different key. (n,) uint64 -> (different keys,) int64

    Pack a hash of the key above the event's index and sort: the first of each run stands for the run. One number holds both, and numpy
    sorts numbers ten times faster than it finds the order of pairs (argsort). With 2^24 events 40 bits are left for the hash, and of 16
    million different keys about a hundred share theirs with another, so that as many continuation counts are missed.
    """
    width = np.uint64(max(1, len(keys).bit_length()))
    packed = mix(keys)
    packed >>= width
    packed <<= width
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    index = packed & ((np.uint64(1) << width) - np.uint64(1))
    packed >>= width
    return index[runs(packed)].astype(np.int64)


def learn_weights(p, kind, rounds=30):
    """How far to trust each of several models, by expectation maximisation (Dempster, Laird & Rubin 1977; for n-grams Jelinek & Mercer 1980).

    The last model is asked first: with its weight the byte comes from it, else from the one before, and so on; what is left is model 0's:
    p = w_M p_M + (1 - w_M) (w_{M-1} p_{M-1} + (1 - w_{M-1}) (... p_0)).
    p (N, M + 1): the probability that each model gave to the byte that came. kind (N, M + 1) integers: in which state each model was; each
    state has a weight of its own, and state 0 means "nothing to say", weight 0. -> weight (M + 1, states)

    E-step: with the weights so far, from which model did each byte probably come? M-step: a model's weight is the share that came from it
    of the bytes that got as far as it. Each round makes the text likelier, until nothing changes.
    """
    states = int(kind.max()) + 1
    weight = np.full((p.shape[1], max(2, states)), 0.5)
    weight[:, 0] = 0
    for _ in range(rounds):
        came, left = np.empty_like(p), np.ones(len(p))
        for m in range(p.shape[1] - 1, 0, -1):
            came[:, m] = left * weight[m, kind[:, m]]
            left = left - came[:, m]
        came[:, 0] = left
        came *= p
        came /= np.maximum(came.sum(1, keepdims=True), 1e-300)  # 0 only where every model said impossible
        reached = np.cumsum(came, 1)
        for m in range(1, p.shape[1]):
            here, all_ = (np.bincount(kind[:, m], x[:, m], weight.shape[1]) for x in (came, reached))
            weight[m] = here / np.maximum(all_, 1e-9)
    return weight.clip(0, 0.99)  # below 1: what a model has never seen keeps some probability


# ---- 4. The story so far -------------------------------------------------------------------------------------------------------------
# What was counted stays as it is, but a story repeats itself: one that has met Lily will meet her again, though the counts know many names.
# So a second, tiny model is asked as well: where has this story had the last 3 (4, 5, ... 12) bytes before, and what followed there? The
# longest echo is asked first. How far it is trusted depends on its length, on how many places there are and on whether they agree; those
# weights are learned. This is what compressors like PPM and paq do when they go on learning while they read (Cleary & Witten 1984).

ECHOES = (3, 4, 5, 6, 8, 12)  # how many bytes in a row must have been there before
LATEST = 8  # so many of those places are asked, the latest ones
REACH = 4096  # a longer story is remembered this far back, bytes


def echoes(text):
    """Yield for each of ECHOES what followed the same bytes earlier in the same story. text: (n,) uint8, from the beginning of a story.

    kind (n,): 0 no such place; 1, 2, 3 so many places (3: or more) and all agree; 4, 5 two or more places that do not
    places (n,): how many; votes: a list of (positions, bytes that followed), each position at most once in each
    """
    positions = np.arange(len(text))
    story = np.cumsum(text == END) - (text == END)  # which story each byte is in
    salt = story.astype(np.uint64) * POWERS[-1]  # the same bytes in another story are another context
    for t, (h, _) in enumerate(context_hashes(text, positions, max(ECHOES)), 1):
        if t not in ECHOES:
            continue
        key = mix(h + salt)
        order = np.argsort(key, kind="stable")  # the places of a context side by side, in the order of the text
        key = key[order]
        places, agree, first, votes = np.zeros(len(text), np.int64), np.ones(len(text), bool), np.zeros(len(text), np.uint8), []
        for back in range(1, LATEST + 1):
            same = key[back:] == key[:-back]
            now, byte = order[back:][same], text[order[:-back][same]]
            if back == 1:
                first[now] = byte
            agree[now] &= first[now] == byte
            places[now] += 1
            votes.append((now, byte))
        kind = np.minimum(places, 3)
        yield np.where(agree, kind, kind + 2), places, votes


# ---- 5. The model --------------------------------------------------------------------------------------------------------------------

class NGram:
    """A counting language model over bytes. smoothing: one of SMOOTHINGS; order: the longest n-gram, 1 to 255."""

    def __init__(self, order=12, smoothing="modified-kneser-ney"):
        if not 1 <= order < len(POWERS):
            raise ValueError(f"order must be from 1 to {len(POWERS) - 1}, not {order}")
        if smoothing not in SMOOTHINGS:
            raise ValueError(f"smoothing must be one of {', '.join(SMOOTHINGS)}, not {smoothing}")
        self.order, self.smoothing = order, smoothing
        self.continuation = smoothing.endswith("kneser-ney")
        self.row_of = np.full(65536, -1, np.int32)  # two bytes -> their row in dense, -1: not worked out
        self.dense = np.zeros((0, 256), np.float32)

    def fit(self, data):
        """Count data, (n,) uint8. Returns self. Raises ValueError if there is nothing to count.

        Sort the hashes of all n-grams of the top order: equal ones stand together, and the length of a run is the count. Then keep one
        event of each run. There is now one event for each *different* n-gram, so counting n-1-grams over what is left gives exactly
        their continuation counts, and over ever fewer events. (For plain counts all events are kept.)
        """
        data = np.ascontiguousarray(data, np.uint8)
        if len(data) == 0:
            raise ValueError("nothing to count: the text is empty")
        h = np.zeros(len(data), np.uint64)  # hash of each event's context
        depth = np.zeros(len(data), np.uint8)  # how many bytes back the context reaches before padding begins
        for a in range(0, len(data), 1 << 18):  # a slice at a time stays in the cache
            here, some = slice(a, a + (1 << 18)), np.arange(a, min(a + (1 << 18), len(data)))
            for hashed, inside in context_hashes(data, some, self.order - 1):
                h[here] = hashed
                depth[here] += inside
        position = np.arange(len(data), dtype=np.int32)
        self.row_of[:] = -1
        self.counts = [None] * (self.order + 1)
        self.learned = np.zeros((self.order + 1, 4), np.float32)
        for n in range(self.order, 0, -1):
            key = mix(h)
            key &= ~np.uint64(255)
            key |= data[position]
            if n == min(DENSE, self.order):
                pairs = position
            if n > 1:
                if self.continuation:  # for the next order; this one's key still holds all events, and is counted below
                    kept = distinct(key)
                    h, position, depth = h[kept], position[kept], depth[kept]
                # The next order's contexts are one byte shorter.
                h -= (byte_before(data, position, n - 1) + np.uint64(1)) * POWERS[n - 1] * (n - 1 <= depth)
            self.counts[n] = Counts(key)
            self.learned[n] = discounts(self.counts[n].count, self.smoothing)
        if self.smoothing == "jelinek-mercer":
            self._learn_weights(data)
        self._tabulate(data, pairs)
        self._learn_echo(data)
        return self

    def _learn_weights(self, data):
        """Jelinek-Mercer's weight for each order, learned on 30,000 positions of the text, each left out of the counts."""
        at = np.random.default_rng(0).integers(0, len(data), 30_000)
        p = np.full((len(at), self.order + 1), 1 / 256)
        for n in range(1, self.order + 1):  # all the weight on one order gives that order's opinion alone
            self.learned[:, 0] = np.arange(self.order + 1) == n
            p[:, n] = self._walk(data, at, True, self.order)[np.arange(len(at)), data[at]]
        known = p != np.float32(1 / 256)  # exactly that only where the order did not know the context
        self.learned[:, 0] = learn_weights(p, known.astype(np.int64))[:, 1]

    def _learn_echo(self, data):
        """The weight of each echo, learned on the first 100,000 bytes or so, left out of the counts, since new text is what it is for."""
        text = data[:100_000]
        ends = np.flatnonzero(text == END)
        text = text[: ends[-1] + 1] if len(ends) else text
        p = [self._gold(data, np.arange(len(text)), True)]
        kinds = [np.zeros(len(text), np.int64)]
        for kind, places, votes in echoes(text):
            right = np.zeros(len(text))
            for now, byte in votes:
                right[now] += byte == text[now]
            p.append(right / np.maximum(places, 1))
            kinds.append(kind)
        self.echo = learn_weights(np.stack(p, 1), np.stack(kinds, 1))[1:].astype(np.float32)

    def _listen(self, p, data, positions):
        """Mix into p (N, 256), in place, what the story so far has to say to each position."""
        # Copy each stretch of consecutive positions, with its story so far before it, into one text of many stories.
        first = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
        pieces, row = [], []  # row: which row of p each byte of the copy is asked about, -1: none
        for a, b in zip(first, np.append(first[1:], len(positions))):
            start, stop = max(0, positions[a] - REACH), positions[b - 1] + 1
            ends = np.flatnonzero(data[start : positions[a]] == END)
            start += ends[-1] + 1 if len(ends) else 0
            # The byte after the last of data may be asked about: END stands there, and between two stretches.
            pieces += [data[start:stop], np.full(1 + max(0, stop - len(data)), END, np.uint8)]
            row += [np.full(positions[a] - start, -1), np.arange(a, b), [-1]]
        text, row = np.concatenate(pieces), np.concatenate(row)
        left, said = np.ones(len(text), np.float32), []
        for weight, (kind, places, votes) in zip(self.echo[::-1], list(echoes(text))[::-1]):
            trust = np.take(weight, kind, mode="clip")
            said.append((left * trust / np.maximum(places, 1), votes))
            left = left * (1 - trust)
        asked = row >= 0
        p[row[asked]] *= left[asked, None]
        for share, votes in said:
            for now, byte in votes:
                now, byte = now[asked[now]], byte[asked[now]]
                p[row[now], byte] += share[now]

    def _tabulate(self, data, positions):
        """Work out the distributions after every pair of bytes that occurs: (pairs, 256) float32, and where each pair's row is."""
        pair, at = np.unique(self._pair(data, positions), return_index=True)
        self.dense = self._walk(data, positions[at].astype(np.int64), False, min(DENSE, self.order))
        self.row_of[pair] = np.arange(len(pair))

    @staticmethod
    def _pair(data, positions):
        """The two bytes before each position as one number. (N,) int64."""
        near, far = byte_before(data, positions, 1), byte_before(data, positions, 2)
        return np.where(near == END, 0, far.astype(np.int64)) * 256 + near

    def probs(self, data, positions, leave_one_out=False, adaptive=False):
        """The distribution of the byte at each position given the bytes before it.

        data: (n,) uint8; positions: (N,) integers from 0 to n (n asks for the byte after the last) -> (N, 256) float32, rows sum to 1.
        leave_one_out: data is the text that was counted; answer as if each position's own n-gram had not been (see `_walk`).
        adaptive: listen to the story so far as well, which data must then hold; quick for stretches of consecutive positions.
        """
        positions = np.asarray(positions, np.int64)
        p = self._walk(data, positions, leave_one_out, self.order)
        if adaptive and len(positions):
            self._listen(p, data, positions)
        return p

    def _gold(self, data, positions, leave_one_out=False, adaptive=False):
        """The probability of the byte that came, at each position. (N,) float32; a slice at a time, so that (N, 256) need not fit."""
        slices = [positions[a : a + (1 << 14)] for a in range(0, len(positions), 1 << 14)]
        return np.concatenate([self.probs(data, at, leave_one_out, adaptive)[np.arange(len(at)), data[at]] for at in slices] or [np.ones(0)])

    def _walk(self, data, positions, leave_one_out, order):
        """probs with the first `order` orders: down the orders, carrying how much probability is still to be given out.

        Leaving one out: a text that was counted holds every n-gram it is asked about, so the model would recite it. At the top order the
        position's own n-gram is therefore counted one time less. If that was its only time, the n-gram would not exist, and its end would have
        been met after one different byte fewer: the order below loses one too, and so on down. (Plain counts lose one at every order.)
        Totals and what is handed down follow from the lowered counts, so the answer is that of a recount, with the same discounts.
        """
        N = len(positions)
        hashes = [np.zeros(N, np.uint64)] + [h.copy() for h, _ in context_hashes(data, positions, order - 1)]
        lowest = min(DENSE, order)
        # First find, for each order, the rows that it knows the context of: an unknown context stays unknown when it grows.
        found = {}  # n -> (rows whose context of n-1 bytes was counted, its index)
        row = np.arange(N)
        for n in range(lowest + 1, order + 1):
            context = self.counts[n].find(mix(hashes[n - 1][row]))
            row, context = row[context >= 0], context[context >= 0]
            found[n] = row, context

        # Then from the top order down: fetch the counts, take the own one away, discount, and hand down what the discounts took.
        gold = data[positions].astype(np.int16) if leave_one_out else None
        lowered = np.full(N, leave_one_out)  # rows whose own n-gram must still be taken away at this order
        weight = np.ones(N, np.float32)  # the probability that the higher orders handed down
        base = np.full((N, 256), 1 / 256, np.float32)  # to whom it goes in the end
        pieces = []
        for n in range(order, 0, -1):
            if n <= lowest:
                if n == lowest and self.smoothing != "add-k":  # nearly all rows end here, in the table
                    dense = np.where(lowered, -1, self.row_of[self._pair(data, positions)])
                    row = np.flatnonzero(dense < 0)
                    base[dense >= 0] = self.dense[dense[dense >= 0]]
                elif n == lowest:
                    row = np.arange(N)
                context = self.counts[n].find(mix(hashes[n - 1][row]))
                found[n] = row[context >= 0], context[context >= 0]
            at, context = found[n]
            if len(at):
                table = self.counts[n]
                begin = table.start[context]
                size = (table.start[context + 1] - begin).astype(np.int64)
                first = np.cumsum(size) - size  # (rows,) where each row's entries begin among the E of this order
                of = np.repeat(np.arange(len(at)), size)  # (E,) which of the rows an entry belongs to
                entry = np.arange(len(of)) + (begin - first)[of]  # (E,) its index into byte and count
                byte, count = table.byte[entry], table.count[entry].astype(np.int64)
                if leave_one_out:
                    own = np.flatnonzero(byte == np.where(lowered, gold, -1)[at][of])
                    count[own] -= 1
                    if self.continuation:
                        lowered[at[of[own[count[own] > 0]]]] = False
                discount, handed, denominator = smooth(self.smoothing, count, first, self.learned[n])
                known = denominator > 0  # a context that has lost its only follower passes everything on
                share = (weight[at] / np.maximum(denominator, 1e-9)).astype(np.float32)
                pieces.append(((at * 256)[of] + byte, (count - discount) * share[of]))
                weight[at] = np.where(known, share * handed, weight[at])
            if self.smoothing == "add-k":
                break  # mixes the top order with p_0, nothing between
            if self.smoothing != "maximum-likelihood":
                # Too small a weight would vanish in float32; 1e-12 more than 1 is far below its rounding.
                np.maximum(weight, 1e-12, out=weight)
        base *= weight[:, None]
        for index, value in pieces:
            base.reshape(-1)[index] += value  # one order names a byte at most once per row, so no addition is lost
        return base

    def bits_per_byte(self, data, positions=None, leave_one_out=False, adaptive=False):
        """Mean of -log2 p(byte) over the positions (default: all). (n,) uint8 -> float, bits per byte."""
        positions = np.arange(len(data)) if positions is None else np.asarray(positions)
        with np.errstate(divide="ignore"):  # maximum likelihood: -log2 of 0 is infinite, as it should be
            bits = -np.log2(self._gold(data, positions, leave_one_out, adaptive), dtype=np.float64)
        return float(bits.sum() / max(1, len(positions)))

    def generate(self, prompt=b"", length=1000, temperature=1.0, seed=0, adaptive=False):
        """Continue prompt until END or for `length` bytes. Returns prompt and continuation, bytes. temperature 0 takes the likeliest byte."""
        rng = np.random.default_rng(seed)
        text = np.concatenate([np.frombuffer(prompt, np.uint8), np.zeros(length, np.uint8)])
        for i in range(len(prompt), len(text)):
            p = self.probs(text[:i], [i], adaptive=adaptive)[0].astype(np.float64)
            p = (p / p.max()) ** (1 / temperature) if temperature > 0 else p == p.max()
            text[i] = rng.choice(256, p=p / p.sum())
            if text[i] == END:
                return text[:i].tobytes()
        return text.tobytes()

    def size(self):
        """The number of n-grams stored, of all orders."""
        return sum(len(table.byte) for table in self.counts[1:])

    def nbytes(self):
        """The memory they take, bytes."""
        return sum(getattr(table, name).nbytes for table in self.counts[1:] for name in Counts.__slots__ if name != "bits")

    def save(self, path):
        """Write everything to one .npz file; path is the old file or the whole new one, never a part.

        Running totals are stored as the differences that they are totals of, which fit one byte: half the size.
        """
        arrays = {}
        for n, table in enumerate(self.counts[1:], 1):
            crowd = np.diff(table.bucket)
            arrays |= {f"{n}.tag": table.tag, f"{n}.byte": table.byte, f"{n}.count": table.count,
                       f"{n}.followers": (np.diff(table.start) - 1).astype(np.uint8), f"{n}.crowd": crowd.astype(np.min_scalar_type(crowd.max()))}
        temporary = f"{path}.tmp{os.getpid()}"
        try:
            with open(temporary, "wb") as file:
                np.savez(file, order=self.order, smoothing=self.smoothing, learned=self.learned, echo=self.echo, dense=self.dense,
                         row_of=self.row_of, **arrays)
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    @classmethod
    def load(cls, path):
        """Read what save wrote. -> NGram"""
        totals = lambda differences: np.concatenate((np.zeros(1, np.uint32), np.cumsum(differences, dtype=np.uint32)))
        with np.load(path, allow_pickle=False) as file:
            model = cls(int(file["order"]), str(file["smoothing"]))
            model.learned, model.echo, model.dense, model.row_of = (file[name] for name in ("learned", "echo", "dense", "row_of"))
            model.counts = [None] + [Counts.__new__(Counts) for _ in range(model.order)]
            for n, table in enumerate(model.counts[1:], 1):
                table.tag, table.byte, table.count = (file[f"{n}.{name}"] for name in ("tag", "byte", "count"))
                table.start = totals(file[f"{n}.followers"].astype(np.uint32) + 1)
                table.bucket = totals(file[f"{n}.crowd"])
                table.bits = (len(table.bucket) - 1).bit_length() - 1
        return model


# ---- 6. To see it work ---------------------------------------------------------------------------------------------------------------

# The research that this project rebuilds (README) swept 19 n-grams. These are chosen so that one sees each smoothing at a short, a middle and a
# long order.
SWEEP = [("maximum-likelihood", 2), ("maximum-likelihood", 4), ("add-k", 2), ("add-k", 4)] + [
    (smoothing, order) for smoothing in SMOOTHINGS[2:6] for order in (3, 6, 12)] + [("modified-kneser-ney", n) for n in (2, 3, 4, 6, 8, 12, 16)]


def measure(text, smoothing, order):
    """Count text.train, score text.valid. -> (row of figures, model)"""
    began = time.perf_counter()
    model = NGram(order, smoothing).fit(text.train)
    seconds = time.perf_counter() - began
    n, memory, began = model.size(), model.nbytes(), time.perf_counter()
    bpb = model.bits_per_byte(text.valid)
    speed = len(text.valid) / (time.perf_counter() - began)
    return dict(bpb=bpb, adaptive=model.bits_per_byte(text.valid, adaptive=True), seconds=seconds, rate=len(text.train) / 1e6 / seconds, speed=speed,
                ngrams=n / 1e6, MB=memory / 1e6, each=memory / n, order=order, smoothing=smoothing), model


HEAD = "   bpb  adaptive  seconds   MB/s  million n-grams     MB  bytes each  order  smoothing"


def line(row):
    return "{bpb:6.4f}  {adaptive:8.4f}  {seconds:7.1f}  {rate:5.1f}  {ngrams:15.2f}  {MB:5.0f}  {each:10.1f}  {order:5}  {smoothing}".format(**row)


def sweep(text):
    """Measure every model of SWEEP and print a table, best first. -> the best one"""
    from tqdm import tqdm

    rows, best = [], None
    for smoothing, order in tqdm(SWEEP, desc="models", disable=not sys.stderr.isatty()):
        row, model = measure(text, smoothing, order)
        rows.append(row)
        if not sys.stderr.isatty():
            print(f"{len(rows)} of {len(SWEEP)} done: order {order}, {smoothing}", file=sys.stderr, flush=True)
        if best is None or row["bpb"] < best[0]:
            best = row["bpb"], model
    print(HEAD)
    for row in sorted(rows, key=lambda row: row["bpb"]):
        print(line(row))
    return best[1]


def main():
    parser = argparse.ArgumentParser(usage="python ngram.py [options]",
                                     description="Count n-grams of bytes, score them on text they have not seen, write a story.",
                                     epilog="example: python ngram.py --data stories.txt --orders 2 4 8 12")
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12], metavar="N", help="(default: 1 2 3 4 6 8 12)")
    parser.add_argument("--smoothing", choices=SMOOTHINGS, default=SMOOTHINGS[-1], metavar="NAME",
                        help=f"{', '.join(SMOOTHINGS)} (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help=f"instead {len(SWEEP)} models of different order and smoothing")
    parser.add_argument("--save", metavar="FILE", help="keep the last model counted")
    parser.add_argument("--load", metavar="FILE", help="count nothing: tell a story with a model that was kept")
    parser.add_argument("--prompt", default="Once upon a time", help="how the story begins (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="(default: %(default)s)")
    parser.add_argument("--adaptive", action="store_true", help="listen to the story so far when writing it")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of the story (default: %(default)s)")
    add_arguments(parser)
    args = parser.parse_args()
    if not all(1 <= order < len(POWERS) for order in args.orders):
        raise Problem(f"--orders: each from 1 to {len(POWERS) - 1}; 12 is usual")
    if not 0 <= args.temperature <= 100:
        raise Problem(f"--temperature {args.temperature:g}: give 0 (no chance) to 100; 0.8 is usual")
    if args.load:
        began = time.perf_counter()
        try:
            model = NGram.load(args.load)
        except OSError as error:
            raise Problem(f"cannot read {args.load}: {error.strerror}; count one first, with --save {args.load}") from None
        except Exception as error:  # whatever a damaged or foreign file leads to
            raise Problem(f"{args.load} is not what ngram.py saved ({type(error).__name__}); count again with --save {args.load}") from None
        print(f"{model.size():,} n-grams of order {model.order} read in {time.perf_counter() - began:.2f} s")
    else:
        text = text_from(args)
        print(f"{text.source}: counting {len(text.train):,} bytes, scoring {len(text.valid):,}\n", flush=True)
        if args.sweep:
            model = sweep(text)
        else:
            print(HEAD)
            for order in args.orders:
                row, model = measure(text, args.smoothing, order)
                print(line(row), flush=True)
            some = np.linspace(0, len(text.train) - 1, 100_000).astype(np.int64)
            print(f"\norder {model.order}, bits per byte:\n"
                  f"{model.bits_per_byte(text.train, some):.4f} on the text it counted, reciting\n"
                  f"{model.bits_per_byte(text.train, some, leave_one_out=True):.4f} on the same, each occurrence left out\n"
                  f"{row['bpb']:.4f} on text it has not seen\n"
                  f"{row['adaptive']:.4f} on text it has not seen, listening to the story so far\n"
                  f"{row['speed']:,.0f} distributions per second; peak memory {peak_memory() / 1e6:,.0f} MB")
    if args.save:
        began = time.perf_counter()
        try:
            model.save(args.save)
        except OSError as error:
            raise Problem(f"cannot write {args.save}: {error.strerror}; name another file") from None
        size = os.path.getsize(args.save)
        print(f"saved {size / 1e6:,.0f} MB in {time.perf_counter() - began:.2f} s: {size / model.size():.1f} bytes per n-gram")
    story = model.generate(os.fsencode(args.prompt), 800, args.temperature, args.seed, args.adaptive)
    print("\n" + printable(story.decode("utf-8", "replace")))


if __name__ == "__main__":
    from data import Problem, add_arguments, peak_memory, printable, run, text_from  # only the script needs them: the class stands alone

    run(main)
