"""Count bytes, predict bytes: n-gram models, up to interpolated modified Kneser-Ney.

By the end of section 2 you know how a language model is made by counting alone, why it must keep
some probability for what it has never seen, and why Kneser-Ney asks "after how many different
bytes?" instead of "how often?". `python ngram.py` counts, scores several orders, writes a story.

Terms (Chen & Goodman, "An empirical study of smoothing techniques for language modeling", 1999):
an *n-gram* is n bytes in a row. Its last byte is the *follower* w, the n-1 bytes before it are the
*context* h. A model's *order* is the longest n it uses. Arrays have one axis E for the followers
of a context.
"""
import argparse
import time
from collections import Counter
from itertools import product

import numpy as np

END = 0  # the byte between stories, and before the first


# ---- 1. The textbook model -----------------------------------------------------------------------
# Count how often each byte w followed each context h: c(h w). The obvious model is
# p(w | h) = c(h w) / c(h), and it is useless. Any text has something new in it, the model says 0,
# and one 0 makes the whole text impossible. So every byte seen must give up a little for those not
# seen. Say h was seen 4 times, 3 times before "a" and once before "b", and each count gives up
# 0.75. Then "a" has 2.25 / 4 and "b" 0.25 / 4 for sure, and 1.5 / 4 are handed down to the shorter
# context, whose distribution shares them out among all bytes. So each distribution sums to 1; the
# literature calls it interpolation with the lower order. The context "quick brown f" may be new,
# but "brown f" was seen, and if not, "n f". A context that was never seen hands down everything.
# All seven models, the useless one among them, are one formula, for n = 1, 2, ... up to the order:
#
#     p_n(w | h) = (c(h w) - discount) / denominator  +  handed / denominator * p_{n-1}(w | h')
#
#     discount     what this count gives up: 0.75
#     added        pseudo-counts, which p_{n-1} shares out among all bytes: none in this example
#     handed       what is handed down to the shorter context: all discounts after h, and added: 1.5
#     denominator  c(h) + added: 4
#     h'           h without its farthest byte; below order 1 stands the uniform p_0 = 1/256
#
# Here p_n(a | h) = (3 - 0.75) / 4 + 1.5 / 4 * p_{n-1}(a | h'). The models differ in `smooth`
# and `discounts`; both Kneser-Neys count otherwise (section 2); add-k has nothing between n and 0.

KNESER_NEY = ("kneser-ney", "modified-kneser-ney")
SMOOTHINGS = ("maximum-likelihood", "add-k", "jelinek-mercer", "witten-bell", "absolute",
              *KNESER_NEY)


class Textbook:
    """An n-gram model made of dictionaries. Slow and short; the tests hold NGram against it."""
    def __init__(self, text, order, smoothing):
        """Count text (bytes)."""
        self.order = order
        self.smoothing = smoothing
        counts = {}  # counts[n][h, w]: the count of w after the n-1 bytes h
        for n in range(order, 0, -1):  # downwards: Kneser-Ney counts in the keys of the longer ones
            if n < order and smoothing in KNESER_NEY:
                counts[n] = continuation_counts(counts[n + 1])  # section 2
            else:
                counts[n] = Counter((context_before(text, i, n), text[i]) for i in range(len(text)))
        self.constants = {}
        self.followers = {}  # followers[h][w]: the same counts, by context (of any length)
        for n in counts:
            self.constants[n] = discounts(smoothing, n, list(counts[n].values()))
            for (context, byte), count in counts[n].items():
                self.followers.setdefault(context, {})[byte] = count

    def distribution(self, text, i):
        """The distribution of byte i of text (bytes), given the bytes before it. -> (256,)"""
        p = np.full(256, 1 / 256)
        for n in orders_mixed(self.smoothing, self.order):  # the formula, from n = 1 up
            followers = self.followers.get(context_before(text, i, n))
            if followers is None:
                break  # unknown: what the shorter context says stands, and longer ones are new too
            count = np.array(list(followers.values()))
            discount, added = smooth(self.smoothing, count, len(count), self.constants[n])
            denominator = count.sum() + added
            handed = discount.sum() + added
            p *= handed / denominator  # p was that of order n - 1; with the next line it is p_n
            p[list(followers)] += (count - discount) / denominator  # (in the order of `count`)
        return p


