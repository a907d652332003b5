"""Bytes in, bytes out: where the text comes from, and how it becomes numbers.

By the end you know why a byte-level model needs no tokenizer and how stories are told apart (byte 0
stands between them). A tokenizer cuts text into frequent pieces and numbers these, since a model
needs numbers; a byte already is one, below 256. `python data.py` shows the text.

Text comes from the first of these that is there: files named with --data; TinyStories (Eldan &
Li, 2023), downloaded once; stories made from a template, so that all works without a network.
"""
import argparse
import contextlib
import http.client
import math
import multiprocessing.pool
import os
import random
import re
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections import namedtuple

import numpy as np
from tqdm import tqdm

SEPARATOR = b"<|endoftext|>"  # stands between two stories in a file
END = 0  # the byte that stands for SEPARATOR in memory: text has no other use for byte 0


# ---- 1. Bytes and stories ------------------------------------------------------------------------

def encode(text):
    """bytes -> (n,) uint8. SEPARATOR, with a line break on each side if it has one, becomes END."""
    text = text.replace(b"\0", b"")  # a byte 0 would look like the end of a story
    return np.frombuffer(re.sub(rb"(\r?\n)?<\|endoftext\|>(\r?\n)?", b"\0", text), np.uint8)


def decode(array):
    """(n,) uint8 -> bytes: encode() undone. Each END becomes SEPARATOR on a line of its own."""
    return np.asarray(array, np.uint8).tobytes().replace(b"\0", b"\n" + SEPARATOR + b"\n")


def split_stories(array):
    """(n,) uint8 -> list of bytes, cut at END, without the empty ones."""
    return [story for story in array.tobytes().split(b"\0") if story.strip()]


def split(text):
    """(n,) uint8 -> text to train on, text to validate on: the last 5%, cut where the nearest story
    ends, if that is near."""
    at = int(0.95 * len(text))
    near = len(text) // 50
    ends = np.flatnonzero(text[at - near : at + near] == END) + at - near
    if len(ends):
        at = ends[np.abs(ends - at).argmin()] + 1
    return text[:at], text[at:]


# ==================================================================================================
# You may stop reading here. What follows gets the text: files, a download that resumes where it
# broke off, stories made up where there is no network, options. The subject goes on in ngram.py.
# ==================================================================================================


# ---- 2. Files ------------------------------------------------------------------------------------

class Problem(Exception):
    """Something the user can mend. Its message is one line: what is wrong; what to do."""


def run(main):
    """Call main(). What a user can mend becomes one line on stderr and exit code 1."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if it was closed: >&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace")  # `?` for what the terminal's encoding lacks
    try:
        main()
        sys.stdout.flush()  # a reader that went away is noticed here, not after the end
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # whoever reads us, `head` for one, has enough
            sys.exit(f"error: {error}")
    except Problem as problem:
        sys.exit(printable(f"error: {problem}"))
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for this
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        advice = "try a smaller model or batch, --order or --megabytes"
        sys.exit(f"error: not enough memory; {advice} ({reason})")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")


def printable(text):
    """str -> str that is safe to show: what can drive a terminal becomes U+FFFD; "\\r" goes."""
    unsafe = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
    return re.sub(unsafe, "\ufffd", text.replace("\r", ""))


def notice(words):
    """Tell the user something on stderr, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(printable(f"NOTICE: {words}"), file=sys.stderr, flush=True)


def read(paths, megabytes=math.inf):
    """Read text files, at most `megabytes` MB of each. -> (n,) uint8, with END between files."""
    contents = []
    for path in paths:
        try:
            with open(path, "rb") as file:  # binary: no encoding to get wrong
                size = os.fstat(file.fileno()).st_size or 1e9  # 0: a pipe, perhaps endless
                limit = int(min(size, 1e6 * megabytes))
                content = file.read(limit + 1)
                large = len(content) > limit
                content = content[:limit]
        except OSError as error:
            advice = "name another file (for a text: --data or --valid)"
            raise Problem(f"cannot read {path}: {error.strerror}; {advice}") from None
        head = content[:100_000]
        plain = head.translate(None, bytes([*range(8), *range(14, 27)]))  # no control characters
        if len(plain) < 0.98 * len(head):
            raise Problem(f"{path} seems to be binary or UTF-16: save it as UTF-8 text")
        if large:
            whole = content.rpartition(SEPARATOR)[0]
            if len(whole) > 0.9 * len(content):
                content = whole  # up to the end of a story
            used = f"using the first {len(content) / 1e6:,.1f} MB of {path}"
            notice(f"{used}. More with --megabytes")
        content = content.removeprefix(b"\xef\xbb\xbf")  # UTF-8's byte order mark
        if not content.strip():
            raise Problem(f"{path} is empty; name a file with some text in it")
        contents.append(content)
    return encode((b"\n" + SEPARATOR + b"\n").join(contents))


