"""Read stories from a trained model, fuse it with simpler models, find out which stories are good.

You will know how other models are mixed in at generation (fusion), and how stories are judged: by
counting what goes wrong (a rubric), or by someone who does not know whose they are (a blind judge).

    python sample.py --prompt "One day, a cat" --n 3        stories
    python sample.py --score out+ngram+knn+cache            bits per byte, alone and fused
    python sample.py --rubric real out                      what goes wrong, in numbers
    python sample.py --judge out mine.txt                   pairs of stories for a blind judge
    python sample.py --tally answers.txt                    which run the judge preferred

A RUN is a folder of tiny.py ("out") or the same with heads fused in ("out+ngram+cache", told
byte by byte); to --rubric and --judge also the counting model ("ngram"), the validation
stories ("real"), or a file.

Axes: B positions side by side, P positions of a window, C the model's width, M entries of the
datastore, k neighbors."""
import argparse
import codecs
import functools
import itertools
import json
import math
import os
import re
import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import data
from data import END, Problem, notice, printable, split_stories
from ngram import NGram, mixture_weights
from tiny import TEMPERATURE, evaluation_windows, generate, load_checkpoint, prepare_cpu

import torch  # after tiny, which says how its threads wait
import torch.nn.functional as F


# ---- 1. Heads: other opinions about the next byte ------------------------------------------------
# A head (neither attention's nor GPT.head) turns a Moment into full distributions, (B, 256): rows
# sum to 1. `moments`, after the banner, yields Moments for all bytes of a text, B at a time.

COUNTED = 15_000_000  # bytes of the training text that the n-gram counts; this takes seconds
DATASTORE = 100_000  # bytes of the training text whose states are kept
NEIGHBORS = 64  # entries of it that vote
KNN_TEMPERATURE = 8.0  # of squared distances; a state has a squared length of C
CACHE_SCALE = 0.25  # of dot products

class Moment(NamedTuple):
    """All that a head may look at before it predicts the next byte, at B positions side by side.
    Say a window has P = 6 positions, and the B = 3 are its second half (| is an END):
        position   0  1  2  3  4  5
        ids        a  b  |  c  d  e
        target     b  |  c  d  e  f
        followed  -1 -1  c -1 -1 -1   for position 3, which predicts d
                  -1 -1  c  d -1 -1   for 4, which predicts e
                  -1 -1  c  d  e -1   for 5, which predicts f"""
    state: torch.Tensor  # (B, C) from which the transformer predicts it
    past: torch.Tensor  # (B, P, C) the states of the whole window
    followed: torch.Tensor  # (B, P) int64, what came after each; -1 if later, or in another story
    text: np.ndarray  # (n,) uint8, all of the text
    at: np.ndarray  # (B,) where the next byte stands in it: only what is before may be looked at


def ngram_head(moment, ngram):
    """What followed the last bytes in the training text (ngram.py)."""
    return torch.from_numpy(ngram.probs(moment.text, moment.at))


def knn_head(moment, keys, values):
    """What followed the most similar moments of the training text (Khandelwal et al. 2020).

    keys (M, C): states; values (M,) int64: the bytes that followed. Similar means near: for a state
    a and a key b, |a - b|^2 = |a|^2 - 2ab + |b|^2; softmax does not see |a|^2."""
    distance = keys.square().sum(1) - 2 * moment.state @ keys.T  # (B, M)
    near, index = distance.topk(min(NEIGHBORS, len(keys)), largest=False)  # (B, k)
    return vote(F.softmax(-near / KNN_TEMPERATURE, -1), values[index])


def cache_head(moment):
    """What followed the most similar moments of this very story (Grave et al. 2017)."""
    known = moment.followed >= 0  # (B, P)
    score = CACHE_SCALE * torch.einsum("bc,bpc->bp", moment.state, moment.past)
    share = F.softmax(score.masked_fill(~known, -1e9), -1)
    return vote(share * known, moment.followed.clamp(min=0))  # if none is known: nothing


def vote(share, byte):
    """Give each byte the shares of those who name it. share, byte (B, k) -> (B, 256). 1 %, and
    what was not given away, is spread over all bytes: nothing is impossible."""
    p = share.new_zeros(len(share), 256)
    p.scatter_add_(1, byte, 0.99 * share)
    return p + (1 - p.sum(1, keepdim=True)) / 256


# ---- 2. Fusion: one mixture of all ---------------------------------------------------------------

