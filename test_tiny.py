"""What must hold, each thing in the smallest case that could break it: python -m pytest -q"""
import argparse
import ast
import doctest
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
import tokenize
import types
from collections import Counter

import numpy as np
import pytest

import data
import ngram
import sample
import tiny

import torch  # after tiny, which says how its threads wait
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
SMALL = ["--width", "16", "--context", "64"]


def script(*command, env={}, cwd=HERE):
    """Run `python command...` as a user would, on one thread. -> CompletedProcess"""
    own = {"PYTHONPATH": HERE, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, cwd=cwd,
                          encoding="utf-8", env=os.environ | own | env, timeout=240)


def refused(result, *words):
    """The command failed with one clear line that has these words, and no traceback."""
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode in (1, 2) and "Traceback" not in result.stderr, result.stderr
    assert "error: " in last and all(word in last for word in words), result.stderr


def options(**changes):
    """The options of data.add_arguments, as argparse gives them."""
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args([])) | changes)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Options that name a little text: built-in stories to learn from, others held out."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_bytes(data.invent(500))
    (folder / "valid.txt").write_bytes(data.invent(100, seed=1))
    return ["--data", str(folder / "train.txt"), "--valid", str(folder / "valid.txt")]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, texts):
    """A whole run on the clock, as a user starts it. -> (result, its folder)"""
    out = tmp_path_factory.mktemp("run") / "out"
    long = out.with_name("long.txt")
    long.write_bytes(data.invent(15000))
    new = out.with_name("new.txt")  # its end is hard: a part of it has another score
    new.write_bytes(data.invent(55, seed=1) + data.invent(5).upper())
    result = script("tiny.py", "--data", long, "--valid", new, "--minutes", 0.3, "--out", out,
                    "--width", 32, "--context", 128)
    assert result.returncode == 0, result.stderr
    return result, out


# ---- The budget of reading -----------------------------------------------------------------------

def test_the_four_chapters_can_be_read_in_one_sitting():
    lines = tokens = 0
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER}
    for name in ("data.py", "ngram.py", "tiny.py", "sample.py"):
        with open(os.path.join(HERE, name), encoding="utf-8") as file:
            text = file.read()
        lines += len(text.splitlines())
        docs = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                docs.update(range(node.lineno, node.end_lineno + 1))
        for token in tokenize.generate_tokens(iter(text.splitlines(True)).__next__):
            tokens += token.type not in layout and token.start[0] not in docs
    split_up = sys.version_info >= (3, 12)  # from there on an f-string is several tokens
    assert lines <= 2100 and (tokens <= 14500 or split_up), (lines, tokens)


@pytest.mark.parametrize("module", [data, ngram])
def test_examples_in_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0


# ---- data.py -------------------------------------------------------------------------------------

def test_stories_are_told_apart_and_nul_bytes_are_dropped():
    text = data.encode(b"a\r\n<|endoftext|>\r\nb<|endoftext|>\n\n<|endoftext|>c\0\0\xff")
    assert text.tobytes() == b"a\0b\0\0c\xff" and data.split_stories(text) == [b"a", b"b", b"c\xff"]


def test_split_is_at_a_story_end_near_95_percent_and_loses_nothing():
    text = data.encode(data.invent(300))
    train, valid = data.split(text)
    assert np.array_equal(np.concatenate((train, valid)), text)
    assert train[-1] == data.END and 0.04 < len(valid) / len(text) < 0.07
    far = np.where(np.arange(1000) == 600, data.END, 65).astype(np.uint8)
    assert len(data.split(far)[1]) == 100


def test_the_easiest_stories_are_kept_in_their_order():
    easy = [b"The dog ran to the cat %d." % i for i in range(6)]
    hard = [b"z%c p%c m%c q%c!" % (4 * (97 + i,)) for i in range(6)]
    mixed = [story for pair in zip(hard, easy) for story in pair]
    text = np.frombuffer(b"\0".join(mixed), np.uint8)
    assert data.split_stories(data.easiest(text, 0.72)) == easy
    bits = data.difficulty(mixed)
    assert bits[1::2].max() < bits[::2].min() <= 12.0
    assert data.difficulty([b"one", b"..."]).tolist() == [12, 12]  # without a pair


def test_only_what_can_drive_a_terminal_is_replaced():
    fine = "« Où ? »\u00a0👩\u200d🚀 \ufeff\tשלום\n\f\u202a\u2066"
    assert data.printable(fine) == fine and data.printable("a\rb\r\n") == "ab\n"
    assert data.printable("\x1b[2J\x9b\u202e") == "\ufffd[2J\ufffd\ufffd"


def test_files_are_joined_and_lose_their_byte_order_marks(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbf" + name.encode() + b"\r\n")
    (tmp_path / "c.txt").write_bytes(b"")
    want = b"a\r\n\0b\r\n"
    assert data.read([tmp_path / "a.txt", tmp_path / "b.txt"]).tobytes() == want
    assert data.split_stories(data.read([str(tmp_path / "*.txt")])) == [b"a\r\n", b"b\r\n"]
    assert "c.txt is empty" in capsys.readouterr().err


def test_a_text_that_is_not_utf8_is_told(tmp_path, capsys):
    (tmp_path / "x").write_bytes("Il était une fois. ".encode("latin-1") * 9)
    data.read([tmp_path / "x"])
    assert "not UTF-8, see byte 3" in capsys.readouterr().err
    (tmp_path / "y").write_bytes("Il était une fois é".encode()[:-1])  # cut by --megabytes
    data.read([tmp_path / "y"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command, words", [
    ("--data missing.txt", ["No such file", "missing.txt"]),
    ("--data folder", ["directory", "folder"]), ("--data empty.txt", ["too little text"]),
    ("--data utf16.txt", ["utf16.txt seems to be binary or UTF-16"]),
    ("--data random.txt", ["random.txt seems to be binary or UTF-16"]),
    ("--data short.txt", ["too little text"]),
    ("--megabytes=x", ["--megabytes"]), ("--mega=1", ["--mega"]),
    ("--keep=33 --data long.txt", ["--keep is a part"]), ("--megabytes=0", ["is above 0"]),
])
def test_bad_text_and_options_get_one_line(tmp_path, command, words):
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf\n")
    (tmp_path / "short.txt").write_bytes(b"Too short.")
    (tmp_path / "long.txt").write_bytes(data.invent(30))
    (tmp_path / "utf16.txt").write_bytes("Once upon a time".encode("utf-16") * 50)
    (tmp_path / "random.txt").write_bytes(np.random.default_rng(0).bytes(10_000))
    (tmp_path / "folder").mkdir()
    refused(script(os.path.join(HERE, "data.py"), *command.split(), cwd=tmp_path), *words)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    pytest.importorskip("resource")
    (tmp_path / "model.pt").write_bytes(b"old")
    code = ("import data, resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
            "data.run(lambda: data.save('model.pt', bytes(2000)))")
    refused(script("-c", code, cwd=tmp_path), "File too large")
    assert (tmp_path / "model.pt").read_bytes() == b"old"


class Server(http.server.ThreadingHTTPServer):
    """Serves the first bytes of a text. kind: None, a status, "cut", or "whole" (knows no Range)"""
    def __init__(self, body, kind=None):
        self.requests = []
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.requests.append(self.headers["Range"])
                last = int(self.headers["Range"].partition("-")[2])
                content = body if kind == "whole" else body[: last + 1]
                self.send_response(kind if isinstance(kind, int) else 206)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if kind == "cut" else content)
            def log_message(self, *_):
                pass
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def no_proxy(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)  # where the cache will be