def save(path, content):
    """Write bytes so that `path` is the whole old file or the whole new one, whatever happens."""
    temporary = f"{path}.tmp{os.urandom(4).hex()}"  # a different one for every call
    if os.path.exists(path) and not os.path.isfile(path):
        raise Problem(f"{path} is not a regular file; give another name")
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # it is on the disk before it gets its name
        os.replace(temporary, path)
    except OSError as error:
        advice = "free some space or name another folder"
        raise Problem(f"cannot write {path}: {error.strerror}; {advice}") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def lock(path):
    """-> `path`, open and ours until it is closed or the process, with any fork of it, has ended;
    None if another holds it."""
    if os.path.islink(path) or os.path.exists(path) and not os.path.isfile(path):
        raise Problem(f"{path} is not a regular file; remove it")  # a link could lead to any file
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(path, "a+b")
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror}; name another folder") from None
    try:
        if os.name == "nt":
            import msvcrt
            file.seek(1 << 30)  # a byte that nobody reads
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        return None
    except OSError:
        pass  # some network file systems know no locks
    return file


# ---- 3. Download ---------------------------------------------------------------------------------

PATIENCE = 10.0  # seconds without an answer after which there is no network
SILENCE = (urllib.error.URLError, TimeoutError, multiprocessing.TimeoutError)


class NoNetwork(Exception):
    """No server could be reached at all."""


def part_sent(answer):
    """Of an answer of HTTP -> where in the text it begins, bytes of the whole text (0: not said)"""
    if answer.status != 206:
        return 0, int(answer.headers.get("Content-Length", 0))
    part = re.match(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if part is None:
        raise ValueError("it does not say which part of the text it sent")
    return int(part[1]), int(part[2])


def fetch(url, file, version, want):
    """Append to `file` what it lacks of the first `want` bytes of url.

    The file `version` remembers the ETag of what `file` began with. Sent as If-Range (RFC 9110) it
    gets us the rest if the server still has that text (status 206), or else its new one (200).
    """
    version.seek(0)
    etag = version.read().decode()
    if not etag:  # nobody can say whether the server still has what we began with
        file.truncate(0)
    have = os.path.getsize(file.name)
    if have >= want:
        return
    headers = {"User-Agent": "tiny", "Range": f"bytes={have}-{want - 1}"}
    if have:
        headers["If-Range"] = etag
    request = urllib.request.Request(url, headers=headers)
    with multiprocessing.pool.ThreadPool(1) as pool:  # because a name's look-up has no time limit
        opening = pool.apply_async(urllib.request.urlopen, [request], {"timeout": PATIENCE})
        answer = opening.get(PATIENCE)
    with answer:
        begin, size = part_sent(answer)
        if begin == 0:
            have = 0
            file.truncate(0)
            version.truncate(0)
            version.write(answer.headers.get("ETag", "").encode())
            version.flush()
        if begin != have:
            raise ValueError(f"it sent what begins at byte {begin}, not at {have}")
        goal = min(want, size or want)
        with tqdm(initial=have, total=goal, unit="B", unit_scale=True, disable=None) as bar:
            while have < goal:
                chunk = answer.read(1 << 16)
                if not chunk and size == 0:
                    break
                if not chunk:
                    raise ConnectionError("the connection was cut")
                file.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)


