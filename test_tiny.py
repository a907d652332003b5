"""What must hold, each thing in the smallest case that could break it. No network but 127.0.0.1. Run: python -m pytest -q"""
import ast
import functools
import http.server
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import ngram
import sample
import tiny

HERE = os.path.dirname(os.path.abspath(__file__))
STORY = b"Once upon a time there was a cat. The cat sat on a mat. The mat was red.\nThe cat said, \"I like this mat.\""
TEXT = np.frombuffer(b"the cat sat on the mat\0the rat sat\0a cat ate the rat on a mat\0" * 2 + b"that hat\0", np.uint8)

slow = pytest.mark.skipif("FAST" in os.environ, reason="slow, and FAST is set")


def script(*command, env=None, cwd=HERE, **options):
    """Run `python command...` as a user would -> CompletedProcess with text output. No proxy stands between it and 127.0.0.1."""
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and k != "TINY_URL"} | (env or {})
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, encoding="utf-8", cwd=cwd, env=clean, timeout=240, **options)


def refused(result, *words, code=1):
    """The command failed with one clear line that has these words, and no traceback."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), result.stderr


@pytest.fixture(scope="module")
def stories_file(tmp_path_factory):
    """A little text on disk: 400 built-in stories."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_bytes(data.invent(400))
    return path


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    """Text enough for half a minute of training (3 MB): a run ends when it has read its text twice."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_bytes(data.invent(6000))
    return path


# ---- data.py -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    b"", b"a", STORY, b"one\n<|endoftext|>\ntwo", b"one\n<|endoftext|>\n", b"\n<|endoftext|>\n\n<|endoftext|>\n", b"\xff\xfe\x80 caf\xc3\xa9",
    b"a\r\nb\r\n", b"a <|endoftext| > b", bytes(range(1, 256)), b"\n\n<|endoftext|>\n\n",
])
def test_round_trip(text):
    assert data.decode(data.encode(text)) == text


def test_separators_become_end():
    assert data.encode(b"a\r\n<|endoftext|>\r\nb<|endoftext|>c").tobytes() == b"a\0b\0c"
    assert data.stories(data.encode(b"a\n<|endoftext|>\n\n<|endoftext|>\nb")) == [b"a", b"b"]


def test_nul_bytes_are_dropped_and_counted(capsys):
    assert data.encode(b"a\0b\0\0c").tobytes() == b"abc"
    assert "3 NUL" in capsys.readouterr().err


def test_split_is_between_stories_and_loses_nothing():
    text = data.encode(data.invent(300))
    train, held = data.split(text)
    assert np.array_equal(np.concatenate((train, held)), text)
    assert train[-1] == 0 and 0.03 < len(held) / len(text) < 0.07
    train, held = data.split(np.full(1000, 65, np.uint8))  # no story ends at all
    assert len(held) == 50


def test_invented_stories_differ_and_repeat_exactly():
    text = data.invent(3000)
    assert data.invent(3000) == text
    assert len(set(data.stories(data.encode(text)))) == 3000


def test_save_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    data.save(path, b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(data.Problem, match="No space left.*free some space"):
        data.save(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


class Server:
    """A web server on 127.0.0.1 for one test: honours Range, and fails in the ways that `fault(request number)` says."""

    def __init__(self, body, fault=lambda n: None):
        self.requests = requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.headers["Range"])
                kind = fault(len(requests))
                if isinstance(kind, int):
                    return self.send_error(kind)
                if kind == "silent":
                    return threading.Event().wait(3)
                a, b = self.headers["Range"].removeprefix("bytes=").split("-")
                part = body[int(a) : int(b) + 1]
                if not part:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    return self.end_headers()
                if kind == "no range":
                    self.send_response(200)
                    part = body
                else:
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {a}-{int(a) + len(part) - 1}/{len(body)}")
                self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                self.wfile.write(part[: len(part) // 2] if kind == "cut" else part)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def quick(monkeypatch):
    """No proxy, no long waits."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(data, "PATIENCE", 0.5)
    monkeypatch.setattr(data.time, "sleep", lambda _: None)


def test_download_takes_a_part_and_cuts_at_a_story_end(tmp_path, quick):
    body = data.invent(100)
    server = Server(body)
    data.download(server.url, tmp_path / "x", 10_000)
    got = (tmp_path / "x").read_bytes()
    assert body.startswith(got) and got.endswith(b"<|endoftext|>\n") and 9_000 < len(got) <= 10_001
    assert server.requests == ["bytes=0-9999"] and os.listdir(tmp_path) == ["x"]


def test_download_goes_on_after_a_cut_connection(tmp_path, quick):
    body = data.invent(100)
    server = Server(body, lambda n: "cut" if n <= 2 else None)
    data.download(server.url, tmp_path / "x", 10_000)
    assert body.startswith((tmp_path / "x").read_bytes())
    assert server.requests == ["bytes=0-9999", "bytes=5000-9999", "bytes=7500-9999"]


def test_download_goes_on_in_the_next_run(tmp_path, quick):
    body = data.invent(100)
    with pytest.raises(data.Problem, match="gave up after 4 tries.*run again"):
        data.download(Server(body, lambda n: "cut").url, tmp_path / "x", 10_000)
    assert os.listdir(tmp_path) == ["x.part"]  # nothing half-written has the name of data
    server = Server(body)
    data.download(server.url, tmp_path / "x", 10_000)
    assert server.requests == ["bytes=9375-9999"] and body.startswith((tmp_path / "x").read_bytes())


def test_download_of_more_than_there_is(tmp_path, quick):
    body = data.invent(20) + b"\n<|endoftext|>\n"
    data.download(Server(body).url, tmp_path / "x", 10**9)
    assert (tmp_path / "x").read_bytes() == body


@pytest.mark.parametrize("kind, words", [
    (404, "HTTP 404.*TINY_URL"), (500, "HTTP 500"), ("no range", "ignores Range"), ("cut", "gave up"),
])
def test_download_says_what_is_wrong(tmp_path, quick, kind, words):
    with pytest.raises(data.Problem, match=words):
        data.download(Server(data.invent(50), lambda n: kind).url, tmp_path / "x", 10_000)
    assert "x" not in os.listdir(tmp_path)


def test_download_killed_just_before_its_end_goes_on(tmp_path, quick):
    body = data.invent(20) + b"\n<|endoftext|>\n"
    (tmp_path / "x.part").write_bytes(body)  # all there is has arrived, but less than was asked for
    data.download(Server(body).url, tmp_path / "x", 10**9)
    assert (tmp_path / "x").read_bytes() == body and os.listdir(tmp_path) == ["x"]


def test_download_of_something_else_is_not_kept(tmp_path, quick):
    with pytest.raises(data.Problem, match="not TinyStories"):
        data.download(Server(b"<html>" * 1000).url, tmp_path / "x", 1000)
    assert os.listdir(tmp_path) == []


def test_silence_is_no_network_at_first_and_a_problem_later(tmp_path, quick):
    body = data.invent(50)
    with pytest.raises(data.NoNetwork):
        data.download(Server(body, lambda n: "silent").url, tmp_path / "x", 10_000)
    with pytest.raises(data.Problem, match="gave up"):
        data.download(Server(body, lambda n: "cut" if n == 1 else "silent").url, tmp_path / "x", 10_000)


def test_load_downloads_once(tmp_path, quick, monkeypatch):
    server = Server(data.invent(200))
    monkeypatch.setenv("TINY_URL", server.url)
    first = data.load(megabytes=0.05, cache=str(tmp_path))
    assert len(server.requests) == 2 and first.source.startswith("TinyStories") and 40_000 < len(first.train) <= 50_000
    again = data.load(megabytes=0.05, cache=str(tmp_path))
    assert len(server.requests) == 2 and np.array_equal(first.train, again.train)