BODY = data.invent(100)


@pytest.mark.parametrize("kind", [None, "whole"])
def test_a_download_is_the_whole_stories_of_what_was_asked_for(tmp_path, no_proxy, kind):
    server = Server(BODY, kind)
    assert data.download(server.url, "x", 10_000)
    got = (tmp_path / "x").read_bytes()
    assert server.requests == ["bytes=0-9999"] and BODY.startswith(got)
    assert got.endswith(b"<|endoftext|>\n") and 9_000 < len(got) <= 10_001


@pytest.mark.parametrize("body, kind, words", [
    (BODY, "cut", "cut; run again"), (BODY, 404, "404.*--data"),
    (b"<html>" * 1000, None, "not TinyStories")])
def test_a_download_that_fails_leaves_nothing(tmp_path, no_proxy, body, kind, words):
    with pytest.raises(data.Problem, match=words):
        data.download(Server(body, kind).url, "x", 10_000)
    assert os.listdir(tmp_path) == []


def test_load_downloads_once_and_keeps_the_easiest_part(no_proxy, monkeypatch, capsys):
    server = Server(data.invent(300))
    monkeypatch.setenv("TINY_URL", server.url)
    first = data.load(options(megabytes=0.06))
    again = data.load(options(megabytes=0.06))
    assert len(server.requests) == 1 and np.array_equal(first.train, again.train)
    whole = data.load(options(megabytes=0.06, keep=1.0))
    assert len(first.train) == pytest.approx(data.KEEP * len(whole.train), rel=0.05)
    assert np.array_equal(data.easiest(whole.train, data.KEEP), first.train)
    assert np.array_equal(first.valid, whole.valid) and len(first.valid) > 2_000  # easy or not
    assert "easiest" in first.source and first.waited > 0
    mine = data.load(options(data=["cache/tinystories-100MB.txt"], megabytes=0.06))
    assert len(mine.train) == len(whole.train)  # a user's own text is read whole


def test_without_a_network_stories_are_made_up_or_those_there_are_used(no_proxy, monkeypatch,
                                                                       tmp_path, capsys):
    monkeypatch.setenv("TINY_URL", "http://127.0.0.1:9")  # nobody listens there
    text = data.load(options())
    assert "MEAN NOTHING" in capsys.readouterr().err and len(text.train) > 900_000
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tinystories-100MB.txt").write_bytes(b"mine\n<|endoftext|>\n" * 999)
    assert bytes(data.load(options(keep=1.0)).train[:5]) == b"mine\0"


# ---- ngram.py ------------------------------------------------------------------------------------

TEXT = b"the cat sat on the mat\0the rat sat\0a cat ate the rat on a mat\0" * 2 + b"that hat\0"
NEW = b"a cat\0the bat sat on that zebra\0\0mat the rat"


def test_a_textbook_case_by_hand():
    text = b"abacab"
    p = {name: ngram.Textbook(text, 2, name).distribution(b"a", 1) for name in ngram.SMOOTHINGS}
    b, c, new = ord("b"), ord("c"), ord("z")
    likely = p["maximum-likelihood"]
    assert (likely[b], likely[c], likely[new]) == pytest.approx((2 / 3, 1 / 3, 0))
    assert p["add-k"][[b, new]] == pytest.approx([2.01 / 5.56, 0.01 / 5.56])
    below = (2 + 3 / 256) / (6 + 3)  # Witten-Bell, order 1: b is 2 of 6; 3 different bytes
    assert p["witten-bell"][b] == pytest.approx((2 + 2 * below) / (3 + 2))
    first = 2 / 6 * 11 / 12 + 1 / 12 / 256  # Jelinek-Mercer: order 1 hands down 1/12, order 2 2/12
    assert p["jelinek-mercer"][b] == pytest.approx(2 / 3 * 10 / 12 + 2 / 12 * first)
    assert all(distribution.sum() == pytest.approx(1) for distribution in p.values())


@pytest.mark.parametrize("smoothing", ngram.SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_the_fast_model_equals_the_textbook(order, smoothing):
    model = ngram.NGram(order, smoothing).fit(TEXT)
    textbook = ngram.Textbook(TEXT, order, smoothing)
    for text in (TEXT, NEW):
        p = model.probs(text, np.arange(len(text) + 1))
        assert p.dtype == np.float32 and p.shape == (len(text) + 1, 256)
        assert np.abs(p.sum(1) - 1).max() < 1e-5
        assert p.min() > 0 or smoothing == "maximum-likelihood"
        want = [textbook.distribution(text, i) for i in range(len(text) + 1)]
        assert np.abs(p - want).max() < 1e-6


@pytest.mark.parametrize("text", [data.invent(100), b"a" * 5000, b"\0" * 100, b"\5"])
def test_distributions_sum_to_1_and_are_never_0(text):
    for smoothing in ngram.SMOOTHINGS[1:]:
        p = ngram.NGram(12, smoothing).fit(text).probs(text, np.arange(len(text))).astype(float)
        assert np.abs(p.sum(1) - 1).max() < 1e-5 and p.min() > 0


def test_bytes_are_taken_wherever_data_is_and_each_is_scored():
    array = np.frombuffer(TEXT, np.uint8)
    model = ngram.NGram(5).fit(array)
    p = model.probs(TEXT, np.arange(len(TEXT)))[np.arange(len(TEXT)), array]
    assert model.bits_per_byte(TEXT) == pytest.approx(-np.log2(p.astype(float)).mean())
    assert np.array_equal(model.probs(b"", [0]), model.probs(b"\0", [1]))  # an END comes first


def test_discounts_are_chen_and_goodmans():
    count = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 7])
    y = 40 / (40 + 2 * 20)
    modified = [0, 1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20, 3 - 4 * y * 5 / 10]
    assert ngram.discounts("modified-kneser-ney", 3, count) == pytest.approx(modified)
    assert ngram.discounts("absolute", 3, count) == pytest.approx([0, y, y, y])
    for c, discount in enumerate(ngram.discounts("modified-kneser-ney", 3, np.array([1]))):
        assert 0 <= discount <= c and (c == 0 or discount > 0)


@pytest.mark.parametrize("truth", [[0.5, 0.3, 0.2], [0.9, 0.1, 0], [0.02, 0.03, 0.95]])
def test_mixture_weights_are_those_that_made_the_data(truth):
    rng = np.random.default_rng(0)
    p = rng.random((40_000, 3)) * 0.9 + 0.05  # three models' p of one of two values
    source = rng.choice(3, len(p), p=truth)
    one = rng.random(len(p)) < p[np.arange(len(p)), source]
    p = np.where(one[:, None], p, 1 - p)
    weights = ngram.mixture_weights(p)
    assert weights.sum() == pytest.approx(1) and np.abs(weights - truth).max() < 0.03
    assert ngram.mixture_weights(np.zeros((5, 2))) == pytest.approx([0.5, 0.5])  # no NaN


def test_generate_repeats_itself_and_stops_at_the_end_of_a_story():
    model = ngram.NGram(5).fit(data.encode(data.invent(600)))
    story = model.generate(b"Once upon", 3000, 0.5, seed=3)
    assert story == model.generate(b"Once upon", 3000, 0.5, seed=3)
    assert model.generate(b"On", 99, 0, seed=3) == model.generate(b"On", 99, 0, seed=4)
    assert story.startswith(b"Once upon") and b"\0" not in story and len(story) < 3000
    assert len(model.generate(b"Once upon", 5)) == 14  # length counts what is generated


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="must be"):
        ngram.NGram(0)
    with pytest.raises(ValueError, match="empty"):
        ngram.NGram().fit(b"")
    with pytest.raises(ValueError, match="uint8"):  # tokens, say
        ngram.NGram().fit(np.array([1000, 2000]))