def download(url, path, want):
    """Fetch the first `want` bytes of url into `path`, cut after the last whole story.

    What has arrived is kept in `path`.part: the next try or run goes on from there. If another
    process is at it, wait for it. Raises NoNetwork if nothing could be had at all, or Problem.
    """
    version = lock(f"{path}.lock")
    if version is None:
        notice(f"waiting for another process that is downloading {path}")
    while version is None:
        time.sleep(1)
        version = lock(f"{path}.lock")
    with version:
        if os.path.exists(path):
            return
        notice(f"downloading {want / 1e6:g} MB from {url}")
        part = f"{path}.part"
        for wait in [1, 3, 9, None]:
            try:
                with open(part, "ab") as file:
                    fetch(url, file, version, want)
                break
            except (*SILENCE, OSError, ValueError, http.client.HTTPException) as error:
                status = getattr(error, "code", None)  # of HTTP
                if status == 416:  # nothing from there on: we have it all
                    break
                reason = str(error) or "no answer"
                silent = isinstance(error, SILENCE) and "CERTIFICATE" not in reason
                silent = silent and status is None and os.path.getsize(part) == 0
                if silent and wait != 1:  # not at the first try: once may be an accident
                    raise NoNetwork(reason) from None
                if wait is None:
                    advice = "run again to go on, correct TINY_URL, or name a text with --data"
                    raise Problem(f"{url}: {reason}; {advice}") from None
            time.sleep(wait)
        with open(part, "rb") as file:
            stories, end, _ = file.read(want).rpartition(SEPARATOR)
        if end:
            save(path, stories + end + b"\n")
        os.remove(part)
    if not end:
        wrong = f"the first {want:,} bytes of {url} hold no {SEPARATOR.decode()}: not TinyStories"
        raise Problem(f"{wrong}; correct TINY_URL, or give more --megabytes")


# ---- 4. Stories out of nothing -------------------------------------------------------------------

WORDS = {  # each stays the same through a story, so that there is something to remember
    "name": "Lily|Mia|Sue|Anna|Lucy|Tom|Ben|Max|Sam|Tim",
    "friend": "Ella|Zoe|Amy|Rose|Nina|Jack|Leo|Finn|Bob|Jay",
    "animal": "dog|cat|bird|frog|bear|fox|duck|mouse|rabbit|pony|turtle",
    "toy": "kite|red ball|toy boat|warm hat|shiny stone|blue cup|drum|book|bell",
    "tool": "a long stick|a rope|a ladder|some glue|a net|a sweet apple|a song",
}
PLOT = """\
[Once upon a time, there was|One day, there was|In a small house lived] a [happy|curious|brave|shy|\
kind|silly|clever|quiet] child named {name}. {name} had a {toy} and took it to the [park|forest|\
garden|river|beach|farm|hill|market|pond|village].
But [it got stuck in a tree|it fell into the water|the wind took it away|a big dog sat down on it|\
it was lost in the long grass]! {name} [was sad|wanted to cry|sat down on the ground]. \
[A {animal} named {friend} came by.|{friend} the {animal} heard {name} and came to look.]
["I can help you," said {friend}. "I have {tool}."|{friend} said, "Do not be sad. Let us use \
{tool}."|"Why are you sad?" asked {friend}. {name} told {friend} about the {toy}.] \
[They used {tool} and worked together.|{friend} used {tool} while {name} helped.] \
[At last {name} had the {toy} again.|"Hooray!" said {name}, and held the {toy}.]
[{name} and {friend} the {animal} played until the sun went down.|{name} thanked {friend} and they \
became friends.] {name} learned that [friends make hard things easy|it is good to ask for help|\
you should not give up|being kind is never wrong|even small friends do big things]."""


def invent(count=12000, seed=0):
    """Stories for machines without a network: PLOT with one of each [a|b]. -> bytes, 400 a story"""
    chance = random.Random(seed)
    stories = []
    for _ in range(count):
        words = {word: chance.choice(choices.split("|")) for word, choices in WORDS.items()}
        parts = re.split(r"[\[\]]", PLOT)  # every second one was in brackets
        story = "".join(chance.choice(part.split("|")) for part in parts)
        stories.append(story.format(**words))
    return f"\n{SEPARATOR.decode()}\n".join(stories).encode()


# ---- 5. All of it --------------------------------------------------------------------------------

URL = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"  # or $TINY_URL
OFFLINE = """no network (%s): using stories made from a template instead of TinyStories.
They show that all works, but SCORES ON THEM MEAN NOTHING BESIDE SCORES ON TINYSTORIES.
For real stories run this where there is a network, or name a text of your own: --data FILE"""

# (n,) uint8 to learn from, (m,) uint8 to be judged on, where they come from, seconds of download
Text = namedtuple("Text", "train valid source waited")


