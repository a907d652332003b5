"""Bytes in: where the text comes from, how it becomes numbers, which of it is read.

A tokenizer cuts text into frequent pieces and numbers these, since a model needs numbers; a byte
already is one, below 256. `python data.py` shows the text: an easy story and a hard one.
"""
import argparse
import codecs
import contextlib
import glob
import math
import os
import random
import re
import sys
import time
import urllib.request
from collections import Counter, namedtuple

import numpy as np
from tqdm import tqdm

SEPARATOR = b"<|endoftext|>"  # stands between two stories in a file
END = 0  # the byte that stands for SEPARATOR in memory: text has no other use for byte 0
WORD = rb"[a-z'\x80-\xff]+"  # in lower case; digits separate words


# ---- 1. Bytes and stories ------------------------------------------------------------------------

def encode(text):
    """bytes -> (n,) uint8. SEPARATOR, with a line break on each side, becomes END."""
    text = text.replace(b"\0", b"")  # a byte 0 would look like the end of a story
    return np.frombuffer(re.sub(rb"(\r?\n)?<\|endoftext\|>(\r?\n)?", b"\0", text), np.uint8)


def split_stories(text):
    """(n,) uint8 -> list of bytes, cut at END, without the empty ones."""
    return [story for story in text.tobytes().split(b"\0") if story.strip()]


def split(text):
    """(n,) uint8 -> text to learn from, text held out: the last stories, 5 to 10 %"""
    end = text[: int(0.95 * len(text))].tobytes().rfind(b"\0") + 1
    at = max(end, int(0.9 * len(text)))
    return text[:at], text[at:]


# ---- 2. What a small model should read -----------------------------------------------------------
# Five minutes are too short to learn all that stories do. A model that reads only easy ones learns
# these well, and writes better for it, though it needs more bits for the hard ones (README).
def difficulty(stories):
    """How hard is each story to read? list of bytes -> (stories,) float, bits a word

    The mean surprisal of a word w after the word v: -log2 p(w | v), p = (c(v w) - 0.75) / c(v),
    counted in the first stories, some 10 MB. (A count gives up 0.75 for the pairs that were not
    seen: see ngram.py.) Pairs met once or never have 12 bits; below `the dog` has -log2(2.25 / 3).

    >>> difficulty([b"The dog ran. The dog sat.", b"The dog ran.", b"A mauve cat mused."]).round(1)
    array([ 5.2,  0.8, 12. ])"""
    first = Counter()
    pairs = Counter()
    for story in stories[:12_500]:
        words = re.findall(WORD, story.lower())
        first.update(words[:-1])
        pairs.update(zip(words, words[1:]))
    bits = {}
    for (v, w), count in pairs.items():
        if count > 1:
            bits[v, w] = -math.log2((count - 0.75) / first[v])
    means = []
    for story in stories:
        words = re.findall(WORD, story.lower())
        means.append(np.mean([bits.get(pair, 12) for pair in zip(words, words[1:])] or [12]))
    return np.array(means)


def easiest(text, part):
    """The easiest stories of a text, in their old order. (n,) uint8 -> (about part * n,) uint8"""
    stories = split_stories(text)
    order = difficulty(stories).argsort()
    size = np.cumsum([len(stories[i]) + 1 for i in order])
    kept = sorted(order[size <= part * size[-1:]])  # [-1:]: an empty text has no last size
    return np.frombuffer(b"".join(stories[i] + b"\0" for i in kept), np.uint8)


# ==================================================================================================
# You may stop reading here. What follows gets the text. The subject goes on in ngram.py.
# ==================================================================================================

# ---- 3. Files, download, stories out of nothing --------------------------------------------------

class Problem(Exception):
    """Something the user can mend. Its message is one line: what is wrong; what to do."""


def run(main):
    """Call main(). What a user can mend becomes one line on stderr and exit code 1."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # `?` for what the terminal's encoding lacks
    try:
        main()
        sys.stdout.flush()  # a reader that went away is noticed here, not after the end
    except BrokenPipeError:  # whoever reads us, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Problem, OSError) as problem:
        sys.exit(printable(f"error: {problem}"))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")


def printable(text):
    """str -> str that is safe to show: what can drive a terminal becomes U+FFFD; "\\r" goes."""
    text = text.replace("\r", "")
    return re.sub(r"[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u202d\u202e]", "\ufffd", text)


def notice(words):
    """Tell the user something on stderr, if anybody reads it."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(f"NOTICE: {words}"), file=sys.stderr, flush=True)


def read(paths, limit=-1):
    """Files of text, `limit` bytes of each -> (n,) uint8, END between them. Raises Problem."""
    contents = []
    for path in [path for name in paths for path in sorted(glob.glob(str(name))) or [name]]:
        with open(path, "rb") as file:  # binary: no encoding to get wrong
            content = file.read(limit)
        content = content.removeprefix(b"\xef\xbb\xbf")  # UTF-8's byte order mark
        if sum(byte < 8 or 13 < byte < 27 for byte in content[:9999]) > 200:  # control characters
            raise Problem(f"{path} seems to be binary or UTF-16: save it as UTF-8 text")
        try:
            codecs.getincrementaldecoder("utf-8")().decode(content)  # half a character may end it
        except UnicodeDecodeError as error:
            notice(f"{path} is not UTF-8, see byte {error.start:,}: convert it (iconv)")
        if not content.strip():
            notice(f"{path} is empty")
        contents.append(content)
    return encode((b"\n" + SEPARATOR + b"\n").join(contents))