def test_the_script_counts_compares_and_writes(texts):
    command = ["ngram.py", *texts, "--orders", 2, 5, "--smoothing", "kneser-ney", "add-k"]
    result = script(*command)
    assert result.returncode == 0 and result.stdout.count("add-k") == 2, result.stderr
    scores = [float(line.split()[0]) for line in result.stdout.splitlines()
              if line.endswith(" kneser-ney")]
    assert scores[0] > scores[1] and f"{scores[1]:.4f} on text it has not seen" in result.stdout
    train, valid = data.read(texts[1:2]), data.read(texts[3:])
    best = ngram.NGram(5, "kneser-ney").fit(train)
    assert scores[1] == pytest.approx(best.bits_per_byte(valid), abs=1e-4)
    assert f"{best.bits_per_byte(train[:100_000]):.4f} on text that it counted" in result.stdout
    assert "\nOnce upon a time" in result.stdout


# ---- tiny.py: the model --------------------------------------------------------------------------

def random_net(plain):
    """A net with every weight random: the zeros it starts with would hide mistakes."""
    torch.manual_seed(0)
    sizes = dict(layers=2, heads=2, width=16, context=32)
    if plain:
        net = tiny.GPT(**sizes)
    else:
        net = tiny.WordGPT(**sizes, rows=64)
        torch.nn.init.normal_(net.memory.table, std=0.3)
        net.memory.count.random_(0, 2)  # some contexts are known, some not
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


@pytest.fixture(params=[False, True], ids=["words", "plain"])
def model(request):
    return random_net(plain=request.param)


def windows(B, size=33):
    """(B, size) bytes that begin within a word, in which words come again, some no text at all"""
    words = [b"Lily ", b"Li, ", b"the ", b"then\n", b"Tim's ", b"\0", b"\xc3\xa9t ", b"\"he.\" "]
    words += ["好大".encode(), b"7even7 "]
    chosen = np.random.default_rng(0).integers(len(words), size=(B, size))
    found = [b"ly " + b"".join(words[i] for i in row) for row in chosen]
    return torch.tensor([list(text[:size]) for text in found])


@torch.no_grad()
def by_brute_force(model, ids):
    """The distribution after a text, (1, n): each of 256 bytes is put behind it. -> (256,)"""
    every = torch.cat((ids.expand(256, -1), torch.arange(256)[:, None]), 1)
    log_p, _ = model(every[:, -model.context - 1 :])
    return log_p[:, -1].exp()


@pytest.mark.parametrize("n", range(1, 32, 2))
def test_every_byte_has_one_normalised_distribution_read_or_spelled(model, n):
    ids = windows(1)[:, :n]
    p = by_brute_force(model, ids)
    assert p.sum().item() == pytest.approx(1, abs=1e-4) and p.min() > 0
    assert torch.allclose(model.next_byte(ids)[0], p, atol=1e-5)


def test_words_that_are_longer_than_their_hash_are_not_copied():
    net = random_net(plain=False)
    text = [0, *b"a" + b"x" * 30 + b" b" + b"x" * 23]
    every = torch.tensor([[*text, byte] for byte in range(256)])
    assert net(every)[0][:, -1].exp().sum().item() == pytest.approx(1, abs=1e-4)


def test_candidates_are_spelled_as_they_would_be_read():
    net = random_net(plain=False)
    text = torch.tensor([list(b"\0Lily saw Tim, the tree. T")])
    reading, begun = net.read(text)
    assert bytes(begun[0].tolist()) == b"T"
    spelled = torch.tensor([list(b"Ti"), list(b"Li"), list(b"tr"), list(b"xx")])
    for row, p in zip(spelled, net.spell(reading, spelled)):
        ids = torch.cat((text[:, :-1], row[None]), 1)
        assert torch.allclose(p, by_brute_force(net, ids), atol=1e-5)


def test_no_byte_sees_the_future(model):
    ids = windows(1)
    before = model(ids)[0]
    for t in (1, 5, 31):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 256
        after = model(changed)[0]
        assert torch.allclose(before[:, : t - 1], after[:, : t - 1], atol=1e-5)
        assert not torch.allclose(before[:, t:], after[:, t:], atol=1e-3)


def test_a_gpt_is_what_the_papers_say():
    """Attention by hand: turned queries and keys, softmax over the past, weighted values."""
    torch.manual_seed(0)
    attention = tiny.Attention(width=8, heads=1)
    torch.nn.init.normal_(attention.out.weight)
    x = torch.randn(1, 5, 8)
    angle = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    q, k, v = attention.qkv(x)[0].chunk(3, -1)
    turn = torch.polar(torch.ones(5, 4), -angle)
    def turned(y):
        return torch.complex(*F.layer_norm(y, (8,)).chunk(2, -1)) * turn
    score = (turned(q)[:, None] * turned(k)[None].conj()).real.sum(-1) / 8**0.5
    score = score.masked_fill(torch.ones(5, 5).triu(1) > 0, -math.inf)
    want = attention.out(score.softmax(-1) @ v)
    assert torch.allclose(attention(x, angle)[0], want, atol=1e-5)


def context_names(text, i):
    """The contexts that byte i of a text completes, spelled out in plain Python."""
    found = [text[max(0, i - n + 1) : i + 1].rjust(n, b"\0") for n in tiny.GRAMS]
    words = [b"", b""]
    word = b""
    for byte in text[: i + 1]:
        if tiny.LETTER[byte].item():
            word += bytes([byte])
        elif word or byte == 0:
            words.append(word)
            word = b""
    word = word or b"-" + text[i : i + 1]  # the word so far, or the mark that ended it
    one, two = words[-1], words[-2]
    return found + [(word, "word"), (word, one), (word, one, two), (word, two, "skip")]


def test_contexts_are_the_same_exactly_where_the_text_is():
    text = (b"\0The cat's hat. The cats sat, and the cat's hat sat: \"The cat's mat!\" ab ba aa bb "
            b"cat's hat 7 sat.\0 \xc3\xa9t\xc3\xa9 the cat")
    ids = torch.tensor([list(text)])
    hashes = tiny.contexts(ids, tiny.find_words(ids))[0]
    names = [context_names(text, i) for i in range(len(text))]
    for kind in range(tiny.KINDS):
        by_name = {names[i][kind]: hashes[i, kind].item() for i in range(len(text))}
        assert [by_name[row[kind]] for row in names] == hashes[:, kind].tolist()
        assert len(set(by_name.values())) == len(by_name)


def test_words_are_complete_at_the_first_byte_behind_them():
    words = tiny.find_words(torch.tensor([list(b"\0Once she,"), list(b"\0It's.\"\0 a")]))
    assert words.done.tolist() == [[1] * 5 + [2] * 4 + [3], [1] * 5 + [2] * 2 + [3] * 3]
    assert words.end.tolist() == [[0, 5, 9], [0, 5, 7]]
    assert words.size.tolist() == [[0, 4, 3], [0, 4, 0]]
    assert words.begin.tolist() == [[0] + [1] * 5 + [6] * 4, [0] + [1] * 5 + [6, 7, 8, 9]]
    chinese = tiny.find_words(torch.tensor([list(" 大好 7a ".encode())]))
    assert chinese.size.tolist() == [[2, 2, 2]]


