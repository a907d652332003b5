"""Read stories from a trained model, fuse it with simpler models, find out which stories are good.

By the end of section 3 you know how other models can be mixed in when the next byte is predicted
(fusion), so that the bits per byte fall, and how stories can be evaluated instead, by counting what
goes wrong (a rubric). Section 5 asks someone who does not know which model wrote which story (a
blind judge). The commands:

    python sample.py --prompt "One day, a cat" --n 3      stories
    python sample.py --score --fuse ngram,knn,cache       bits per byte, alone and fused
    python sample.py --rubric out out+ngram+knn+cache     what goes wrong in stories, in numbers
    python sample.py --judge out out+ngram+knn+cache      which stories you prefer, blind

A RUN is a folder that tiny.py wrote ("out"), the same with heads fused in ("out+ngram+knn+cache"),
the counting model alone ("ngram"), the validation stories ("real"), or a text file of stories with
<|endoftext|> between them.

Axes: B positions or stories side by side, T positions of a window, P earlier positions of it, C the
model's width, R recent bytes of the text, M entries of the datastore, k neighbors, 256 byte values.
"""
import argparse
import codecs
import contextlib
import functools
import hashlib
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
import zlib
from array import array
from collections import Counter
from itertools import islice
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import data
from data import END, Problem, notice, printable, split_stories
from ngram import NGram, mixture_weights
from tiny import TEMPERATURE, continuation, evaluation_windows, load_checkpoint, pick_device
from tiny import prepare_cpu, trusted_recipe, write_story

import torch  # after tiny, which says how its threads wait
import torch.nn.functional as F


# ---- 1. Heads: several opinions about the next byte ----------------------------------------------

# A head (not an attention head) turns a Moment into a full distribution, (B, 256), rows sum to 1.

DATASTORE = 100_000  # bytes of the training text whose states are kept
NEIGHBORS = 64  # entries of it that vote
KNN_TEMPERATURE = 8.0  # of squared distances; a state has a squared length of C
CACHE_SCALE = 0.25  # of dot products


class Moment(NamedTuple):
    """All that a head may look at before it predicts the next byte."""
    transformer: torch.Tensor  # (B, 256) the transformer's probabilities
    state: torch.Tensor  # (B, C) the state that they were computed from
    past: torch.Tensor  # (B, P, C) the states at bytes of the context, of which `followed` says
    followed: torch.Tensor  # (B, P) int64, the byte after each, or -1 if it may not be seen
    recent: np.ndarray  # (B, R) uint8, the last R bytes of the text, END before its beginning


def transformer_head(moment):
    """What the transformer predicts."""
    return moment.transformer


def ngram_head(moment, ngram):
    """What followed the recent bytes in the training text (ngram.py)."""
    B, R = moment.recent.shape
    # All rows become one text, in which an END (|) after each keeps them apart, and is what is
    # asked about. With R = 2, B = 2: a b | c d |, positions 2 and 5.
    text = np.pad(moment.recent, ((0, 0), (0, 1)), constant_values=END)  # (B, R + 1)
    positions = R + (R + 1) * np.arange(B)
    return torch.from_numpy(ngram.probs(text.ravel(), positions))


def knn_head(moment, keys, values):
    """What followed the most similar moments of the training text (Khandelwal et al. 2020).

    keys (M, C), values (M,) int64, the bytes that followed. Similar means near in state. The search
    is exact, one matrix product: for a state a and a key b, |a - b|^2 = |a|^2 - 2ab + |b|^2, and
    |a|^2, the same for all keys, changes neither their order nor their shares.
    """
    distance = torch.addmm(keys.square().sum(1), moment.state, keys.T, alpha=-2)  # (B, M)
    near, index = distance.topk(min(NEIGHBORS, len(keys)), largest=False)  # (B, k)
    return vote(F.softmax(-near / KNN_TEMPERATURE, -1), values[index])