def context_before(text, i, n):
    """The n-1 bytes before position i of text (bytes). Before the text all are END."""
    return text[max(0, i - n + 1) : i].rjust(n - 1, b"\0")


def orders_mixed(smoothing, order):
    """The orders that the formula runs through. Add-k mixes the highest with p_0 alone."""
    if smoothing == "add-k":
        return [order]
    return range(1, order + 1)


def smooth(smoothing, count, different, constants):
    """What each smoothing takes and adds. -> discount (E,), added

    count (E,) integers: how often each follower was met. different: how many different followers
    there are. constants (4,): see `discounts`. (NGram asks about R contexts at once: then
    `different` and `added` are (R,).)"""
    none = np.zeros(len(count))
    if smoothing == "maximum-likelihood":  # nothing: what was never seen is impossible
        return none, 0
    if smoothing == "add-k":  # as if each of the 256 bytes had been seen 0.01 times more
        return none, 256 * 0.01
    if smoothing == "jelinek-mercer":  # a fixed share of every count (Jelinek & Mercer 1980)
        return count * constants[0], 0
    if smoothing == "witten-bell":  # "something new" has happened too (Witten & Bell 1991):
        return none, different  # once for each different follower
    # Absolute discounting (Ney, Essen & Kneser 1994) and both Kneser-Neys: a constant. In new text
    # of the same length, an n-gram that was seen c times comes about c - 0.75 times. Modified
    # Kneser-Ney has three constants: for counts of 1, of 2, and of 3 or more.
    return constants[np.minimum(count, 3)], 0


def discounts(smoothing, n, count):
    """What counts of 0, 1, 2, and 3 or more give up (Jelinek-Mercer: the share).
    count: of all n-grams of order n. -> (4,)

    Let met[c] be how many different n-grams were met c times. One that was met once may well be
    chance; the more there are of these, the more each count should give up. Absolute discounting
    and Kneser-Ney take the same y = met[1] / (met[1] + 2 met[2]) from every count. Modified
    Kneser-Ney takes c - y (c + 1) met[c + 1] / met[c]. With 40, 20, 10 and 5 n-grams met 1, 2, 3
    and 4 times, y is 0.5, and the three discounts are 0.5, 1.25 and 2. (Equations 17 and 26 of Chen
    & Goodman.) At least 0.01, so that new bytes stay possible, at most c."""
    if smoothing == "jelinek-mercer":  # a share: counts of longer contexts are worth less
        return np.full(4, min(0.9, n / 12))
    met = np.bincount(np.minimum(count, 5), minlength=6).astype(float)
    y = met[1] / max(1, met[1] + 2 * met[2])
    found = np.array([0, y, y, y])
    if smoothing == "modified-kneser-ney":
        for c in (1, 2, 3):
            found[c] = c - y * (c + 1) * met[c + 1] / max(1, met[c])
    return found.clip([0, 0.01, 0.01, 0.01], [0, 1, 2, 3])


# ---- 2. Kneser-Ney's question --------------------------------------------------------------------
# A shorter context weighs most where the longer one knows little. "Francisco" is frequent, so after
# an unknown "big " a plain count offers it. But it was only ever met after "San ". So below the
# highest order Kneser & Ney (1995) do not count how often w followed h, but after how many
# *different* bytes "h w" was met:
#
#     text:                San Francisco, San Francisco, San Francisco, my dog, a dog, the dog
#     counts:              " F" 3, " d" 3     how often?
#     continuation counts: " F" 1, " d" 3     after how many different bytes?  (n; y, a, e)