def test_memory_learns_as_adagrad_on_the_rows_of_known_contexts():
    memory = tiny.Memory(width=4, rows=8)
    torch.nn.init.normal_(memory.table)
    memory.count.random_(0, 2).mul_(3)
    memory.first_epoch = False  # nothing is counted below
    table = memory.table.clone().requires_grad_()
    squares = torch.full((8,), 0.03)
    for _ in range(3):
        slots = torch.randint(0, 2**tiny.COUNTER_BITS, (5, 3))
        goal = torch.randn(5, 4)
        known = memory.count[slots] > 0
        (memory(slots << (64 - tiny.COUNTER_BITS)) - goal).square().mean().backward()
        memory.step(0.1)
        rows = slots >> (tiny.COUNTER_BITS - 3)
        each = table[rows] * known[:, :, None]
        gradient = torch.autograd.grad((each.sum(1) - goal).square().mean(), each)[0] * 5
        for n, k in known.nonzero().tolist():
            squares[rows[n, k]] += gradient[n, k].square().mean()
        with torch.no_grad():
            for n, k in known.nonzero().tolist():
                table[rows[n, k]] -= 0.1 * gradient[n, k] / squares[rows[n, k]].sqrt()
        assert torch.allclose(memory.table, table, atol=1e-5)


def test_memory_knows_of_a_context_only_what_was_learned_elsewhere():
    memory = tiny.Memory(width=2, rows=8)
    torch.nn.init.ones_(memory.table)
    hashes = torch.arange(3)[None] << (64 - tiny.COUNTER_BITS)  # one position
    def visit():
        """-> the share of contexts looked up when learning from them, and after that"""
        out = memory(hashes)
        memory.used[2].grad = torch.zeros_like(out)
        memory.step(0.0)
        with torch.no_grad():
            return [x[0, 0].item() / 3 for x in (out, memory(hashes))]
    assert visit() == [0, 1]  # new: nothing is known; from now on it is
    assert visit() == [1, 1]
    memory.first_epoch = False
    assert visit() == [0, 1]  # counted twice, one of them here: a single other place
    memory.first_epoch = True
    visit()
    memory.first_epoch = False
    assert visit() == [1, 1] and memory.count.max() == 3  # later epochs count nothing


def test_a_word_is_as_likely_as_its_copies_and_its_spelling_together():
    """The pointer, from its definition: the letters of a word, or all of it with the closing byte,
    have the probability a_0 p(letters) plus, for each earlier word that they begin with, or that
    begins with them, its share times p(the letters after it)."""
    torch.manual_seed(0)
    text = b" Lily saw Tim, the tree and the tall toy. Lily, the tallest one, saw Timmy"
    ids = torch.tensor([list(text)])
    T = len(text) - 1
    pointer = tiny.Pointer(width=16, context=80)
    torch.nn.init.normal_(pointer.query.weight)
    head = torch.randn(1, T, 256).log_softmax(-1)
    states = torch.randn(1, T, 16)
    words = tiny.find_words(ids)
    thoughts = torch.randn(1, words.end.shape[1], 16)
    log_p = pointer.log_next(states, thoughts, words, tiny.pick(head, ids[:, 1:]))[0]
    for found in re.finditer(rb"\w+.?", text):
        start = found.start()
        earlier = re.findall(rb"\w+", text[:start])
        query = pointer.query(states)[0, start - 1]
        distance = len(earlier) - torch.arange(len(earlier))[:, None]  # in words
        turn = torch.exp(-1j * distance * 10000.0 ** (-torch.arange(4) / 4))
        key = torch.complex(*pointer.key(thoughts)[0, : len(earlier)].chunk(2, -1))
        score = (torch.complex(*query[1:].chunk(2)) * turn * key.conj()).real.sum(-1) / 8**0.5
        share = torch.cat((query[:1] + 4, score)).softmax(0)
        for stop in range(start + 1, found.end() + 1):
            typed = text[start:stop]
            want = 0
            for a, word in zip(share, [b"", *earlier]):
                rest = [start + len(word) + i for i in range(len(typed[len(word) :]))]
                if typed.startswith(word) or word.startswith(typed):
                    want += a * head[0, [i - 1 for i in rest], [text[i] for i in rest]].sum().exp()
            got = log_p[start - 1 : stop - 1].sum().exp()
            assert got.item() == pytest.approx(want.item(), rel=1e-3), typed


def test_only_the_last_complete_word_bends_the_bytes():
    net = random_net(plain=False)
    ids = torch.tensor([list(b"\0one two thr")])
    words, thoughts, film, states = net.look_around(ids)
    x = net.look_up(ids, words, ids.shape[1])
    scale, shift = net.film(thoughts[0, 2]).chunk(2, -1)  # "", "one", "two"
    assert torch.allclose(states[0, -1], tiny.norm(x[0, -1] * (1 + scale) + shift), atol=1e-5)


def test_stories_begin_after_an_end_repeat_and_end_in_time(model):
    for temperature in (0, 0.5, 1):
        def write(prompt, seed=3):
            generator = torch.Generator().manual_seed(seed)
            return b"".join(tiny.generate(model, prompt, 60, temperature, generator))
        for prompt in (b"Once", b"", b"A prompt that is far longer than the context of the net"):
            story = write(prompt)
            assert story == write(prompt) and len(story) <= 60 and 0 not in story
        assert (temperature == 0) == (write(b"Once", 4) == write(b"Once", 3))
    ends = types.SimpleNamespace(next_byte=lambda ids: F.one_hot((ids[0, -1:] == 0) * 97, 256) / 1)
    assert b"".join(tiny.generate(ends, b"", 9, 1.0)) == b"a"  # after an a comes an END
    first = next(tiny.generate(model, b"Tom", temperature=0))[0]
    assert first == by_brute_force(model, torch.tensor([list(b"\0Tom")])).argmax()


class Park:
    """A stub that knows six words, `park` with 0.25, four with b, and a rare one."""
    chances = {b"park ": 0.25, b"bag ": 0.1875, b"bed ": 0.1875, b"bird ": 0.1875, b"box ": 0.1875}
    chances[b"absurd "] = 0.005
    def read(self, ids):
        return None, ids[:, :0]
    def spell(self, reading, spelled):
        p = torch.zeros(len(spelled), 256)
        for row, begun in enumerate(map(bytes, spelled.tolist())):
            for word, chance in self.chances.items():
                if word.startswith(begun) and word != begun:
                    p[row, word[len(begun)]] += chance
            p[row, 0] += 1e-9
        return p / p.sum(1, keepdim=True)
    def next_byte(self, ids):
        begun = bytes(ids[0].tolist()).rpartition(b" ")[2].strip(b"\0")
        return self.spell(None, torch.tensor([list(begun)], dtype=torch.int64))


