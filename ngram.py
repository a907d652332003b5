"""Count bytes, predict bytes: an interpolated modified Kneser-Ney n-gram in numpy.

By the end of this file you know how a language model is made by counting alone, why it must keep some probability for what it has never
seen, why it asks "after how many different contexts have I met this byte?" instead of "how often?", and how to do all of it for tens of
millions of n-grams in a few seconds without a Python loop over bytes. The one command:

    python ngram.py --data stories.txt        counts, scores several orders on held-out text, writes a story

Terms (Chen & Goodman, "An empirical study of smoothing techniques for language modeling", 1999): an *n-gram* is n bytes in a row, its
first n-1 bytes are the *context*, its last byte the *follower*; the model's *order* is the longest n it uses. Axes: N positions asked
about, E n-grams that follow the contexts of those positions, 256 byte values. The class needs numpy alone and can be copied with this file.
"""
import argparse
import os
import time

import numpy as np

END = 0  # the byte between stories; no context reaches back beyond it
DENSE = 3  # orders 1..3 have so few contexts (some thousand) that their distributions are worked out once and kept as a table


# ---- 1. Contexts as numbers ----------------------------------------------------------------------------------------------------------
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


# ---- 2. One order's counts -----------------------------------------------------------------------------------------------------------

class Counts:
    """The n-grams of one order: for every context its followers and how often each was counted.

    Layout, with the followers of one context side by side and the contexts in the order of their hashes:

        bucket  (2^bits + 1,) uint32   the hash's top bits -> where contexts with these bits begin
        tag     (contexts,)   uint32   32 more bits of the hash, to tell the one or two contexts of a bucket apart
        start   (contexts + 1,) uint32 where a context's followers begin
        byte    (n-grams,)    uint8    the follower
        count   (n-grams,)    uint32   its count

    Hashes are spread evenly, so the top bits alone lead to within a place or two of the right context: no binary search, no collisions
    to chain. A wrong context passes for the right one once in 2^32 look-ups.
    """
    __slots__ = "bits", "bucket", "tag", "start", "byte", "count"

    def __init__(self, keys):
        """keys: (n,) uint64, one per counted event, 56 bits of context hash and 8 bits of follower; sorted here, in place."""
        keys.sort()  # equal n-grams now stand together, and so do the n-grams of one context
        first = runs(keys)
        self.count = np.diff(np.append(first, len(keys))).astype(np.uint32)
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
        while len(left):  # as often as the fullest bucket has contexts, about eight times, for ever fewer positions
            hit = self.tag[at[left]] == tag[left]
            found[left[hit]] = at[left[hit]]
            left = left[~hit]
            at[left] += 1
            left = left[at[left] < end[left]]
        return found


# ---- 3. The model --------------------------------------------------------------------------------------------------------------------