def continuation_counts(longer):
    """The counts of order n + 1, {(context, byte): count} -> the continuation counts of order n.
    Each different longer n-gram puts a different byte in front of the shorter one. (Below, "g " is
    new, so " " decides. After it stand 11 counts, F 3 and d 3, and 8 continuation counts, F 1 and
    d 3; the discount takes most of a single one.)

    >>> text = b"San Francisco, San Francisco, San Francisco, my dog, a dog, the dog"
    >>> for smoothing in ("absolute", "kneser-ney"):
    ...     p = Textbook(text, 3, smoothing).distribution(b"big ", 4)
    ...     print(f"{smoothing:10}   F {p[ord('F')]:.2f}   d {p[ord('d')]:.2f}")
    absolute     F 0.22   d 0.22
    kneser-ney   F 0.03   d 0.28"""
    return Counter((context[1:], byte) for context, byte in longer)


# ==================================================================================================
# You may stop reading here. What follows is the same model for tens of millions of n-grams in
# seconds, with sorted arrays in place of dictionaries. The subject goes on in tiny.py.
# ==================================================================================================


# ---- 3. Contexts as numbers ----------------------------------------------------------------------
# Further axes: N positions asked about, R of them with a context that is known. The t bytes before
# position i become one number, their hash: the sum of (data[i-s] + 1) * ODD^s for s = 1 ... t,
# modulo 2^64. A byte more is a term more, a byte less a subtraction.

ODD = 6364136223846793005  # Knuth's, for MMIX; odd, so that multiplying mod 2^64 loses nothing


def as_array(data):
    """bytes or (n,) uint8 -> (n,) uint8. Raises ValueError for anything else, such as tokens."""
    data = np.asarray(memoryview(data))
    if data.dtype != np.uint8:
        raise ValueError("data must be bytes or an array of uint8")
    return data


def power(t):
    """ODD^t modulo 2^64"""
    return np.uint64(pow(ODD, t, 2**64))


def byte_before(data, positions, t):
    """The byte t places before each position, END before the beginning. -> (N,) uint8"""
    byte = data[np.maximum(positions - t, 0)]
    byte[positions < t] = END
    return byte


def context_hashes(data, positions, longest):
    """Yield for t = 0 ... longest the hash of the t bytes before each position, (N,) uint64. The
    array changes in place: copy what is to be kept."""
    h = np.zeros(len(positions), np.uint64)
    yield h
    for t in range(1, longest + 1):
        h += (byte_before(data, positions, t) + np.uint64(1)) * power(t)
        yield h


def run_starts(values):
    """Where each run of equal values begins in a sorted array. (n,) -> (different values,) int64"""
    return np.flatnonzero(np.append(True, values[1:] != values[:-1]))


def one_of_each(keys):
    """The index of one key of each value. (n,) uint64 -> (different values,) int64"""
    order = keys.argsort()
    return order[run_starts(keys[order])]


class Counts:
    """The n-grams of one order, sorted: the followers of a context stand side by side."""
    def __init__(self, events):
        """events: (n,) uint64, made in `NGram.fit`. Sorted in place."""
        events.sort()
        first = run_starts(events)
        count = np.diff(first, append=len(events))
        grams = events[first]  # each different n-gram once
        context = grams >> np.uint64(8)
        begin = run_starts(context)
        self.context = context[begin]  # (contexts,) uint64: 56 bits of the hash, ascending
        self.start = np.append(begin, len(grams)).astype(np.uint32)  # where its followers begin
        self.byte = grams.astype(np.uint8)  # (n-grams,) the follower
        self.count = count.astype(np.min_scalar_type(count.max()))  # (n-grams,) unsigned

    def find(self, h):
        """Hashes (N,) uint64 -> the index of each context, (N,) int64; -1: unknown."""
        h, which = np.unique(h >> np.uint64(8), return_inverse=True)  # sorted: much faster
        index = np.searchsorted(self.context[:-1], h)  # without the last: never beyond the end
        return np.where(self.context[index] == h, index, -1)[which]

    def followers(self, index):
        """All followers of R contexts, side by side. index (R,) -> first (R,): where each context's
        begin; of (E,): whose each is, 0 to R-1; byte (E,) uint8; count (E,) int64
        Two contexts whose 2 and 3 followers stand from 10 and from 40 on:
            first 0 2   of 0 0 1 1 1   at 10 11 40 41 42"""
        begin = self.start[index].astype(np.int64)
        size = self.start[index + 1] - begin
        first = np.cumsum(size) - size
        of = np.repeat(np.arange(len(size)), size)
        at = np.arange(len(of)) + (begin - first)[of]
        return first, of, self.byte[at], self.count[at].astype(np.int64)