def test_a_temperature_is_a_words_not_a_bytes(monkeypatch):
    """p(word)^(1/T) for whole words: at T = 1/3 park has 0.37; byte by byte b would have 0.96."""
    monkeypatch.setattr(tiny, "CANDIDATES", 64)
    generator = torch.Generator().manual_seed(0)
    for prompt, exponent in ((b" " * 60, 3), (b"", 0.5)):  # a story's opening has a T of 2
        told = Counter(next(tiny.generate(Park(), prompt, 9, 1 / 3, generator)) for _ in range(600))
        powers = {word: chance**exponent for word, chance in Park.chances.items()}
        for word, power in powers.items():
            assert told[word] / 600 == pytest.approx(power / sum(powers.values()), abs=0.06)
        assert not told[b"absurd "]
    by_byte = types.SimpleNamespace(next_byte=Park().next_byte)
    told = b"".join(tiny.generate(by_byte, b"", 1500, 1 / 3, generator)).split()
    assert told.count(b"park") / len(told) == pytest.approx(0.036, abs=0.04)


def test_choose_draws_as_often_as_it_should():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).expand(3000, -1)
    generator = torch.Generator().manual_seed(0)
    def draws(temperature):
        return Counter(tiny.choose(p, temperature, generator).tolist())
    assert set(draws(0)) == {0} == set(draws(1e-40))
    assert draws(1)[1] == pytest.approx(900, abs=120)
    assert draws(0.5)[1] == pytest.approx(3000 * 0.09 / 0.365, abs=120)


def test_muon_makes_orthogonal_steps_and_learns():
    stretched = torch.randn(8, 20) * torch.logspace(-2, 0, 8)[:, None]
    singular = torch.linalg.svdvals(tiny.orthogonalize(stretched))
    assert singular.min() > 0.3 and singular.max() < 1.3
    tall = torch.randn(20, 8)
    assert torch.allclose(tiny.orthogonalize(tall), tiny.orthogonalize(tall.T).T, atol=1e-5)
    w = torch.nn.Parameter(torch.zeros(6, 4))
    goal = torch.randn(6, 4)
    muon = tiny.Muon([w], lr=0.05)
    for _ in range(200):
        muon.zero_grad()
        loss = (w - goal).square().mean()
        loss.backward()
        muon.step()
    assert loss < 0.05 * goal.square().mean()


def test_distillation_loss_is_the_cross_entropy_it_claims():
    log_p = torch.randn(2, 7, 256).log_softmax(-1)
    target = torch.randint(0, 256, (2, 7))
    teacher = torch.softmax(torch.randn(2, 7, 256), -1)
    hard = F.nll_loss(log_p.flatten(0, 1), target.flatten())
    soft = -(teacher * log_p).sum() / 14
    loss = tiny.distillation_loss(log_p, target, teacher, 0.6)
    assert torch.allclose(loss, 0.4 * hard + 0.6 * soft)


