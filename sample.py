"""Read stories from a trained model, fuse it with simpler models, find out which stories are good.

By the end of this file you know how other models can be mixed in at the moment a model names the
next byte (shallow fusion), so that the bits per byte fall; why that can make the stories worse; and
how stories can be judged instead: by counting what goes wrong (a rubric), and by asking someone who
does not know which is whose (a blind judge). The commands:

    python sample.py --prompt "One day, a cat" --n 3      stories
    python sample.py --score --fuse ngram,knn,cache       bits per byte, alone and fused
    python sample.py --rubric out out+ngram+knn+cache     what fusion does to stories, in numbers
    python sample.py --judge out out+ngram+knn+cache      and in your own eyes, blind

A RUN is a folder that tiny.py wrote ("out"), the same with heads fused in ("out+ngram+knn+cache"),
the counting model alone ("ngram"), the validation stories ("real"), a text file of stories with
<|endoftext|> between them, or several of these with commas between.

Axes: B positions or stories side by side, T positions of a window, P earlier positions of it, C the
model's width, M entries of the datastore, k neighbors, 256 byte values.
"""
import argparse
import codecs
import hashlib
import http.client
import io
import json
import math
import os
import re
import sys
import time
import urllib.error
import urllib.request
from array import array
from collections import Counter
from functools import cache, cached_property, partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from data import END, Problem, printable, split_stories
from ngram import NGram, mixture_weights
from tiny import evaluation_windows, generate, load_checkpoint, pick_device, prepare_cpu
from tiny import write_stories


# ---- 1. Heads: several opinions about the next byte ----------------------------------------------

# Each head turns a Moment into a full distribution (B, 256) whose rows sum to 1, and so does any
# mixture of heads. (A head that only gave a number for the target could claim any figure.)

DATASTORE = 100_000  # bytes of the training text whose hidden states are kept
NEIGHBORS = 64  # entries of it that vote
KNN_TEMPERATURE = 8.0  # of squared distances; a hidden state has a squared length of C
CACHE_SCALE = 0.25  # of dot products


class Moment(NamedTuple):
    """All that a head may look at before it names the next byte."""
    net: torch.Tensor  # (B, 256) the transformer's probabilities
    hidden: torch.Tensor  # (B, C) the hidden state they were computed from
    past: torch.Tensor  # (B, P, C) the hidden states at earlier bytes of the context
    followed: torch.Tensor  # (B, P) int64, the byte that followed each of those, -1 for none
    tail: np.ndarray  # (B, t) uint8, the last t bytes of the text, END before its beginning


def net_head(moment):
    """What the transformer says."""
    return moment.net


def ngram_head(moment, ngram):
    """What followed the last bytes in the training text (ngram.py)."""
    B, t = moment.tail.shape
    text = np.pad(moment.tail, ((0, 0), (0, 1)), constant_values=END)  # (B, t + 1)
    last = (t + 1) * np.arange(B) + t  # asks about the END: no context reaches back across one
    return torch.from_numpy(ngram.probs(text.ravel(), last))


def knn_head(moment, keys, values):
    """What followed the most similar moments of the training text (Khandelwal et al. 2020).

    keys (M, C), values (M,) the bytes that followed. Similar means near in hidden state. The search
    is exact, one matrix product: |a - b|^2 = |a|^2 - 2ab + |b|^2, and |a|^2, the same for all
    entries, changes neither their order nor their shares.
    """
    distance = torch.addmm(keys.square().sum(1), moment.hidden, keys.T, alpha=-2)  # (B, M)
    near, index = distance.topk(min(NEIGHBORS, len(keys)), largest=False)  # (B, k)
    return vote(F.softmax(-near / KNN_TEMPERATURE, -1), values[index])


def cache_head(moment):
    """What followed the most similar moments of this very story (Grave et al. 2017).

    Words that the story already has become likelier.
    """
    if moment.past.shape[1] == 0:
        return torch.full_like(moment.net, 1 / 256)
    known = moment.followed >= 0  # (B, P)
    score = CACHE_SCALE * torch.einsum("bc,bpc->bp", moment.hidden, moment.past)
    share = F.softmax(score.masked_fill(~known, -1e9), -1)
    return vote(share * known, moment.followed.clamp(min=0))


