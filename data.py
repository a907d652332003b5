"""Bytes in, bytes out: where the text comes from and how it becomes numbers.

By the end of this file you know why a byte-level model needs no tokenizer (a byte already is a number below 256), how stories are told
apart (byte 0 between them), and how to fetch a part of a large file so that neither a broken connection nor Ctrl-C leaves a broken file
behind. The one command:

    python data.py                             shows what there is: source, bytes, stories, one of them

Text comes from the first of these that is there: files named with --data; TinyStories (Eldan & Li, 2023), downloaded once; a small story
generator at the end of this file, so that everything runs without a network too.
"""
import argparse
import http.client
import math
import os
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import namedtuple

import numpy as np
from tqdm import tqdm

SEPARATOR = b"<|endoftext|>"
END = 0  # the byte that stands for SEPARATOR; text has no other use for it
URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"  # the environment's TINY_URL replaces it
FILES = {"train": "TinyStoriesV2-GPT4-train.txt", "valid": "TinyStoriesV2-GPT4-valid.txt"}
PATIENCE = 10.0  # seconds without an answer after which there is no network, or no longer

Text = namedtuple("Text", "train valid source waited")  # (n,) uint8, (m,) uint8, str, seconds spent on downloads


class Problem(Exception):
    """Something the user can mend. Its message is one line: what is wrong and what to do."""


def run(main):
    """Call main(); a Problem becomes one line on stderr and exit code 1 instead of a traceback."""
    try:
        main()
    except Problem as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except BrokenPipeError:  # whoever read our output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---- 1. Text as numbers --------------------------------------------------------------------------------------------------------------

def encode(text):
    """bytes -> (n,) uint8. SEPARATOR, with one line break on each side if there is one, becomes END; all else stays as it is.

    NUL bytes that the text already has would look like story ends: they are dropped, with a warning that says how many.
    """
    if nul := text.count(b"\0"):
        print(f"warning: dropped {nul:,} NUL bytes: byte 0 marks the end of a story here", file=sys.stderr)
        text = text.replace(b"\0", b"")
    return np.frombuffer(re.sub(rb"(?:\r?\n)?<\|endoftext\|>(?:\r?\n)?", b"\0", text), np.uint8)


def decode(array):
    """(n,) uint8 -> bytes, END as a line of its own. decode(encode(text)) == text if its separators stand on their own lines."""
    return np.asarray(array, np.uint8).tobytes().replace(b"\0", b"\n" + SEPARATOR + b"\n")


def printable(text):
    """str -> str for a terminal: what is neither printable nor a line break or tab could drive it, and becomes U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def peak_memory():
    """The most memory this process has held so far, bytes; 0 where the system does not say (Windows)."""
    try:
        with open("/proc/self/status") as file:  # Linux; getrusage there begins with what the parent process held
            return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) * 1024
    except (OSError, TypeError):
        pass
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def stories(array):
    """Cut at END: (n,) uint8 -> list of bytes, without the empty ones."""
    return [story for story in array.tobytes().split(b"\0") if story.strip()]


# ---- 2. Files ------------------------------------------------------------------------------------------------------------------------

def read(paths, megabytes=math.inf):
    """Read text files, in binary so that no encoding can be wrong; stories do not run on from one file to the next. -> (n,) uint8

    No more than the first so many megabytes of each are read, up to the end of a story if there is one, and a notice says so.
    """
    parts = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                part = file.read() if size <= 1e6 * megabytes else file.read(int(1e6 * megabytes))
            if len(part) < size:
                part = part[: part.rfind(SEPARATOR)] if SEPARATOR in part else part
                print(f"NOTICE: {path} has {size / 1e6:,.0f} MB; using the first {len(part) / 1e6:,.0f}. More with --megabytes", file=sys.stderr)
        except OSError as error:
            raise Problem(f"cannot read {path}: {error.strerror}; name a text file with --data") from None
        if not part.strip():
            raise Problem(f"{path} is empty; name a text file with something in it")
        parts.append(part)
    return encode((b"\n" + SEPARATOR + b"\n").join(parts))


def split(text, part=0.05):
    """The last `part` of the text is for validation, cut between two stories if it can be: otherwise half a story is known already."""
    at = int(len(text) * (1 - part))
    ends = np.flatnonzero(text == END)
    ends = ends[(ends > len(text) // 2) & (ends < len(text) - 1)]
    if len(ends):
        at = int(ends[np.abs(ends - at).argmin()]) + 1
    return text[:at], text[at:]


def save(path, content):
    """Write bytes so that `path` is always the old file or the whole new one: to a temporary file, flushed to the disk, then renamed."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror}; free some space or name another folder") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ---- 3. Download ---------------------------------------------------------------------------------------------------------------------