# ---- 4. The fast model ---------------------------------------------------------------------------

SLICE = 1 << 14  # how many positions are worked on at a time


class NGram:
    """A counting language model. data is bytes or (n,) uint8 everywhere, END between stories."""
    def __init__(self, order=12, smoothing="modified-kneser-ney"):
        if order < 1 or smoothing not in SMOOTHINGS:
            raise ValueError(f"order must be at least 1, smoothing one of {', '.join(SMOOTHINGS)}")
        self.order = order
        self.smoothing = smoothing
        self.orders = orders_mixed(smoothing, order)
        self.counts = {}  # n -> Counts
        self.constants = np.zeros((order + 1, 4))  # of each order, for `smooth`

    def fit(self, data):
        """Count data. -> self. Raises ValueError if there is nothing in it.

        An *event* is one time that a byte is counted after a context. At the highest order each
        position is one. As a number: [56 bits: hash of the context | 8 bits: the follower] (the
        hash's last 8 bits are given up).
        `Counts` sorts these numbers: equal n-grams then stand together, and the length of a run is
        the count. Before that, for Kneser-Ney, `one_of_each` keeps one event of each *different*
        n-gram for the next order: how often a shorter n-gram ends one of these is its continuation
        count. So there are fewer events at each order."""
        data = as_array(data)
        if len(data) == 0:
            raise ValueError("nothing to count: the text is empty")
        h = np.zeros(len(data), np.uint64)  # the hash of each event's context
        for a in range(0, len(data), SLICE):
            some = np.arange(a, min(a + SLICE, len(data)))
            *_, h[some] = context_hashes(data, some, self.order - 1)  # the last: the longest
        position = np.arange(len(data), dtype=np.int32)
        for n in range(self.order, 0, -1):
            events = (h & ~np.uint64(255)) | data[position]
            if n > 1:  # for the next order: its events, with contexts shorter by a byte
                if self.smoothing in KNESER_NEY:
                    kept = one_of_each(events)
                    h = h[kept]
                    position = position[kept]
                farthest = byte_before(data, position, n - 1)
                h -= (farthest + np.uint64(1)) * power(n - 1)
            self.counts[n] = Counts(events)  # last, as it sorts them in place
            self.constants[n] = discounts(self.smoothing, n, self.counts[n].count)
        return self

    def probs(self, data, positions):
        """The distribution of the byte at each position, by those before. positions: (N,) integers
        from 0 to n, where n asks for the byte after the last -> (N, 256) float32. (On text that it
        has counted a model recites.)"""
        data = as_array(data if len(data) else b"\0")  # an END stands before the text
        positions = np.asarray(positions, np.int64)
        # The formula of section 1, unrolled. For orders 1 to 3 it is
        #     p_3 = given_3 + left_3 * (given_2 + left_2 * (given_1 + left_1 / 256))
        # with given_n = (count - discount) / denominator and left_n = handed / denominator. So go
        # from the longest context down, and multiply what each order gives by all left_n before.
        left = np.ones(len(positions))  # (N,) the product of the left_n so far
        given = []  # of each order: flat indices (E,) into (N, 256), and their p (E,)
        for n, row, context in reversed(self._find(data, positions)):
            first, of, byte, count = self.counts[n].followers(context)
            different = np.diff(first, append=len(of))
            discount, added = smooth(self.smoothing, count, different, self.constants[n])
            denominator = np.add.reduceat(count, first) + added
            handed = np.add.reduceat(discount, first) + added
            scale = left[row] / denominator
            # row[of]: the index of the position for which each follower was found
            given.append((256 * row[of] + byte, (count - discount) * scale[of]))
            left[row] = scale * handed
        if self.smoothing != "maximum-likelihood":
            left = np.maximum(left, 1e-12)  # so that float32 does not round it to impossible
        p = np.repeat(np.float32(left / 256), 256).reshape(-1, 256)
        for place, probability in given:
            p.reshape(-1)[place] += probability
        return p

    def _find(self, data, positions):
        """Which orders know the context of which positions? -> list of n, row (R,): indices into
        positions, context (R,): indices into counts[n]"""
        found = []
        row = np.arange(len(positions))
        hashes = context_hashes(data, positions, self.order - 1)
        for n, h in enumerate(hashes, 1):
            if n in self.orders:
                context = self.counts[n].find(h[row])
                row = row[context >= 0]  # an unknown context stays unknown when it grows
                found.append((n, row, context[context >= 0]))
        return found

    def bits_per_byte(self, data):
        """The mean of -log2 p(byte) over all of data. -> bits per byte"""
        data = as_array(data)
        bits = 0.0
        for a in range(0, len(data), SLICE):
            some = np.arange(a, min(a + SLICE, len(data)))
            p = self.probs(data, some)
            p = p[np.arange(len(some)), data[some]]
            with np.errstate(divide="ignore"):  # maximum likelihood: infinite, as it should be
                bits -= np.log2(p, dtype=np.float64).sum()
        return float(bits / len(data))

    def generate(self, prompt=b"", length=1000, temperature=0.8, seed=0):
        """Continue prompt by `length` bytes, or to the end of the story. -> bytes, prompt included
        temperature: 1 samples what the model predicts, less prefers the likely."""
        rng = np.random.default_rng(seed)
        text = np.frombuffer(bytearray(prompt) + bytes(length), np.uint8)
        for i in range(len(prompt), len(text)):
            p = self.probs(text, [i])[0].astype(np.float64)
            p = (p / p.max()) ** (1 / max(temperature, 1e-3))
            text[i] = rng.choice(256, p=p / p.sum())
            if text[i] == END:
                return text[:i].tobytes()
        return text.tobytes()