class Fusion:
    """p = the sum of weight x head, the transformer's own prediction first among them. (Shallow
    fusion usually adds logarithms; this is linear interpolation of probabilities.) A head may know
    something that the others do not, so the mixture needs fewer bits. But with --plain two thirds
    of it are the n-gram. It knows better which letters come next, and that is most of the bits;
    after a dozen bytes it does not know whom the story is about, but that costs few bits. (Are the
    stories worse, then? The original says so; ours were not: README.)"""
    def __init__(self, model, names, ngram=None, text=None):
        """names: of ngram, knn, cache; text: (n,) uint8, for the first two; ngram: if counted"""
        self.model = model
        self.heads = {}
        for name in names:
            if name == "ngram":
                ngram = ngram or NGram().fit(text[:COUNTED])
                self.heads[name] = functools.partial(ngram_head, ngram=ngram)
            elif name == "knn":
                keys = []
                values = []
                for moment, target, _ in moments(model, text[:DATASTORE]):  # target: what came
                    keys.append(moment.state)
                    values.append(target)
                store = dict(keys=torch.cat(keys), values=torch.cat(values))  # (M, C), (M,)
                self.heads[name] = functools.partial(knn_head, **store)
            elif name == "cache":
                self.heads[name] = cache_head
            else:
                raise Problem(f"there is no head {name!r}: they are ngram, knn and cache")
        self.weights = np.ones(1 + len(self.heads)) / (1 + len(self.heads))  # until `fit`

    def target_probs(self, text):
        """What the transformer and each head gave to each byte of text. -> (n, 1 + heads)"""
        rows = []
        for moment, target, p in tqdm(moments(self.model, text), leave=False, disable=None):
            of_heads = [head(moment).gather(1, target[:, None]) for head in self.heads.values()]
            rows.append(torch.cat((p[:, None], *of_heads), 1))
        return torch.cat(rows).double().numpy()

    def fit(self, text):
        """Learn the weights on text that is neither trained on nor scored (mixture_weights)."""
        self.weights = mixture_weights(self.target_probs(text))
        return self

    def next_byte(self, ids):
        """The mixture after a text, for tiny.generate. ids (1, n) int64 -> p (1, 256)"""
        # ids are `| a b` (| is an END). `moments` predicts each byte of a text, so we ask it for
        # those of `a b ?`: the last one predicts the ?. Which byte that is it does not see: 0.
        text = F.pad(ids[0, 1:], (0, 1)).numpy().astype(np.uint8)
        *_, (moment, _, _) = moments(self.model, text[-self.model.context :])
        state, past, followed, seen, at = moment  # of B positions; the last is wanted
        last = Moment(state[-1:], past[-1:], followed[-1:], seen, at[-1:])
        heads = [head(last) for head in self.heads.values()]
        p = torch.cat((self.model.next_byte(ids), *heads))  # (1 + heads, 256)
        return torch.from_numpy(self.weights).float()[None] @ p


def split_validation(valid):
    """-> the bytes that are scored, and others to learn the weights on"""
    middle = len(valid) // 2
    return valid[:middle][:100_000], valid[middle:][:100_000]


# ---- 3. The rubric: what goes wrong, counted -----------------------------------------------------

LENGTH = 650  # bytes of a story that are looked at