def test_batches_pair_each_byte_with_the_teachers_view_of_it():
    counted = np.random.default_rng(0).integers(97, 101, 9000, dtype=np.uint8)
    teacher = ngram.NGram(6).fit(counted[len(counted) // 2 :])
    batches = tiny.Batches(counted, 4, 32, 0, teacher)
    whole = b"\0" + counted.tobytes()
    for step in range(3):
        ids, q = batches.get(step, taught=True)  # number t of q is about byte t + 1 of the window
        for row, distributions in zip(ids.numpy(), q.numpy()):
            at = whole.find(row.astype(np.uint8).tobytes())
            assert 0 <= at < len(counted) // 2 - 32  # what it has counted it would recite
            assert np.allclose(distributions, teacher.probs(counted, at + np.arange(32)))
    assert batches.get(0)[1] is None


def test_batches_read_everything_once_before_anything_again():
    text = np.random.default_rng(0).integers(1, 256, 4000, dtype=np.uint8)
    whole = b"\0" + text.tobytes()
    batches = tiny.Batches(text, 4, 32, 1)
    assert batches.per_epoch == 3969 // (4 * 32)
    orders = []
    for epoch in range(2):
        steps = epoch * batches.per_epoch + np.arange(batches.per_epoch)
        found = [row for step in steps for row in batches.get(step)[0].tolist()]
        orders.append([whole.find(bytes(row)) for row in found])
        once = np.zeros(len(whole))
        for at in orders[-1]:
            once[at : at + 32] += 1
        assert min(orders[-1]) >= 0 and once.max() == 1
        assert once[64:-160].mean() > 0.9  # what does not fill a step is left out
    assert orders[0] != sorted(orders[0]) != sorted(orders[1])  # shuffled; cut elsewhere, too
    later = tiny.Batches(text, 4, 32, 1).get(5)[0]
    assert later.tolist() == [list(whole[at : at + 33]) for at in orders[0][20:24]]
    assert tiny.Batches(text, 4, 32, 2).get(5)[0].tolist() != later.tolist()  # the seed decides
    tiny.Batches(text[:40], 8, 32, 1).get(0)  # shorter than a batch: some of it several times


def test_evaluate_scores_every_byte_once_with_real_context(model):
    text = data.encode(b"Once upon a time there was a cat. The cat sat on a mat. It was red." * 2)
    ids = torch.tensor([0, *text.tolist()])
    nats = 0.0
    for i in range(len(text)):
        start = max(0, (i // 16 - 1) * 16)
        nats -= model(ids[None, start : i + 2])[0][0, -1].item()
    assert tiny.evaluate(model, text) == pytest.approx(nats / len(text) / math.log(2), rel=1e-4)
    assert all(tiny.evaluate(model, text[:size]) > 0 for size in (1, 5, 16, 17, 33))


def test_the_rate_of_all_optimizers_falls_to_0():
    net = random_net(plain=False)
    before = {name: w.clone() for name, w in net.state_dict().items() if name != "memory.count"}
    optimizers = tiny.make_optimizers(net)
    for factor in (0.0, 1.0):
        loss = tiny.train_step(net, optimizers, windows(4), None, factor)
        same = [torch.equal(w, net.state_dict()[name]) for name, w in before.items()
                if name != "memory.squares"]
        assert set(same) == {factor == 0}  # all of them learn, or none
    assert not torch.equal(before["memory.table"], net.memory.table)
    assert loss == pytest.approx(-net(windows(4))[0].mean().item(), rel=0.5)


# ---- tiny.py: a run, as a user starts it ---------------------------------------------------------

def test_main_job(finished):
    result, out = finished
    facts = dict(re.findall(r"^(\w+): (\S+)$", result.stdout, re.MULTILINE))
    assert 18 * 0.9 < float(facts["seconds"]) < 18 * 1.1  # ±2 % of five minutes are 6 s
    assert float(facts["val_bpb"]) < 2 and float(facts["ngram_bpb"]) < 2
    assert result.stdout.rstrip().endswith(f"python sample.py --out {out}")
    looks = [float(x) for x in re.findall(r"([\d.]+) bits per byte \|", result.stdout)]
    assert len(looks) >= 5 and looks[-1] < 0.4 and os.listdir(out) == ["model.pt"]
    model, content = tiny.load_checkpoint(out)
    valid = data.read([out.with_name("new.txt")])
    assert tiny.evaluate(model, valid) == pytest.approx(float(facts["val_bpb"]), abs=2e-3)
    assert content["optimizers"] is None


def test_the_teacher_teaches_a_plain_gpt_for_its_part_of_the_time(runs, texts, monkeypatch):
    taught = []
    train_step = tiny.train_step
    def watched(*rest):
        taught.append(rest[3] is not None)
        return train_step(*rest)
    monkeypatch.setattr(tiny, "train_step", watched)
    runs("out", "--plain", "--distill", 0.5, "--steps", 8)
    assert taught == [True] * 4 + [False] * 4  # the teacher stops
    train = data.read(texts[1:2])
    args = argparse.Namespace(distill=0.5, minutes=5, seed=1)
    teacher, _ = tiny.count_ngram(args, train, train[:99])
    half = ngram.NGram().fit(train[len(train) // 2 :])  # the rest is what it teaches
    assert np.array_equal(teacher.counts[12].context, half.counts[12].context)
    model, _ = tiny.load_checkpoint("out")
    assert type(model) is tiny.GPT and len(model.blocks) == 3


@pytest.fixture
def runs(monkeypatch, tmp_path, texts):
    """A function that calls tiny.main in this process with a small net. -> the weights it saved"""
    monkeypatch.setattr(tiny.WordGPT.__init__, "__defaults__", (2, 4, 128, 512, 2**10))
    monkeypatch.setattr(tiny, "LOOKS", (0.1, 0.5, 1))
    monkeypatch.chdir(tmp_path)
    def train(out, *more):
        where = ["--out", out, *SMALL, "--minutes", 0.05, *more]
        if "--data" not in more:
            where += texts
        tiny.main(list(map(str, where)))
        content = torch.load(os.path.join(out, "model.pt"), weights_only=True)
        return content["weights"]
    return train


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(monkeypatch, step, number):
    """Send this process a signal in the middle of a step. -> list with an entry for each step"""
    train_step = tiny.train_step
    count = []
    def stopping(*rest):
        count.append(rest[-1])  # the factor of the rates
        if len(count) == step:
            os.kill(os.getpid(), number)
        return train_step(*rest)
    monkeypatch.setattr(tiny, "train_step", stopping)
    return count


def test_steps_repeat_exactly_and_looking_changes_nothing(runs, monkeypatch, capsys):
    first = runs("a", "--steps", 12)
    story = capsys.readouterr().out.partition("val_bpb")[0].split("\n")[-3]
    monkeypatch.setattr(tiny, "LOOKS", (0.9, 1))
    assert same(first, runs("b", "--steps", 12)) and f"\n{story}\n" in capsys.readouterr().out
    assert not same(first, runs("c", "--steps", 12, "--seed", 2))


@pytest.mark.parametrize("cut, plain", [(1, []), (8, ["--plain", "--distill", 0.5]), (15, [])])
def test_interrupted_and_resumed_equals_uninterrupted(runs, monkeypatch, cut, plain, capsys):
    more = ["--steps", 16, *plain]
    whole = runs("whole", *more)
    number = (signal.SIGTERM, signal.SIGINT)[cut % 2]
    monkeypatch.setattr(sys, "argv", ["tiny.py", "--minutes", "1"])
    count = stop_at(monkeypatch, cut, number)
    ctrl_c = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        runs("cut", *more)
    assert ended.value.code == 128 + number and signal.getsignal(signal.SIGINT) is ctrl_c
    told = capsys.readouterr().out
    assert f"interrupted after {cut} steps" in told
    assert "go on: python tiny.py --minutes 1 --resume cut" in told
    for other, name in ((["--width", 32], "width"), (["--seed", 3], "seed"),
                        (["--data", __file__], "text")):
        with pytest.raises(data.Problem, match=f"began with {name} "):
            runs("cut", *more, "--resume", "cut", *other)
    assert same(whole, runs("cut", *more, "--resume", "cut")) and len(count) == 16
    with pytest.raises(data.Problem, match="is complete"):
        runs("cut", *more, "--resume", "cut")
    with pytest.raises(data.Problem, match="diverged"):
        runs("wild", *more, "--rate", 1e30)


def test_waiting_for_a_download_does_not_count(runs, texts, monkeypatch):
    load = data.load
    monkeypatch.setattr(data, "load", lambda *a, **b: load(*a, **b)._replace(waited=1000.0))
    assert tiny.main([*texts, *SMALL, "--minutes", "0.05"], time.monotonic() - 1000)["steps"] > 0


def test_two_runs_with_one_name_get_two_folders(runs, capsys):
    first = runs("a", "--steps", 2)
    runs("a", "--steps", 3)
    assert "the model goes to a-2" in capsys.readouterr().out
    assert same(first, torch.load("a/model.pt", weights_only=True)["weights"])


def test_the_state_is_saved_each_minute_and_at_any_moment_whole(runs, monkeypatch, tmp_path):
    """A clock that runs fast; each save is the state so far, whatever happens later."""
    real = time.monotonic
    steps = stop_at(monkeypatch, 10**9, signal.SIGINT)
    monkeypatch.setattr(time, "monotonic", lambda: real() + 25 * len(steps))
    saved = []
    save = data.save
    def watched(path, content):
        save(path, content)
        saved.append(tiny.load_checkpoint("a")[1]["state"]["step"])
    monkeypatch.setattr(data, "save", watched)
    runs("a", "--steps", 10)
    assert saved == [3, 6, 9, 10]


def test_killed_at_any_moment_leaves_a_whole_checkpoint_or_none(tmp_path, texts, monkeypatch):
    code = ("import sys, tiny; tiny.WordGPT.__init__.__defaults__ = (2, 4, 128, 512, 2**10); "
            "tiny.SAVE_EVERY = 0; tiny.main(sys.argv[1:])")
    env = os.environ | {"PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(tiny.WordGPT.__init__, "__defaults__", (2, 4, 128, 512, 2**10))
    for i in range(4):
        out = tmp_path / str(i)
        command = [sys.executable, "-c", code, *texts, "--out", out, *SMALL]
        run = subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL)
        while i % 2 == 0 and not (out / "model.pt").exists() and run.poll() is None:
            time.sleep(0.01)
        time.sleep(0.3 + 0.5 * i)
        run.kill()
        run.wait()
        if i % 2 == 0 or (out / "model.pt").exists():
            _, content = tiny.load_checkpoint(out)
            assert content["state"]["step"] > 0 and content["optimizers"]


def test_a_full_disk_is_told_and_stops_no_training(runs, monkeypatch, capsys):
    save = data.save
    full = [True] * 3
    def failing(*rest):
        if full and full.pop():
            raise OSError(28, "No space left on device")
        save(*rest)
    monkeypatch.setattr(data, "save", failing)
    monkeypatch.setattr(tiny, "SAVE_EVERY", 0)
    runs("a", "--steps", 6)
    assert capsys.readouterr().err.count("No space left on device") == 3
    full[:] = [True] * 99
    with pytest.raises(data.Problem, match="the model is not in b"):
        runs("b", "--steps", 3)
    stop_at(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(SystemExit):
        runs("c", "--steps", 9)
    assert "val_bpb: " in (told := capsys.readouterr().out) and "all is saved" not in told


def test_that_nobody_reads_stops_nothing(runs, monkeypatch):
    def gone(*_):
        raise BrokenPipeError
    nobody = types.SimpleNamespace(write=gone, flush=gone, isatty=lambda: False, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", nobody)
    monkeypatch.setattr(sys, "stderr", nobody)
    data.notice("hello")
    assert runs("a", "--steps", 3)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_a_second_signal_ends_at_once_and_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with tiny.stop_signals() as stop:
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, before)


def test_on_the_clock_the_rate_falls_to_0_and_the_second_epoch_is_told(runs, monkeypatch, capsys):
    factors = stop_at(monkeypatch, 10**9, signal.SIGINT)
    epochs = []
    step = tiny.Memory.step
    def watched(self, lr):
        epochs.append(self.first_epoch)
        step(self, lr)
    monkeypatch.setattr(tiny.Memory, "step", watched)
    monkeypatch.setattr(tiny, "LEAST", 0)  # else a short text is read more often
    runs("a", "--minutes", 5, "--batch", 64)
    steps = len(factors)
    for part, factor in ((0, 1), (0.49, 1), (0.75, 0.5), (0.999, 0)):
        assert factors[int(part * steps)] == pytest.approx(factor, abs=0.1)
    quarter = steps // tiny.EPOCHS
    assert epochs == [True] * quarter + [False] * 3 * quarter  # it ends after four


def test_bad_options_get_one_line():
    for command, words in ((["--width", "30"], "multiple"), (["--distill", "1"], "--plain"),
                           (["--steps", "0"], "above 0"), (["--batch", "-1"], "above 0"),
                           (["--layers", "x"], "--layers")):
        refused(script("tiny.py", *command), words)
    if not torch.accelerator.is_available():
        refused(script("tiny.py", "--device", "cuda"), "no GPU")
    assert "example: python tiny.py" in script("tiny.py", "--help").stdout


class Evil:  # a pickle that would create a folder when it is loaded
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_damaged_or_foreign_checkpoint_is_refused(runs, tmp_path):
    runs("a", "--steps", 2)
    path = tmp_path / "a" / "model.pt"
    whole = path.read_bytes()
    good = torch.load(path, weights_only=True)
    for part in range(0, 8, 2):
        path.write_bytes(whole[: len(whole) * part // 8])
        with pytest.raises(data.Problem, match="not a checkpoint"):
            tiny.load_checkpoint("a")
    for content in (Evil(), {"weights": 3}, good | {"options": {}}, good | {"weights": {}}):
        torch.save(content, path)
        with pytest.raises(data.Problem, match="not a checkpoint"):
            tiny.load_checkpoint("a")
    assert not os.path.exists("ran")
    with pytest.raises(data.Problem, match="cannot read b.*train first"):
        tiny.load_checkpoint("b")


# ---- sample.py -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def fused(tmp_path_factory, texts):
    """All heads on a run that leaves them something to add. -> (Fusion, validation text)"""
    out = tmp_path_factory.mktemp("run") / "out"
    tiny.main([*texts, *SMALL, "--plain", "--steps", "60", "--out", str(out)])
    text = data.load(options(data=texts[1:2], valid=texts[3:]))
    model, _ = tiny.load_checkpoint(out)
    counting = ngram.NGram(5).fit(text.train)
    fusion = sample.Fusion(model, ("ngram", "knn", "cache"), counting, text.train[:10_000])
    return fusion, text.valid[:4_000]


def test_every_head_is_a_distribution_and_sees_its_own_story_only(fused):
    fusion, valid = fused
    seen = 0
    for moment, target, p in sample.moments(fusion.model, valid[:700]):
        for head in fusion.heads.values():
            q = head(moment)
            assert q.shape == (len(target), 256) and q.min() > 0
            assert torch.allclose(q.sum(-1), torch.ones(len(q)), atol=1e-5)
        assert target.tolist() == valid[seen : seen + len(target)].tolist()
        for row in range(len(target)):
            past = valid[: seen + row].tobytes()
            here = past[-64:].rpartition(b"\0")[2]
            followed = [byte for byte in moment.followed[row].tolist() if byte >= 0]
            assert bytes(followed) in here and 0 not in followed
            assert len(followed) >= min(31, len(here) - 1)
            assert moment.at[row] == seen + row
        seen += len(target)
    assert seen == 700


def test_fused_is_better_than_each_head(fused):
    fusion, valid = fused
    scored, held = valid[:2000], valid[2000:]
    fusion.fit(held)
    assert fusion.weights.sum() == pytest.approx(1) and fusion.weights.min() >= 0
    p = fusion.target_probs(scored)
    alone = -np.log2(p).mean(0)
    assert len(p) == 2000 and -np.log2(p @ fusion.weights).mean() < alone.min() + 0.01
    assert alone[0] == pytest.approx(tiny.evaluate(fusion.model, scored), rel=1e-4)
    counting = fusion.heads["ngram"].keywords["ngram"]
    assert alone[1] == pytest.approx(counting.bits_per_byte(scored), rel=1e-4)
    assert len(fusion.heads["knn"].keywords["values"].unique()) > 20  # bytes that followed


def test_generation_asks_the_heads_what_scoring_asked(fused, monkeypatch):
    monkeypatch.setattr(sample, "NEIGHBORS", 10**6)  # which is the last of 64 rounding may decide
    fusion, valid = fused
    fusion.weights = np.array([0.1, 0.2, 0.3, 0.4])
    text = valid[:50]
    scored = fusion.target_probs(text) @ fusion.weights
    for i in (0, 1, 20, 49):
        p = fusion.next_byte(torch.tensor([[0, *text[:i].tolist()]])).detach()
        assert p.sum().item() == pytest.approx(1, abs=1e-4)
        assert p[0, text[i]].item() == pytest.approx(scored[i], rel=1e-3)


def test_cache_and_knn_vote_for_what_followed():
    states = torch.eye(8)[None] * 8  # like that at position 2, where 12 (or 22) followed
    followed = torch.tensor([[10, 11, 12, 13, -1]])
    moment = sample.Moment(states[:, 2], states[:, :5], followed, None, None)
    assert sample.cache_head(moment).argmax() == 12
    nothing = moment._replace(followed=torch.full((1, 5), -1))
    assert torch.allclose(sample.cache_head(nothing), torch.full((1, 256), 1 / 256))
    p = sample.knn_head(moment, states[0, :5], torch.tensor([20, 21, 22, 23, 24]))
    assert p.argmax() == 22 and p.sum() == pytest.approx(1)
    assert p[0, 99] == pytest.approx(0.01 / 256)


def test_weights_are_learned_on_other_bytes_than_are_scored(finished, texts, monkeypatch, capsys):
    asked = []
    target_probs = sample.Fusion.target_probs
    def watched(self, text):
        asked.append(text)
        return target_probs(self, text)
    monkeypatch.setattr(sample.Fusion, "target_probs", watched)
    _, out = finished
    sample.main(["--score", f"{out}+cache", "--data", str(out.with_name("long.txt")), *texts[2:]])
    valid = data.read(texts[3:])
    assert np.array_equal(asked[0], valid[len(valid) // 2 :])
    assert np.array_equal(asked[1], valid[: len(valid) // 2])
    alone, fused = re.findall(r"(?:transformer|fused)_bpb: ([\d.]+)", capsys.readouterr().out)
    assert float(fused) <= float(alone) + 0.002


REF = sample.Reference(data.encode(b"\0".join(
    [b"One day, Lily saw Tom. He saw Lily and Tom with Lily and Tom, red Tom, Red Tom."] * 9)))


@pytest.mark.parametrize("row, story, value", [
    ("doubled", "She got got it,, at last.", 2000 / 6), ("doubled", "She got it, at last.", 0),
    ("names_return", "Lily met Tom. " + "He ran. " * 9 + "Lily won.", 50),
    ("names_return", "She met him. " * 9, None),
    ("repeated_4", "a b c d e a b c d f", 100 * 1 / 7), ("repeated_4", "a b c", None),
    ("copied_8", "he saw lily and tom with lily and b c", 100 / 3), ("copied_8", "so short", None),
])
def test_the_rubric_counts_what_its_rows_say(row, story, value):
    found = getattr(sample, row)(story, REF)
    assert found is value or found == pytest.approx(value)


def test_the_rubric_is_about_names_and_means():
    assert REF.names == {"lily", "tom"}  # capitalised inside sentences
    mean, error = sample.rubric(["a b c d", "a b c d a b c d"], REF)["repeated_4"]
    assert (mean, error) == pytest.approx((10, 10 / 2**0.5))


def test_pairs_are_balanced_and_each_export_has_its_own_key():
    stories = [[f"a{i}" for i in range(42)], [f"b{i}" for i in range(42)]]
    keys = set()
    for runs, seed in ((["a", "b"], 1), (["a", "c"], 1), (["a", "b"], 2)):
        pairs = sample.blind_pairs(runs, stories, seed)
        assert pairs == sample.blind_pairs(runs, stories, seed)
        assert sum(k for _, _, k in pairs) == 21
        assert all(first == "ab"[k] + first[1:] and second == "ba"[k] + first[1:]
                   for first, second, k in pairs)
        assert len({first[1:] for first, _, _ in pairs}) == 42
        keys.add(str([k for _, _, k in pairs]))
    assert len(keys) == 3


def test_tally_counts_by_the_key_and_refuses_what_is_no_answer():
    assert sample.tally([0, 1, 1, 0], ["1", "1", "2", "="]) == [2, 1, 1]
    with pytest.raises(data.Problem, match="3 answers to 4 pairs"):
        sample.tally([0, 1, 1, 0], ["1", "1", "2"])
    with pytest.raises(data.Problem, match="answer 2 is 'A'"):
        sample.tally([0, 1], ["1", "A"])
    assert sample.sign_test(5, 1) == pytest.approx(14 / 64) and sample.sign_test(0, 0) == 1
    assert sample.sign_test(52, 74) == pytest.approx(0.061, abs=0.001)


def test_a_judgement_from_stories_to_sign_test(finished, texts, monkeypatch, tmp_path, capsys):
    _, out = finished
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_bytes(b"Mine. " * 200 + (b"<|endoftext|>" + b"Mine. " * 200) * 5)
    more = ["--data", str(out.with_name("long.txt")), *texts[2:], "--n", "6"]
    sample.main(["--judge", str(out), "mine.txt", *more])
    pages = (tmp_path / "pairs.txt").read_text()
    assert pages.count("######## pair") == 6 and pages.count("Mine. Mine.") > 6
    assert len(pages) < 8_800 and str(out) not in pages and "real" not in pages  # cut, and blind
    key = json.loads((tmp_path / "pairs.txt.key").read_text())
    (tmp_path / "answers").write_text("\n".join("12"[k == 1] for k in key["first"]))  # always ours
    sample.main(["--tally", "answers"])
    told, notices = capsys.readouterr()
    assert f"{out}: 6\nmine.txt: 0\nties: 0\np: 0.0312" in told and "another text" not in notices
    refused(script(os.path.join(HERE, "sample.py"), "--tally", "nothing"), "No such file")
    with pytest.raises(data.Problem, match="pairs.txt is there already"):
        sample.main(["--judge", "real", "mine.txt", *more])


def test_runs_of_all_kinds_tell_stories_from_the_same_prompts(finished, texts, capsys):
    _, out = finished
    more = ["--data", str(out.with_name("long.txt")), *texts[2:], "--n", "2"]
    sample.main(["--rubric", "real", "ngram", str(out), f"{out}+cache", *more])
    assert len(capsys.readouterr().out.splitlines()) == 5
    args = options(n=3, seed=1, temperature=0.45)
    text = data.load(options(data=texts[1:2], valid=texts[3:]))
    real = sample.stories_of("real", text, args)
    for run in ("ngram", str(out)):
        for story, known in zip(sample.stories_of(run, text, args), real):
            assert story.split()[:4] == known.split()[:4] and len(story) <= sample.LENGTH
    assert f"{out} was trained on another text" in capsys.readouterr().err
    with pytest.raises(data.Problem, match="no head 'knm'"):
        sample.open_run(f"{out}+knm", text)
    short = text._replace(valid=data.encode(b"One\n<|endoftext|>\nTwo poems\n"))
    assert sample.stories_of("real", short, args) == ["One", "Two poems\n"]


def test_stories_are_told_as_they_come_and_whole_characters(finished, monkeypatch, capsys):
    _, out = finished
    sample.main(["--out", str(out), "--n", "2", "--length", "40", "--prompt", "Où est 大"])
    first = capsys.readouterr().out
    assert first.count("Où est 大") == 2
    sample.main(["--out", str(out), "--n", "2", "--length", "40", "--prompt", "Où est 大"])
    assert first == capsys.readouterr().out
    refused(script("sample.py", "--out", "nothing"), "cannot read", "train first")
    monkeypatch.setattr(sample, "generate", lambda *_: iter([b"\xe5\xa4", b"\xa7 \xc3"]))
    sample.main(["--out", str(out), "--n", "1"])
    assert capsys.readouterr().out.endswith("大 \n\n")


# ---- README.md -----------------------------------------------------------------------------------

def pieces():
    """The examples of the README, as (what they need, code)."""
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"```python\n# (.*?)\n(.*?)```", file.read(), re.DOTALL)
    assert len(blocks) == 6
    return blocks


def part(name):
    """A definition, an assignment or a section of a file, as text: "Muon of tiny.py"."""
    name, _, path = name.rpartition(" of ")
    with open(os.path.join(HERE, path), encoding="utf-8") as file:
        text = file.read()
    if name.startswith("section "):
        return re.search(rf"# ---- {name[8:]}\. .*?(?=\n# ---- |\n# ====)", text, re.DOTALL)[0]
    found = rf"^(@.*\n)?(def |class )?{name}\b.*\n((    .*)?\n)*"
    return re.search(found, text, re.MULTILINE)[0]


@pytest.mark.parametrize("needs, code", pieces())
def test_the_pieces_work_with_what_the_readme_says_they_need(tmp_path, needs, code):
    packages, *parts = needs.split("; ")
    pasted = []
    for name in parts:
        if name.startswith("the file "):
            shutil.copy(os.path.join(HERE, name.removeprefix("the file ")), tmp_path)
        else:
            names, _, path = name.rpartition(" of ")
            pasted += [part(f"{one} of {path}") for one in names.split(" and ")]
    allowed = set(packages.split()) | {name.split()[-1][:-3] for name in parts if "file" in name}
    code = code.replace("...\n", "\n\n".join(pasted) + "\n", 1)
    for module in ("numpy", "torch", "tqdm", "data", "ngram", "tiny", "sample"):
        used = re.search(rf"^(import|from) .*\b{module}\b", code, re.MULTILINE)
        assert not used or module in allowed
    (tmp_path / "piece.py").write_text(code)
    result = script("piece.py", cwd=tmp_path, env={"PYTHONPATH": ""})
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


def test_the_readme_names_only_what_is_there():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        text = file.read()
    assert len(text.split()) <= 2300
    files = {name: open(os.path.join(HERE, name), encoding="utf-8").read().splitlines()
             for name in ("data.py", "ngram.py", "tiny.py", "sample.py")}
    for name, path, line in re.findall(r"\[`(?:def|class) (\w+)`\]\((\w+\.py)#L(\d+)\)", text):
        assert re.match(rf"(def|class) {name}\b", files[path][int(line) - 1]), (name, path, line)
    for option in set(re.findall(r"(?<=[ `])--[a-z][a-z-]+", text)):
        known = "\n".join("\n".join(lines) for lines in files.values())
        names = {"--nproc", "--index-url", "--upgrade", "--muon", "--stories"}
        assert option in names or f'"{option}"' in known or option[2:] in tiny.DEFAULT, option