def test_without_network_stories_are_built_in(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.delenv("TINY_URL", raising=False)
    monkeypatch.setattr(data, "URL", "http://127.0.0.1:9")  # nobody listens there
    text = data.load(cache=str(tmp_path))
    assert "built-in" in text.source and "MEAN NOTHING" in capsys.readouterr().err
    monkeypatch.setenv("TINY_URL", "http://127.0.0.1:9")  # but an address that was asked for is not silently left aside
    with pytest.raises(data.Problem, match="TINY_URL.*cannot be reached"):
        data.load(cache=str(tmp_path))


# ---- ngram.py ------------------------------------------------------------------------------------------------------------------------

def padded(text, i, n):
    """The n-1 bytes before i as the n-gram sees them: nothing but END beyond the story's start."""
    context = bytes(text[max(0, i - n + 1) : i])
    return context.rpartition(b"\0")[2].rjust(n - 1, b"\0")


def brute_force(text, model, without=None):
    """The same model in plain Python, straight from the formulas -> p(asked, i): 256 probabilities. `without`: one event left out.

    From the model itself come only the constants it has learned, which leaving one out does not change.
    """
    kind, order, learned = model.smoothing, model.order, model.learned.astype(float)
    grams = [(i, text[i]) for i in range(len(text)) if i != without]
    counts = {n: Counter((padded(text, i, n), byte) for i, byte in grams) for n in range(1, order + 1)}
    if kind.endswith("kneser-ney"):
        for n in range(order - 1, 0, -1):  # continuation counts: one for each different longer n-gram
            counts[n] = Counter((context[1:], byte) for context, byte in counts[n + 1])
    followers = defaultdict(dict)
    for n in counts:
        for (context, byte), count in counts[n].items():
            followers[n, context][byte] = count

    def p(asked, i):
        dist = np.full(256, 1 / 256)
        for n in [order] if kind == "add-k" else range(1, order + 1):
            after = followers.get((n, padded(asked, i, n)))
            if not after:
                continue
            total, own, lower = sum(after.values()), np.zeros(256), 0
            for byte, c in after.items():
                own[byte] = c / total
            if kind.endswith("kneser-ney") or kind == "absolute":
                lower = sum(learned[n][min(c, 3)] for c in after.values()) / total
                own[list(after)] -= [learned[n][min(c, 3)] / total for c in after.values()]
            elif kind == "witten-bell":
                lower = len(after) / (total + len(after))
                own *= 1 - lower
            elif kind == "jelinek-mercer":
                lower = 1 - learned[n][0]
                own *= learned[n][0]
            elif kind == "add-k":
                lower = 2.56 / (total + 2.56)
                own *= 1 - lower
            dist = own + lower * dist
        return dist

    return p


NEW = np.frombuffer(b"a cat\0the bat sat on that zebra\0\0mat the rat", np.uint8)


@pytest.mark.parametrize("smoothing", ngram.SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 8])
def test_every_smoothing_equals_brute_force(order, smoothing):
    model = ngram.NGram(order, smoothing).fit(TEXT)
    p = brute_force(TEXT, model)
    for asked in (TEXT, NEW):
        got = model.probs(asked, np.arange(len(asked) + 1))
        assert got.dtype == np.float32 and got.shape == (len(asked) + 1, 256)
        assert np.abs(got.sum(1) - 1).max() < 1e-5
        assert got.min() > 0 or smoothing == "maximum-likelihood"
        assert np.abs(got - [p(asked, i) for i in range(len(asked) + 1)]).max() < 1e-6


@pytest.mark.parametrize("smoothing", ngram.SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 3, 6])
def test_leave_one_out_equals_a_recount(order, smoothing):
    model = ngram.NGram(order, smoothing).fit(TEXT)
    got = model.probs(TEXT, np.arange(len(TEXT)), leave_one_out=True)
    for i in range(0, len(TEXT), 3):
        assert np.abs(got[i] - brute_force(TEXT, model, without=i)(TEXT, i)).max() < 1e-6


def test_probabilities_are_normalised_and_never_zero():
    text = data.encode(data.invent(300))
    for counted in (text, np.full(5000, 97, np.uint8), np.zeros(100, np.uint8), np.array([5], np.uint8)):
        model = ngram.NGram(12).fit(counted)
        for asked in (counted[:2000], np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8)):
            for leave in (False, True) if asked is not counted and len(counted) >= len(asked) and (counted[: len(asked)] == asked).all() else (False,):
                p = model.probs(asked, np.arange(len(asked)), leave_one_out=leave)
                assert np.abs(p.astype(float).sum(1) - 1).max() < 1e-5 and p.min() > 0


def test_the_story_so_far_equals_brute_force():
    """adaptive: the longest echo first, each with the weight of its kind, and what is left for the counts; straight from the description."""
    counted = data.encode(data.invent(150))
    model = ngram.NGram(6).fit(counted)
    text = np.concatenate((data.encode(data.invent(4, seed=9)), data.encode(b"aaaaaaaaaaaaaabaaaaaaaa abcabcabd abcabc")))
    got, fixed = (model.probs(text, np.arange(len(text) + 1), adaptive=adaptive) for adaptive in (True, False))
    for i in range(0, len(text) + 1, 3):
        story, want, left = bytes(text[:i]).rpartition(b"\0")[2], np.zeros(256), 1.0
        for weight, t in reversed(list(zip(model.echo, ngram.ECHOES))):
            tail = story[max(0, len(story) - t) :]  # near its beginning a story has no t bytes yet, and so no place before
            after = [story[j] for j in range(t, len(story)) if story[j - t : j] == tail and len(tail) == t][-ngram.LATEST :]
            if after:
                w = weight[min(len(after), 3) + (0 if len(set(after)) == 1 else 2)]
                np.add.at(want, after, left * w / len(after))
                left *= 1 - w
        assert np.abs(got[i] - (want + left * fixed[i])).max() < 1e-6
    assert np.abs(got.astype(float).sum(1) - 1).max() < 1e-5 and got.min() > 0
    some = np.concatenate((np.arange(300, 420), [7, 5, 6], np.arange(len(text) - 30, len(text) + 1)))
    assert np.allclose(model.probs(text, some, adaptive=True), got[some], atol=1e-7)  # wherever the stretches begin


def test_listening_to_the_story_helps():
    train, held = data.split(data.encode(data.invent(600)))
    model = ngram.NGram(4).fit(train)
    assert model.bits_per_byte(held, adaptive=True) < 0.99 * model.bits_per_byte(held)


def test_learn_weights_finds_the_mixture_that_made_the_data():
    rng = np.random.default_rng(0)
    p = rng.random((40_000, 3)) * 0.9 + 0.05  # what three models say of each byte's two values; the byte comes from one of them
    kind = np.stack([np.zeros(len(p), int), rng.integers(0, 3, len(p)), np.ones(len(p), int)], 1)
    truth = np.array([[0, 0, 0], [0, 0.2, 0.7], [0, 0.4, 0]])
    source = np.where(rng.random(len(p)) < 0.4, 2, np.where(rng.random(len(p)) < truth[1][kind[:, 1]], 1, 0))
    came = rng.random(len(p)) < p[np.arange(len(p)), source]
    weight = ngram.learn_weights(np.where(came[:, None], p, 1 - p), kind, rounds=300)
    assert np.abs(weight - truth)[1:].max() < 0.06 and (weight[:, 0] == 0).all()


def test_leaving_out_tells_new_text_from_recited():
    train, held = data.split(data.encode(data.invent(600)))
    model, some = ngram.NGram(12).fit(train), np.arange(0, len(train), 7)
    seen, left_out = model.bits_per_byte(train, some), model.bits_per_byte(train, some, leave_one_out=True)
    assert seen < 0.9 * model.bits_per_byte(held) < left_out < 1.1 * model.bits_per_byte(held)


def test_more_context_predicts_better_and_nothing_can_be_counted_in_nothing():
    train, held = data.split(data.encode(data.invent(600)))
    scores = [ngram.NGram(order).fit(train).bits_per_byte(held) for order in (1, 2, 4, 8)]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(ValueError, match="empty"):
        ngram.NGram().fit(np.zeros(0, np.uint8))


def test_ngram_save_load(tmp_path):
    model = ngram.NGram(6).fit(TEXT)
    model.save(tmp_path / "n.npz")
    again = ngram.NGram.load(tmp_path / "n.npz")
    for options in ({"leave_one_out": True}, {"adaptive": True}):
        assert np.array_equal(model.probs(TEXT, np.arange(50), **options), again.probs(TEXT, np.arange(50), **options))
    assert os.listdir(tmp_path) == ["n.npz"]


def test_generate_is_repeatable_and_stops_at_a_story_end():
    model = ngram.NGram(5).fit(data.encode(data.invent(200)))
    story = model.generate(b"Once upon", 3000, 0.5, seed=3)
    assert story == model.generate(b"Once upon", 3000, 0.5, seed=3) != model.generate(b"Once upon", 3000, 0.5, seed=4)
    assert story.startswith(b"Once upon") and b"\0" not in story and len(story) < 3000


def test_discounts_are_chen_and_goodmans():
    count = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 7])
    y = 40 / (40 + 2 * 20)
    assert ngram.discounts(count, "modified-kneser-ney") == pytest.approx([0, 1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20, 3 - 4 * y * 5 / 10])
    assert ngram.discounts(count, "absolute") == pytest.approx([0, y, y, y])
    assert all(0 < d <= c for c, d in zip((1, 2, 3), ngram.discounts(np.array([1]), "modified-kneser-ney")[1:]))


# ---- tiny.py -------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def model():
    """A net with every weight random: the zeros it starts with would hide mistakes."""
    torch.manual_seed(0)
    net = tiny.GPT(layers=2, heads=2, width=16, context=32, rows=64)
    for p in [*net.parameters(), net.memory.table]:
        torch.nn.init.normal_(p, std=0.3)
    net.memory.count.random_(0, 2)  # some contexts are known, some not
    return net