def cache_head(moment):
    """What followed the most similar moments of this very story (Grave et al. 2017)."""
    known = moment.followed >= 0  # (B, P)
    score = CACHE_SCALE * torch.einsum("bc,bpc->bp", moment.state, moment.past)
    share = F.softmax(score.masked_fill(~known, -1e9), -1)
    return vote(share * known, moment.followed.clamp(min=0))


def vote(share, byte):
    """Give each byte the shares of those who name it. share, byte (B, k) -> (B, 256)

    1 %, and whatever was not given away, is spread over all bytes: nothing is impossible.
    """
    p = share.new_zeros(len(share), 256)
    p.scatter_add_(1, byte, 0.99 * share)
    return p + (1 - p.sum(1, keepdim=True)) / 256


# ---- 2. Fusion: one mixture of all heads ---------------------------------------------------------

class Fusion:
    """p = the sum of weight x head. Made for one model; tiny.generate calls it for each byte.

    (Shallow fusion usually adds logarithms; this is linear interpolation of probabilities.)

    Each head knows something that the others do not, so the mixture needs fewer bits. The plain
    transformer's sentences get better then, but its stories lose their thread (README). Our
    reading: about two thirds of the mixture are the n-gram. It knows better which letters come
    next, and that is most of the bits. After a dozen bytes it no longer knows whom the story is
    about, but that costs few bits.
    """
    NAMES = ("ngram", "knn", "cache")

    def __init__(self, model, names, ngram=None, text=None):
        """names: of the heads beside the transformer, some of NAMES. ngram, an NGram, and text,
        (n,) uint8, for the kNN datastore: for the heads that need them."""
        self.model = model
        self.reach = 1  # R, how many recent bytes a head wants to see
        self.heads = {"transformer": transformer_head}
        if "ngram" in names:
            self.reach = ngram.order
            self.heads["ngram"] = functools.partial(ngram_head, ngram=ngram)
        if "knn" in names:
            entries = [(moment.state, target) for moment, target in self.moments(text[:DATASTORE])]
            keys, values = map(torch.cat, zip(*entries))  # (M, C), (M,)
            self.heads["knn"] = functools.partial(knn_head, keys=keys, values=values)
        if "cache" in names:
            self.heads["cache"] = cache_head
        self.weights = np.full(len(self.heads), 1 / len(self.heads))  # until `fit`

    def moments(self, text):
        """Read text, (n,) uint8, as tiny.evaluate does. Yields (Moment, target (B,)) till its end.

        Each byte is the target once. A Moment has a row for each scored position of one window. In
        this example the second half of a window is scored, and | stands for END:

            position   0  1  2  3  4  5
            ids        a  b  |  c  d  e
            target     b  |  c  d  e  f
            followed  -1 -1  c  d -1 -1   in the row of position 4, whose target is e
            recent           |  c  d      in the same row, if R is 3
        """
        padded = np.concatenate((np.full(self.reach, END, np.uint8), text))
        recent = np.lib.stride_tricks.sliding_window_view(padded, self.reach)  # [i]: before text[i]
        for window in evaluation_windows(self.model, text, batch=1):
            ids, target, at, scored, logits, states = (tensor[0] for tensor in window)  # (T, ...)
            position = torch.arange(len(ids))
            begin = torch.where(ids == END, position, 0).cummax(0).values  # of the story there
            t = scored.nonzero()  # (B, 1)
            visible = (position < t) & (position >= begin[t])  # (B, P): earlier, in the same story
            yield Moment(
                transformer=F.softmax(logits[scored], -1),
                state=states[scored],
                past=states.expand(len(t), -1, -1),  # the whole window, masked by `followed`
                followed=torch.where(visible, target, -1),
                recent=recent[at[scored].numpy()],
            ), target[scored]

    def distributions(self, moment):
        """What each head predicts. -> (heads, B, 256)"""
        return torch.stack([head(moment) for head in self.heads.values()])

    def target_probs(self, text, label):
        """The probability that each head gave to each byte of text. -> (n, heads) float64"""
        rows = []
        for moment, target in tqdm(self.moments(text), label, leave=False, disable=None):
            p = self.distributions(moment)
            rows.append(p[:, torch.arange(len(target)), target].T)  # (B, heads)
        return torch.cat(rows).double().numpy()

    def fit(self, text):
        """Learn the weights on text that is neither trained on nor scored (mixture_weights)."""
        self.weights = mixture_weights(self.target_probs(text, "weights"))
        return self

    def __call__(self, p, states, ids):
        """The mixture after each byte of tiny.generate: p (B, 256) -> (B, 256).

        states (B, P + 1, C): of the bytes in the context; ids (B, n): all bytes so far. It makes
        the same Moment as `moments`, of the last position alone.
        """
        states = states.cpu()
        past = states[:, :-1]  # (B, P, C)
        ended = (ids == END).flip(1).cumsum(1).flip(1)  # (B, n) how many END come there or later
        followed = ids.masked_fill(ended > 0, -1)[:, ids.shape[1] - past.shape[1] :]  # (B, P)
        recent = F.pad(ids, (self.reach, 0), value=END)[:, -self.reach :].to(torch.uint8).numpy()
        heads = self.distributions(Moment(p, states[:, -1], past, followed, recent))
        return torch.einsum("h,hbv->bv", torch.from_numpy(self.weights).float(), heads)