def load(files=None, valid=None, megabytes=100, cache="cache", least=2):
    """The text to learn from and the text to be judged on. -> Text

    files, valid: lists of paths, or None for TinyStories, or without a network the built-in
    stories. megabytes: of each file, from its beginning. least: bytes of training text. Raises
    Problem.
    """
    began = time.monotonic()
    source = "TinyStories V2-GPT4"
    if files:
        source = printable(" ".join(map(str, files)))
    elif valid:
        raise Problem("--valid needs --data: name the text to learn from as well")
    else:
        folder = (os.environ.get("TINY_URL") or URL).rstrip("/")
        name_of_text = "tinystories"
        if folder != URL:
            source = folder
            name_of_text += f"-{zlib.crc32(folder.encode()):08x}"
        paths = []
        try:
            for name, size in [("train", megabytes), ("valid", 10)]:
                paths.append(os.path.join(cache, f"{name_of_text}-{name}-{size:g}MB.txt"))
                if not os.path.exists(paths[-1]):
                    download(f"{folder}/TinyStoriesV2-GPT4-{name}.txt", paths[-1], int(1e6 * size))
            files, valid, megabytes = paths[:1], paths[1:], math.inf
        except NoNetwork as error:
            if folder != URL:
                raise Problem(f"cannot reach TINY_URL ({error}); correct or unset it") from None
            notice(OFFLINE % error)
            source = "built-in stories (no network)"
    waited = time.monotonic() - began
    train = read(files, megabytes) if files else encode(invent())
    if valid:
        held_out = read(valid, megabytes)
    else:
        train, held_out = split(train)
    for name, text, enough in [("training", train, least), ("validation", held_out, 64)]:
        if len(text) < enough:
            size = f"{len(text):,} bytes, at least {enough:,} are needed"
            raise Problem(f"the {name} text has {size}; give more with --data or --valid")
    if files:
        warn_of_overlap(train, held_out)
    return Text(train, held_out, source, waited)


def warn_of_overlap(train, held_out):
    """Print a notice where much of the validation text stands in the training text, word for word:
    whole stories, or where hardly any story's end is marked, whole lines."""
    mark = b"\0"
    if min((train == END).sum(), (held_out == END).sum()) < 3:
        mark = b"\n"

    def pieces(text):  # short ones may be alike by chance
        parts = text.tobytes().replace(b"\r", b"").replace(b"\0", mark).split(mark)
        return [part for part in map(bytes.strip, parts) if len(part) > 20]

    known = set(pieces(train))
    share = sum(len(piece) for piece in pieces(held_out) if piece in known) / len(held_out)
    if share > 0.01:
        where = "stands in the training text word for word: the scores flatter the model"
        notice(f"{share:.0%} of the validation text {where}")


def number(kind=float, low=-math.inf, high=math.inf, above=False):
    """A `type=` for argparse: a finite number from low to high, or above low."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or abs(value) == math.inf or (above and value == low):
            limits = f"{'above' if above else 'from'} {low} to {high}".removesuffix(" to inf")
            whole = "whole " * (kind is int)
            raise argparse.ArgumentTypeError(f"give a {whole}number {limits}")
        return value
    return parse


def add_arguments(parser):
    """The options about text, the same for every script."""
    add = parser.add_argument
    files = dict(nargs="+", metavar="FILE", action="extend")
    add("--data", **files, help="text to learn from (default: TinyStories)")
    add("--valid", **files, help="text to be judged on (default: 5%% of --data)")
    add("--megabytes", type=number(float, 0, 1e6, above=True), default=100, metavar="N",
        help="how much of a text to use, and to download (default: %(default)s)")
    add("--cache", default="cache", metavar="DIR", help="for downloads (default: %(default)s)")


def text_from(args, least=2):
    """load() with the options of add_arguments."""
    return load(args.data, args.valid, args.megabytes, args.cache, least)


def peak_memory():
    """The most memory this process has held so far, bytes; 0 where the system does not say."""
    if os.path.exists("/proc/self/status"):  # Linux, whose getrusage counts the parent as well
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(r"VmHWM:\s+(\d+)|$", file.read())[1] or 0)
    if os.name == "nt":
        return 0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS


def main():
    parser = argparse.ArgumentParser(
        description="Show the text: where it comes from, how much there is, one story.",
        epilog="example: python data.py --data stories.txt", allow_abbrev=False)
    add_arguments(parser)
    text = text_from(parser.parse_args())
    print(f"source: {text.source}")
    for name, array in [("train", text.train), ("valid", text.valid)]:
        print(f"{name}: {len(array):,} bytes, {len(split_stories(array)):,} stories")
    first = b"".join(split_stories(text.valid)[:1])
    print("\n" + printable(first[:2000].decode("utf-8", "replace")))


if __name__ == "__main__":
    run(main)