def test_contexts_are_the_same_exactly_where_the_text_is():
    text = b"\0The cat's hat. The cats sat, and the cat's hat sat: \"The cat's mat!\" the cat's hat sat. \xc3\xa9t\xc3\xa9 the cat"
    words = tiny.contexts(np.frombuffer(text, np.uint8)[None], len(text))[0]
    assert np.array_equal(tiny.contexts(np.frombuffer(text, np.uint8)[None], 5)[0], words[-5:])

    def named(i):
        """The contexts that byte i completes, in plain Python."""
        def word_before(end):
            start = end
            while start > 0 and (chr(text[start - 1]).isalpha() or text[start - 1] >= 128 or text[start - 1] == ord("'")):
                start -= 1
            return start
        begin = word_before(i + 1)
        now, before = (text[begin : i + 1], b"" if i + 1 > begin else text[i : i + 1]), []
        for _ in range(2):
            end = begin
            while end > 0 and word_before(end) == end:
                end -= 1
            begin = word_before(end)
            before.append(text[begin:end])
        one, two = before
        return [text[max(0, i - n + 1) : i + 1].rjust(n, b"\0") for n in tiny.GRAMS] + [now, (now, one), (now, one, two), (now, two)]

    names = [named(i) for i in range(len(text))]
    for kind in range(tiny.KINDS):
        for i in range(len(text)):
            for j in range(i):
                assert (words[i, kind] == words[j, kind]) == (names[i][kind] == names[j][kind]), (kind, names[i][kind], names[j][kind])
    assert len(np.unique(words)) == len({(kind, name) for row in names for kind, name in enumerate(row)})


def test_memory_learns_as_adagrad_on_its_known_rows():
    memory = tiny.Memory(width=4, rows=8)
    torch.nn.init.normal_(memory.table)
    table, pushed = memory.table.clone().requires_grad_(), torch.full((8,), 0.03)
    memory.count.random_(0, 2)
    memory.again = True  # nothing is counted below
    memory.count *= 3
    for step in range(3):
        slots, goal = torch.randint(0, 2**tiny.SLOTS, (5, tiny.KINDS)), torch.randn(5, 4)
        rows, known = slots >> tiny.SLOTS - 3, memory.count[slots] > 0
        assert known.any() and not known.all()
        hashes = slots.numpy().astype(np.uint64) << np.uint64(64 - tiny.SLOTS)  # the top bits are the slot, the first of them the row
        (memory(hashes) - goal).square().mean().backward()
        memory.step(0.1)
        each = table[rows] * known[:, :, None]  # (5, KINDS, 4), and the gradient of each look-up
        gradient = 5 * torch.autograd.grad((each.sum(1) - goal).square().mean(), each)[0]
        for n, k in known.nonzero().tolist():
            pushed[rows[n, k]] += gradient[n, k].square().mean()
        with torch.no_grad():
            for n, k in known.nonzero().tolist():
                table[rows[n, k]] -= 0.1 * gradient[n, k] / pushed[rows[n, k]].sqrt()
        assert torch.allclose(memory.table, table, atol=1e-5)


def test_memory_tells_of_a_context_only_what_was_learned_elsewhere():
    memory = tiny.Memory(width=2, rows=8)
    torch.nn.init.ones_(memory.table)
    hashes = (np.arange(tiny.KINDS, dtype=np.uint64) * 999 << np.uint64(64 - tiny.SLOTS))[None]  # one position

    def visit():
        """-> of how many contexts the row is looked up when it is learned from, and before and after that when it is not"""
        out = memory(hashes)
        with torch.no_grad():
            before = memory(hashes)
            out.grad = torch.zeros_like(out)
            memory.step(0.0)
            return [round(x[0, 0].item() / len(hashes[0])) for x in (out, before, memory(hashes))]

    assert visit() == [0, 0, 1]  # new, so nothing is known; from now on it is
    assert visit() == [1, 1, 1]
    memory.again = True
    assert visit() == [0, 1, 1]  # counted twice, one of them here: a single other place
    memory.again = False
    assert visit() == [1, 1, 1]
    memory.again = True
    assert visit() == [1, 1, 1] and memory.count.max() == 3  # two others; later readings count nothing
    memory.again, memory.count[0] = False, 255
    assert visit() == [1, 1, 1] and memory.count.max() == 255


def test_no_byte_sees_the_future(model):
    ids = torch.randint(0, 256, (1, 32))
    before = model(ids)[0]
    for t in (1, 5, 31):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 256
        after = model(changed)[0]
        assert torch.allclose(before[:, :t], after[:, :t], atol=1e-5) and not torch.allclose(before[:, t], after[:, t], atol=1e-3)


def test_attention_finds_what_came_next_where_the_text_looked_alike():
    torch.manual_seed(0)
    block, x, still = tiny.Block(width=64, heads=1), torch.randn(1, 40, 64), (torch.ones(40, 32), torch.zeros(40, 32))  # no positions
    x[0, 30] = x[0, 10]
    block.qkv.weight.data[128:] = block.out.weight.data[:] = torch.eye(64)  # values are the vectors themselves
    found = (block(x, *still) - x)[0, 30]
    assert torch.cosine_similarity(found[None], x[0]).argmax() == 11


@pytest.mark.parametrize("pieces", [[32], [1] * 32, [5, 1, 1, 20, 5], [31, 1]])
def test_cached_logits_equal_uncached(model, pieces):
    ids = torch.randint(0, 256, (3, 32))
    cache = {}
    parts = torch.cat([model(piece, cache)[0] for piece in ids.split(pieces, 1)], 1)
    assert torch.allclose(parts, model(ids)[0], atol=1e-4)
    with pytest.raises(ValueError, match="33 bytes do not fit"):
        model(ids[:, :1], cache)


def test_quick_is_forward(model):
    ids = torch.randint(0, 256, (1, 32))
    cache = {}
    with torch.inference_mode():
        first, quick = model(ids[:, :5], cache)[0], tiny.quick(model, cache)
        parts = torch.cat([first, *(quick(byte)[None, None] for byte in ids[0, 5:].tolist())], 1)
        assert torch.allclose(parts, model(ids)[0], atol=1e-4)


def test_generate_feeds_what_evaluate_judges(model):
    """Beyond the context, every byte is drawn from the logits that the last half to whole context gives uncached."""
    prompt = bytes(range(65, 105))
    told = [byte for _, (byte,) in zip(range(60), tiny.generate(model, [prompt], temperature=0))]
    text = [0, *prompt, *told]
    first = len(prompt) + 1
    fed = first - 16  # the prompt is longer than the context: its last half is fed
    for i in range(first, len(text)):
        if i - fed > 32:
            fed = i - 16
        assert text[i] == int(model(torch.tensor([text[fed:i]]))[0][0, -1].argmax())


def test_stories_side_by_side_are_those_told_alone(model):
    prompts = [b"Once", b"A longer beginning", b"Tom"]
    together = tiny.stories(model, prompts, 80, temperature=0)
    assert together == [tiny.stories(model, [p], 80, temperature=0)[0] for p in prompts]
    assert all(story.startswith(p) for story, p in zip(together, prompts))


def test_residual_is_the_ngram_at_step_0_and_tells_what_it_was_judged_on():
    counted = data.encode(data.invent(200))
    counting, text = ngram.NGram(5).fit(counted), data.encode(data.invent(5, seed=3))
    torch.manual_seed(0)
    net = tiny.GPT(heads=2, width=16, context=64, rows=64, residual=True)
    net.ngram = counting
    assert tiny.evaluate(net, text) == pytest.approx(counting.bits_per_byte(text), rel=1e-3)
    for p in [*net.parameters(), net.memory.table]:
        torch.nn.init.normal_(p, std=0.1)
    said, prompt = [], bytes(text[:80]).split(b"\0")[0]
    told = [byte for _, (byte,) in zip(range(60), tiny.generate(net, [prompt], 0, fuse=lambda p, *_: said.append(p) or p))]
    whole = np.frombuffer(prompt + bytes(told), np.uint8)
    nats = [torch.log(p[0, byte]).item() for p, byte in zip(said, told)]
    p = counting.probs(whole, np.arange(len(whole) + 1))
    fed = 0  # in `whole` with its END in front; the cache starts again at half a context
    for i in range(len(prompt), len(whole)):
        if i + 1 - fed > 64:
            fed = i + 1 - 32
        ids = torch.tensor([[0, *whole[:i]]])[:, fed:]
        logits, _ = net(ids, ngram=torch.from_numpy(p[fed : i + 1])[None])
        assert torch.log_softmax(logits[0, -1], -1)[whole[i]].item() == pytest.approx(nats[i - len(prompt)], abs=1e-3)


def test_distillation_loss_is_the_cross_entropy_it_claims():
    logits, target = torch.randn(7, 256), torch.randint(0, 256, (7,))
    teacher = torch.softmax(torch.randn(7, 256), -1)
    log_p = torch.log_softmax(logits, -1)
    want = -0.4 * log_p[torch.arange(7), target].mean() - 0.6 * (teacher * log_p).sum(1).mean()
    assert torch.allclose(tiny.distillation_loss(logits, target, teacher, 0.6), want)
    assert torch.allclose(tiny.distillation_loss(logits, target, teacher, 0), F.cross_entropy(logits, target))