class NGram:
    """Interpolated modified Kneser-Ney over bytes (Kneser & Ney 1995; Chen & Goodman 1999).

        p_n(w | h) = (c(h w) - D(c(h w))) / c(h)  +  gamma(h) * p_{n-1}(w | h without its farthest byte)

    Every count gives up a discount D; gamma(h), the sum of what the followers of h gave up, divided by c(h), is handed to the next shorter
    context, so each distribution sums to 1. Below order 1 stands the uniform distribution 1/256: nothing ever has probability 0.
    """

    def __init__(self, order=12):
        if not 1 <= order < len(POWERS):
            raise ValueError(f"order must be from 1 to {len(POWERS) - 1}, not {order}")
        self.order = order

    def fit(self, data):
        """Count data, (n,) uint8. Returns self. Raises ValueError if there is nothing to count.

        At the top order c(h w) is how often h w occurs. Below it, c(h w) is in how many different n+1-grams h w is the end: after how many
        different bytes it was met. "Francisco" is frequent, but only ever after "San "; a shorter context is asked only where the longer
        one did not know, and there "Francisco" deserves what its variety says, not its frequency.

        Both kinds of count come from the same step. Sort the n-grams' hashes: equal ones stand together, and the length of a run is the
        count. Keep one position of each run; there is now one event per *distinct* n-gram, so counting n-1-grams on what is left counts in
        how many distinct n-grams each is the end.
        """
        data = np.ascontiguousarray(data, np.uint8)
        if len(data) == 0:
            raise ValueError("nothing to count: the text is empty")
        h = np.empty(len(data), np.uint64)
        depth = np.zeros(len(data), np.uint8)  # how many bytes back each context reaches before padding begins
        for a in range(0, len(data), 1 << 18):  # a slice at a time stays in the cache
            here = np.arange(a, min(a + (1 << 18), len(data)))
            h[a : a + len(here)] = 0
            for hashed, inside in context_hashes(data, here, self.order - 1):
                depth[here] += inside
                h[here] = hashed
        position = np.arange(len(data), dtype=np.int32)
        self.counts, self.discounts = [None] * (self.order + 1), np.zeros((self.order + 1, 4), np.float32)
        for n in range(self.order, 0, -1):
            key = mix(h)
            key &= ~np.uint64(255)
            key |= data[position]
            # One event of each distinct n-gram: pack a hash of the n-gram above the event's index and sort; a run's first entry stands for
            # the run. 64 bits hold both, which numpy sorts ten times faster than it can argsort; with 2^24 events 40 bits are left for the
            # hash, and two different n-grams in a million share theirs.
            width = np.uint64(max(1, len(key).bit_length()))
            packed = mix(key)
            packed >>= width
            packed <<= width
            packed |= np.arange(len(key), dtype=np.uint64)
            packed.sort()
            kept = (packed[runs(packed >> width)] & ((np.uint64(1) << width) - np.uint64(1))).astype(np.int64)
            del packed
            self.counts[n] = Counts(key)
            self.discounts[n, 1:] = modified_discounts(self.counts[n].count)
            if n > 1:  # the next order's contexts are one byte shorter
                h, position, depth = h[kept], position[kept], depth[kept]
                h -= (byte_before(data, position, n - 1) + np.uint64(1)) * POWERS[n - 1] * (n - 1 <= depth)
            if n == DENSE:
                pairs = position
        self._tabulate(data, pairs if self.order >= DENSE else position)
        return self

    def _tabulate(self, data, positions):
        """Work out the distributions after every pair of bytes that occurs: (pairs, 256) float32, and where each pair's row is."""
        self.row_of = np.full(65536, -1, np.int32)
        pair, at = np.unique(self._pair(data, positions), return_index=True)
        self.dense = self._walk(data, positions[at].astype(np.int64), False, min(DENSE, self.order))
        self.row_of[pair] = np.arange(len(pair))

    @staticmethod
    def _pair(data, positions):
        """The two bytes before each position as one number. (N,) int64."""
        near, far = byte_before(data, positions, 1), byte_before(data, positions, 2)
        return np.where(near == END, 0, far.astype(np.int64)) * 256 + near

    def probs(self, data, positions, leave_one_out=False):
        """The distribution of the byte at each position given the bytes before it.

        data: (n,) uint8; positions: (N,) integers from 0 to n (n asks for the byte after the last) -> (N, 256) float32, rows sum to 1.
        leave_one_out: data is the text that was counted; answer as if each position's own n-gram had not been (see `_walk`).
        """
        return self._walk(data, np.asarray(positions, np.int64), leave_one_out, self.order)

    def _walk(self, data, positions, leave_one_out, order):
        """probs with the first `order` orders. Down the orders, carrying how much probability is still to be given out.

        Leaving one out: at the top order the position's own n-gram is counted one time less. If that was its only time, the n-gram
        would not exist, so the order below would have met its end after one context less: take one there too, and so on down. Totals,
        discounts and gamma are worked out from the lowered counts, so the answer is exactly that of a recount (with the same discounts).
        """
        N = len(positions)
        hashes = [np.zeros(N, np.uint64)] + [h.copy() for h, _ in context_hashes(data, positions, order - 1)]
        found = {}  # n -> (rows whose context of n-1 bytes was counted, its index); a longer context can only be known if the shorter is
        row = np.arange(N)
        for n in range(min(DENSE, order) + 1, order + 1):
            context = self.counts[n].find(mix(hashes[n - 1][row]))
            row, context = row[context >= 0], context[context >= 0]
            found[n] = row, context

        gold = data[positions].astype(np.int16) if leave_one_out else None
        lowered = np.full(N, leave_one_out)  # rows whose own n-gram must still be taken away at this order
        weight = np.ones(N, np.float32)  # what the higher orders handed down
        base = np.full((N, 256), 1 / 256, np.float32)
        pieces = []
        for n in range(order, 0, -1):
            if n == min(DENSE, order):  # nearly all rows end here, in the table
                dense = np.where(lowered, -1, self.row_of[self._pair(data, positions)])
                base[dense >= 0] = self.dense[dense[dense >= 0]] if (dense >= 0).any() else 0
                row = np.flatnonzero(dense < 0)
            if n <= DENSE:
                if len(row) == 0:
                    break
                context = self.counts[n].find(mix(hashes[n - 1][row]))
                found[n] = row[context >= 0], context[context >= 0]
            at, context = found[n]
            table = self.counts[n]
            begin = table.start[context]
            size = (table.start[context + 1] - begin).astype(np.int64)
            first = np.cumsum(size) - size  # (rows,) where each row's entries begin among the E of this order
            of = np.repeat(np.arange(len(at)), size)  # (E,) which of the rows an entry belongs to
            entry = np.arange(len(of)) + (begin - first)[of]  # (E,) index into byte and count
            byte, count = table.byte[entry], table.count[entry]
            if leave_one_out:
                own = np.flatnonzero(byte == np.where(lowered, gold, -1)[at][of])
                count[own] -= 1
                lowered[at[of[own[count[own] > 0]]]] = False
            discount = self.discounts[n][np.minimum(count, 3)]
            # Sums over each row's entries; a row that was found has at least one.
            total = np.add.reduceat(count, first).astype(np.float32) if len(at) else np.zeros(0, np.float32)
            handed = np.add.reduceat(discount, first) if len(at) else total
            some = np.maximum(total, 1)  # a context left without any follower passes everything on
            pieces.append(((at * 256)[of] + byte, (count - discount) * (weight[at] / some)[of]))
            # Too small a weight would vanish in float32; 1e-12 more probability than 1 is far below its rounding.
            weight[at] = np.maximum(weight[at] * np.where(total > 0, handed / some, 1), 1e-12)
        base *= weight[:, None]
        for index, value in pieces:
            base.reshape(-1)[index] += value  # one order names a byte at most once per row, so no addition is lost
        return base

    def bits_per_byte(self, data, positions=None, leave_one_out=False):
        """Mean of -log2 p(byte) over the positions (default: all). (n,) uint8 -> float, bits per byte."""
        positions = np.arange(len(data)) if positions is None else np.asarray(positions)
        bits = 0.0
        for a in range(0, len(positions), 1 << 14):
            at = positions[a : a + (1 << 14)]
            bits -= np.log2(self.probs(data, at, leave_one_out)[np.arange(len(at)), data[at]], dtype=np.float64).sum()
        return bits / max(1, len(positions))

    def generate(self, prompt=b"", length=1000, temperature=1.0, seed=0):
        """Continue prompt until END or for `length` bytes. Returns prompt and continuation, bytes. temperature 0 takes the likeliest byte."""
        rng = np.random.default_rng(seed)
        text = np.concatenate([np.frombuffer(prompt, np.uint8), np.zeros(length, np.uint8)])
        for i in range(len(prompt), len(text)):
            p = self.probs(text[:i], [i])[0].astype(np.float64)
            p = p ** (1 / temperature) if temperature > 0 else p == p.max()
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
        """Write everything to one .npz file; path is the old file or the whole new one, never a part."""
        arrays = {f"{n}.{name}": getattr(table, name) for n, table in enumerate(self.counts) if n for name in Counts.__slots__}
        with open(f"{path}.tmp", "wb") as file:
            np.savez(file, order=self.order, discounts=self.discounts, dense=self.dense, row_of=self.row_of, **arrays)
        os.replace(f"{path}.tmp", path)

    @classmethod
    def load(cls, path):
        """Read what save wrote. -> NGram"""
        with np.load(path, allow_pickle=False) as file:
            model = cls(int(file["order"]))
            model.discounts, model.dense, model.row_of = file["discounts"], file["dense"], file["row_of"]
            model.counts = [None] + [Counts.__new__(Counts) for _ in range(model.order)]
            for n, table in enumerate(model.counts[1:], 1):
                for name in Counts.__slots__:
                    setattr(table, name, file[f"{n}.{name}"])
                table.bits = int(table.bits)
        return model