def grams(text, n):
    """All n words in a row, in lower case, as tuples."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())
    return list(zip(*(words[i:] for i in range(n))))


class Reference:
    """What a training text, (n,) uint8, says of its language. names: words that are nearly always
    capitalised inside a sentence; grams: hashes of its word 8-grams. The rubric's rows ask it; they
    are functions (story, Reference) -> number, None where the story gives no occasion."""
    def __init__(self, text):
        inside = Counter()
        capitalised = Counter()
        self.grams = set()
        for story in split_stories(text):
            story = story.decode("utf-8", "replace")
            self.grams.update(hash(gram) for gram in grams(story, 8))
            for word in re.findall(r"(?<=[a-z,] )[A-Za-z]{3,}", story):  # begins no sentence
                inside[word.lower()] += 1
                capitalised[word.lower()] += word[0].isupper()
        self.names = set()
        for word, count in capitalised.items():
            if count >= 5 and count > 0.9 * inside[word]:
                self.names.add(word)

    def names_of(self, text):
        found = re.findall("[A-Z][a-z]+", text)
        return self.names.intersection(word.lower() for word in found)


def doubled(story, ref):
    """Words written twice and marks after , ; or :, per 1,000 words. Catches `got got` and `,,`."""
    twice = re.findall(r"\b([a-z]+) \1\b|[,;:]\s*[,.;:!?]", story.lower())
    return 1000 * len(twice) / max(1, len(grams(story, 1)))


def names_return(story, ref):
    """Share of the names in the first third that come back in the last, %. Catches lost heroes."""
    third = len(story) // 3
    first = ref.names_of(story[:third])
    if first:
        return 100 * len(first & ref.names_of(story[-third:])) / len(first)


def repeated_4(story, ref):
    """Share of word 4-grams that the story has had before, %. Catches refrains and loops."""
    found = grams(story, 4)
    if found:
        return 100 * (1 - len(set(found)) / len(found))


def copied_8(story, ref):
    """Share of word 8-grams that stand in the training text, %. Catches recitation."""
    found = [hash(gram) in ref.grams for gram in grams(story, 8)]
    if found:
        return 100 * np.mean(found)


def rubric(stories, ref):
    """-> {name of row: (mean, standard error)} over a list of stories, nan where none counted."""
    table = {}
    for row in (doubled, names_return, repeated_4, copied_8):
        values = [row(story, ref) for story in stories]
        values = [value for value in values if value is not None]
        values = values or [math.nan]
        error = np.std(values) / len(values) ** 0.5
        table[row.__name__] = np.mean(values), error
    return table


# ---- 4. The judge: somebody who does not know which story is whose -------------------------------

CRITERIA = """Compare two short stories for small children. Judge grammar, creativity, consistency
(do persons and things stay who and what they are?) and plot (does one thing lead to the next, is
there a problem and an ending?). A story may be cut off at its end: do not mind. Which is better?
Write one line for each pair: 1, 2, or = if they are equally good."""


def blind_pairs(runs, stories, seed):
    """Shuffle the stories of two runs, two lists of str from the same prompts -> list of (first
    story, second story, which run, 0 or 1, the first is from). Each run comes first in half of the
    pairs. (The names of the runs seed the order, so that no judge can learn it.)"""
    rng = np.random.default_rng(zlib.crc32(f"{runs} {seed}".encode()))
    n = min(map(len, stories))
    first = rng.permutation(np.arange(n) % 2).tolist()  # whose story comes first, 0 or 1
    pairs = []
    for i, k in zip(rng.permutation(n), first):
        pairs.append((stories[k][i], stories[1 - k][i], k))
    return pairs


def tally(first, answers):
    """first: for each pair which run, 0 or 1, came first; answers: list of "1", "2" or "=" -> how
    often run 0 was preferred, run 1, neither. Raises Problem for anything else."""
    if len(answers) != len(first):
        raise Problem(f"there are {len(answers)} answers to {len(first)} pairs; one line for each")
    score = [0, 0, 0]
    for number, (k, answer) in enumerate(zip(first, answers), 1):
        if answer not in ("1", "2", "="):
            raise Problem(f"answer {number} is {answer!r}; it must be 1, 2 or =")
        score[{"1": k, "2": 1 - k, "=": 2}[answer]] += 1
    return score


def sign_test(wins, losses):
    """Two-sided exact p-value: how often a fair coin falls at least as unevenly as this."""
    rare = sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * rare / 2 ** (wins + losses))


# ==================================================================================================
# You may stop reading here. What follows finds the moments and stories of a run, and prints tables.
# ==================================================================================================

@torch.no_grad()
def moments(model, text):
    """Read text, (n,) uint8, as tiny.evaluate does, each byte once, in order. Yields, for the B
    scored positions of a window, the Moment, target (B,) and the transformer's p (B,) of it."""
    done = 0
    for ids, scored in evaluation_windows(text, model.context, batch=1):
        log_p, states = model(ids)
        ids, target = ids[0, :-1], ids[0, 1:]
        position = torch.arange(len(ids))
        begin = torch.where(ids == END, position, 0).cummax(0).values  # (P,) of the story there
        t = scored[0].nonzero()  # (B, 1)
        visible = (position < t) & (position >= begin[t])  # (B, P): earlier, in the same story
        past = states.expand(len(t), -1, -1)  # the whole window, masked by `followed`
        followed = torch.where(visible, target, -1)
        at = np.arange(done, done + len(t))
        moment = Moment(states[scored], past, followed, text, at)
        done += len(t)
        yield moment, target[scored[0]], log_p[scored].exp()


def open_run(run, text):
    """ "out" or "out+ngram+cache" -> GPT, WordGPT or Fusion"""
    out, *names = run.split("+")
    model, content = load_checkpoint(out)
    if content["options"]["text"] != zlib.crc32(text.train):
        notice(f"{out} was trained on another text, perhaps on what it is asked about here; give "
               "the --data, --valid, --megabytes and --keep that it was trained with")
    if not names:
        return model
    return Fusion(model, names, text=text.train).fit(split_validation(text.valid)[1])


def stories_of(run, text, args):
    """Stories of a RUN, from the same prompts (but a file's are its own), cut to LENGTH -> list"""
    real = split_stories(text.valid)
    prompts = [re.match(rb"(\s*\S+){1,5}", story)[0] for story in real[: args.n]]
    prompts = [prompt[:60] for prompt in prompts]  # where there are no spaces a word may be long
    generator = torch.Generator().manual_seed(args.seed)  # one for all
    if os.path.isfile(run):
        stories = split_stories(data.read([run]))
    elif run == "real":
        stories = real
    elif run == "ngram":
        ngram = NGram().fit(text.train[:COUNTED])
        stories = [ngram.generate(x, LENGTH, args.temperature, i)
                   for i, x in enumerate(prompts, args.seed)]
    else:
        model = open_run(run, text)
        stories = []
        for prompt in tqdm(prompts, run, disable=None):
            told = generate(model, prompt, LENGTH - len(prompt), args.temperature, generator)
            stories.append(prompt + b"".join(told))
    return [story[:LENGTH].decode("utf-8", "ignore") for story in stories[: args.n]]