def test_batches_pair_each_byte_with_the_teachers_opinion_of_it():
    counted = data.encode(data.invent(200))
    teacher = ngram.NGram(6).fit(counted)
    batches = tiny.Batches(counted, 4, 32, teacher, seed=0)
    for step in range(3):
        window, q = batches.get(True)
        for at, row, dists in zip(batches.order[4 * step :], window.numpy(), q.numpy()):
            assert row.astype(np.uint8).tobytes() == (b"\0" + counted.tobytes())[at : at + 33]
            want = teacher.probs(counted, at + np.arange(32), leave_one_out=True)
            assert np.allclose(dists, want)  # distribution t is about byte t + 1 of the window


def test_batches_read_everything_once_before_anything_again():
    text = np.random.default_rng(0).integers(1, 256, 4000, dtype=np.uint8)
    whole, orders = b"\0" + text.tobytes(), []
    for world in (1, 2):
        covered = np.zeros(len(whole))
        for rank in range(world):
            batches = tiny.Batches(text, 4, 32, None, 1, rank, world)
            assert batches.per_reading == 3969 // world // (4 * 32)
            for reading in range(2):
                orders.append([whole.find(row.numpy().astype(np.uint8).tobytes()) for _ in range(batches.per_reading) for row in batches.get(False)[0]])
                once = np.zeros(len(whole))
                for at in orders[-1]:
                    assert at >= 0
                    once[at : at + 32] += 1
                assert once.max() == 1
                covered += once
        assert (covered[64:-160] >= 1).mean() > 0.9  # what does not fill a step is left out
    assert orders[0] != orders[1] and sorted(orders[0]) != sorted(orders[1])  # cut elsewhere, in another order
    later = tiny.Batches(text, 4, 32, None, 1, step=5)
    assert torch.equal(later.get(False)[0], torch.tensor([list(whole[at : at + 33]) for at in orders[0][20:24]]))
    tiny.Batches(text[:40], 8, 32, None, 1).get(False)  # shorter than a batch: some of it several times


def test_evaluate_scores_every_byte_once_with_real_context(model):
    text = np.frombuffer(STORY * 2, np.uint8)
    ids = torch.tensor([0, *text.tolist()])
    nats = 0.0
    for i in range(len(text)):
        start = 0 if i < 32 else (i // 16 - 1) * 16
        nats -= torch.log_softmax(model(ids[None, start : i + 1])[0][0, -1], -1)[text[i]].item()
    assert tiny.evaluate(model, text) == pytest.approx(nats / len(text) / math.log(2), rel=1e-4)
    state = torch.get_rng_state()
    for size in (1, 5, 16, 17, 33):
        assert tiny.evaluate(model, text[:size]) > 0
    assert torch.equal(state, torch.get_rng_state())


def test_muon_makes_orthogonal_steps_and_learns():
    x = tiny.orthogonalize(torch.randn(3, 8, 20))
    s = torch.linalg.svdvals(x)
    assert s.min() > 0.3 and s.max() < 1.3
    assert torch.allclose(tiny.orthogonalize(torch.ones(1, 20, 8)).mT, tiny.orthogonalize(torch.ones(1, 8, 20)), atol=1e-5)
    w, goal = torch.nn.Parameter(torch.zeros(6, 4)), torch.randn(6, 4)
    optimizer = tiny.Muon([w], lr=0.05)
    losses = []
    for _ in range(200):
        loss = (w - goal).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_choose():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05] + [0.0] * 252]).expand(3000, -1)
    g = torch.Generator().manual_seed(0)
    draws = lambda **kw: Counter(tiny.choose(p.log(), generator=g, **kw).tolist())
    assert set(draws(temperature=0)) == {0}
    assert draws()[1] == pytest.approx(900, abs=120) and draws(temperature=0.5)[1] == pytest.approx(3000 * 0.09 / 0.365, abs=120)
    assert set(draws(top_p=0.7)) == {0, 1} and set(draws(top_p=0.0001)) == {0}


def test_picture_and_svg_hold_the_curve():
    curve = [(5, 2.5), (60, 1.4), (120, 1.1)]
    text = tiny.picture(curve, 1.25)
    assert text.count("o") >= 3 and "n-gram 1.25" in text and "2.50" in text and "1.10" in text and "120 s" in text
    assert tiny.svg(curve, 1.25).count("<circle") == 3 and "n-gram 1.250" in tiny.svg(curve, 1.25)
    assert tiny.picture([(1, 3.0)], None) and tiny.svg([(1, 3.0)], None)


def closing_block(stdout):
    """The `key: value` lines of a run -> dict."""
    return dict(line.split(": ", 1) for line in stdout.splitlines() if ": " in line and line.split(": ")[0].replace("_", "").isalpha())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, long_file):
    """One whole run of the main job on the clock, as a user starts it. -> (its output, its folder)"""
    out = tmp_path_factory.mktemp("run") / "out"
    result = script("tiny.py", "--minutes", 0.4, "--data", long_file, "--out", out, "--width", 32, "--order", 8)
    assert result.returncode == 0, result.stderr
    return result, out


def test_main_job(finished):
    result, out = finished
    facts = closing_block(result.stdout)
    keys = "val_bpb ngram_bpb seconds steps bytes_seen parameters device seed out".split()
    assert all(key in facts for key in keys)
    assert 24 * 0.95 < float(facts["seconds"]) < 24 * 1.05  # ±2 % of five minutes are 6 s; here 5 % are 1.2 s
    assert float(facts["val_bpb"]) < 1.5 and float(facts["ngram_bpb"]) < 0.6
    assert int(facts["bytes_seen"]) == int(facts["steps"]) * 8 * 512
    assert "\r" not in result.stderr and result.stdout.rstrip().endswith(f"python sample.py --out {out}")
    assert "NOTICE" not in result.stderr
    assert sorted(os.listdir(out)) == ["curve.svg", "log.jsonl", "model.pt"]


def test_sample_reads_the_checkpoint(finished):
    _, out = finished
    command = ["sample.py", "--out", out, "--n", 3, "--length", 400]
    result = script(*command)
    told = result.stdout.split("\n<|endoftext|>\n")
    assert len(told) == 3 and all(story.startswith("Once upon a time") for story in told), result.stderr
    assert script(*command).stdout == result.stdout != script(*command, "--seed", 2).stdout
    model, checkpoint = tiny.load_checkpoint(out)
    assert checkpoint["facts"]["val_bpb"] == float(closing_block(finished[0].stdout)["val_bpb"])
    result = script("sample.py", "--out", out, "--n", 1, "--length", 40, "--prompt", b"\xff\xfe caf\xc3\xa9 \x1b[2J".decode("utf-8", "surrogateescape"))
    assert result.returncode == 0 and result.stdout.startswith("\ufffd\ufffd café \ufffd[2J")


def test_a_residual_run_is_whole(tmp_path, stories_file):
    result = script("tiny.py", "--steps", 30, "--data", stories_file, "--out", tmp_path / "r", "--order", 4, "--width", 16, "--residual")
    facts = closing_block(result.stdout)
    assert float(facts["val_bpb"]) < float(facts["ngram_bpb"]), result.stderr
    assert script("sample.py", "--out", tmp_path / "r", "--n", 1, "--length", 60).stdout.startswith("Once upon a time")


