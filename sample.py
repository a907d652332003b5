"""Read stories from a trained model, fuse it with simpler models, and find out which stories are good.

By the end of this file you know how text comes out of a model that only ever predicts the next byte; how other models can be mixed in at
that moment (shallow fusion) so that the bits per byte fall; why that can make the stories worse; and how stories can be judged instead: by
counting what goes wrong (a rubric), and by asking someone who does not know which is whose (a blind judge). The commands:

    python sample.py --prompt "One day, a cat" --n 3          stories
    python sample.py --fuse ngram,knn,cache --score           what fusion does to the bits per byte
    python sample.py --rubric out out+ngram+knn+cache         what it does to the stories, in numbers
    python sample.py --judge out out+ngram+knn+cache          and in your own eyes, blind
    python sample.py --bench                                  how fast, and why

A RUN is a folder that tiny.py wrote ("out"), the same with heads fused in ("out+ngram+knn+cache"), the counting model alone ("ngram"), the
validation stories ("real"), any text file of stories with <|endoftext|> between them, or several of these with commas between.
Axes: B stories or positions, P earlier positions of the context, C the model's width, M entries of the datastore, 256 byte values.
"""
import argparse
import codecs
import hashlib
import http.client
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import END, SEPARATOR, Problem, add_arguments, decode, load, printable, read, run, save, text_from
from data import stories as cut_at_ends
from ngram import NGram, learn_weights
from tiny import ask, choose, generate, load_checkpoint, pick_device, prepare_cpu, stories, windows

PROMPTS = 40  # stories per variant
LENGTH = 650  # bytes of each that are looked at


# ---- 1. Heads: several opinions about the next byte ----------------------------------------------------------------------------------
# Each head is a function from the same inputs to a full distribution, (B, 256), whose rows sum to 1; so does any mixture of them. (A head
# that gave a score for the byte that came and nothing else could claim any figure.)

Now = namedtuple("Now", "net hidden past followed tail")
# net (B, 256): what the transformer says; hidden (B, C): the state it says it from; past (B, P, C): its states at earlier bytes of the
# context; followed (B, P): the byte that came after each of those, -1 for none; tail (B, t) uint8: the last bytes, END before the story
DATASTORE = 100_000  # bytes of the training text whose states are kept
NEAREST = 64  # neighbours asked
KNN_HEAT = 8.0  # of squared distances; states have a squared length of C
CACHE_HEAT = 0.25  # of dot products


def net_head(now):
    """What the transformer says."""
    return now.net


def ngram_head(now, ngram):
    """What followed these bytes in the training text (ngram.py)."""
    return ask(ngram, torch.from_numpy(now.tail), 1)[:, 0]


def knn_head(now, keys, values):
    """What followed the most similar moments of the training text (Khandelwal et al. 2020): keys (M, C), values (M,) the bytes.

    Similar means a near hidden state. Exact search, by one matrix product: |a - b|^2 = |a|^2 - 2ab + |b|^2.
    """
    distance = now.hidden.square().sum(1, keepdim=True) - 2 * now.hidden @ keys.T + keys.square().sum(1)  # (B, M)
    near, index = distance.topk(min(NEAREST, len(keys)), largest=False)
    return vote(F.softmax(-near / KNN_HEAT, -1), values[index])


def cache_head(now):
    """What followed the most similar moments of this very story (Grave et al. 2017). Words already said get likelier."""
    if now.past.shape[1] == 0:
        return torch.full_like(now.net, 1 / 256)
    score = CACHE_HEAT * torch.einsum("bc,bpc->bp", now.hidden, now.past)
    score = score.masked_fill(now.followed < 0, -1e9)
    return vote(F.softmax(score, -1) * (now.followed >= 0), now.followed.clamp(min=0))


def vote(share, byte):
    """Give each byte the shares of those who name it, and 1% (or all that was not given) to all bytes alike: nothing is impossible.
    share (B, k), rows sum to at most 1; byte (B, k) -> (B, 256), rows sum to 1"""
    p = torch.zeros(len(share), 256).scatter_add_(1, byte, 0.99 * share)
    return p + (1 - p.sum(1, keepdim=True)) / 256


def mixture_weights(p):
    """The weights that make the bytes likeliest, by expectation maximisation (ngram.learn_weights). p (n, heads) -> (heads,), sum 1"""
    weight, out, left = learn_weights(p, np.ones(p.shape, np.int64))[:, 1], np.zeros(p.shape[1]), 1.0
    for head in range(len(out) - 1, 0, -1):  # there the last head is asked first, and what is left goes to the others
        out[head], left = left * weight[head], left * (1 - weight[head])
    out[0] = left
    return out