class NoNetwork(Exception):
    """No server could be reached at all."""


def ask(url, start, stop):
    """Open bytes start to stop of url (HTTP Range, RFC 9110). Returns the open answer and the whole file's size in bytes.

    Raises NoNetwork if nothing answers within PATIENCE, name look-up included (it has no time limit of its own, hence the thread).
    """
    result = []

    def connect():
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{stop - 1}", "User-Agent": "tiny"})
        try:
            result.append(urllib.request.urlopen(request, timeout=PATIENCE))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    answer = result[0] if result else TimeoutError("no answer")
    if isinstance(answer, urllib.error.HTTPError):
        if answer.code == 416 and (given := re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))):
            return answer, int(given[1])  # nothing from `start` on: the file ends there
        raise Problem(f"{url} answered HTTP {answer.code}; set TINY_URL to a copy of the files, or name text of your own with --data")
    if isinstance(answer, Exception):
        raise NoNetwork(str(getattr(answer, "reason", answer)))
    given = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if answer.status != 206 or not given or int(given[1]) != start:
        answer.close()
        raise Problem(f"{url}: the server ignores Range, so a part of the file cannot be had; set TINY_URL to another, or use --data")
    return answer, int(given[2])


def download(url, path, want, tries=4):
    """Fetch the first `want` bytes of url, cut after the last whole story, into path.

    What has arrived is kept in `path`.part: a lost connection, an error or Ctrl-C costs nothing, the next try or run goes on from there.
    Only a part of the right size becomes `path`. Raises NoNetwork if the first try reaches nobody, Problem for all else.
    """
    part, failed, last = f"{path}.part", 0, "no answer"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(part, "ab") as file, tqdm(
            total=want, unit="B", unit_scale=True, desc=os.path.basename(path), file=sys.stderr, disable=not sys.stderr.isatty()
        ) as bar:
            if not sys.stderr.isatty():
                print(f"downloading {want / 1e6:.0f} MB from {url}", file=sys.stderr)
            while (have := file.tell()) < want:
                bar.update(have - bar.n)
                try:
                    answer, size = ask(url, have, want)
                    bar.total = want = min(want, size)
                    with answer:
                        if file.tell() >= want:
                            break
                        while chunk := answer.read(min(1 << 16, want - file.tell()) or 1):  # the last read, of 1, finds the end
                            file.write(chunk)
                            bar.update(len(chunk))
                    if file.tell() < want:
                        raise ConnectionError("the connection was cut")
                except (NoNetwork, ConnectionError, TimeoutError, http.client.HTTPException) as error:
                    last, failed = error, failed + 1
                    if isinstance(error, NoNetwork) and file.tell() == 0:
                        raise
                    if failed == tries:
                        raise Problem(f"{url}: gave up after {tries} tries ({last}); run again to go on from {file.tell():,} bytes") from None
                    time.sleep(0.1 * 4**failed)
                file.flush()
        with open(part, "rb") as file:
            content = file.read(want)
    except OSError as error:
        raise Problem(f"cannot write {part}: {error.strerror}; free some space or name another folder with --cache") from None
    end = content.rfind(SEPARATOR)
    if end < 0:
        os.remove(part)
        raise Problem(f"{url} holds no {SEPARATOR.decode()}: not TinyStories; set TINY_URL to the right folder")
    save(path, content[: end + len(SEPARATOR)] + b"\n")
    os.remove(part)