def test_the_largest_size_that_gets_enough_steps(monkeypatch):
    text = data.encode(data.invent(50))
    monkeypatch.setattr(tiny, "ENOUGH", 10)
    monkeypatch.setattr(tiny, "learn", lambda *_: time.sleep(0.01))  # a step
    monkeypatch.setattr(tiny, "SIZES", {"small": dict(layers=1, heads=1, width=16, context=32, batch=2),
                                        "large": dict(layers=1, heads=1, width=128, context=128, batch=4)})
    pick = lambda seconds, *options: tiny.pick_size(tiny.parse_arguments(options), text, torch.device("cpu"), seconds)
    assert pick(2)[0]["width"] == 128 and pick(0.01)[0]["width"] == 16 and "more than small needs 10" in pick(0.01)[1]
    assert pick(2, "--steps", "9")[0]["width"] == 16 and pick(0.01, "--size", "large", "--width", "32")[0] == dict(
        layers=1, heads=1, width=32, context=128, batch=4)
    monkeypatch.setattr(tiny, "LEAST", 9 * 4 * 128 // 2)
    text = text[:1000]
    assert pick(2)[0]["width"] == 16 and "large 8;" in pick(2)[1]  # time enough, too little text


@slow
def test_seeds_and_sweep_go_on_where_they_stopped(tmp_path, stories_file):
    def lines(*options):
        result = script(os.path.join(HERE, "tiny.py"), "--steps", 4, "--order", 0, "--width", 16, "--data", stories_file, *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    first = lines("--seeds", 1)
    both = lines("--seeds", 2)
    table = (tmp_path / "out-seeds.tsv").read_text().splitlines()
    assert len(table) == 3 and table[1] in first and table[1].rsplit("\t", 1)[0] in both
    bpb = [float(line.split("\t")[0]) for line in table[1:]]
    assert f"2 runs: {np.mean(bpb):.4f} ± {np.std(bpb, ddof=1):.4f}" in both
    assert (tmp_path / "out-seed2" / "model.pt").exists()
    (tmp_path / "sweep.tsv").write_text("not\ta table\n")
    refused(script(os.path.join(HERE, "tiny.py"), "--sweep", 1, cwd=tmp_path), "sweep.tsv", "move it away")


def test_without_network_or_ngram(tmp_path):
    """The main job on the built-in stories, without --data, when nothing answers."""
    code = "import data, tiny; data.URL = 'http://127.0.0.1:9'; data.run(lambda: tiny.main(['--steps', '3', '--order', '0', '--distill', '0']))"
    result = script("-c", code, cwd=tmp_path, env={"PYTHONPATH": HERE})
    assert result.returncode == 0, result.stderr
    assert "MEAN NOTHING" in result.stderr and "ngram_bpb: none" in result.stdout and "val_bpb: " in result.stdout


BAD = [  # command, words of the one line that answers it
    ("tiny.py --data missing.txt", ["cannot read missing.txt", "--data"]), ("tiny.py --data empty.txt", ["empty.txt is empty"]),
    ("tiny.py --data folder", ["cannot read folder", "directory"]), ("tiny.py --data nul.txt", ["training text has 0 bytes"]),
    ("tiny.py --data short.txt", ["training text has 9 bytes", "at least 513"]), ("tiny.py --valid short.txt", ["--valid needs --data"]),
    ("tiny.py --data stories.txt --valid missing.txt", ["missing.txt"]), ("tiny.py --data stories.txt --valid short.txt", ["validation text has 10 bytes"]),
    ("tiny.py --data stories.txt --valid stories.txt", ["stories.txt", "both"]),
    ("tiny.py --minutes 0", ["--minutes 0"]), ("tiny.py --minutes -1", ["--minutes -1"]), ("tiny.py --minutes nan", ["--minutes nan"]),
    ("tiny.py --minutes inf", ["--minutes inf"]), ("tiny.py --steps 0", ["--steps 0"]), ("tiny.py --rate 0", ["--rate 0"]),
    ("tiny.py --distill 1.5", ["--distill 1.5"]), ("tiny.py --order 300", ["--order 300"]), ("tiny.py --order 0 --distill 0.5", ["no teacher"]),
    ("tiny.py --residual --distill 0.5", ["leave out"]), ("tiny.py --width 30 --heads 4", ["--width 30"]), ("tiny.py --layers 0", ["--layers 0"]),
    ("tiny.py --context 7000", ["--context 7000"]), ("tiny.py --context 33", ["--context 33"]), ("tiny.py --batch 0", ["--batch 0"]),
    ("tiny.py --device mps", ["--device mps", "--device cpu"]), ("tiny.py --device cuda", ["--device cuda"]),
    ("tiny.py --megabytes 0", ["--megabytes 0"]), ("tiny.py --seeds 0", ["--seeds 0"]), ("tiny.py --sweep -3", ["--sweep -3"]),
    ("tiny.py --data stories.txt --out short.txt", ["cannot write short.txt"]), ("tiny.py --data stories.txt --out short.txt/run", ["cannot write short.txt"]),
    ("tiny.py --resume nowhere", ["no model.pt in nowhere"]), ("tiny.py --resume broken", ["not a checkpoint"]), ("tiny.py --resume other", ["not a checkpoint"]),
    ("tiny.py --resume old", ["another version"]),
    ("ngram.py --orders 0", ["--orders"]), ("ngram.py --data empty.txt", ["empty.txt"]), ("ngram.py --load missing", ["cannot read missing"]),
    ("ngram.py --load empty.txt", ["not what ngram.py saved"]), ("ngram.py --temperature -1", ["--temperature -1"]),
    ("ngram.py --data stories.txt --orders 2 --save folder", ["cannot write folder"]), ("ngram.py --data stories.txt --orders 2 --save no/where", ["cannot write no/where"]),
    ("data.py --data missing.txt", ["missing.txt"]), ("data.py --data folder", ["folder"]), ("data.py --megabytes nan", ["--megabytes nan"]),
    ("sample.py --out nowhere", ["no model.pt in nowhere", "train a model first"]), ("sample.py --out broken", ["not a checkpoint"]),
    ("sample.py --out other", ["not a checkpoint"]), ("sample.py --out evil", ["not a checkpoint"]), ("sample.py --out old", ["another version"]),
    ("sample.py --out short.txt", ["short.txt"]), ("sample.py --out isfolder", ["isfolder"]), ("sample.py --device cuda", ["--device cuda"]),
    ("sample.py --fuse nonsense", ["no model.pt in out"]), ("sample.py --score", ["--fuse"]), ("sample.py --export x", ["--judge"]),
    ("sample.py --fuse ngram --weights -1 2", ["--weights"]), ("sample.py --judge out out --data stories.txt", ["no model.pt in out"]),
    ("sample.py --n 0", ["--n 0"]), ("sample.py --length 0", ["--length 0"]), ("sample.py --temperature -1", ["--temperature -1"]),
    ("sample.py --top-p 0", ["--top-p 0"]), ("sample.py --top-p 1.5", ["--top-p 1.5"]), ("sample.py --order 0", ["--order 0"]),
]


class Evil:
    """A pickle that would create a file when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory):
    """A folder with everything that BAD names."""
    here = tmp_path_factory.mktemp("bad")
    (here / "empty.txt").write_bytes(b"")
    (here / "short.txt").write_bytes(b"Too short.")
    (here / "nul.txt").write_bytes(bytes(1000))
    (here / "stories.txt").write_bytes(data.invent(50))
    (here / "folder").mkdir()
    for name in ("broken", "other", "evil", "old", "isfolder"):
        (here / name).mkdir()
    (here / "isfolder" / "model.pt").mkdir()
    (here / "broken" / "model.pt").write_bytes(b"no checkpoint")
    torch.save({"model": {"weight": torch.zeros(3)}}, here / "other" / "model.pt")
    torch.save({"version": -1}, here / "old" / "model.pt")
    torch.save(Evil(), here / "evil" / "model.pt")
    return here


@pytest.mark.parametrize("command, words", BAD)
def test_bad_input_gets_one_line(bad_place, command, words, monkeypatch):
    """In this process, with what data.run would do with it: one line and exit code 1, nothing written."""
    if ("cuda" in command and torch.cuda.is_available()) or ("mps" in command and torch.backends.mps.is_available()):
        pytest.skip("this machine has one")
    monkeypatch.chdir(bad_place)
    before = sorted(map(str, bad_place.rglob("*")))
    name, *rest = command.split()
    if name == "ngram.py":  # as a module it is the class alone
        refused(script(os.path.join(HERE, name), *rest, cwd=bad_place), *words)
    else:
        monkeypatch.setattr(sys, "argv", [name, *rest])
        with pytest.raises(SystemExit) as ended:
            data.run({"data.py": data, "tiny.py": tiny, "sample.py": sample}[name].main)
        line = ended.value.code
        assert line.startswith("error: ") and "\n" not in line and all(word in line for word in words), line
    assert sorted(map(str, bad_place.rglob("*"))) == before


def test_bad_input_from_outside(bad_place):
    refused(script(os.path.join(HERE, "tiny.py"), "--data", "missing.txt", cwd=bad_place), "missing.txt")
    result = script(os.path.join(HERE, "tiny.py"), "--no-such-option", cwd=bad_place)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    stories = ["--data", "stories.txt"]
    prompt = script(os.path.join(HERE, "ngram.py"), *stories, "--orders", 3, "--prompt", b"\xff\xfe".decode("utf-8", "surrogateescape"), cwd=bad_place)
    assert prompt.returncode == 0 and "\ufffd" in prompt.stdout


def test_a_full_disk_leaves_the_old_file(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"old")
    code = ("import data, resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); "
            "data.run(lambda: data.save('model.pt', bytes(2000)))")
    refused(script("-c", code, cwd=tmp_path, env={"PYTHONPATH": HERE}), "cannot write model.pt", "free some space")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.pt", b"old")]


def test_a_truncated_checkpoint_is_refused(tiny_runs, tmp_path):
    tiny_runs("a", "--steps", 2)
    whole = (tmp_path / "a" / "model.pt").read_bytes()
    for part in range(16):
        (tmp_path / "a" / "model.pt").write_bytes(whole[: len(whole) * part // 16])
        with pytest.raises(data.Problem, match="not a checkpoint"):
            tiny.load_checkpoint(str(tmp_path / "a"))


def test_help_has_an_example():
    for name in ("data.py", "ngram.py", "tiny.py", "sample.py"):
        result = script(name, "--help")
        assert result.returncode == 0 and "example: python " + name in result.stdout


# ---- what one can rely on ------------------------------------------------------------------------------------------------------------

SMALL = ["--width", "16", "--context", "64", "--order", "4"]


@pytest.fixture
def tiny_runs(monkeypatch, tmp_path, stories_file):
    """A function that calls tiny.main in this process with a small net and memory. -> the weights that it saved"""
    monkeypatch.setattr(tiny, "GPT", functools.partial(tiny.GPT, rows=2**10))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(name, *options):
        tiny.main(["--data", str(stories_file), "--out", str(tmp_path / name), *SMALL, *map(str, options)] if "--resume" not in options else [*map(str, options)])
        return torch.load(tmp_path / name / "model.pt", weights_only=True)["weights"]

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_steps_repeat_exactly_and_evaluating_changes_nothing(tiny_runs, monkeypatch):
    first = tiny_runs("a", "--steps", 12, "--distill", 0.5)
    assert same(first, tiny_runs("b", "--steps", 12, "--distill", 0.5))
    monkeypatch.setattr(tiny, "SHOW", ())
    assert same(first, tiny_runs("c", "--steps", 12, "--distill", 0.5))


@pytest.mark.parametrize("cut", [1, 4, 8, 9, 15])
def test_interrupted_and_resumed_equals_uninterrupted(tiny_runs, monkeypatch, tmp_path, cut, capsys, stories_file):
    """Bit for bit, in the phase with a teacher, at its end and after it."""
    options = ["--steps", 16, "--distill", 0.5]
    whole, learn, count = tiny_runs("whole", *options), tiny.learn, []

    def counted(*rest):
        count.append(1)
        if len(count) == cut:
            os.kill(os.getpid(), signal.SIGTERM if cut % 2 else signal.SIGINT)
        return learn(*rest)

    monkeypatch.setattr(tiny, "learn", counted)
    with pytest.raises(SystemExit) as ended:
        tiny_runs("cut", *options)
    assert ended.value.code in (128 + signal.SIGTERM, 128 + signal.SIGINT) and f"interrupted after {cut} steps" in capsys.readouterr().out
    with pytest.raises(data.Problem, match="--steps 17 differs .* which has 16"):
        tiny.main(["--resume", str(tmp_path / "cut"), "--steps", "17"])
    (tmp_path / "other.txt").write_bytes(data.invent(399))
    assert same(whole, tiny_runs("cut", "--resume", tmp_path / "cut", "--steps", "16"))
    assert len(count) == 16
    with pytest.raises(data.Problem, match="is complete"):
        tiny.main(["--resume", str(tmp_path / "cut")])


def test_resume_refuses_other_text(tiny_runs, monkeypatch, tmp_path, stories_file):
    monkeypatch.setattr(tiny, "SAVE_EVERY", 0)
    path = tmp_path / "text.txt"
    path.write_bytes(stories_file.read_bytes())
    monkeypatch.setattr(tiny, "stories", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT) or [b""])
    with pytest.raises(SystemExit):
        tiny_runs("r", "--steps", 9, "--data", path)
    path.write_bytes(data.invent(300))
    with pytest.raises(data.Problem, match="not the one of the run"):
        tiny.main(["--resume", str(tmp_path / "r")])


KILLED = """
import functools, os, random, signal, sys, time
import tiny
random.seed(0)
tiny.torch.optim.AdamW([tiny.torch.zeros(1)])  # the first optimizer imports for a second
tiny.GPT, tiny.SAVE_EVERY = functools.partial(tiny.GPT, rows=2**10), 0  # saves after every step
for i in range(int(sys.argv[1])):
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        tiny.START = began
        tiny.torch.set_num_threads(1)
        tiny.main(sys.argv[2:] + ["--out", f"run{i}", "--minutes", "1"])
        os._exit(0)
    time.sleep(random.uniform(0.1, 1.3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@slow
def test_killed_at_any_moment_leaves_a_whole_checkpoint_or_none(tmp_path, stories_file):
    kills = 30
    small = tmp_path / "small.txt"
    small.write_bytes(data.invent(60))
    result = script("-c", KILLED, kills, "--data", small, *SMALL, "--order", 0, "--size", "small", cwd=tmp_path, env={"PYTHONPATH": HERE})
    assert result.returncode == 0, result.stderr
    loaded = 0
    for i in range(kills):
        if (tmp_path / f"run{i}" / "model.pt").exists():
            model, rest = tiny.load_checkpoint(str(tmp_path / f"run{i}"))
            assert rest["training"]["now"]["step"] > 0 and all(p.isfinite().all() for p in model.parameters())
            loaded += 1
    assert loaded > kills // 3


def test_a_run_is_never_overwritten(tiny_runs, tmp_path, capsys):
    first = tiny_runs("a", "--steps", 2)
    tiny_runs("a", "--steps", 3)
    tiny_runs("a", "--steps", 4)
    assert "it is now in" in capsys.readouterr().err
    assert same(first, torch.load(tmp_path / "a.1" / "model.pt", weights_only=True)["weights"]) and (tmp_path / "a.2" / "model.pt").exists()


def test_gradients_that_are_no_numbers_are_skipped_and_counted(tiny_runs, monkeypatch, tmp_path, capsys):
    make, batch = tiny.Batches.make, []

    def poisoned(self, taught):
        window, teacher = make(self, taught)
        batch.append(1)
        if teacher is not None and len(batch) in bad:
            teacher[0, 0] = math.nan
        return window, teacher

    monkeypatch.setattr(tiny.Batches, "make", poisoned)
    bad = {3, 5}
    weights = tiny_runs("a", "--steps", 12, "--distill", 1)
    assert "skipped_steps: 2\n" in capsys.readouterr().out and all(w.isfinite().all() for w in weights.values())
    batch, bad = [], set(range(6, 100))
    with pytest.raises(data.Problem, match="--rate 0.5"):
        tiny_runs("b", "--steps", 40, "--distill", 1)
    model, rest = tiny.load_checkpoint(str(tmp_path / "b"))
    assert rest["training"]["now"]["step"] == 5 + tiny.PATIENCE and all(p.isfinite().all() for p in model.parameters())


@slow
def test_ends_on_time_under_load(tmp_path, stories_file):
    hog = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        out = script("tiny.py", "--data", stories_file, *SMALL, "--minutes", "0.3", "--out", tmp_path / "o").stdout
    finally:
        for process in hog:
            process.kill()
    assert 18 * 0.9 < float(closing_block(out)["seconds"]) < 18 * 1.1


def test_a_sleep_does_not_count_and_the_learning_rate_goes_down_all_the_same(tmp_path, tiny_runs, monkeypatch, capsys):
    """The clock jumps by an hour in the middle of a run. (By hand: a process that is stopped on a busy machine has stopped before.)"""
    real, slept, get = time.monotonic, [0.0], tiny.Batches.get

    def sleepy(self, taught):
        slept[0] = 3600.0 * (real() > tiny.START + 3)
        return get(self, taught)

    monkeypatch.setattr(tiny.Batches, "get", sleepy)
    monkeypatch.setattr(tiny, "START", real())
    monkeypatch.setattr(time, "monotonic", lambda: real() + slept[0])
    monkeypatch.setattr(tiny, "LEAST", 10**9)  # the little text may be read again and again
    tiny_runs("o", "--minutes", 0.1)
    out = capsys.readouterr().out
    assert "slept through 3600 s" in out and 6 * 0.8 < float(closing_block(out)["seconds"]) < 6 * 1.3
    last = [json.loads(line) for line in open(tmp_path / "o" / "log.jsonl", encoding="utf-8")][-1]
    assert last["rates"][0] < 0.25 * 0.02


def test_a_run_ends_when_it_has_read_its_text_twice(tmp_path, tiny_runs, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "START", time.monotonic())
    monkeypatch.setattr(tiny, "LEAST", 0)
    learn, factors = tiny.learn, []
    monkeypatch.setattr(tiny, "learn", lambda *rest: factors.append(rest[-1]) or learn(*rest))
    (tmp_path / "short.txt").write_bytes(data.invent(100))
    tiny_runs("o", "--minutes", 5, "--size", "small", "--data", tmp_path / "short.txt")
    told, size = capsys.readouterr(), len(data.load([tmp_path / "short.txt"]).train)
    facts = closing_block(told.out)
    assert int(facts["steps"]) == 2 * ((size + 1 - 64) // (8 * 64)) and float(facts["seconds"]) < 100
    assert "NOTICE: the text was read 2.0 times" in told.err and factors[0] == 1
    assert factors[-1] == pytest.approx(2 / len(factors))  # the rate has come down by then


def test_log_and_quiet(tiny_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    tiny_runs("q", "--steps", 20, "--quiet")
    captured = capsys.readouterr()
    assert captured.out.startswith("val_bpb: ") and len(captured.out.splitlines()) == len(closing_block(captured.out)) and "\x1b" not in captured.out
    rows = [json.loads(line) for line in open(tmp_path / "q" / "log.jsonl", encoding="utf-8")]
    assert 5 <= len(rows) <= len(tiny.SHOW) and rows[-1]["step"] in (18, 19) and rows[-1]["bytes"] == rows[-1]["step"] * 8 * 64 and 0 < rows[-1]["bpb"] < 8


def test_a_large_file_is_read_only_as_far_as_needed(tmp_path):
    with open(tmp_path / "large.txt", "wb") as file:
        file.write(data.invent(3000))
        file.truncate(2_000_000_000)
    result = script("-c", "import data, sys; t = data.load([sys.argv[1]], megabytes=1); print(len(t.train), data.peak_memory())", tmp_path / "large.txt")
    size, memory = map(int, result.stdout.split())
    assert 900_000 < size < 1_000_000 and memory < 300e6 and "2,000 MB; using the first 1" in result.stderr


def test_a_device_that_computes_something_else_is_not_used(monkeypatch, capsys):
    assert tiny.fault(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tiny, "fault", lambda device: "it computes another loss")
    assert tiny.pick_device("auto").type == "cpu" and "mps is not used: it computes another loss" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(tiny.GPT, "to", lambda self, device: self if device == "cpu" else setattr(self.head.weight, "data", self.head.weight * 1.5) or self)
    assert "another loss" in tiny.fault(torch.device("cuda"))
    monkeypatch.undo()
    assert tiny.fault(torch.device("meta"))  # where nothing can be computed


JOINT = """
import os, sys, torch, tiny
rank, world = tiny.processes()
torch.manual_seed(0)
model = tiny.GPT(width=16, context=32, rows=2**10)
net = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
opts = tiny.optimizers(model)
windows = torch.randint(1, 256, (3, 8, 33), generator=torch.Generator().manual_seed(1))
for window in (*windows, *windows):  # the memory knows a context from its second time on
    tiny.learn(net, opts, window[rank * 8 // world : (rank + 1) * 8 // world], None, 1.0)
if rank == 0:
    torch.save(model.state_dict(), sys.argv[1])
if world > 1:  # together: a process that leaves on its own can pull the other one down
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]


@slow
def test_two_processes_learn_what_one_learns_from_the_joint_batch(tmp_path):
    (tmp_path / "joint.py").write_text(JOINT)
    env = {"PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}
    for command in (["joint.py", "one.pt"], [*TORCHRUN, "joint.py", "two.pt"]):
        for _ in range(3):  # one start of torchrun in thirty was aborted here, before or after what is tested
            result = script(*command, cwd=tmp_path, env=env)
            if result.returncode == 0:
                break
        assert result.returncode == 0, result.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert all((one[name].float() - two[name].float()).abs().mean() < 1e-5 for name in one)
    assert one["head.weight"].abs().max() > 0.005 and one["memory.table"].abs().max() > 0.005


@slow
def test_two_processes_make_one_run_and_a_killed_one_ends_it(tmp_path, stories_file):
    env = {"OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "tiny.py", "--data", stories_file, *SMALL]
    result = script(*command, "--minutes", 0.25, "--out", tmp_path / "both", env=env)
    facts = closing_block(result.stdout)
    assert result.returncode == 0 and result.stdout.count("val_bpb:") == 1, result.stderr
    assert int(facts["bytes_seen"]) == 2 * 8 * 64 * int(facts["steps"]) and float(facts["seconds"]) < 16.5
    (tmp_path / "killed.py").write_text("import os, signal, sys, tiny\ntiny.SAVE_EVERY, learn, n = 0, tiny.learn, []\n"
                                        "def learn_and_die(*a):\n    n.append(1)\n    if len(n) == 20 and os.environ['RANK'] == '1':\n"
                                        "        os.kill(os.getpid(), signal.SIGKILL)\n    return learn(*a)\n"
                                        "tiny.learn = learn_and_die\ntiny.run(tiny.main)\n")
    result = script(*TORCHRUN, tmp_path / "killed.py", *command[len(TORCHRUN) + 1 :], "--minutes", 0.5, "--out", tmp_path / "one", env=env | {"PYTHONPATH": HERE})
    assert result.returncode != 0 and "error: another process has ended" in result.stderr and "--resume" in result.stderr
    assert tiny.load_checkpoint(str(tmp_path / "one"))[1]["training"]["now"]["step"] == 19


# ---- sample.py -----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def fused(tmp_path_factory, stories_file):
    """A fusion of all heads on a run that leaves them something to add. -> (Fusion, validation text)"""
    out = str(tmp_path_factory.mktemp("run") / "out")
    assert script("tiny.py", "--steps", 150, "--data", stories_file, "--out", out, "--width", 32, "--order", 0).returncode == 0
    library = sample.Library(sample.parse_arguments(["--out", out, "--order", "5"]))
    text = library.text()  # found through the run's recipe
    model = library.model(out)[0]
    return sample.Fusion(model, sample.Fusion.NAMES, ngram.NGram(5).fit(text.train), text.train[:20_000]), text.valid[:6_000]


def test_every_head_and_mixture_is_a_distribution(fused):
    fusion, valid = fused
    fusion.weights = np.array([0.4, 0.3, 0.2, 0.1])
    for now, _ in fusion.moments(valid[:700]):
        heads = fusion.heads(now)
        assert heads.shape == (4, len(now.hidden), 256) and heads.min() > 0
        assert torch.allclose(heads.sum(-1), torch.ones(heads.shape[:2]), atol=1e-5)
        assert torch.allclose(fusion.mix(heads).sum(-1), torch.ones(len(now.hidden)), atol=1e-5)
    for i in range(4):  # with all the weight on one head the mixture is that head
        fusion.weights = np.eye(4)[i]
        assert torch.allclose(fusion.mix(heads), heads[i], atol=1e-7)


def test_fused_is_better_than_each_head(fused):
    fusion, valid = fused
    fusion.fit(valid[3000:])
    p = fusion.gold(valid[:3000], "")
    alone = -np.log2(p).mean(0)
    assert len(p) == 3000 and fusion.weights.sum() == pytest.approx(1) and fusion.weights.min() >= 0
    assert -np.log2(p @ fusion.weights).mean() < alone.min() + 0.01  # the built-in stories leave little to learn from so few
    q = fusion.gold(valid[3000:], "")
    assert -np.log2(q @ fusion.weights).mean() < (-np.log2(q)).mean(0).min()  # where the weights come from, no head is better
    assert alone[0] == pytest.approx(tiny.evaluate(fusion.model, valid[:3000]), rel=1e-4)
    assert alone[1] == pytest.approx(fusion.ngram.bits_per_byte(valid[:3000]), rel=1e-4)


def test_generation_asks_the_heads_what_scoring_asked(fused):
    """The distribution for each byte is the same whether a text is scored in windows or told byte by byte."""
    fusion, valid = fused
    fusion.weights, said = np.array([0.1, 0.2, 0.3, 0.4]), []
    text = bytes(valid[:200])
    spy = lambda p, hidden, ids: said.append(fusion(p, hidden, ids)) or said[-1]
    for _ in zip(range(101), tiny.generate(fusion.model, [text[:100], text], fuse=spy)):
        pass
    want = torch.cat([fusion.mix(fusion.heads(now)) for now, _ in fusion.moments(valid[:201])])
    for i, p in enumerate(said):  # row 1 is told the validation text itself
        assert torch.allclose(p[1], want[100 + i], atol=1e-4)


def test_cache_and_knn_vote_for_what_followed():
    hidden = torch.eye(8)[None] * 8
    now = sample.Now(torch.full((1, 256), 1 / 256), hidden[:, 2], hidden[:, :5], torch.tensor([[10, 11, 12, 13, -1]]), None)
    assert sample.cache_head(now).argmax() == 12
    assert torch.allclose(sample.cache_head(now._replace(followed=torch.full((1, 5), -1))), torch.full((1, 256), 1 / 256))
    p = sample.knn_head(now, hidden[0, :5], torch.tensor([20, 21, 22, 22, 24]))
    assert p.argmax() == 22 and p.sum() == pytest.approx(1) and p[0, 99] == pytest.approx(0.01 / 256)


@pytest.fixture(scope="module")
def reference():
    return sample.Reference(data.encode(data.invent(2000)))


GOOD = ("Once upon a time, there was a happy girl named Lily. Lily had a kite. She took the kite to the park.\n\"I can help you,\" said Tom. "
        "Tom used a rope while Lily helped.\nLily and Tom the dog played with the kite until the sun went down.")


@pytest.mark.parametrize("row, broken", [
    ("doubled", GOOD.replace("had a", "had had a").replace("time,", "time,,")),
    ("quotes_close", GOOD.replace('you,"', "you,")),
    ("sentences_begin", GOOD.replace("She", "she").replace("Tom used", "tom used")),
    ("names_return", GOOD.replace("Lily and Tom", "Mia and Ben")),
    ("nouns_return", GOOD.replace("with the kite until", "until")),
    ("pronouns_fit", GOOD.replace("She took", "He took")),
    ("new_names", GOOD.replace("Lily helped", "Max helped").replace("Tom the dog", "Zoe the dog")),
    ("known_words", GOOD.replace("park", "parmk")),
    ("known_trigrams", GOOD.replace("sun went down", "down went sun")),
    ("same_word", GOOD.replace("She took the kite", "She and the kite took the kite")),
    ("distinct_2", GOOD + GOOD), ("repeated_4", GOOD + GOOD), ("length", GOOD[:40]),
])
def test_each_row_tells_good_from_broken(reference, row, broken):
    function, better = next((f, d) for f, d in sample.ROWS if f.__name__ == row)
    good, bad = function(GOOD, reference), function(broken, reference)
    assert good != bad and (better == 0 or (good > bad) == (better == 1)), (good, bad)
    function("", reference)  # an empty story is no crash


def test_longest_copy(reference):
    text = bytes(reference.array[1000:1100]).replace(b"\0", b"#").decode()
    clean = max(text.split("#"), key=len)
    found = reference.longest_copies([f"Xyzzy {clean}qqq", "nothing of this stands there", clean[:10]])
    assert found[0] in (len(clean), len(clean) + 1) and found[1] == 0 and found[2] == 0


def test_rubric_passes_its_own_check():
    """Real stories lead on every row that claims a direction; sentences shuffled across stories and n-gram text lose on the threads."""
    text = data.encode(data.invent(4000))
    train, held = data.split(text)
    ref = sample.Reference(train)
    real = [story[: sample.LENGTH].decode() for story in data.stories(held)[:60]]
    mixed = sample.shuffled(real)
    assert mixed != real and abs(len("".join(mixed)) / len("".join(real)) - 1) < 0.1
    counting = ngram.NGram(6).fit(train)
    told = [counting.generate(story[:25].encode(), len(story) - 25, 0.8, i).decode("utf-8", "ignore") for i, story in enumerate(real)]
    tables = {name: sample.rubric(texts, ref) for name, texts in (("real", real), ("shuffled", mixed), ("ngram", told))}
    for row, better in sample.ROWS:
        real_value = tables["real"][row.__name__][0]
        for other in ("shuffled", "ngram"):
            if better:
                assert better * (real_value - tables[other][row.__name__][0]) > -1e-9, (row.__name__, other)
    for row in ("names_return", "new_names"):
        better = dict((f.__name__, d) for f, d in sample.ROWS)[row]
        assert better * (tables["real"][row][0] - tables["shuffled"][row][0]) > 3 * tables["shuffled"][row][1]


def test_binomial_p_is_exact():
    assert sample.binomial_p(5, 5) == 1 and sample.binomial_p(0, 0) == 1
    assert sample.binomial_p(10, 0) == pytest.approx(2 / 1024)
    assert sample.binomial_p(8, 2) == sample.binomial_p(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)


@pytest.fixture
def two_runs(tmp_path):
    """Two files of five stories, the second always longer."""
    for name, story in (("a.txt", "A cat sat."), ("b.txt", "A cat sat on a long mat.")):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(f"{story} {i}" for i in range(5)))
    return ["sample.py", "--judge", tmp_path / "a.txt", tmp_path / "b.txt", "--n", 5, "--data", tmp_path / "a.txt", "--valid", tmp_path / "b.txt",
            "--answers", tmp_path / "answers.jsonl"]


def test_judging_in_the_terminal_can_be_interrupted(two_runs, tmp_path):
    first = script(*two_runs, input="1\nx\n=\nq\n")
    assert first.returncode == 0 and "ties: 1" in first.stdout, first.stderr
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["1", "="]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + '\n{"id": "cut o')  # killed while writing
    second = script(*two_runs, input="1\n1\n1\n")
    assert second.stdout.count("Which is better?") == 3 and "p: " in second.stdout, second.stderr
    third = script(*two_runs, input="")
    assert "Which" not in third.stdout and third.stdout.splitlines()[-5:] == second.stdout.splitlines()[-5:]


def test_export_keeps_the_key_apart(two_runs, tmp_path):
    result = script(*two_runs, "--export", tmp_path / "pairs.txt")
    text, key = (tmp_path / "pairs.txt").read_text(), json.loads((tmp_path / "pairs.txt.key.json").read_text())
    assert result.returncode == 0 and len(key) == 5 and "a.txt" not in text
    for number, sides in key.items():
        pair = text.split("#### A\n")[int(number)]
        assert ("long" in pair.split("#### B")[0]) == sides["A"].endswith("b.txt")
    assert {sides["A"][-5:] for sides in key.values()} == {"a.txt", "b.txt"}


def test_a_language_model_judges_and_faults_are_survived(two_runs, tmp_path):
    """A stub endpoint that prefers long stories, after it has failed in each way; the key is never written anywhere."""
    seen, faults = [], [429, 500, "garbage", "cut", "no answer"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.headers["Authorization"], body["model"]))
            fault = faults.pop(0) if faults else None
            if isinstance(fault, int):
                return self.send_error(fault)
            content = body["messages"][0]["content"]
            one, two = content.split("Story 1:")[1].split("Story 2:")
            said = "hm" if fault == "no answer" else f"Because.\nANSWER: {'1' if 'long' in one else '2'}"
            reply = b"<html>" if fault == "garbage" else json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply[:5] if fault == "cut" else reply)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    env = {"JUDGE_MODEL": "stub", "JUDGE_KEY": "sk-secret"}
    code = f"import sample, data; sample.time.sleep = lambda s: None; data.run(lambda: sample.main({[str(x) for x in two_runs[1:]] + ['--judge-url', url]!r}))"
    failed = script("-c", code, env=env)  # five faults in a row are too many
    refused(failed, "no answer after 5 tries", "answers so far are kept")
    result = script("-c", code, env=env)
    assert "b.txt: 5 wins" in result.stdout and "changed with the order: 0" in result.stdout and "p: 0.0625" in result.stdout, result.stderr
    assert len(seen) == 5 + 10 and set(seen) == {("Bearer sk-secret", "stub")}
    again = script("-c", code, env=env)
    assert again.stdout == result.stdout and len(seen) == 15  # nothing is asked twice
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"sk-secret" not in written and "sk-secret" not in failed.stderr + result.stdout + result.stderr


def test_the_commands_of_sample(finished):
    _, out = finished
    score = script("sample.py", "--out", out, "--order", 6, "--fuse", "ngram,cache", "--score")
    facts = closing_block(score.stdout)
    assert float(facts["fused_bpb"]) < min(float(facts[f"{name}_bpb"]) for name in ("transformer", "ngram", "cache")) + 0.01, score.stderr
    told = script("sample.py", "--out", out, "--order", 6, "--fuse", "ngram,cache", "--weights", 1, 1, 1, "--n", 1, "--length", 100)
    assert told.stdout.startswith("Once upon a time"), told.stderr
    speed = script("-c", f"import sample, tiny; sample.bench(tiny.load_checkpoint({str(out)!r})[0], 1, 0.3)")
    assert "40 at once" in speed.stdout, speed.stderr
    table = script("sample.py", "--out", out, "--order", 6, "--rubric", out)
    assert table.returncode == 0 and "| names_return | more |" in table.stdout and "| longest_copy |" in table.stdout, table.stderr


# ---- README.md -----------------------------------------------------------------------------------------------------------------------

README = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
PIECES = re.findall(r"```python\n# ?(.*?); (.*?)\n(.*?)```", README, re.DOTALL)
ONLY = """
import builtins, os
def only(name, globals=None, *rest, imported=builtins.__import__, **more):  # the piece's own imports; what PyTorch imports is not its concern
    if name in {"numpy", "torch", "tqdm", "pytest"} - set(%r.split()) and os.path.dirname(globals.get("__file__", "")) == os.getcwd():
        raise ImportError(name + " is not among what this piece says it needs")
    return imported(name, globals, *rest, **more)
builtins.__import__ = only
"""


def part(of, file):
    """A part of a file as the README names it: `section 1`, or functions, classes and constants by name."""
    text = open(os.path.join(HERE, file), encoding="utf-8").read()
    source = {f"section {n}": section for section, n in re.findall(r"(# ---- (\d+)\..*?)(?=# ---- )", text, re.DOTALL)}
    for node in ast.parse(text).body:
        names = [target.id for target in node.targets if isinstance(target, ast.Name)] if isinstance(node, ast.Assign) else [getattr(node, "name", "")]
        source |= dict.fromkeys(names, ast.get_source_segment(text, node))
    return "\n\n".join(source[name] for name in re.findall(r"section \d+|\w+", of.replace(" and ", " "))) + "\n"


@pytest.mark.parametrize("packages, takes, code", PIECES, ids=[takes for _, takes, _ in PIECES])
def test_each_piece_works_alone(tmp_path, packages, takes, code):
    for take in takes.split("; "):
        if take.startswith("the file "):
            shutil.copy(os.path.join(HERE, take[9:]), tmp_path)
        else:
            code = code.replace("\n...\n", f"\n{part(*take.split(' of '))}\n")
    code = re.sub(r"https://\S+(?=\")", Server(data.invent(3000)).url, code)
    (tmp_path / "piece.py").write_text(ONLY % packages + code, encoding="utf-8")
    assert len(PIECES) == 7
    result = script("piece.py", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


def test_links_lead_to_the_line_they_name():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README)
    for name, file, line in links:
        lines = open(os.path.join(HERE, file), encoding="utf-8").read().splitlines()
        assert name in lines[int(line) - 1], f"{name} is in line {[n for n, x in enumerate(lines, 1) if name in x]} of {file}, not in {line}"
    assert len(links) > 10