def split_validation(valid):
    """-> the validation bytes that are scored, and as many others to learn the weights on: from
    the middle or after 300 kB, since the prompts are taken from the first stories"""
    middle = min(300_000, len(valid) // 2)
    return valid[:middle][:100_000], valid[middle:][:100_000]


@torch.no_grad()
def context_gain(model, valid):
    """Bits per byte that a model saves by knowing what stands more than 100 bytes back.

    For up to 400 stories: what bytes 400 to 500 cost after the first 300 bytes of *another* story,
    less what they cost after those of their own. The 100 bytes between are their own both times, so
    spelling and grammar are known: what counts is who and what the story is about. A model whose
    context is shorter than 500 bytes gets the last ones. nan if it is shorter than 100, or fewer
    than two stories have 500 bytes.
    """
    stories = [story[:500] for story in split_stories(valid) if len(story) >= 500][:400]
    if model.context < 100 or len(stories) < 2:
        return math.nan
    own = torch.tensor([[END, *story] for story in stories])  # (stories, 501)
    other = torch.cat((own[:, :301].roll(1, 0), own[:, 301:]), 1)
    gain = 0.0
    for sign, ids in ((1, other), (-1, own)):
        for batch in ids.split(16):
            logits, _ = model(batch[:, :-1][:, -model.context :])
            logits = logits[:, -100:].cpu().flatten(0, 1)  # (B * 100, 256)
            nats = F.cross_entropy(logits, batch[:, 401:].flatten(), reduction="sum").item()
            gain += sign * nats / math.log(2)
    return gain / (100 * len(stories))


# ---- 3. The rubric: what goes wrong, counted -----------------------------------------------------
# Stories of different models are compared from the same prompts: the first five words of the same
# validation stories. What goes wrong in them can be counted, row by row.

LENGTH = 650  # bytes of a story that are looked at

WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
TOKEN = re.compile(rf"{WORD.pattern}|[^\sA-Za-z]+")  # a word, or marks and digits


def words(text):
    """A text's words in lower case."""
    return WORD.findall(text.lower())


def grams(items, n):
    """All n items in a row, as tuples."""
    return zip(*(islice(items, i, None) for i in range(n)))


class Reference:
    """What a training text says of its language. names: words that are nearly always capitalised;
    style: words that are doubled on purpose; grams: its word 8-grams, as hashes."""

    def __init__(self, text):
        """text: (n,) uint8"""
        inside = Counter()  # words inside a sentence, where only names are capitalised
        capitalised = Counter()
        twice = Counter()
        hashes = array("q")  # 8 bytes each: there are as many as words
        for story in split_stories(text):
            story = story.decode("utf-8", "replace")
            hashes.extend(map(hash, grams(words(story), 8)))
            for previous, token in grams(TOKEN.findall(story), 2):
                word = token.lower()
                twice[word] += word == previous.lower()
                if previous[-1].isalpha() or previous == ",":
                    inside[word] += 1
                    capitalised[word] += token[0].isupper()
        self.grams = np.unique(hashes)  # sorted
        self.style = {word for word, count in twice.items() if count >= 5}  # "very very", "bye bye"
        self.names = set()
        for word, count in capitalised.items():
            if word.isalpha() and len(word) >= 3 and count >= 5 and count > 0.9 * inside[word]:
                self.names.add(word)

    def names_of(self, text):
        """The names in a text, in lower case."""
        found = [word for word in WORD.findall(text) if word[0].isupper()]
        return {word.lower().removesuffix("'s") for word in found} & self.names


def percent(part, whole):
    """None where there is no whole to have a part of."""
    if not whole:
        return None
    return 100 * part / whole


# Each row is a function (story, Reference) -> number, or None where the story gives no occasion.
# Its docstring says what it catches and what it cannot; --rubric prints it below the table.

def doubled(story, ref):
    """Words written twice and marks after a comma, per 1,000 words. Catches `got got` and `,,`; not
    a thought that is said twice in other words."""
    twice = sum(word not in ref.style for word in re.findall(r"\b([a-z]+)(?= \1\b)", story.lower()))
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
    third = len(story) // 3
    first = ref.names_of(story[:third])
    return percent(len(first & ref.names_of(story[-third:])), len(first))


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
    """Share of stories that end by themselves before the cut, %. Not whether the end is good."""
    return 100.0 * (len(story.encode()) < LENGTH - 3)  # the cut may drop up to 3 bytes more


ROWS = [  # and what is better
    (doubled, "less"), (quotes_close, "more"), (names_return, "more"),
    (repeated_4, "as real"), (copied_8, "as real"), (ends, "as real"),
]


def rubric(stories, ref):
    """-> {name of row: (mean, standard error)} over a list of stories, nan where none counted."""
    table = {}
    for row, _ in ROWS:
        values = [row(story, ref) for story in stories]
        values = np.array([value for value in values if value is not None] or [math.nan])
        error = math.nan
        if len(values) > 1:
            error = values.std(ddof=1) / len(values) ** 0.5
        table[row.__name__] = values.mean(), error
    return table


# ==================================================================================================
# You may stop reading here. What follows is what a program owes its users: the stories of a run, a
# blind judge that can be interrupted, be it a person or a language model, and the options.
# ==================================================================================================


# ---- 4. Stories of a run, and the tables ---------------------------------------------------------

STORIES = 40  # of each run, unless --n says otherwise
SHORTEST = 200  # bytes of a validation story that lends its beginning as a prompt
PROMPT_BYTES = 60  # that a prompt has at most


def folder_and_heads(run):
    """ "out+ngram+knn" -> "out", ["ngram", "knn"] """
    names = []
    while "+" in run and not os.path.isdir(run):
        run, _, name = run.rpartition("+")
        names.insert(0, name)
    return run, names


class Library:
    """Texts, models and stories. What takes long is read or made once, when it is first wanted."""

    def __init__(self, args):
        self.args = args

    @functools.cache
    def model(self, out):
        """-> (GPT, checkpoint)"""
        return load_checkpoint(out, pick_device(self.args.device))

    @functools.cache
    def text(self):
        """The text named with --data, otherwise that which the run in --out was trained on."""
        args = self.args
        if args.data:
            return data.text_from(args)
        _, checkpoint = self.model(args.out)
        recipe = trusted_recipe(args.out, checkpoint, args)  # a foreign one could name any file
        cache = recipe["cache"]
        if args.cache != "cache":
            cache = args.cache
        text = data.load(recipe["data"], recipe["valid"], recipe["megabytes"], cache)
        if args.valid:
            text = text._replace(valid=data.read(args.valid, args.megabytes))
            data.warn_of_overlap(text.train, text.valid)
        return text

    @functools.cache
    def ngram(self):
        """Counting anew takes seconds; kept as a file it would need more room than the model."""
        notice("counting the n-gram model ...")
        return NGram().fit(self.text().train[:15_000_000])  # 0.7 GB; all of 100 MB would take 5

    def fusion(self, out, names):
        """The run `out` with the heads `names`, and the weights learned. -> Fusion"""
        for name in names:
            if name not in Fusion.NAMES:
                raise Problem(f"there is no head {name!r}; the heads are {', '.join(Fusion.NAMES)}")
        model, checkpoint = self.model(out)
        crc = zlib.crc32(self.text().train)
        if checkpoint["facts"].get("text_crc32", crc) != crc:
            notice(f"{out} was trained on another text, perhaps on what is scored here; name the "
                   "--data and --valid that it was trained with")
        if not names:
            return Fusion(model, names)
        ngram = None
        if "ngram" in names:
            ngram = self.ngram()
        _, held_out = split_validation(self.text().valid)
        return Fusion(model, names, ngram, self.text().train).fit(held_out)

    @functools.cache
    def prompts(self):
        """Beginnings of validation stories, and these stories. -> list of bytes, list of bytes"""
        real = [story for story in split_stories(self.text().valid) if len(story) > SHORTEST]
        real = real[: self.args.n or STORIES]
        if not real:
            raise Problem(f"the validation text has no story of more than {SHORTEST} bytes to take "
                          f"a prompt from; put {data.SEPARATOR.decode()} between its stories, or "
                          "name another with --data and --valid")
        if len(real) < (self.args.n or STORIES):
            notice(f"the validation text lends only {len(real)} prompts; put "
                   f"{data.SEPARATOR.decode()} between its stories, or name more with --valid")
        prompts = []
        for story in real:
            beginning = re.match(rb"(\s*\S+){1,5}", story)[0]
            # Where there are no spaces a word may be a page; it ends at a whole character.
            prompts.append(beginning[:PROMPT_BYTES].decode("utf-8", "ignore").encode())
        return prompts, real

    def stories(self, run):
        """Stories of a RUN, from the same prompts as all runs', cut to LENGTH. -> list of str"""
        args = self.args
        if os.path.exists(run) and not os.path.isdir(run):
            stories = split_stories(data.read([run]))[: args.n or STORIES]
        else:
            prompts, stories = self.prompts()
            if run == "ngram":
                ngram = self.ngram()
                stories = []
                for seed, prompt in enumerate(tqdm(prompts, run, disable=None)):
                    length = LENGTH - len(prompt)
                    stories.append(ngram.generate(prompt, length, args.temperature, seed))
            elif run != "real":
                out, names = folder_and_heads(run)
                fusion = self.fusion(out, names)
                # One generator for all: stories from the same prompt differ.
                generator = torch.Generator().manual_seed(args.seed)
                options = [args.temperature, args.top_p, args.candidates, generator]
                if names:
                    options.append(fusion)
                stories = []
                for prompt in tqdm(prompts, run, disable=None):
                    stories.append(write_story(fusion.model, prompt, LENGTH, *options))
        if not stories:
            raise Problem(f"{run} holds no stories; name another run")
        return [story[:LENGTH].decode("utf-8", "ignore") for story in stories]


def show_scores(fusion, valid):
    """Print the bits per byte of each head alone (transformer_bpb, ngram_bpb, ...) and of their
    mixture (fused_bpb), then the transformer's context gain."""
    scored, _ = split_validation(valid)
    p = fusion.target_probs(scored, "scoring")
    print(f"scored_bytes: {len(scored)}")
    for name, alone in zip(fusion.heads, p.T):
        print(f"{name}_bpb: {-np.log2(alone).mean():.4f}")
    if len(fusion.heads) > 1:
        print(f"fused_bpb: {-np.log2(p @ fusion.weights).mean():.4f}")
        print(f"weights: {fusion.weights.round(3)}")
    print(f"context_gain: {context_gain(fusion.model, valid):.4f}")


def show_rubric(library, runs):
    """Print the rubric of real stories, of the n-gram (fluent, without a thread), of the runs."""
    ref = Reference(library.text().train)
    columns = {run: library.stories(run) for run in ("real", "ngram", *runs)}
    tables = [rubric(stories, ref) for stories in columns.values()]
    print(f"cut to {LENGTH} bytes, temperature {library.args.temperature:g}; "
          "mean ± standard error\n")
    print("| row | better | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    print("| stories | | " + " | ".join(str(len(stories)) for stories in columns.values()) + " |")
    for row, better in ROWS:
        cells = ["{:.1f} ± {:.1f}".format(*table[row.__name__]) for table in tables]
        print(f"| {row.__name__} | {better} | " + " | ".join(cells) + " |")
    print("\nWhat the rows catch, and what they cannot:")
    for row, _ in ROWS:
        print(f"  {row.__name__}: {' '.join(row.__doc__.split())}")


# ---- 5. The judge: somebody who does not know which story is whose -------------------------------

CRITERIA = (
    "Compare two short stories for small children. Judge grammar, creativity, consistency (do "
    "persons and things stay who and what they are?) and plot (does one thing lead to the next, is "
    "there a problem and an ending?). A story may be cut off at its end: do not mind.")
QUESTION = (
    "Which is better? If they are equally good, the answer is =. End with a line that says ANSWER: "
    "and then only 1, 2 or =.")
VERDICT = re.compile(r"(?im)answer\W*?:\W*?(?:story\W*)?([12=])\W*$")  # or **ANSWER:** 1
ANSWERS = "answers.jsonl"


class NoAnswer(Exception):
    """The judge did not answer this time. Its message says why."""


def blind_pairs(library, runs, args):
    """Stories from the same prompt side by side, shuffled, which comes first left to chance.

    -> list of (first story, second story, order); order: which of the runs (0 or 1) each is from
    """
    stories = [library.stories(run) for run in runs]
    rng = np.random.default_rng(args.seed)
    pairs = []
    for i in rng.permutation(min(map(len, stories))):
        order = rng.permutation(2).tolist()
        pairs.append((stories[order[0]][i], stories[order[1]][i], order))
    return pairs


def sign_test(wins, losses):
    """Two-sided exact p-value: how often a fair coin falls at least as unevenly as this."""
    n = int(wins + losses)  # 2^n is too large for numpy's
    rare = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * rare / 2**n)


def read_answers():
    """The answers on disk, one JSON object a line. -> {id of a pair: answer}"""
    known = {}
    if os.path.exists(ANSWERS):
        with open(ANSWERS, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    row = json.loads(line)
                    if row["answer"] in ("1", "2", "="):
                        known[row["id"]] = row["answer"]
    return known


def ask_once(known, judge, question, first, second):
    """The known answer to this pair in this order, otherwise question(first, second), which is
    written down at once: whoever was interrupted goes on, and no answer is paid for twice."""
    asked = "\0".join((judge, CRITERIA, QUESTION, first, second))
    pair = hashlib.sha256(asked.encode()).hexdigest()
    if pair in known:
        return known[pair]
    answer = question(first, second)
    if answer != "q":
        known[pair] = answer
        row = json.dumps({"id": pair, "judge": judge, "answer": answer})
        try:
            with open(ANSWERS, "a", encoding="utf-8") as file:
                file.write("\n" + row)  # a line break first: a killed run may have left none
        except OSError as error:
            raise Problem(f"cannot write {ANSWERS}: {error.strerror}; free some space") from None
    return answer


def person(first, second):
    """Show two stories, read a key. -> "1", "2", "=" or "q" """
    print(f"\n{' 1 ':=^64}\n{printable(first)}\n{' 2 ':=^64}\n{printable(second)}\n{'=' * 64}")
    while True:
        try:
            answer = input("Which is better? 1, 2, = (as good), q (stop, go on later): ").strip()
        except (EOFError, RuntimeError, UnicodeError):  # stdin has ended, was closed, is no text
            return "q"
        if answer in ("1", "2", "=", "q"):
            return answer


def language_model(url, model, first, second):
    """The verdict, "1", "2" or "=", of a language model behind an OpenAI-compatible address.

    Raises NoAnswer when all tries were in vain.
    """
    key = os.environ.get("JUDGE_KEY", "").strip()
    content = f"{CRITERIA}\n\nStory 1:\n{first}\n\nStory 2:\n{second}\n\n{QUESTION}"
    message = {"role": "user", "content": content}
    body = json.dumps({"model": model, "messages": [message]}).encode()
    headers = {"Content-Type": "application/json"}
    reason = "the request cannot be sent; check the address and JUDGE_KEY"
    for wait in (1, 4, 16, 60, 0):  # seconds before the next try
        try:
            request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers)
            if key:  # for this host alone: a redirect to another does not take it along
                request.add_unredirected_header("Authorization", f"Bearer {key}")
            try:
                reply = urllib.request.urlopen(request, timeout=300)
            except urllib.error.HTTPError as error:
                reply = error  # that is a reply too
            with reply:
                text = reply.read(1_000_000).decode("utf-8", "replace")
            if key:
                text = text.replace(key, "JUDGE_KEY")
            shown = " ".join(text[:300].split())  # the server's own words, in one line
            reason = f"HTTP {reply.status} {shown}"
            if 400 <= reply.status < 500 and reply.status not in (408, 429):
                break  # it would say the same again
            found = VERDICT.findall(str(json.loads(text)["choices"][0]["message"]["content"]))
            if found:
                return found[-1]
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", type(error).__name__))
        except (ValueError, LookupError, TypeError, RecursionError):
            pass  # no JSON, or not of this form
        notice(f"no answer yet: {reason}")
        time.sleep(wait)
    raise NoAnswer(printable(reason))


def in_both_orders(ask, first, second):
    """Language models prefer what they read first: an answer counts if it survives the exchange."""
    answer = ask(first, second)
    exchanged = ask(second, first)
    if exchanged == {"1": "2", "2": "1", "=": "="}[answer]:
        return answer
    return "changed"


def judge(library, runs, args):
    """Ask for each pair, count the answers."""
    ask = functools.partial(ask_once, read_answers(), "person", person)
    if args.judge_url:
        model = os.environ.get("JUDGE_MODEL", "default")
        question = functools.partial(language_model, args.judge_url, model)
        who = f"{model} at {args.judge_url}"
        ask = functools.partial(ask_once, read_answers(), who, question)
        ask = functools.partial(in_both_orders, ask)
    pairs = blind_pairs(library, runs, args)
    score = Counter()
    silent = 0  # pairs in a row without an answer
    for first, second, order in tqdm(pairs, disable=None if args.judge_url else True):
        try:
            answer = ask(first, second)
            silent = 0
        except NoAnswer as error:
            answer = "none"
            silent += 1
            if silent == min(3, len(pairs)):
                raise Problem(f"--judge-url: no answer to {silent} pairs ({error}); run again "
                              "later, the answers so far are kept") from None
        if answer == "q":
            break
        if answer in ("1", "2"):
            answer = order[int(answer) - 1]  # which of the runs
        score[answer] += 1
    print(f"\n{runs[0]}: {score[0]} wins\n{runs[1]}: {score[1]} wins\nties: {score['=']}")
    print(f"answers that changed with the order: {score['changed']}")
    print(f"pairs without an answer: {score['none']}")
    print(f"p: {sign_test(score[0], score[1]):.4f} (exact sign test, two-sided, without ties)")


def export(library, runs, args):
    """Write the shuffled pairs for any other judge, and apart from them the key."""
    text = [CRITERIA]
    key = {}
    for number, (first, second, order) in enumerate(blind_pairs(library, runs, args), 1):
        text.append(f"######## pair {number}\n\n#### A\n{printable(first)}")
        text.append(f"#### B\n{printable(second)}")
        key[number] = {"A": runs[order[0]], "B": runs[order[1]]}
    data.save(args.export, "\n\n".join(text).encode() + b"\n")
    data.save(f"{args.export}.key.json", json.dumps(key, indent=1).encode())
    print(f"{len(key)} pairs in {args.export}, which is which in {args.export}.key.json")


# ---- 6. The command ------------------------------------------------------------------------------

def tell(library, args):
    """Print --n stories, each word as it comes, to END or to --length bytes after the prompt.

    Bytes are not characters: the decoder waits for the rest of a character of several bytes.
    """
    fusion = None
    if args.fuse:
        fusion = library.fusion(args.out, args.fuse)
    model, _ = library.model(args.out)
    # A prompt that is no UTF-8 arrives as the bytes that were typed.
    prompt = data.encode(args.prompt.encode("utf-8", "surrogateescape")).tobytes()
    prompt = prompt.lstrip(bytes([END]))  # `generate` begins each story with one
    generator = torch.Generator().manual_seed(args.seed)
    for i in range(args.n or 5):
        if i:
            print(f"\n{data.SEPARATOR.decode()}")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        shown = data.decode(np.frombuffer(prompt, np.uint8))
        print(printable(decoder.decode(shown)), end="")
        options = args.temperature, args.top_p, args.candidates, generator, fusion
        for word in continuation(model, prompt, args.length, *options):
            print(printable(decoder.decode(word)), end="", flush=True)
        print(decoder.decode(b"", final=True), end="")
    print()


def split_at_commas(text):
    return list(filter(None, text.replace(" ", "").split(",")))


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        usage="python sample.py [options]", allow_abbrev=False,
        description='Let a trained model write stories, and evaluate them. A RUN is a folder of '
                    'tiny.py, a folder with heads ("out+ngram+cache"), "ngram", "real" or a text '
                    'file of stories.',
        epilog='example: python sample.py --prompt "One day, a cat" --n 3 --temperature 0.7')
    add = parser.add_argument
    number = data.number
    add("--out", metavar="DIR", help="folder of the model (default: the first RUN's, or out)")
    add("--prompt", default="Once upon a time", help="of each story")
    add("--n", type=number(int, 1), metavar="N", help="stories (default: 5; of each RUN: 40)")
    add("--length", type=number(int, 1), default=2000, metavar="N",
        help="bytes of a story after the prompt (default: 2000)")
    add("--temperature", type=number(float, 0, 100), default=TEMPERATURE, metavar="T",
        help="below 1: safer, 0: always the likeliest byte (default: %(default)s)")
    add("--top-p", type=number(float, 0, 1, above=True), default=1.0, metavar="P",
        help="draw from the likeliest bytes that have this probability together (default: 1)")
    add("--candidates", type=number(int, 1, 1000), default=8, metavar="N",
        help="words of which one is chosen; 1: the temperature is each byte's (default: 8)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=1, metavar="N", help="(default: 1)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="cpu", metavar="NAME",
        help="auto, cpu, cuda, mps (default: cpu)")
    add("--fuse", type=split_at_commas, default=[], metavar="HEADS", help="of ngram,knn,cache")
    add("--score", action="store_true", help="instead: bits per byte, context gain")
    add("--rubric", nargs="*", metavar="RUN", help="instead: count what goes wrong in stories")
    add("--judge", nargs=2, metavar="RUN", help="instead: compare two runs blind, here")
    add("--judge-url", metavar="URL",
        help="... by a language model at https://.../v1; set JUDGE_MODEL and JUDGE_KEY")
    add("--export", metavar="FILE", help="... by others: pairs to FILE, the key to FILE.key.json")
    data.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.out is None:
        folders = [folder_and_heads(run)[0] for run in args.rubric or args.judge or []]
        args.out = next(filter(os.path.isdir, folders), "out")
    if args.export:
        for path in (args.export, f"{args.export}.key.json"):
            if os.path.exists(path):
                raise Problem(f"{path} is there already; give --export another name")
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
        show_scores(library.fusion(args.out, args.fuse), library.text().valid)
    else:
        tell(library, args)


if __name__ == "__main__":
    data.run(main)