# ---- 4. Stories out of nothing -------------------------------------------------------------------------------------------------------

def invent(count=12000, seed=0):
    """Stories from a template with some twenty choices, for machines without a network. -> bytes, about 500 a story, always the same.

    Name, animal, want and helper come back later in the story, so that there is something to remember, and the choices multiply
    to more than 10^12 stories: one that is asked about in validation has not been seen in training.
    """
    names = "Lily Tom Mia Ben Sue Max Anna Sam Lucy Tim Ella Jack Zoe Leo Amy Finn Rose Bob Nina Jay".split()
    animals = "dog cat bird frog bear fox duck mouse rabbit pony turtle squirrel".split()
    wants = ["kite", "red ball", "big cake", "toy boat", "warm hat", "shiny stone", "blue cup", "drum", "little car", "soft blanket", "book", "bell"]
    places = ["park", "forest", "garden", "river", "beach", "farm", "old barn", "hill", "market", "pond", "school yard", "village"]
    moods = ["happy", "curious", "brave", "shy", "kind", "silly", "clever", "quiet"]
    troubles = ["it was stuck in a tall tree", "it fell into deep water", "it was under a heavy rock", "the wind took it away",
                "a big dog was sitting on it", "it was lost in the long grass", "it was on a high shelf", "it broke in two pieces"]
    tools = ["a long stick", "a rope", "a ladder", "some glue", "a net", "a sweet apple", "a little song", "a bright lamp"]
    lessons = ["friends make hard things easy", "it is good to ask for help", "being kind is never wrong", "you should not give up",
               "sharing makes everyone glad", "even small friends can do big things", "thinking first is better than crying", "patience helps"]
    r = random.Random(seed)
    out = []
    for _ in range(count):
        name, friend = r.sample(names, 2)
        girl = name in "Lily Mia Sue Anna Lucy Ella Zoe Amy Rose Nina".split()
        she, her, child = ("she", "her", "girl") if girl else ("he", "his", "boy")
        animal, want, place, trouble, tool, mood = map(r.choice, (animals, wants, places, troubles, tools, moods))
        start = r.choice(["Once upon a time, there was", "One day, there was", "In a small house lived", "Long ago, there was"])
        meet = r.choice([f"A {animal} named {friend} came by.", f"Then {she} met {friend}, a {r.choice(moods)} {animal}.",
                         f"{friend} the {animal} heard {name} and came to look."])
        feel = r.choice(["was sad", "wanted to cry", "did not know what to do", "sat down on the ground", "looked up at the sky"])
        speak = r.choice([f'"I can help you," said {friend}. "I have {tool}."', f'{friend} said, "Do not be sad. Let us use {tool}."',
                          f'"Why are you sad?" asked {friend}. {name} told {friend} about the {want}. "We need {tool}," said {friend}.'])
        solve = r.choice([f"They used {tool} and worked together.", f"{friend} used {tool} while {name} helped.",
                          f"First it did not work. They tried again with {tool}."])
        joy = r.choice([f"At last {name} had the {want} again.", f"Soon the {want} was back.", f'"Hooray!" said {name}, and held the {want}.'])
        close = r.choice([f"{name} and {friend} the {animal} played until the sun went down.", f"{name} thanked {friend} and they became friends.",
                          f"{she.capitalize()} shared {her} {r.choice(['cookie', 'apple', 'bread', 'cake', 'soup'])} with {friend}."])
        out.append(f"{start} a {mood} {child} named {name}. {name} had a {want}. {she.capitalize()} took the {want} to the {place}.\n"
                   f"But {trouble}! {name} {feel}. {meet}\n{speak} {solve} {joy}\n{close} {name} learned that {r.choice(lessons)}.")
    return f"\n{SEPARATOR.decode()}\n".join(out).encode()


# ---- 5. All of it --------------------------------------------------------------------------------------------------------------------