def mixture_weights(p):
    """p (n, models): the probability each model gave to each target -> (models,): the weights with
    which their mixture makes the targets likeliest, sum 1. Expectation maximisation (Dempster,
    Laird & Rubin 1977): a model's new weight is the share of the targets that probably came from
    it, until the mean log-likelihood is within 1e-5 of the best there is (Cover 1984)."""
    weights = np.full(p.shape[1], 1 / p.shape[1])
    p = np.maximum(p, 1e-12)
    for _ in range(20_000):
        growth = (1 / (p @ weights)) @ p / len(p)
        weights *= growth  # now the mean of weight * p / mixture, the share of each target
        if growth.max() < 1 + 1e-5:
            break
    return weights / weights.sum()


def compare(text, kinds):
    best_bits = np.inf
    print("   bpb  seconds  order  smoothing")
    for smoothing, order in kinds:
        began = time.perf_counter()
        model = NGram(order, smoothing).fit(text.train)
        seconds = time.perf_counter() - began  # of counting
        bits = model.bits_per_byte(text.valid)
        print(f"{bits:6.4f}  {seconds:7.1f}  {order:5}  {smoothing}")
        if bits <= best_bits:
            best = model
            best_bits = bits
    print(f"\nthe best, order {best.order}, {best.smoothing}, in bits per byte:")
    print(f"{best.bits_per_byte(text.train[:100_000]):.4f} on text that it counted, reciting")
    print(f"{best_bits:.4f} on text it has not seen\n")
    return best


def main():
    parser = argparse.ArgumentParser(
        description="Count n-grams of bytes, score them on text they have not seen, write a story.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
        epilog="example: python ngram.py --data stories.txt --orders 2 4 8 12")
    add = parser.add_argument
    add("--orders", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12], help="to compare")
    add("--smoothing", choices=SMOOTHINGS, nargs="+", default=SMOOTHINGS[-1:], help="to compare")
    add_arguments(parser)
    args = parser.parse_args()
    if min(args.orders) < 1:
        parser.error("--orders are numbers above 0")
    text = load(args)
    print(f"{text.source}: {len(text.train):,} bytes to count, {len(text.valid):,} to score\n")
    model = compare(text, product(args.smoothing, args.orders))
    story = model.generate(b"Once upon a time", 800)
    print(printable(story.decode("utf-8", "replace")))


if __name__ == "__main__":  # only the script needs data.py
    from data import add_arguments, load, printable, run

    run(main)