def show_scores(run, text):
    scored, _ = split_validation(text.valid)
    model = open_run(run, text)
    if not isinstance(model, Fusion):
        model = Fusion(model, [])
    p = model.target_probs(scored)
    for name, alone, weight in zip(("transformer", *model.heads), p.T, model.weights):
        print(f"{name}_bpb: {-np.log2(alone).mean():.4f} (weight {weight:.2f})")
    print(f"fused_bpb: {-np.log2(p @ model.weights).mean():.4f}")


def show_rubric(runs, text, args):
    ref = Reference(text.train)
    tables = [rubric(stories_of(run, text, args), ref) for run in runs]
    print("mean ± error".ljust(14), *[run.ljust(11) for run in runs], sep="  ")
    for row in tables[0]:
        cells = ["{:5.1f} ± {:.1f}".format(*table[row]) for table in tables]
        print(f"{row:14}", *cells, sep="  ")


def write_pairs(runs, text, args):
    for path in (args.pairs, f"{args.pairs}.key"):
        if os.path.exists(path):
            raise Problem(f"{path} is there already; name another with --pairs")
    pages = [CRITERIA]
    pairs = blind_pairs(runs, [stories_of(run, text, args) for run in runs], args.seed)
    for number, (first, second, _) in enumerate(pairs, 1):
        pages.append(f"######## pair {number}\n\n#### 1\n{first}\n\n#### 2\n{second}")
    data.save(args.pairs, printable("\n\n".join(pages)).encode())
    key = {"runs": runs, "first": [k for _, _, k in pairs]}
    data.save(f"{args.pairs}.key", json.dumps(key).encode())
    print(f"{len(pairs)} pairs; then: python sample.py --pairs {args.pairs} --tally answers.txt")


def show_tally(args):
    with open(f"{args.pairs}.key") as file:
        key = json.load(file)
    with open(args.tally, errors="replace") as file:
        answers = file.read().split()
    *wins, ties = tally(key["first"], answers)
    for run, score in zip(key["runs"], wins):
        print(f"{run}: {score}")
    print(f"ties: {ties}\np: {sign_test(*wins):.4f} (exact sign test, two-sided, without ties)")


def tell(model, args):
    prompt = os.fsencode(args.prompt)
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.n):
        decoder = codecs.getincrementaldecoder("utf-8")("ignore")  # waits for whole characters
        pieces = generate(model, prompt, args.length, args.temperature, generator)
        for piece in itertools.chain([prompt], pieces):
            print(printable(decoder.decode(piece)), end="", flush=True)
        print("\n")


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage="python sample.py [options]", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description='A RUN is a folder of tiny.py or "out+ngram+cache", to --rubric and --judge '
        'also "ngram", "real" or a file.',
        epilog='example: python sample.py --prompt "One day, a cat" --n 3 --temperature 0.7')
    add = parser.add_argument
    add("--out", default="out", metavar="RUN", help="whose stories")
    add("--prompt", default="Once upon a time", help="of each story")
    add("--n", type=int, default=5, help="how many stories")
    add("--length", type=int, default=2000, help="bytes of a story")
    add("--temperature", type=float, default=TEMPERATURE, help="0: always the likeliest")
    add("--seed", type=int, default=1, help="of all random numbers")
    add("--score", metavar="RUN", help="instead: bits per byte, alone and fused")
    add("--rubric", nargs="+", metavar="RUN", help="instead: count what goes wrong in stories")
    add("--judge", nargs=2, metavar="RUN", help="instead: write pairs of stories for a blind judge")
    add("--pairs", default="pairs.txt", help="the file of pairs")
    add("--tally", metavar="FILE", help="instead: count the answers, a line of 1, 2 or = each")
    data.add_arguments(parser)
    args = parser.parse_args(argv)
    prepare_cpu()
    if args.tally:
        return show_tally(args)
    if not (args.score or args.rubric or args.judge or "+" in args.out):
        return tell(load_checkpoint(args.out)[0], args)  # this needs no text
    text = data.load(args)
    if args.score:
        show_scores(args.score, text)
    elif args.rubric:
        show_rubric(args.rubric, text, args)
    elif args.judge:
        write_pairs(args.judge, text, args)
    else:
        tell(open_run(args.out, text), args)


if __name__ == "__main__":
    data.run(main)