def load(files=None, valid=None, megabytes=100, cache="cache", least=2):
    """The text to learn from and the text to be judged on. -> Text

    files, valid: paths, or None for TinyStories (kept in the folder `cache`), or without a network the built-in stories. megabytes: how much
    of each file is used, from its beginning. least: bytes that the training text must have. Raises Problem, whose message says what to do.
    """
    waited = 0.0
    if files:
        if both := set(map(os.path.realpath, files)) & set(map(os.path.realpath, valid or [])):
            raise Problem(f"{min(both)} is both --data and --valid: a model is judged on text it has not seen; leave out --valid to keep 5% for that")
        train, source = read(files, megabytes), " ".join(map(str, files))
        train, held = (train, read(valid, megabytes)) if valid else split(train)
    elif valid:
        raise Problem("--valid needs --data: name the text to learn from as well")
    else:
        paths = {name: os.path.join(cache, f"tinystories-{name}-{want:g}MB.txt") for name, want in (("train", megabytes), ("valid", 10))}
        began = time.monotonic()
        try:
            for name, path in paths.items():
                if not os.path.exists(path):
                    size = int(1e6 * (megabytes if name == "train" else 10))
                    download(f"{os.environ.get('TINY_URL', URL).rstrip('/')}/{FILES[name]}", path, size)
            waited = time.monotonic() - began
            train, held, source = read([paths["train"]]), read([paths["valid"]]), "TinyStories V2-GPT4"
        except NoNetwork as error:
            waited = time.monotonic() - began
            if "TINY_URL" in os.environ:
                raise Problem(f"TINY_URL={os.environ['TINY_URL']} cannot be reached ({error}); correct it or unset it") from None
            print(f"NOTICE: no network ({error}), so TinyStories cannot be fetched. Using stories that data.py makes up from a template. They show\n"
                  "that everything works, but they are far more regular than real ones: SCORES ON THEM MEAN NOTHING BESIDE SCORES ON TINYSTORIES.\n"
                  "For real stories run this where there is a network, or name a text file of your own: --data FILE", file=sys.stderr)
            train, held = split(encode(invent()))
            source = "built-in stories (no network)"
    for name, text, enough in (("training", train, least), ("validation", held, 64)):
        if len(text) < enough:
            raise Problem(f"the {name} text has {len(text):,} bytes, at least {enough:,} are needed; give more text with --data or --valid")
    return Text(train, held, source, waited)


def add_arguments(parser):
    """The options about text, the same for every script."""
    parser.add_argument("--data", nargs="+", metavar="FILE", help="text to learn from (default: TinyStories, fetched once)")
    parser.add_argument("--valid", nargs="+", metavar="FILE", help="text to be judged on (default: the last 5%% of --data)")
    parser.add_argument("--megabytes", type=float, default=100, metavar="N", help="to use of a text, and to fetch (default: %(default)s)")
    parser.add_argument("--cache", default="cache", metavar="DIR", help="where what was fetched is kept (default: %(default)s)")


def text_from(args, least=2):
    """load() with the options of add_arguments."""
    if not args.megabytes > 0:
        raise Problem(f"--megabytes {args.megabytes:g}: give a number above 0, such as 100")
    return load(args.data, args.valid, args.megabytes, args.cache, least)


def main():
    parser = argparse.ArgumentParser(description="Show the text: where it comes from, how much there is, one story.",
                                     epilog="example: python data.py --data stories.txt")
    add_arguments(parser)
    text = text_from(parser.parse_args())
    print(f"source: {text.source}")
    for name, array in (("train", text.train), ("valid", text.valid)):
        lengths = np.array([len(story) for story in stories(array)] or [0])
        low, middle, high = np.percentile(lengths, (5, 50, 95))
        print(f"{name}: {len(array):,} bytes, {len(lengths):,} stories of {middle:.0f} bytes (5% below {low:.0f}, 5% above {high:.0f}), "
              f"{len(np.unique(array))} distinct bytes")
    print(f"\nthe first story of the validation text:\n\n{printable(b''.join(stories(text.valid)[:1]).decode('utf-8', 'replace'))}")


if __name__ == "__main__":
    run(main)