class Fusion:
    """Shallow fusion: p = sum of weight x head. Made for one model; called by tiny.generate for each byte.

    Each head knows something that the others do not, so the mixture needs fewer bits. Why are its stories worse, at temperature 0.8 (at 0.45
    they are not)? Our reading: each head adds a little probability to bytes that do not fit this story, the n-gram above all, which after a
    dozen bytes forgets whom it is about. While such tails are drawn from, one of them turns up every few words and the thread is lost; a low
    temperature cuts them off. In the mean over all bytes they hardly show.
    """
    NAMES = ("ngram", "knn", "cache")

    def __init__(self, model, names, ngram=None, text=None, weights=None):
        """names: of the heads beside the transformer. text: (n,) uint8 training text, whose first part becomes the kNN datastore."""
        self.model, self.names, self.ngram, self.weights, self.pairs = model, ("transformer", *names), ngram, weights, []
        self.reach = ngram.order if ngram else 1  # so many of the last bytes the n-gram may want to see
        if "knn" in names:
            self.keys, self.values = self.remember(text[:DATASTORE])

    def remember(self, text):
        """The hidden state at each byte of text and the byte that came next. -> keys (M, C), values (M,)"""
        keys, values = [], []
        for now, gold in self.moments(text):
            keys.append(now.hidden)
            values.append(gold)
        return torch.cat(keys), torch.cat(values)

    def moments(self, text):
        """Walk through text as tiny.evaluate does: yields (Now, the bytes that came (B,))."""
        before = np.concatenate((np.zeros(1, np.uint8), text))  # before[i] is the byte before text[i]
        for window in windows(self.model, text, batch=1):
            given, came, at, asked, logits, states = (x[0] for x in window)  # each (T, ...)
            asked = asked.nonzero()[:, 0]  # (B,)
            # Position t knows what followed the positions before it, no more, and of this story alone: B rows share one past.
            P = torch.arange(len(given))
            begin = torch.where(given == END, P, 0).cummax(0)[0][asked]  # (B,) where its story begins
            followed = torch.where((P < asked[:, None]) & (P >= begin[:, None]), came, -1)  # (B, P)
            back = at[asked].numpy()[:, None] - np.arange(self.reach - 1, -1, -1)
            tail = np.where(back < 0, END, before[back.clip(0)]).astype(np.uint8)
            yield Now(F.softmax(logits[asked], -1), states[asked], states.expand(len(asked), -1, -1), followed, tail), came[asked]

    def heads(self, now):
        """-> (heads, B, 256)"""
        ask = {"transformer": lambda: net_head(now), "ngram": lambda: ngram_head(now, self.ngram),
               "knn": lambda: knn_head(now, self.keys, self.values), "cache": lambda: cache_head(now)}
        return torch.stack([ask[name]() for name in self.names])

    def gold(self, text, label):
        """The probability that each head gave to each byte of text. -> (n, heads)"""
        moments = tqdm(self.moments(text), label, total=max(1, 2 * len(text) // self.model.context), leave=False, disable=not sys.stderr.isatty())
        return torch.cat([self.heads(now)[:, torch.arange(len(came)), came].T for now, came in moments]).double().numpy()

    def fit(self, text):
        """Learn the weights on text that is neither trained on nor scored, by expectation maximisation."""
        p = self.gold(text, "weights")
        self.weights = mixture_weights(p)
        self.pairs = [mixture_weights(p[:, [0, head]]) for head in range(1, len(self.names))]  # the transformer with one other alone
        return self

    def mix(self, heads):
        """(heads, B, 256) -> (B, 256), rows sum to 1"""
        return torch.einsum("h,hbv->bv", torch.as_tensor(self.weights, dtype=heads.dtype), heads)

    def __call__(self, p, hidden, ids):
        """For tiny.generate: p (B, 256), hidden (B, T, C) of the bytes just fed, ids (B, t) all bytes so far -> (B, 256)"""
        hidden = hidden.cpu()
        # Several bytes at once are the beginning of a context, one is the next of the same.
        self.states = torch.cat((self.states, hidden), 1) if hidden.shape[1] == 1 and ids.shape[1] > 1 else hidden
        P = self.states.shape[1] - 1
        tail = F.pad(ids, (self.reach, 0), value=END)[:, -self.reach :].to(torch.uint8).numpy()
        return self.mix(self.heads(Now(p, hidden[:, -1], self.states[:, :P], ids[:, ids.shape[1] - P :], tail)))


def slices(valid):
    """-> the validation bytes that are scored, and others that the weights are learned on"""
    return (valid[:100_000], valid[300_000:320_000]) if len(valid) >= 320_000 else (valid[: len(valid) // 2], valid[len(valid) // 2 :])


def show_scores(fusion, valid):
    """What fusion does to the bits per byte of every head and mixture."""
    scored, held = slices(valid)
    p = fusion.gold(scored, "scoring")
    bits = lambda q: -np.log2(q).mean()
    print(f"bits per byte on {len(scored):,} bytes; weights {f'learned on {len(held):,} others' if fusion.pairs else 'as given'}\n")
    for i, name in enumerate(fusion.names):
        print(f"{bits(p[:, i]):8.4f}  {name} alone")
    for i, pair in enumerate(fusion.pairs, 1):
        print(f"{bits(p[:, [0, i]] @ pair):8.4f}  {pair[0]:.3f} transformer + {pair[1]:.3f} {fusion.names[i]}")
    mixture = " + ".join(f"{w:.3f} {name}" for w, name in zip(fusion.weights, fusion.names))
    print(f"{bits(p @ fusion.weights):8.4f}  {mixture}\n")
    for i, name in enumerate(fusion.names):
        print(f"{name}_bpb: {bits(p[:, i]):.4f}")
    print(f"fused_bpb: {bits(p @ fusion.weights):.4f}")


# ---- 2. Stories of a run -------------------------------------------------------------------------------------------------------------

class Library:
    """Texts and counting models, each read or made once, when it is first asked for."""

    def __init__(self, args):
        self.args, self.made = args, {}

    def once(self, key, make):
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def model(self, out):
        return self.once(("model", out), lambda: load_checkpoint(out, pick_device(self.args.device)))

    def text(self):
        """The texts named with --data, else those the run in --out was trained on."""
        def find():
            if not self.args.data and os.path.exists(os.path.join(self.args.out, "model.pt")):
                recipe = self.model(self.args.out)[1]["recipe"]
                return load(recipe["data"], recipe["valid"], recipe["megabytes"], recipe["cache"])
            return text_from(self.args)
        return self.once("text", find)

    def ngram(self):
        """Recounting takes seconds; kept as a file it would take more room than the model itself."""
        def count():
            print("counting the n-gram model ...", file=sys.stderr, flush=True)
            return NGram(self.args.order).fit(self.text().train)
        return self.once("ngram", count)

    def fusion(self, out, names):
        """A Fusion for the run `out`, its weights learned on the validation text (or given with --weights)."""
        def make():
            unknown = [name for name in names if name not in Fusion.NAMES]
            if unknown:
                raise Problem(f"there is no head {unknown[0]}; the heads are {', '.join(Fusion.NAMES)}")
            text = self.text()
            given = self.args.weights
            if given and len(given) != len(names) + 1:
                raise Problem(f"--weights: give {len(names) + 1} numbers, for {', '.join(('transformer', *names))}")
            weights = given and np.array(given) / sum(given)
            fusion = Fusion(self.model(out)[0], names, self.ngram() if "ngram" in names else None, text.train, weights)
            return fusion if given else fusion.fit(slices(text.valid)[1])
        return self.once(("fusion", out, names), make)

    def prompts(self, n):
        """n beginnings of validation stories, and the stories. -> list of bytes, list of bytes"""
        real = [story for story in cut_at_ends(self.text().valid) if len(story) > 200][:n]
        if not real:
            raise Problem("the validation text has no story of more than 200 bytes to take a prompt from; name another with --data, --valid")
        return [b" ".join(story.split(b" ")[:5]) for story in real], real

    def stories(self, spec, n=PROMPTS):
        """n stories of a RUN, from the same prompts, cut to LENGTH; of several with commas between, n of each. -> list of str"""
        if "," in spec:
            return [story for one in spec.split(",") for story in self.stories(one, n)]

        def write():
            if os.path.isfile(spec):
                return [story[:LENGTH].decode("utf-8", "ignore") for story in cut_at_ends(read([spec]))[:n]]
            name, *heads = spec.split("+")
            prompts, real = self.prompts(n)
            if spec == "real":
                found = real
            elif spec == "ngram":
                counting, bar = self.ngram(), tqdm(prompts, "ngram", disable=not sys.stderr.isatty())
                found = [counting.generate(p, LENGTH - len(p), self.args.temperature, i) for i, p in enumerate(bar)]
            else:
                model, fusion = self.model(name)[0], self.fusion(name, tuple(heads)) if heads else None
                found = stories(model, prompts, LENGTH, self.args.temperature, self.args.top_p, self.args.seed, fusion)
            return [story[:LENGTH].decode("utf-8", "ignore") for story in found]
        return self.once(("stories", spec, n), write)


# ---- 3. The rubric: what goes wrong, counted -----------------------------------------------------------------------------------------

WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
FUNCTION = set("a an the and or but so to of in on at with for from by as is was were are be had has have did do does not that this it he she they "
               "you we i his her their my your our its him them who when then there up down out into over all very if because".split())
DETERMINERS = set("a an the his her their my your some".split())
HE, SHE = set("he him his himself".split()), set("she her hers herself".split())


def words(text):
    return WORD.findall(text)


class Reference:
    """What a training text says about its language: its words, names, nouns, and who is a he and who a she. By hand there are only the few
    function words above and a dozen nouns for persons."""

    def __init__(self, text):
        """text: (n,) uint8"""
        self.array = np.concatenate((np.zeros(1, np.uint8), text))
        plain = decode(text).decode("utf-8", "replace").replace(SEPARATOR.decode(), " . ")
        tokens = re.findall(rf"{WORD.pattern}|[^\sA-Za-z]+", plain)
        lower = [token.lower() for token in tokens]
        total = Counter(lower)
        self.words = {token for token in total if token[0].isalpha()}
        alone = [token for token in lower if token[0].isalpha()]
        self.trigrams = set(map(hash, zip(alone, alone[1:], alone[2:])))
        capital, after, before, he, she, doubled = Counter(), Counter(), Counter(), Counter(), Counter(), Counter()
        name, inside = None, lambda last: last[-1:].isalpha() or last == ","  # of a sentence, where only names are written large
        for last, token, low, following in zip([""] + lower, tokens, lower, lower[1:] + [""]):
            if token[0].isupper() and inside(last):
                capital[low] += 1
                name = low
            if last in DETERMINERS:
                after[low] += 1
            if following in FUNCTION or not following[:1].isalpha():
                before[low] += 1
            if name and low in HE | SHE:  # the first pronoun after a name tells most often of whom
                (he if low in HE else she)[name] += 1
                name = None
            doubled[low] += low == last
        within = Counter(low for last, low in zip(lower, lower[1:]) if inside(last))
        self.names = {w for w, c in capital.items() if c >= 5 and c > 0.9 * within[w] and len(w) > 2 and "'" not in w}
        self.nouns = {w for w, c in total.items() if c >= 10 and len(w) > 2 and after[w] > 0.25 * c and before[w] > 0.6 * c} - FUNCTION
        self.is_male = {w: he[w] > she[w] for w in self.names if he[w] + she[w] >= 5 and max(he[w], she[w]) > 0.8 * (he[w] + she[w])}
        self.is_male |= {w: True for w in ("boy", "dad", "man", "daddy", "king", "brother", "prince")}
        self.is_male |= {w: False for w in ("girl", "mom", "woman", "mommy", "queen", "sister", "princess")}
        self.style = {w for w, c in doubled.items() if c >= 5}  # "very very", "bye bye": what is written twice on purpose

    def names_of(self, story):
        """The names in a text in order, as written in lower case."""
        return [w for w in (w.lower().removesuffix("'s") for w in words(story) if w[0].isupper()) if w in self.names]

    def longest_copies(self, texts, seed=24):
        """For each text the length of its longest piece that stands in the training text, bytes; 0 if below `seed`.

        All pieces of `seed` bytes are looked up by hash, then each hit is prolonged as far as it goes, all of them at once.
        """
        joined = np.concatenate([np.append(np.frombuffer(t.encode(), np.uint8), np.uint8(END)) for t in texts])
        owner = np.repeat(np.arange(len(texts)), [len(t.encode()) + 1 for t in texts])
        theirs, ours = hashes(joined, seed), hashes(self.array, seed)
        order = np.argsort(theirs)
        ranked = theirs[order]
        at = np.concatenate([a + np.flatnonzero(np.isin(ours[a : a + (1 << 20)], ranked)) for a in range(0, len(ours), 1 << 20)])  # (hits,)
        low, high = np.searchsorted(ranked, ours[at]), np.searchsorted(ranked, ours[at], "right")
        best = np.zeros(len(texts), np.int64)
        for k in range(int((high - low).max(initial=0))):
            here = low + k < high
            i, j = order[(low + k)[here]], at[here]
            length = 0
            while len(i):
                same = (i + length < len(joined)) & (j + length < len(self.array))
                i, j = i[same], j[same]
                same = (joined[i + length] == self.array[j + length]) & (joined[i + length] != END)
                i, j = i[same], j[same]
                length += 1
                if length >= seed:
                    np.maximum.at(best, owner[i], length)
        return best


def hashes(array, length):
    """A hash of the `length` bytes from each position on. (n,) uint8 -> (n - length + 1,) uint64"""
    h = np.zeros(max(0, len(array) - length + 1), np.uint64)
    for k in range(length):
        h = h * np.uint64(0x9E3779B97F4A7C15) + array[k : k + len(h)] + np.uint64(1)
    return h


def third(story):
    """-> the first and the last third of a text"""
    return story[: len(story) // 3], story[-(len(story) // 3) :]


# Each row is a function (story, reference) -> number, or None where the story gives no occasion. What it catches; what it cannot.

def doubled(story, ref):
    """Words and punctuation written twice per 1,000 words. Catches `got got`, `,,`; not a thought that is said twice in other words."""
    w = [x.lower() for x in words(story)]
    twice = sum(a.lower() == b.lower() and a.lower() not in ref.style for a, b in re.findall(r"(?=\b([A-Za-z]+) ([A-Za-z]+)\b)", story))
    return 1000 * (twice + len(re.findall(r"[,;:]\s*[,.;:!?]", story))) / max(1, len(w))


def known_words(story, ref):
    """Share of words that occur in the training text, %. Catches invented spellings; 100 is no merit: real stories bring new words."""
    w = words(story)
    return 100 * sum(x.lower() in ref.words for x in w) / max(1, len(w))


def known_trigrams(story, ref):
    """Share of word 3-grams that occur in the training text, %. Low: word salad; far above real stories: patchwork from the text."""
    w = [x.lower() for x in words(story)]
    return 100 * sum(hash(t) in ref.trigrams for t in zip(w, w[1:], w[2:])) / max(1, len(w) - 2)


def quotes_close(story, ref):
    """Share of paragraphs, of those with quotation marks, where all of them close, %. Not who speaks. The last may have been cut: left out."""
    marks = [p.count('"') for p in story.split("\n")[:-1] if '"' in p]
    return 100 * sum(m % 2 == 0 for m in marks) / len(marks) if marks else None


def sentences_begin(story, ref):
    """Share of sentences that begin with a capital letter, %. Catches `. then`, not a sentence without a verb."""
    starts = re.findall(r"(?:^|[.!?] +|\n+)[\"'(]*(\w)", story)
    return 100 * sum(not s.islower() for s in starts) / max(1, len(starts))


def distinct_2(story, ref):
    """Different word 2-grams in all of the story's, %. Low: it goes round in circles; very high: nothing is ever taken up again."""
    w = [x.lower() for x in words(story)]
    return 100 * len(set(zip(w, w[1:]))) / max(1, len(w) - 1)


def repeated_4(story, ref):
    """Share of word 4-grams that the story has had before, %. Catches refrains and loops; real stories have some, on purpose."""
    w = [x.lower() for x in words(story)]
    grams = list(zip(w, w[1:], w[2:], w[3:]))
    return 100 * (1 - len(set(grams)) / len(grams)) if grams else None


def same_word(story, ref):
    """Share of sentences, of three words or more, that say a word twice which is no function word, %. Catches `the cat saw the cat`."""
    sentences = [[w.lower().removesuffix("'s") for w in words(sentence)] for sentence in re.split(r"[.!?\n]+", story)]
    telling = [[w for w in sentence if len(w) > 2 and w not in FUNCTION] for sentence in sentences if len(sentence) > 2]
    return 100 * sum(len(set(w)) < len(w) for w in telling) / len(telling) if telling else None


def names_return(story, ref):
    """Share of the names in the first third that come back in the last, %. Catches forgotten heroes; not what they are doing there."""
    first, last = map(set, map(ref.names_of, third(story)))
    return 100 * len(first & last) / len(first) if first else None


def nouns_return(story, ref):
    """The same for nouns ("kite", "cave"). Catches a plot that drifts off; not whether the kite is still broken."""
    first, last = ({w.lower() for w in words(part)} & ref.nouns for part in third(story))
    return 100 * len(first & last) / len(first) if first else None


def pronouns_fit(story, ref):
    """Share of he / she words that fit one of the last two persons named before, %. Catches `Lily ... his`; not who of two girls is meant."""
    people, fit = [], []
    for w in words(story):
        w = w.lower().removesuffix("'s")
        if w in ref.is_male:
            people = [p for p in people if p != w] + [w]
        elif w in HE | SHE and people:
            fit.append((w in HE) in {ref.is_male[p] for p in people[-2:]})
    return 100 * sum(fit) / len(fit) if fit else None


def new_names(story, ref):
    """Different names per 100 words. High: everybody who comes is new."""
    return 100 * len(set(ref.names_of(story))) / max(1, len(words(story)))


def length(story, ref):
    """Bytes (cut at LENGTH)."""
    return len(story.encode())


def ends(story, ref):
    """Stories that end by themselves before the cut, %."""
    return 100.0 * (len(story.encode()) < LENGTH - 3)  # a cut inside a character drops up to 3 bytes more


# Row, and what is better: -1 less, 1 more, 0 neither: as much as real stories have.
ROWS = [(doubled, -1), (quotes_close, 1), (sentences_begin, 1), (names_return, 1), (nouns_return, 1), (pronouns_fit, 1), (new_names, -1),
        (known_words, 0), (known_trigrams, 0), (same_word, 0), (distinct_2, 0), (repeated_4, 0), (length, 0), (ends, 0)]


def rubric(texts, ref):
    """All rows for a list of stories: {row name: (mean, standard error)}."""
    table = {}
    for row, _ in ROWS:
        values = [v for v in (row(story, ref) for story in texts) if v is not None]
        table[row.__name__] = (np.mean(values), np.std(values) / math.sqrt(len(values))) if values else (math.nan, math.nan)
    copied = ref.longest_copies(texts)
    table["longest_copy"] = float(np.mean(copied)), float(np.std(copied) / math.sqrt(len(copied)))
    return table


def shuffled(texts):
    """The same sentences, each story's taken from others: sentence i of story s comes from story s + i. Fluent, without a thread."""
    cut = [re.findall(r"[^.!?]+[.!?]+[\"']?\s*", text) or [text] for text in texts]
    return ["".join(cut[(s + i) % len(cut)][i % len(cut[(s + i) % len(cut)])] for i in range(len(cut[s]))) for s in range(len(cut))]


def show_rubric(library, specs):
    ref = Reference(library.text().train)
    columns = {"real": library.stories("real"), "shuffled": shuffled(library.stories("real")), "ngram": library.stories("ngram")}
    for spec in specs:
        columns[spec] = library.stories(spec)
    tables = {name: rubric(texts, ref) for name, texts in columns.items()}
    print(f"{PROMPTS} stories each, cut to {LENGTH} bytes, temperature {library.args.temperature}; mean ± standard error\n")
    print("| row | better | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    for name, direction in [(row.__name__, direction) for row, direction in ROWS] + [("longest_copy", 0)]:
        cells = " | ".join("{:.1f} ± {:.1f}".format(*table[name]) for table in tables.values())
        print(f"| {name} | {('as real', 'more', 'less')[direction]} | {cells} |")
    print("\nWhat the rows catch, and what they cannot:")
    for row, _ in ROWS:
        print(f"  {row.__name__}: {' '.join(row.__doc__.split())}")
    print("  longest_copy: the longest piece, in bytes, that stands in the training text word for word. Memorisation, if far above real stories'.")


# ---- 4. The judge: somebody who does not know which is whose -------------------------------------------------------------------------

CRITERIA = ("Compare two short stories for small children. Judge grammar, creativity, consistency (do persons and things stay who and what they "
            "are?) and plot (does one thing lead to the next, is there a problem and an ending?). A story may be cut off at its end: do not mind.")


def pairs(left, right, seed):
    """Shuffle: [(which of the pairs, whether the sides are swapped), ...] for stories that belong together by index."""
    rng = np.random.default_rng(seed)
    n = min(len(left), len(right))
    return [(int(i), bool(rng.integers(2))) for i in rng.permutation(n)]


def binomial_p(wins, losses):
    """Two-sided exact p-value of a coin that falls `wins` to `losses`; ties are left out (the sign test)."""
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


class Answers:
    """Judgements on disk, one JSON object a line, written as they come: an interrupted judge goes on, and no answer is paid for twice."""

    def __init__(self, path):
        self.path, self.known = path, {}
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                for line in file:
                    try:
                        row = json.loads(line)
                        self.known[row["id"]] = row["answer"]
                    except (ValueError, KeyError, TypeError):
                        continue  # the last line of a run that was killed

    def ask(self, judge, first, second, question):
        """The answer for this pair in this order: the one on disk, or that of question()."""
        key = hashlib.sha256("\0".join((judge, first, second)).encode()).hexdigest()
        if key not in self.known:
            self.known[key] = question()
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    line = json.dumps({"id": key, "judge": judge, "answer": self.known[key]}) + "\n"
                    file.write("\n" * (file.tell() > 0 and not ends_line(self.path)) + line)
            except OSError as error:
                raise Problem(f"cannot write {self.path}: {error.strerror}; name another file with --answers") from None
        return self.known[key]


def ends_line(path):
    """Whether a file ends with a line break: it does not if a writer was killed."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def person(first, second):
    """Show two stories, read a key. -> "1", "2", "=" or "q" """
    print(f"\n{'=' * 30} 1 {'=' * 30}\n{printable(first)}\n{'=' * 30} 2 {'=' * 30}\n{printable(second)}\n{'=' * 63}")
    while True:
        try:
            answer = input("Which is better? 1, 2, = (as good), q (stop, go on later): ").strip()
        except EOFError:
            return "q"
        if answer in ("1", "2", "=", "q"):
            return answer


def language_model(url, model, key, tries=5):
    """A judge at an OpenAI-compatible chat endpoint -> function (first, second) -> "1", "2" or "=". The key is only ever sent."""
    def ask(first, second):
        content = f"{CRITERIA}\n\nStory 1:\n{first}\n\nStory 2:\n{second}\n\nWhich is better? End with one line: ANSWER: 1, ANSWER: 2 or ANSWER: ="
        body = json.dumps({"model": model, "temperature": 0, "messages": [{"role": "user", "content": content}]}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        for attempt in range(tries):
            wait, problem = 2.0**attempt, ""
            try:
                request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers)
                with urllib.request.urlopen(request, timeout=60) as reply:
                    said = json.load(reply)["choices"][0]["message"]["content"]
                if found := re.findall(r"ANSWER:\s*([12=])", said):
                    return found[-1]
                problem = "its answer names no story"
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                if error.code != 429 and error.code < 500:
                    raise Problem(f"--judge-url: {problem}; check the address, JUDGE_MODEL and JUDGE_KEY") from None
                wait = max(wait, float(error.headers.get("Retry-After", 0)) if error.headers.get("Retry-After", "0").isdigit() else 0)
            except (OSError, ValueError, KeyError, IndexError, TypeError, http.client.HTTPException) as error:
                problem = type(error).__name__
            if attempt < tries - 1:
                time.sleep(min(wait, 60))
        raise Problem(f"--judge-url: no answer after {tries} tries ({problem}); run again later, the answers so far are kept")
    return ask


def judge(library, specs, args):
    """Ask for every pair, count."""
    texts = [library.stories(spec, args.n or PROMPTS) for spec in specs]
    answers, score = Answers(args.answers), Counter()
    order = pairs(*texts, args.seed)
    if args.judge_url:
        name = os.environ.get("JUDGE_MODEL", "default")
        ask = language_model(args.judge_url, name, os.environ.get("JUDGE_KEY", ""))
    for i, swapped in tqdm(order, "pairs", disable=not args.judge_url or not sys.stderr.isatty()):
        a, b = texts[0][i], texts[1][i]
        first, second = (b, a) if swapped else (a, b)
        if args.judge_url:  # in both orders, and it counts only if the answers agree: such judges prefer what they read first
            one, two = (answers.ask(name, *pair, lambda: ask(*pair)) for pair in ((first, second), (second, first)))
            agree = {one, two} in ({"1", "2"}, {"="})  # the second time the sides were exchanged: who prefers one story says 1 and 2
            answer = one if agree else "disagree"
        else:
            answer = answers.ask("person", first, second, lambda: leave_at_q(person(first, second), score, specs))
        winner = specs[(answer == "2") != swapped] if answer in ("1", "2") else answer
        score[winner] += 1
    tell_score(score, specs)


def leave_at_q(answer, score, specs):
    if answer == "q":
        tell_score(score, specs)
        sys.exit(0)
    return answer


def tell_score(score, specs):
    a, b = score[specs[0]], score[specs[1]]
    print(f"\n{specs[0]}: {a} wins\n{specs[1]}: {b} wins\nties: {score['=']}\nanswers that changed with the order: {score['disagree']}")
    print(f"p: {binomial_p(a, b):.4f} (exact two-sided binomial, ties left out)")


def export(library, specs, args):
    """Write the shuffled pairs for any other judge, and apart from them the key."""
    texts = [library.stories(spec, args.n or PROMPTS) for spec in specs]
    out, key = [CRITERIA + "\n"], {}
    for number, (i, swapped) in enumerate(pairs(*texts, args.seed), 1):
        first, second = (texts[1][i], texts[0][i]) if swapped else (texts[0][i], texts[1][i])
        out.append(f"######## pair {number}\n\n#### A\n{first}\n\n#### B\n{second}\n")
        key[number] = {"A": specs[swapped], "B": specs[not swapped]}
    save(args.export, "\n".join(out).encode())
    save(f"{args.export}.key.json", json.dumps(key, indent=1).encode())
    print(f"{len(key)} pairs in {args.export}, which is which in {args.export}.key.json")


# ---- 5. Speed ------------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def bench(model, seed, seconds=5.0):
    """Bytes per second: the whole context computed again for each byte, one story at a time, against the cache, for 1 and for 40 stories."""
    def rate(step, stories_at_once):
        for _ in range(model.context + 20):  # warm up, and outgrow the context
            next(step)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(step)
            count += stories_at_once
        return count / (time.perf_counter() - began)

    def recomputing():
        generator, ids = torch.Generator().manual_seed(seed), torch.zeros(1, 1, dtype=torch.int64)
        while True:
            byte = choose(model(ids[:, -model.context :])[0][:, -1].cpu(), generator=generator)
            ids = torch.cat((ids, byte[:, None]), 1)
            yield

    naive = rate(recomputing(), 1)
    print(f"{naive:10,.0f} bytes/s  recomputing the context for each byte, one story")
    for n in (1, 40):
        fast = rate(generate(model, [b"Once upon a time"] * n, generator=torch.Generator().manual_seed(seed)), n)
        print(f"{fast:10,.0f} bytes/s  with the cache, {n} at once: {fast / naive:.0f} times as fast")


# ---- 6. The command ------------------------------------------------------------------------------------------------------------------

def write_story(model, prompt, args, generator, fusion, write):
    """Call write(str) with the prompt and then with each piece of its continuation as it comes, until END or --length bytes in all.

    Bytes are not characters: the decoder waits for the rest of a character of several bytes, and what is no UTF-8 becomes U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    show = lambda text: write(printable(text))
    show(decoder.decode(prompt))
    for count, (byte,) in enumerate(generate(model, [prompt], args.temperature, args.top_p, generator, fusion), len(prompt)):
        if byte == END or count >= args.length:
            break
        show(decoder.decode(bytes([byte])))
    show(decoder.decode(b"", final=True))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        usage="python sample.py [options]",
        description='Let a trained model tell stories, and find out whether they are good. A RUN is a folder of tiny.py, a folder with heads '
                    '("out+ngram+cache"), "ngram", "real", a text file of stories, or several of these with commas between.',
        epilog='example: python sample.py --prompt "One day, a cat" --n 3 --temperature 0.7')
    parser.add_argument("--out", default="out", metavar="DIR", help="the folder tiny.py saved the model in (default: %(default)s)")
    parser.add_argument("--prompt", default="Once upon a time", help="how each story begins (default: %(default)s)")
    parser.add_argument("--n", type=int, metavar="N", help="how many stories (default: 5), or pairs to judge (default: 40)")
    parser.add_argument("--length", type=int, default=2000, metavar="N", help="bytes after which a story is cut (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.45, metavar="T", help="below 1: safer, 0: always the likeliest (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest bytes with so much probability (default: all)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="cpu", metavar="NAME",
                        help="auto, cpu, cuda, mps (default: %(default)s)")
    parser.add_argument("--fuse", metavar="HEADS", help="mix in: ngram,knn,cache")
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="of the transformer and each head (default: learned)")
    parser.add_argument("--order", type=int, default=12, metavar="N", help="of the n-gram (default: %(default)s)")
    parser.add_argument("--score", action="store_true", help="instead: bits per byte of every head and of the mixture")
    parser.add_argument("--rubric", nargs="*", metavar="RUN", help="instead: what goes wrong in 40 stories of each run, counted")
    parser.add_argument("--judge", nargs=2, metavar="RUN", help="instead: compare two runs blind, here in the terminal")
    parser.add_argument("--judge-url", metavar="URL", help="... by a language model: https://.../v1, and JUDGE_MODEL, JUDGE_KEY set")
    parser.add_argument("--answers", default="answers.jsonl", metavar="FILE", help="where judgements are kept (default: %(default)s)")
    parser.add_argument("--export", metavar="FILE", help="with --judge: write the pairs to a file, and FILE.key.json")
    parser.add_argument("--bench", action="store_true", help="instead: measure the speed of sampling")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.n is not None and args.n < 1:
        raise Problem(f"--n {args.n}: give at least 1")
    if args.length < 1:
        raise Problem(f"--length {args.length}: give at least 1")
    if not 0 <= args.temperature <= 100:
        raise Problem(f"--temperature {args.temperature:g}: give 0 (no chance) to 100; 0.45 is usual")
    if not 0 < args.top_p <= 1:
        raise Problem(f"--top-p {args.top_p:g}: give a probability above 0, at most 1")
    if args.weights and not (min(args.weights) >= 0 and 0 < sum(args.weights) < math.inf):
        raise Problem("--weights: give numbers of 0 or more, not all 0")
    if args.score and not args.fuse:
        raise Problem("--score is about --fuse: add --fuse ngram,knn,cache")
    if not 1 <= args.order <= 255:
        raise Problem(f"--order {args.order}: give 1 to 255; 12 is usual")
    if (args.export or args.judge_url) and not args.judge:
        raise Problem("name the two runs: --judge RUN_A RUN_B")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    prepare_cpu()
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?" instead of stopping the story
    library = Library(args)
    if args.rubric is not None:
        return show_rubric(library, args.rubric)
    if args.judge:
        return (export if args.export else judge)(library, args.judge, args)
    model, _ = library.model(args.out)
    if args.bench:
        return bench(model, args.seed)
    fusion = library.fusion(args.out, tuple(args.fuse.split(","))) if args.fuse else None
    if args.score:
        return show_scores(fusion, library.text().valid)
    generator = torch.Generator().manual_seed(args.seed)
    prompt = args.prompt.encode("utf-8", "surrogateescape")  # a prompt in another encoding arrives as the bytes that were typed

    def write(text):
        sys.stdout.write(text)
        sys.stdout.flush()

    for i in range(args.n or 5):
        if i:
            print(f"\n{SEPARATOR.decode()}")
        write_story(model, prompt, args, generator, fusion, write)
    print()


if __name__ == "__main__":
    run(main)