def vote(share, byte):
    """Give each byte the shares of those who name it. share, byte (B, k) -> (B, 256)

    All bytes alike get 1 %, or all that was not given away: nothing is impossible.
    """
    p = torch.zeros(len(share), 256)
    p.scatter_add_(1, byte, 0.99 * share)
    return p + (1 - p.sum(1, keepdim=True)) / 256


# ---- 2. Fusion: one mixture of all heads ---------------------------------------------------------

class Fusion:
    """Shallow fusion: p = sum of weight x head. Made for one model; tiny.generate calls it.

    Each head knows something that the others do not, so the mixture needs fewer bits. Why, then,
    are its stories worse at temperature 0.8 (at 0.45 they are not)? Our reading: each head adds a
    little probability to bytes that do not fit this story, above all the n-gram, which after a
    dozen bytes forgets whom it is about. In the mean over all bytes such tails hardly show. But in
    sampling, one of them turns up every few words, and the thread is lost. A low temperature cuts
    them off.
    """
    NAMES = ("ngram", "knn", "cache")
    pairs = ()

    def __init__(self, model, names, ngram=None, text=None):
        """names: of the heads beside the transformer. text: (n,) uint8, for the kNN datastore."""
        self.model = model
        self.tail = 1  # bytes of text that a head wants to see
        self.heads = {"transformer": net_head}
        if "ngram" in names:
            self.tail = ngram.order
            self.heads["ngram"] = partial(ngram_head, ngram=ngram)
        if "knn" in names:
            moments = [(moment.hidden, target) for moment, target in self.moments(text[:DATASTORE])]
            keys, values = map(torch.cat, zip(*moments))  # (M, C), (M,)
            self.heads["knn"] = partial(knn_head, keys=keys, values=values)
        if "cache" in names:
            self.heads["cache"] = cache_head
        self.weights = np.full(len(self.heads), 1 / len(self.heads))  # until `fit`

    def moments(self, text):
        """Read text, (n,) uint8, as tiny.evaluate does. Yields (Moment, target (B,)) till its end.

        Each byte is the target once. The B rows of a Moment share one window.
        """
        before = np.append(np.uint8(END), text)  # before[i] is the byte before text[i]
        for window in evaluation_windows(self.model, text, batch=1):
            ids, target, at, scored, logits, hidden = (tensor[0] for tensor in window)  # (T, ...)
            t = scored.nonzero()  # (B, 1)
            P = torch.arange(len(ids))
            begin = torch.where(ids == END, P, 0).cummax(0)[0]  # (T,) where each byte's story began
            visible = (P < t) & (P >= begin[t])  # (B, P): earlier, and in the same story
            followed = torch.where(visible, target, -1)
            last = at[scored].numpy()[:, None] - np.arange(self.tail)[::-1]  # (B, tail)
            tail = np.where(last < 0, END, before[last.clip(0)]).astype(np.uint8)
            past = hidden.expand(len(t), -1, -1)  # (B, P, C), without a copy
            net = F.softmax(logits[scored], -1)
            yield Moment(net, hidden[scored], past, followed, tail), target[scored]

    def distributions(self, moment):
        """What each head says. -> (heads, B, 256)"""
        return torch.stack([head(moment) for head in self.heads.values()])

    def target_probs(self, text, label):
        """The probability that each head gave to each byte of text. -> (n, heads) float64"""
        rows = []
        for moment, target in tqdm(self.moments(text), label, leave=False, disable=None):
            p = self.distributions(moment)
            rows.append(p[:, torch.arange(len(target)), target].T)  # (B, heads)
        return torch.cat(rows).double().numpy()

    def fit(self, text):
        """Learn the weights by expectation maximisation. text: neither trained on nor scored."""
        p = self.target_probs(text, "weights")
        self.weights = mixture_weights(p)
        self.pairs = [mixture_weights(p[:, [0, head]]) for head in range(1, p.shape[1])]
        return self

    def __call__(self, p, hidden, ids):
        """The mixture after each byte of tiny.generate: p (B, 256) -> (B, 256).

        hidden (B, T, C): the states of the bytes just fed; ids (B, t): all bytes so far.
        """
        hidden = hidden.cpu()
        if hidden.shape[1] == 1 and ids.shape[1] > 1:  # several: the beginning of a new context
            hidden = torch.cat((self.states, hidden), 1)
        self.states = hidden
        past = hidden[:, :-1]  # (B, P, C)
        followed = ids[:, ids.shape[1] - past.shape[1] :]  # (B, P)
        tail = F.pad(ids, (self.tail, 0), value=END)[:, -self.tail :].to(torch.uint8).numpy()
        heads = self.distributions(Moment(p, hidden[:, -1], past, followed, tail))
        return torch.einsum("h,hbv->bv", torch.from_numpy(self.weights).float(), heads)