def save(path, content):
    """Write bytes so that `path` is the whole old file or the whole new one, whatever happens."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:
        file.write(content)
    os.replace(f"{path}.tmp", path)


HUB = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"


def download(url, path, want):
    """Fetch the first `want` bytes of url into `path`, cut after the last whole story. -> whether a
    server was there. Raises Problem if anything else fails, and leaves no file."""
    request = urllib.request.Request(url, headers={"Range": f"bytes=0-{want - 1}"})
    content = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            with tqdm.wrapattr(answer, "read", want, disable=None) as file:
                while len(content) < want and (chunk := file.read(1 << 16)):
                    content += chunk
            if len(content) < want and answer.length:
                raise ConnectionError("the connection was cut")
    except Exception as error:
        if type(error) is urllib.error.URLError and "CERTIFICATE" not in str(error):
            return False
        raise Problem(f"{url}: {error}; run again, or name a text with --data") from None
    stories, end, _ = bytes(content[:want]).rpartition(SEPARATOR)
    if not end:
        raise Problem(f"{url} holds no {SEPARATOR.decode()}: it is not TinyStories")
    save(path, stories + end + b"\n")
    return True


PLOT = """\
[Once upon a time|One day], there was a [happy|curious|brave|shy|kind|silly|clever] child named \
{name}. {name} took a {toy} to the [park|forest|garden|river|beach|farm|hill|market|pond].
But [it got stuck in a tree|it fell into the water|it was lost]! {name} [was sad|wanted to cry]. \
"[I can help you|Do not be sad]," said {friend}. [They used a stick|They made a rope|They sang]. \
[At last|Soon] {name} had the {toy} again. {name} and {friend} [played|danced|ate an apple]."""
NAMES = ("Lily Mia Sue Anna Tom Ben", "Ella Zoe Amy Rose Jack Leo", "kite ball boat hat drum book")


def invent(count=15000, seed=0):
    """Stories for machines without a network: PLOT with one of each [a|b]. -> bytes, 300 a story"""
    chance = random.Random(seed)
    stories = []
    for _ in range(count):
        parts = re.split(r"[\[\]]", PLOT)  # every second one was in brackets
        story = "".join(chance.choice(part.split("|")) for part in parts)
        name, friend, toy = (chance.choice(words.split()) for words in NAMES)
        stories.append(story.format(name=name, friend=friend, toy=toy))
    return f"\n{SEPARATOR.decode()}\n".join(stories).encode()


# ---- 4. The command ------------------------------------------------------------------------------

Text = namedtuple("Text", "train valid source waited")  # (n,), (m,) uint8; str; seconds
KEEP = 0.33  # the part of TinyStories that is read by default, the easiest


def load(args, least=2):
    """args: the options of add_arguments; least: bytes to learn from. -> Text. Raises Problem."""
    default = 1 if args.data else KEEP
    keep = default if args.keep is None else args.keep
    if not 0 < keep <= 1 or not 0 < args.megabytes < 1e6:
        raise Problem("--keep is a part, above 0, at most 1; --megabytes is above 0")
    began = time.monotonic()
    files = args.data
    if not files:
        want = max(100, args.megabytes)  # one download serves smaller wishes, too
        path = os.path.join("cache", f"tinystories-{want:g}MB.txt")
        url = os.environ.get("TINY_URL", f"{HUB}/TinyStoriesV2-GPT4-train.txt")
        if os.path.exists(path) or download(url, path, int(1e6 * want)):
            files = [path]
    waited = time.monotonic() - began
    if files:
        source = str(files[0])
        train = read(files, int(1e6 * args.megabytes))
    else:
        source = "made-up stories"
        train = encode(invent())
        notice("no network: using stories made from a template. SCORES ON THEM MEAN NOTHING")
    if args.valid:
        held_out = read(args.valid, int(1e6 * args.megabytes))
    else:
        train, held_out = split(train)
    if keep < 1:
        source += f", the easiest {keep:.0%}"
        train = easiest(train, keep)
    if len(train) < least or len(held_out) < 64:
        raise Problem("too little text, or with --keep no <|endoftext|> between the stories")
    return Text(train, held_out, source, waited)


def add_arguments(parser):
    """The options about text, the same for every script."""
    add = parser.add_argument
    add("--data", nargs="+", metavar="FILE", help="text to learn from, instead of TinyStories")
    add("--valid", nargs="+", metavar="FILE", help="text held out, instead of its end")
    add("--megabytes", type=float, default=100, help="how much to use, of each file")
    add("--keep", type=float, help=f"the easiest part to read, 0 to 1 ({KEEP}; of --data all)")


def main():
    parser = argparse.ArgumentParser(
        description="Show the text: how much there is, an easy story, a hard one.",
        epilog="example: python data.py --data stories.txt", allow_abbrev=False)
    add_arguments(parser)
    text = load(parser.parse_args())
    print(f"{text.source}: {len(text.train):,} bytes to learn from, {len(text.valid):,} held out")
    stories = split_stories(text.valid)
    bits = difficulty(stories)
    for i in (bits.argmin(), bits.argmax()):
        print(f"\n{bits[i]:.1f} bits a word:")
        print(printable(stories[i][:1000].decode("utf-8", "replace")))


if __name__ == "__main__":
    run(main)