def modified_discounts(count):
    """What counts of 1, 2 and 3 or more give up, from the numbers of n-grams counted once, twice ... four times. (n-grams,) -> 3 floats.

    n-grams counted c times in one half of a text are counted fewer than c times in the other; Chen & Goodman's estimate of the difference.
    Kept between 0.01 and c: a discount of 0 would let unseen bytes have probability 0, one above c would make a probability negative.
    """
    n = np.bincount(np.minimum(count, 5), minlength=6).astype(float)
    y = n[1] / max(1, n[1] + 2 * n[2])
    return [min(max(c - (c + 1) * y * n[c + 1] / max(1, n[c]), 0.01), c) for c in (1, 2, 3)]


# ---- 4. To see it work ---------------------------------------------------------------------------------------------------------------

def main():
    import resource

    from data import Problem, add_arguments, text_from

    parser = argparse.ArgumentParser(description="Count n-grams of bytes, score them on text they have not seen, write a story.",
                                     epilog="example: python ngram.py --data stories.txt --orders 2 4 8 12")
    parser.add_argument("--orders", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12], help="(default: 1 2 3 4 6 8 12)")
    parser.add_argument("--seed", type=int, default=1, help="of the story (default: %(default)s)")
    add_arguments(parser)
    args = parser.parse_args()
    if not all(1 <= order < len(POWERS) for order in args.orders):
        raise Problem(f"--orders: each from 1 to {len(POWERS) - 1}; 12 is usual")
    text = text_from(args)
    print(f"{text.source}: counting {len(text.train):,} bytes, scoring {len(text.valid):,}\n")
    print("order  bits per byte  seconds  million n-grams    MB")
    for order in args.orders:
        began = time.perf_counter()
        model = NGram(order).fit(text.train)
        seconds = time.perf_counter() - began
        print(f"{order:5}  {model.bits_per_byte(text.valid):13.4f}  {seconds:7.1f}  {model.size() / 1e6:15.2f}  {model.nbytes() / 1e6:4.0f}", flush=True)
    sample = np.linspace(0, len(text.train) - 1, 50_000).astype(np.int64)
    print(f"\norder {order} about the text it counted: {model.bits_per_byte(text.train, sample):.4f} bits per byte reciting, "
          f"{model.bits_per_byte(text.train, sample, leave_one_out=True):.4f} with each occurrence left out")
    scale = 1 if os.uname().sysname == "Darwin" else 1024
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6:.0f} MB\n")
    print(model.generate(b"Once upon a time", 600, 0.8, args.seed).decode("utf-8", "replace"))


if __name__ == "__main__":
    from data import run

    run(main)