def score_and_held(valid):
    """The validation bytes that are scored, and as many others to learn the weights on."""
    middle = min(300_000, len(valid) // 2)  # prompts come from the beginning, far from the others
    return valid[:middle][:100_000], valid[middle:][:100_000]


@torch.no_grad()
def context_gain(model, valid):
    """Bits per byte that a model makes of what lies further back than a sentence.

    For up to 400 stories: what bytes 400 to 500 cost after the first 300 bytes of *another* story,
    less what they cost after those of their own. The 100 bytes between are their own both times, so
    spelling and grammar are known: what counts is who and what the story is about. nan if the
    model sees fewer than 500 bytes, or fewer than two stories are that long.
    """
    stories = [story[:500] for story in split_stories(valid) if len(story) >= 500][:400]
    if model.context < 500 or len(stories) < 2:
        return math.nan
    own = torch.tensor([[END, *story] for story in stories])  # (stories, 501)
    other = torch.cat((own[:, :301].roll(1, 0), own[:, 301:]), 1)
    nats = {}
    for name, ids in (("own", own), ("other", other)):
        losses = []
        for batch in ids.split(16):
            logits, _ = model(batch[:, :-1])  # (B, 500, 256)
            logits = logits[:, 400:].cpu().transpose(1, 2)  # (B, 256, 100)
            losses.append(F.cross_entropy(logits, batch[:, 401:], reduction="none"))
        nats[name] = torch.cat(losses).mean().item()
    return (nats["other"] - nats["own"]) / math.log(2)


def show_scores(fusion, valid):
    """Bits per byte of each head, of the transformer with each other, and of the mixture."""
    scored, _ = score_and_held(valid)
    p = fusion.target_probs(scored, "scoring")
    names = list(fusion.heads)
    print(f"scored_bytes: {len(scored)}")
    for name, alone in zip(names, p.T):
        print(f"{name}_bpb: {-np.log2(alone).mean():.4f}")
    for name, head, weights in zip(names[1:], p.T[1:], fusion.pairs):
        pair = np.stack((p[:, 0], head), 1) @ weights
        cost = -np.log2(pair).mean()
        print(f"transformer_and_{name}_bpb: {cost:.4f} (weights {weights.round(3)})")
    if len(names) > 1:
        print(f"fused_bpb: {-np.log2(p @ fusion.weights).mean():.4f}")
        print(f"weights: {fusion.weights.round(3)}")
    print(f"context_gain: {context_gain(fusion.model, valid):.4f}")


# ---- 3. Stories of a run -------------------------------------------------------------------------

STORIES = 40  # of each run
LENGTH = 650  # bytes of each that are looked at
SHORTEST = 200  # bytes of a validation story that lends its beginning as a prompt
PROMPT = 60  # bytes that a prompt has at most


class Library:
    """Texts, models and stories, each read or made once, when it is first asked for."""

    def __init__(self, args):
        self.args = args

    @cache
    def model(self, out):
        """-> (GPT, checkpoint)"""
        return load_checkpoint(out, pick_device(self.args.device))

    @cached_property
    def text(self):
        """The text named with --data, otherwise that which the run in --out was trained on."""
        args = self.args
        if args.data or not os.path.exists(os.path.join(args.out, "model.pt")):
            return data.text_from(args)
        _, checkpoint = self.model(args.out)
        recipe = checkpoint["recipe"]
        if not checkpoint["made_here"]:  # a foreign file could name any file of this machine
            if recipe["data"]:
                raise Problem(f"the run in {args.out} was not made on this machine, so the texts "
                              "that it names are not opened; name its text with --data")
            return data.text_from(args)
        text = data.load(recipe["data"], recipe["valid"], recipe["megabytes"], recipe["cache"])
        if args.valid:
            text = text._replace(valid=data.read(args.valid, args.megabytes))
        return text

    @cached_property
    def ngram(self):
        """Counting anew takes seconds; kept as a file it would need more room than the model."""
        print("counting the n-gram model ...", file=sys.stderr, flush=True)
        return NGram().fit(self.text.train)

    @cache
    def fusion(self, out, names):
        """The run `out` with the heads `names`, a tuple, and the weights learned."""
        for name in names:
            if name not in Fusion.NAMES:
                raise Problem(f"there is no head {name!r}; the heads are {', '.join(Fusion.NAMES)}")
        model, _ = self.model(out)
        ngram = self.ngram if "ngram" in names else None
        _, held = score_and_held(self.text.valid)
        fusion = Fusion(model, names, ngram, self.text.train)
        return fusion.fit(held) if names else fusion

    @cache
    def prompts(self, n):
        """n beginnings of validation stories, and the stories. -> list of bytes, list of bytes"""
        real = [story for story in split_stories(self.text.valid) if len(story) > SHORTEST][:n]
        if not real:
            raise Problem(f"the validation text has no story of more than {SHORTEST} bytes to take "
                          f"a prompt from; put {data.SEPARATOR.decode()} between its stories, or "
                          "name another with --data and --valid")
        prompts = []
        for story in real:
            words = re.match(rb"(\s*\S+){1,5}", story)[0]
            # Where there are no spaces a word may be a page; it ends at a whole character.
            prompts.append(words[:PROMPT].decode("utf-8", "ignore").encode())
        return prompts, real

    @cache
    def stories(self, run, n=STORIES):
        """n stories of a RUN, from the same prompts as all runs', cut to LENGTH. -> list of str"""
        if "," in run:
            return [story for part in run.split(",") for story in self.stories(part, n)]
        if os.path.isfile(run):
            stories = split_stories(data.read([run]))[:n]
        elif run == "real":
            _, stories = self.prompts(n)
        else:
            prompts, _ = self.prompts(n)
            stories = self.generate(run, prompts)
        if not stories:
            raise Problem(f"{run} holds no stories; name another run")
        return [story[:LENGTH].decode("utf-8", "ignore") for story in stories]

    def generate(self, run, prompts):
        """-> list of bytes"""
        args = self.args
        if run == "ngram":
            bar = tqdm(prompts, run, disable=None)
            return [self.ngram.generate(prompt, LENGTH - len(prompt), args.temperature, seed)
                    for seed, prompt in enumerate(bar)]
        out, *heads = run.split("+")
        model, _ = self.model(out)
        fusion = self.fusion(out, tuple(heads)) if heads else None
        options = (args.temperature, args.top_p, args.seed, fusion)
        return write_stories(model, prompts, LENGTH, *options)


# ---- 4. The rubric: what goes wrong, counted -----------------------------------------------------

WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
TOKEN = re.compile(rf"{WORD.pattern}|[^\sA-Za-z]+")  # a word, or marks and digits
DETERMINERS = set("a an the his her their my your some".split())
FUNCTION_WORDS = set(
    "a an the and or but so to of in on at with for from by as is was were are be had has have did "
    "do does not that this it he she they you we i his her their my your our its him them who when "
    "then there up down out into over all very if because".split())


def words(text):
    """A text's words in lower case."""
    return WORD.findall(text.lower())


def grams(items, n):
    """All runs of n items in a row, as tuples."""
    return zip(*(islice(items, i, None) for i in range(n)))


class Reference:
    """What a training text says about its language: names, nouns, words doubled on purpose.

    By hand there are only the few function words above.
    """

    def __init__(self, text):
        """text: (n,) uint8"""
        total, inside, capital, after, before, twice = (Counter() for _ in range(6))
        hashes = array("q")  # 8 bytes each: there are as many as words
        for story in split_stories(text):
            story = story.decode("utf-8", "replace")
            hashes.extend(map(hash, grams(words(story), 8)))
            tokens = [".", *TOKEN.findall(story), "."]
            for last, token, following in grams(tokens, 3):
                word = token.lower()
                last = last.lower()
                following = following.lower()
                total[word] += 1
                twice[word] += word == last
                after[word] += last in DETERMINERS
                before[word] += following in FUNCTION_WORDS or not following[0].isalpha()
                if last[-1].isalpha() or last == ",":  # here only names are capitalised
                    inside[word] += 1
                    capital[word] += token[0].isupper()
        self.grams = np.unique(hashes)  # sorted
        self.style = {word for word, count in twice.items() if count >= 5}  # "very very", "bye bye"
        self.names = set()
        self.nouns = set()
        for word, count in total.items():
            if len(word) < 3 or not word.isalpha():
                continue
            if capital[word] >= 5 and capital[word] > 0.9 * inside[word]:
                self.names.add(word)
            if count >= 10 and after[word] > 0.25 * count and before[word] > 0.6 * count:
                self.nouns.add(word)
        self.nouns -= FUNCTION_WORDS

    def names_of(self, text):
        """The names in a text, in lower case."""
        capitalised = [word for word in WORD.findall(text) if word[0].isupper()]
        return {word.lower().removesuffix("'s") for word in capitalised} & self.names


def thirds(story):
    """The first and the last third of a text."""
    return story[: len(story) // 3], story[-(len(story) // 3) :]


def percent(part, whole):
    """None where there is no whole to have a part of."""
    if not whole:
        return None
    return 100 * part / whole


# Each row is a function (story, Reference) -> number, or None where the story gives no occasion.
# Its docstring says what it catches and what it cannot; --rubric prints it below the table.

def doubled(story, ref):
    """Words and marks written twice per 1,000 words. Catches `got got` and `,,`; not a thought
    that is said twice in other words."""
    pairs = re.findall(r"(?=\b([a-z]+) ([a-z]+)\b)", story.lower())
    twice = sum(a == b and a not in ref.style for a, b in pairs)
    marks = len(re.findall(r"[,;:]\s*[,.;:!?]", story))
    return 1000 * (twice + marks) / max(1, len(words(story)))


def quotes_close(story, ref):
    """Share of paragraphs with quotation marks where all of them close, %. Not who speaks. The
    last paragraph may have been cut off: left out."""
    marks = [line.count('"') for line in story.split("\n")[:-1] if '"' in line]
    return percent(sum(count % 2 == 0 for count in marks), len(marks))


def names_return(story, ref):
    """Share of the names in the first third that come back in the last, %. Catches forgotten
    heroes; not what they are doing there."""
    first, last = map(ref.names_of, thirds(story))
    return percent(len(first & last), len(first))


def nouns_return(story, ref):
    """The same for nouns ("kite", "cave"). Catches a plot that drifts off; not whether the kite is
    still broken."""
    first, last = (ref.nouns.intersection(words(third)) for third in thirds(story))
    return percent(len(first & last), len(first))


def same_word(story, ref):
    """Share of sentences that say a word twice which is no function word, %. Catches `the cat saw
    the cat`; real stories do it too, now and then."""
    sentences = [words(sentence) for sentence in re.split(r"[.!?\n]+", story)]
    sentences = [sentence for sentence in sentences if len(sentence) > 2]
    repeats = 0
    for sentence in sentences:
        content = [word for word in sentence if len(word) > 2 and word not in FUNCTION_WORDS]
        repeats += len(set(content)) < len(content)
    return percent(repeats, len(sentences))


def repeated_4(story, ref):
    """Share of word 4-grams that the story has had before, %. Catches refrains and loops; real
    stories have some, on purpose."""
    found = list(grams(words(story), 4))
    return percent(len(found) - len(set(found)), len(found))


def copied_8(story, ref):
    """Share of word 8-grams that stand in the training text word for word, %. Catches recitation,
    if far above real stories' share; not a plot retold in other words."""
    found = [hash(gram) for gram in grams(words(story), 8)]
    begin = np.searchsorted(ref.grams, found)
    end = np.searchsorted(ref.grams, found, side="right")
    return percent((end > begin).sum(), len(found))


def ends(story, ref):
    """Share of stories that end by themselves before the cut, %. Not whether the end is one."""
    return 100.0 * (len(story.encode()) < LENGTH - 3)  # the cut may spare up to 3 bytes


ROWS = {doubled: "less", quotes_close: "more", names_return: "more", nouns_return: "more",
        same_word: "as real", repeated_4: "as real", copied_8: "as real", ends: "as real"}


def rubric(stories, ref):
    """-> {name of row: (mean, standard error)} over a list of stories, nan where none counted."""
    table = {}
    for row in ROWS:
        values = [row(story, ref) for story in stories]
        values = np.array([value for value in values if value is not None] or [math.nan])
        table[row.__name__] = values.mean(), values.std() / len(values) ** 0.5
    return table


def shuffled(stories):
    """A control, fluent but without a thread: sentence i of story s comes from story s + i."""
    sentences = [re.findall(r"[^.!?]+[.!?]+[\"']?\s*", story) or [story] for story in stories]
    mixed = []
    for s, own in enumerate(sentences):
        story = ""
        for i in range(len(own)):
            other = sentences[(s + i) % len(sentences)]
            story += other[i % len(other)]
        mixed.append(story)
    return mixed


def show_rubric(library, runs):
    ref = Reference(library.text.train)
    real = library.stories("real")
    columns = {"real": real, "shuffled": shuffled(real)}
    for run in ("ngram", *runs):
        columns[run] = library.stories(run)
    tables = [rubric(stories, ref) for stories in columns.values()]
    print(f"{len(real)} stories each, cut to {LENGTH} bytes, temperature "
          f"{library.args.temperature:g}; mean ± standard error\n")
    print("| row | better | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for row, better in ROWS.items():
        cells = ["{:.1f} ± {:.1f}".format(*table[row.__name__]) for table in tables]
        print(f"| {row.__name__} | {better} | " + " | ".join(cells) + " |")
    print("\nWhat the rows catch, and what they cannot:")
    for row in ROWS:
        print(f"  {row.__name__}: {' '.join(row.__doc__.split())}")


# ---- 5. The judge: somebody who does not know which story is whose -------------------------------

CRITERIA = (
    "Compare two short stories for small children. Judge grammar, creativity, consistency (do "
    "persons and things stay who and what they are?) and plot (does one thing lead to the next, is "
    "there a problem and an ending?). A story may be cut off at its end: do not mind.")
QUESTION = "Which is better? End with one line: ANSWER: 1, ANSWER: 2 or ANSWER: ="
VERDICT = re.compile(r"answer\W*?:\W*?(?:story\W*)?([12=])", re.IGNORECASE)  # or **ANSWER:** 1
ANSWERS = "answers.jsonl"


class NoAnswer(Exception):
    """The judge did not answer this time. Its message says why."""


def blind_pairs(library, runs, args):
    """Stories from the same prompt side by side, shuffled, which comes first left to chance.

    -> list of (first story, second story, swapped); swapped: the first is that of runs[1].
    """
    left, right = (library.stories(run, args.n or STORIES) for run in runs)
    rng = np.random.default_rng(args.seed)
    pairs = []
    for i in rng.permutation(min(len(left), len(right))):
        swapped = bool(rng.integers(2))
        pairs.append((right[i], left[i], True) if swapped else (left[i], right[i], False))
    return pairs


def sign_test(wins, losses):
    """Two-sided exact p-value: how often a fair coin falls at least as unevenly as this."""
    n = wins + losses
    rare = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * rare / 2**n)


class Answers:
    """Verdicts on disk, one JSON object a line, written as they come: whoever was interrupted goes
    on, and no answer is paid for twice."""

    def __init__(self, path):
        self.path = path
        self.known = {}
        if os.path.exists(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        row = json.loads(line)
                        self.known[row["id"]] = row["answer"]
                    except (ValueError, KeyError, TypeError):
                        pass  # the last line of a run that was killed

    def ask(self, judge, question, first, second):
        """The answer on disk to this pair in this order, otherwise question(first, second)."""
        pair = hashlib.sha256("\0".join((judge, first, second)).encode()).hexdigest()
        if pair not in self.known:
            answer = question(first, second)
            if answer == "q":
                return answer
            self.known[pair] = answer
            row = json.dumps({"id": pair, "judge": judge, "answer": answer})
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write("\n" + row)  # a line break first: a killed run may have left none
            except OSError as error:
                raise Problem(f"cannot write {self.path}: {error.strerror}; "
                              "start from a folder you can write to") from None
        return self.known[pair]


def person(first, second):
    """Show two stories, read a key. -> "1", "2", "=" or "q" """
    print(f"\n{' 1 ':=^64}\n{printable(first)}\n{' 2 ':=^64}\n{printable(second)}\n{'=' * 64}")
    while True:
        try:
            answer = input("Which is better? 1, 2, = (as good), q (stop, go on later): ").strip()
        except EOFError:
            return "q"
        if answer in ("1", "2", "=", "q"):
            return answer


def chat(url, key, model, content):
    """Send one message to an OpenAI-compatible endpoint. -> HTTP status, body of the answer"""
    message = {"role": "user", "content": content}
    body = json.dumps({"model": model, "temperature": 0, "messages": [message]}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers)
    if key:  # for this host alone: a redirect to another does not take it along
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        reply = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        reply = error  # that is an answer too
    with reply:
        return reply.status, reply.read().decode("utf-8", "replace")


def language_model(first, second, url, key, model):
    """A language model's verdict: "1", "2" or "=". Raises NoAnswer when all tries were in vain."""
    content = f"{CRITERIA}\n\nStory 1:\n{first}\n\nStory 2:\n{second}\n\n{QUESTION}"
    reason = "the request cannot be sent; check the address and JUDGE_KEY"
    for wait in (1, 4, 16, 60, 0):  # seconds before the next try
        try:
            status, body = chat(url, key, model, content)
            reason = f"HTTP {status} {body[:300]}"  # the server's own words
            if 400 <= status < 500 and status not in (408, 429):
                break  # it would say the same again
            found = VERDICT.findall(json.loads(body)["choices"][0]["message"]["content"])
            if found:
                return found[-1]
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", type(error).__name__))
        except (ValueError, LookupError, TypeError):
            pass  # no JSON, not of this form, or no text in it
        time.sleep(wait)
    if key:
        reason = reason.replace(key, "JUDGE_KEY")
    raise NoAnswer(printable(" ".join(reason.split())))


def in_both_orders(ask, first, second):
    """Such judges prefer what they read first: an answer counts if it survives the exchange."""
    answer = ask(first, second)
    exchanged = ask(second, first)
    if exchanged == {"1": "2", "2": "1", "=": "="}[answer]:
        return answer
    return "changed"


def judge(library, runs, args):
    """Ask for each pair, count the answers."""
    ask = partial(Answers(ANSWERS).ask, "person", person)
    if args.judge_url:
        model = os.environ.get("JUDGE_MODEL", "default")
        key = os.environ.get("JUDGE_KEY", "").strip()
        question = partial(language_model, url=args.judge_url, key=key, model=model)
        ask = partial(in_both_orders, partial(Answers(ANSWERS).ask, model, question))
    pairs = blind_pairs(library, runs, args)
    score = Counter()
    silent = 0  # pairs without an answer, one after the other
    for first, second, swapped in tqdm(pairs, disable=None if args.judge_url else True):
        try:
            answer = ask(first, second)
            silent = 0
        except NoAnswer as error:
            answer = "none"
            silent += 1
            if silent == min(3, len(pairs)):
                raise Problem(f"--judge-url: no answer to {silent} pairs in a row ({error}); run "
                              "again later, the answers so far are kept") from None
        if answer == "q":
            break
        if answer in ("1", "2"):
            answer = int((answer == "2") != swapped)  # which of the runs
        score[answer] += 1
    print(f"\n{runs[0]}: {score[0]} wins\n{runs[1]}: {score[1]} wins\nties: {score['=']}")
    print(f"answers that changed with the order: {score['changed']}")
    print(f"pairs without an answer: {score['none']}")
    print(f"p: {sign_test(score[0], score[1]):.4f} (exact sign test, two-sided, without ties)")


def export(library, runs, args):
    """Write the shuffled pairs for any other judge, and apart from them the key."""
    text = [CRITERIA]
    key = {}
    for number, (first, second, swapped) in enumerate(blind_pairs(library, runs, args), 1):
        text.append(f"######## pair {number}\n\n#### A\n{printable(first)}")
        text.append(f"#### B\n{printable(second)}")
        key[number] = {"A": runs[swapped], "B": runs[not swapped]}
    data.save(args.export, "\n\n".join(text).encode() + b"\n")
    data.save(f"{args.export}.key.json", json.dumps(key, indent=1).encode())
    print(f"{len(key)} pairs in {args.export}, which is which in {args.export}.key.json")


# ---- 6. The command ------------------------------------------------------------------------------

def tell(library, args):
    """Print --n stories, each byte as it comes, to END or to --length bytes after the prompt.

    Bytes are not characters: the decoder waits for the rest of a character of several bytes, and
    what is no UTF-8 becomes U+FFFD.
    """
    fusion = library.fusion(args.out, args.fuse) if args.fuse else None
    model, _ = library.model(args.out)
    # A prompt that is no UTF-8 arrives as the bytes that were typed.
    prompt = data.encode(args.prompt.encode("utf-8", "surrogateescape")).tobytes()
    prompt = prompt.lstrip(bytes([END]))  # `generate` begins each story with one
    generator = torch.Generator().manual_seed(args.seed)
    for i in range(args.n or 5):
        if i:
            print(f"\n{data.SEPARATOR.decode()}")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder = io.IncrementalNewlineDecoder(decoder, translate=True)  # \r\n in two steps
        shown = data.decode(np.frombuffer(prompt, np.uint8))
        print(printable(decoder.decode(shown)), end="")
        steps = generate(model, [prompt], args.temperature, args.top_p, generator, fusion)
        for (byte,) in islice(steps, args.length):
            if byte == END:
                break
            print(printable(decoder.decode(bytes([byte]))), end="", flush=True)
        print(decoder.decode(b"", final=True), end="")
    print()


def split_at_commas(text):
    return tuple(filter(None, text.split(",")))


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        usage="python sample.py [options]", allow_abbrev=False,
        description='Let a trained model write stories, and find out whether they are good. A RUN '
                    'is a folder of tiny.py, a folder with heads ("out+ngram+cache"), "ngram", '
                    '"real", a text file of stories, or several of these with commas between.',
        epilog='example: python sample.py --prompt "One day, a cat" --n 3 --temperature 0.7')
    add = parser.add_argument
    number = data.number
    add("--out", default="out", metavar="DIR", help="folder of the model (default: %(default)s)")
    add("--prompt", default="Once upon a time", help="of each story (default: %(default)s)")
    add("--n", type=number(int, 1), metavar="N", help="stories (default: 5) or pairs (default: 40)")
    add("--length", type=number(int, 1), default=2000, metavar="N",
        help="bytes after the prompt at which a story is cut (default: %(default)s)")
    add("--temperature", type=number(float, 0, 100), default=0.45, metavar="T",
        help="below 1: safer, 0: always the likeliest byte (default: %(default)s)")
    add("--top-p", type=number(float, 0, 1, above=True), default=1.0, metavar="P",
        help="draw from the likeliest bytes that have this probability together (default: all)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=1, metavar="N",
        help="of the random draws (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="cpu", metavar="NAME",
        help="auto, cpu, cuda, mps (default: %(default)s)")
    add("--fuse", type=split_at_commas, default=(), metavar="HEADS",
        help="mix in other heads: ngram,knn,cache")
    add("--score", action="store_true", help="instead: bits per byte, context gain")
    add("--rubric", nargs="*", metavar="RUN", help="instead: what goes wrong in 40 stories of each")
    add("--judge", nargs=2, metavar="RUN", help="instead: compare two runs blind, here")
    add("--judge-url", metavar="URL",
        help="... by a language model at https://.../v1; set JUDGE_MODEL and JUDGE_KEY")
    add("--export", metavar="FILE", help="... by others: pairs to FILE, the key to FILE.key.json")
    data.add_arguments(parser)
    args = parser.parse_args(argv)
    if (args.export or args.judge_url) and not args.judge:
        raise Problem("name the two runs: --judge RUN RUN")
    if args.judge_url and not re.match("https?://", args.judge_url):
        raise Problem(f"--judge-url {args.judge_url}: give an address such as https://host/v1")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    prepare_cpu()
    library = Library(args)
    if args.rubric is not None:
        show_rubric(library, args.rubric)
    elif args.export:
        export(library, args.judge, args)
    elif args.judge:
        judge(library, args.judge, args)
    elif args.score:
        show_scores(library.fusion(args.out, args.fuse), library.text.valid)
    else:
        tell(library, args)


if __name__ == "__main__":
    data.run(main)
