"""What must hold, each thing in the smallest case that could break it. No network but 127.0.0.1.

Run: python -m pytest -q; with FAST=1 in the environment the slow ones are left out.
"""
import ast
import doctest
import errno
import functools
import http.server
import json
import math
import multiprocessing.pool
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import urllib.error
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
STORY = (b"Once upon a time there was a cat. The cat sat on a mat. The mat was red.\n"
         b"The cat said, \"I like this mat.\"")
SMALL = ["--set", "width=16", "context=64", "--order", "4", "--device", "cpu"]
SHORT_STORY = ["--minutes", "0.04"]  # with --steps, the minutes only say how long the last story is
slow = pytest.mark.skipif("FAST" in os.environ, reason="slow, and FAST is set")


def script(*command, env=None, cwd=HERE, **options):
    """Run `python command...` as a user would, on one thread. -> CompletedProcess. No proxy to
    127.0.0.1."""
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    clean.pop("TINY_URL", None)
    clean |= {"PYTHONPATH": HERE, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                          encoding="utf-8", cwd=cwd, env=clean | (env or {}), timeout=240,
                          **options)


def scripts(*commands, **options):
    """Several at once, two at a time, as most of it is starting up."""
    with multiprocessing.pool.ThreadPool(2) as pool:
        run = functools.partial(script, **options)
        return pool.starmap(run, commands, chunksize=1)


def refused(result, *words):
    """The command failed with one clear line that has these words, and no traceback."""
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode in (1, 2) and "Traceback" not in result.stderr, result.stderr
    assert "error: " in last and all(word in last for word in words), result.stderr


def closing_block(stdout):
    """The `key: value` lines of a run -> dict."""
    pairs = [line.split(": ", 1) for line in stdout.splitlines() if ": " in line]
    return {key: value for key, value in pairs if key.replace("_", "").isalpha()}


@pytest.fixture(scope="module")
def stories_file(tmp_path_factory):
    """A little text on disk: 400 built-in stories."""
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    path.write_bytes(data.invent(400))
    return path


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    """Text enough for half a minute of training: a run ends when it has read its text twice."""
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_bytes(data.invent(12000))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, long_file):
    """One whole run of the main job on the clock, as a user starts it. -> (result, its folder)"""
    out = tmp_path_factory.mktemp("run") / "out"
    valid = out.with_name("valid.txt")  # a short one, so that looks are cheap on any machine
    valid.write_bytes(data.invent(50, seed=1))
    texts = ["--data", long_file, "--valid", valid]
    # Small steps on one thread, so that beside busy processes, too, there are some hundred.
    result = script("tiny.py", "--minutes", 0.4, *texts, "--out", out, "--order", 8, "--device",
                    "cpu", "--set", "width=32", "context=128", "batch=4")
    assert result.returncode == 0, result.stderr
    return result, out


# ---- data.py -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [b"", b"one\n<|endoftext|>\ntwo", b"\xff\xfe\x80 caf\xc3\xa9",
                                  b"\n\n<|endoftext|>\n\n", b"a\r\nb\r\n", bytes(range(1, 256))])
def test_round_trip(text):
    assert data.decode(data.encode(text)) == text


def test_stories_are_told_apart_and_nul_bytes_are_dropped():
    text = data.encode(b"a\r\n<|endoftext|>\r\nb<|endoftext|>\n\n<|endoftext|>c\0\0")
    assert text.tobytes() == b"a\0b\0\0c" and data.split_stories(text) == [b"a", b"b", b"c"]


def test_printable_replaces_only_what_can_drive_a_terminal():
    fine = "« Où ? »\u00a0👩\u200d🚀 \ufeff\tשלום\n"
    assert data.printable(fine) == fine and data.printable("a\rb\r\n") == "ab\n"
    assert data.printable("\x1b[2J\x9b\u202e") == "\ufffd[2J\ufffd\ufffd"


def test_files_are_joined_and_lose_their_byte_order_marks(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + name.encode() + b"\r\n")
    assert data.read([tmp_path / "a", tmp_path / "b"]).tobytes() == b"a\r\n\0b\r\n"


def test_split_is_at_a_story_end_near_95_percent_and_loses_nothing():
    text = data.encode(data.invent(300))
    train, valid = data.split(text)
    assert np.array_equal(np.concatenate((train, valid)), text)
    assert train[-1] == data.END and 0.03 < len(valid) / len(text) < 0.07
    far = np.where(np.arange(1000) == 600, data.END, 65).astype(np.uint8)
    assert len(data.split(far)[1]) == 50


def test_invented_stories_differ_and_repeat_exactly():
    text = data.invent(1000)
    stories = data.split_stories(data.encode(text))
    assert data.invent(1000) == text and len(set(stories)) == 1000
    for story in stories:  # the one whose story it is comes back; nothing of the template is left
        assert story.count(story.split(b" named ")[1].split(b".")[0]) >= 4
        assert not set(b"{}[]|") & set(story)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    pytest.importorskip("resource")
    (tmp_path / "model.pt").write_bytes(b"old")
    code = ("import data, resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
            "data.run(lambda: data.save('model.pt', bytes(2000)))")
    refused(script("-c", code, cwd=tmp_path), "cannot write model.pt", "free some space")
    assert [(x.name, x.read_bytes()) for x in tmp_path.iterdir()] == [("model.pt", b"old")]


def test_two_threads_may_save_one_file(tmp_path):
    contents = [b"1" * 2_000_000, b"2" * 2_000_000]
    with multiprocessing.pool.ThreadPool(4) as pool:
        pool.map(functools.partial(data.save, str(tmp_path / "file")), 10 * contents)
    assert [x.read_bytes() in contents for x in tmp_path.iterdir()] == [True]


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path):
    code = f"import data, os; print(data.lock({str(tmp_path / 'lock')!r}), flush=True); os._exit(1)"
    (tmp_path / "link").symlink_to(tmp_path / "anything")
    with pytest.raises(data.Problem, match="is not a regular file"):
        data.lock(tmp_path / "link")
    with data.lock(tmp_path / "lock"):
        assert script("-c", code).stdout == "None\n"
    assert "None" not in script("-c", code).stdout  # ended without closing it
    assert data.lock(tmp_path / "lock") is not None


def test_a_file_system_without_locks_is_good_enough(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    data.lock(tmp_path / "x").close()


def test_a_large_file_is_read_only_as_far_as_needed(tmp_path):
    with open(tmp_path / "large.txt", "wb") as file:
        file.write(data.invent(3000))
        file.truncate(2_000_000_000)
    code = ("import data, sys; text = data.load([sys.argv[1]], megabytes=1);"
            "print(len(text.train), data.peak_memory())")
    result = script("-c", code, tmp_path / "large.txt")
    size, memory = map(int, result.stdout.split())
    assert 900_000 < size < 1_000_000 and 10e6 < memory < 300e6 and "--megabytes" in result.stderr


class Server(http.server.ThreadingHTTPServer):
    """Honours Range and If-Range. fault(number of the request): a status, "cut", "silent", "few" (a
    fifth of what was asked for), "all" (from the beginning, whatever was asked for), or "whole" (as
    if it knew no Range)."""

    def __init__(self, body, fault=lambda n: None, version='"one"'):
        self.requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.requests.append(self.headers["Range"])
                kind = fault(len(self.server.requests))
                if kind == "silent":
                    return threading.Event().wait(5)
                first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                status, content = 206, body[first : last + 1]
                if self.headers.get("If-Range", version) != version or kind == "whole":
                    status, content = 200, body
                elif not content:
                    status = 416
                if kind == "few":
                    content = content[: len(content) // 5]
                if kind == "all":
                    first, content = 0, body[: last + 1]
                self.send_response(kind if isinstance(kind, int) else status)
                if status == 206:
                    part = f"bytes {first}-{first + len(content) - 1}/{len(body)}"
                    self.send_header("Content-Range", part)
                if status != 200 or version:
                    self.send_header("Content-Length", str(len(content)))
                if version:
                    self.send_header("ETag", version)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if kind == "cut" else content)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def quick(monkeypatch):
    """No proxy, no long waits. -> the list of waits that there would have been"""
    for name in [x for x in os.environ if x.lower().endswith("_proxy") or x == "TINY_URL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "*")
    waits = []
    monkeypatch.setattr(data, "PATIENCE", 1.5)
    # Not time.sleep itself: the clocks of other tests would never sleep again.
    stand_in = types.SimpleNamespace(sleep=waits.append, monotonic=time.monotonic)
    monkeypatch.setattr(data, "time", stand_in)
    return waits


BODY = data.invent(100)


def test_a_cut_line_a_busy_server_and_silence_are_tried_again(tmp_path, quick):
    server = Server(BODY, {1: "cut", 2: 503, 3: "silent"}.get)
    data.download(server.url, tmp_path / "x", 10_000)
    assert server.requests == ["bytes=0-9999"] + ["bytes=5000-9999"] * 3 and len(quick) == 3
    got = (tmp_path / "x").read_bytes()
    assert BODY.startswith(got) and got.endswith(b"<|endoftext|>\n") and 9_000 < len(got) <= 10_001
    server = Server(BODY, {1: "silent"}.get)
    data.download(server.url, tmp_path / "y", 10_000)
    assert len(server.requests) == 2


def test_what_a_server_sends_is_what_it_says_it_sends(tmp_path, quick):
    server = Server(BODY, {1: "few", 2: "all"}.get)
    data.download(server.url, tmp_path / "x", 10_000)
    assert server.requests == ["bytes=0-9999", "bytes=2000-9999"]
    assert BODY.startswith((tmp_path / "x").read_bytes())
    server = Server(BODY, {1: "cut"}.get, version="")  # without it a change is not noticed
    data.download(server.url, tmp_path / "y", 10_000)
    assert server.requests == ["bytes=0-9999"] * 2
    server = Server(BODY + b"\n<|endoftext|>\n", lambda n: "whole", version="")  # of no length
    data.download(server.url, tmp_path / "z", 10**9)
    assert (tmp_path / "z").read_bytes() == BODY + b"\n<|endoftext|>\n"


@pytest.mark.parametrize("version", ['"one"', '"two"'])
def test_the_next_run_goes_on_unless_the_text_has_changed(tmp_path, quick, version):
    with pytest.raises(data.Problem, match="cut; run again to go on"):
        data.download(Server(BODY, lambda n: "cut").url, tmp_path / "x", 10_000)
    assert not (tmp_path / "x").exists()  # nothing half-written has the name of data
    body = data.invent(100, seed=1) if version == '"two"' else BODY
    server = Server(body, version=version)
    data.download(server.url, tmp_path / "x", 10_000)
    assert server.requests == ["bytes=9375-9999"] and body.startswith((tmp_path / "x").read_bytes())


def test_another_process_at_the_same_download_is_waited_for(tmp_path, quick, monkeypatch, capsys):
    other = data.lock(tmp_path / "x.lock")
    monkeypatch.setattr(data.time, "sleep",
                        lambda _: (tmp_path / "x").write_bytes(b"fetched") and other.close())
    data.download("http://127.0.0.1:9", tmp_path / "x", 10_000)
    assert "waiting for another process" in capsys.readouterr().err


def test_download_of_more_than_there_is(tmp_path, quick):
    whole = data.invent(20) + b"\n<|endoftext|>\n"
    for part in b"", whole:  # all has arrived before
        path = tmp_path / f"x{len(part)}"
        path.with_suffix(".part").write_bytes(part)
        path.with_suffix(".lock").write_bytes(b'"one"')
        server = Server(whole)
        data.download(server.url, path, 10**9)
        assert path.read_bytes() == whole and server.requests == [f"bytes={len(part)}-999999999"]


@pytest.mark.parametrize("body, kind, words", [
    (BODY, 404, "404.*TINY_URL"), (b"<html>" * 1000, None, "not TinyStories; correct TINY_URL")])
def test_download_says_what_is_wrong(tmp_path, quick, body, kind, words):
    with pytest.raises(data.Problem, match=words):
        data.download(Server(body, lambda n: kind).url, tmp_path / "x", 1000)


def test_a_bad_certificate_is_not_no_network_but_silence_is(tmp_path, quick, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")

    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)
    with pytest.raises(data.Problem, match="self-signed"):
        data.download("https://x", tmp_path / "x", 10_000)
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: threading.Event().wait(9))
    monkeypatch.setattr(data, "PATIENCE", 0.5)
    began = time.monotonic()
    with pytest.raises(data.NoNetwork):  # even a look-up of the name that never ends
        data.download("https://x", tmp_path / "y", 10_000)
    assert time.monotonic() - began < 5


def test_load_downloads_once(tmp_path, quick, monkeypatch):
    server = Server(data.invent(200))
    monkeypatch.setattr(data, "URL", server.url)
    first = data.load(megabytes=0.05, cache=tmp_path)
    again = data.load(megabytes=0.05, cache=tmp_path)
    assert len(server.requests) == 2 and np.array_equal(first.train, again.train)
    assert first.source.startswith("TinyStories") and 40_000 < len(first.train) <= 50_000
    other = Server(data.invent(200, seed=1))
    monkeypatch.setenv("TINY_URL", other.url)  # another address, another text
    second = data.load(megabytes=0.05, cache=tmp_path)
    assert second.source == other.url and not np.array_equal(first.train, second.train)


def test_without_network_stories_are_built_in(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(data, "URL", "http://127.0.0.1:9")  # nobody listens there
    assert "built-in" in data.load(cache=tmp_path).source
    assert "MEAN NOTHING" in capsys.readouterr().err
    monkeypatch.setenv("TINY_URL", "http://127.0.0.1:8")  # what was asked for is not left aside
    with pytest.raises(data.Problem, match="cannot reach TINY_URL"):
        data.load(cache=tmp_path)


def numbered_lines(low, high):
    return "".join(f"This is line {i}, like no other.\n" for i in range(low, high)).encode()


@pytest.mark.parametrize("training, validation, share", [
    (numbered_lines(100, 200), numbered_lines(200, 300), None),
    (numbered_lines(100, 200), numbered_lines(150, 250), 48),  # no story ends in either
    (numbered_lines(100, 200), numbered_lines(180, 190) + data.SEPARATOR + b"New. " * 3, 90),
    (60 * numbered_lines(100, 110), None, 97),
    (data.invent(100), None, None),  # their lines are often alike, as stories they are not
    (data.invent(100), data.invent(50) + data.SEPARATOR + data.invent(50, seed=1), 50),
])
def test_a_validation_text_that_is_known_is_told(tmp_path, capsys, training, validation, share):
    (tmp_path / "train").write_bytes(training)
    (tmp_path / "valid").write_bytes(validation or b"")
    data.load([tmp_path / "train"], [tmp_path / "valid"] if validation else None)
    told = re.findall("([0-9]+)% of the validation text", capsys.readouterr().err)
    assert told == [] if share is None else abs(int(told[0]) - share) < 8


@pytest.mark.parametrize("command, words", [
    ("--data missing.txt", ["cannot read missing.txt", "name another file"]),
    ("--data folder", ["cannot read folder", "directory"]),
    ("--data empty.txt", ["empty.txt is empty"]),
    ("--data utf16.txt", ["utf16.txt seems to be binary or UTF-16"]),
    ("--data random.txt", ["random.txt seems to be binary or UTF-16"]),
    ("--data short.txt", ["validation text has 1 bytes"]),
    ("--valid short.txt", ["--valid needs --data"]),
])
def test_bad_text_gets_one_line(tmp_path, command, words):
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf\n")
    (tmp_path / "short.txt").write_bytes(b"Too short.")
    (tmp_path / "utf16.txt").write_bytes("Once upon a time".encode("utf-16"))
    (tmp_path / "random.txt").write_bytes(np.random.default_rng(0).bytes(10_000))
    (tmp_path / "folder").mkdir()
    refused(script(os.path.join(HERE, "data.py"), *command.split(), cwd=tmp_path), *words)


@pytest.mark.parametrize("option", ["--megabytes=0", "--megabytes=nan", "--mega=1"])
def test_bad_options_of_data_are_named_and_none_is_abbreviated(option):
    result = script("data.py", option)
    assert result.returncode == 2 and option.split("=")[0] in result.stderr.splitlines()[-1]


def test_main_shows_the_text_on_any_terminal(tmp_path):
    (tmp_path / "x.txt").write_bytes("Où est le chat 🐈 ?\n".encode() * 200)
    result = script("data.py", "--data", tmp_path / "x.txt", env={"PYTHONIOENCODING": "cp1252"},
                    errors="replace")
    assert result.returncode == 0 and "chat ? ?" in result.stdout


def test_a_closed_stdout_is_no_traceback(tmp_path):
    (tmp_path / "x.txt").write_bytes(data.invent(20))
    code = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    result = script("-c", code, "data.py", "--data", tmp_path / "x.txt")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_that_goes_away_ends_a_script_quietly():
    command = [sys.executable, "-c", "import data; data.run(lambda: print('x' * 1_000_000))"]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)


# ---- ngram.py ------------------------------------------------------------------------------------

TEXT = b"the cat sat on the mat\0the rat sat\0a cat ate the rat on a mat\0" * 2 + b"that hat\0"
NEW = b"a cat\0the bat sat on that zebra\0\0mat the rat"
FRANCISCO = b"San Francisco, San Francisco, San Francisco, my dog, a dog, the dog"


@pytest.fixture(scope="module")
def stories():
    """Training and validation text."""
    return data.split(data.encode(data.invent(600)))


@pytest.mark.parametrize("smoothing, low, high", [("absolute", 0.99, 1.01), ("kneser-ney", 5, 20)])
def test_kneser_ney_asks_after_how_many_different_bytes(smoothing, low, high):
    """After an unknown word: " F" was met as often as " d", but always after the same byte."""
    slow = ngram.Textbook(FRANCISCO, 3, smoothing).distribution(b"big ", 4)
    fast = ngram.NGram(3, smoothing).fit(FRANCISCO).probs(b"big ", [4])[0]
    for p in (slow, fast):
        assert low < p[ord("d")] / p[ord("F")] < high
    counts = {(b"n ", "F"): 3, (b"y ", "d"): 1, (b"a ", "d"): 1, (b"e ", "d"): 1}
    assert ngram.continuation_counts(counts) == {(b" ", "F"): 1, (b" ", "d"): 3}


def test_examples_in_docstrings_hold():
    result = doctest.testmod(ngram)
    assert result.attempted > 0 and result.failed == 0


def test_a_textbook_case_by_hand():
    """After a: b twice, c once. Each seen byte's share by the formula, in numbers."""
    text = b"abacab"
    p = {name: ngram.Textbook(text, 2, name).distribution(b"a", 1) for name in ngram.SMOOTHINGS}
    b, c, new = ord("b"), ord("c"), ord("z")
    likely = p["maximum-likelihood"]
    assert (likely[b], likely[c], likely[new]) == pytest.approx((2 / 3, 1 / 3, 0))
    assert p["add-k"][[b, new]] == pytest.approx([2.01 / 5.56, 0.01 / 5.56])
    below = (2 + 3 / 256) / (6 + 3)  # Witten-Bell, order 1: b is 2 of 6; 3 different bytes
    assert p["witten-bell"][b] == pytest.approx((2 + 2 * below) / (3 + 2))
    assert all(distribution.sum() == pytest.approx(1) for distribution in p.values())


@pytest.mark.parametrize("smoothing", ngram.SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 8])
def test_the_fast_model_equals_the_textbook(order, smoothing):
    model = ngram.NGram(order, smoothing).fit(TEXT)
    textbook = ngram.Textbook(TEXT, order, smoothing, model.constants)
    for text in (TEXT, NEW):
        p = model.probs(text, np.arange(len(text) + 1))
        assert p.dtype == np.float32 and p.shape == (len(text) + 1, 256)
        assert np.abs(p.sum(1) - 1).max() < 1e-5
        assert p.min() > 0 or smoothing == "maximum-likelihood"
        want = [textbook.distribution(text, i) for i in range(len(text) + 1)]
        assert np.abs(p - want).max() < 1e-6
    if smoothing != "jelinek-mercer":  # whose constants are learned, not estimated from counts
        own = ngram.Textbook(TEXT, order, smoothing).constants
        assert model.constants[1:] == pytest.approx(np.array([own[n] for n in range(1, order + 1)]))


@pytest.mark.parametrize("smoothing", ngram.SMOOTHINGS)
@pytest.mark.parametrize("order", [1, 3, 6])
def test_leave_one_out_equals_a_recount(order, smoothing):
    model = ngram.NGram(order, smoothing).fit(TEXT)
    p = model.probs(TEXT, np.arange(len(TEXT)), leave_one_out=True)
    for i in range(0, len(TEXT), 3):
        recount = ngram.Textbook(TEXT, order, smoothing, model.constants, left_out=i)
        assert np.abs(p[i] - recount.distribution(TEXT, i)).max() < 1e-6


def test_leaving_out_tells_new_text_from_recited():
    """Nobody can predict random letters, log2(26) = 4.70 bits each, but one can recite them."""
    train, valid = np.random.default_rng(0).integers(97, 123, (2, 20_000), dtype=np.uint8)
    model = ngram.NGram(8).fit(train)
    assert model.bits_per_byte(train) < 4
    left_out = model.bits_per_byte(train, leave_one_out=True)
    assert left_out > 4.65 and left_out == pytest.approx(model.bits_per_byte(valid), abs=0.1)


@pytest.mark.parametrize("text", [data.invent(300), b"a" * 5000, b"\0" * 100, b"\5"])
def test_distributions_sum_to_1_and_are_never_0(text):
    text = data.encode(text) if len(text) > 5000 else text
    model = ngram.NGram(12).fit(text)
    noise = np.random.default_rng(0).integers(0, 256, 500, dtype=np.uint8)
    for asked, leave_one_out in ((text, False), (text, True), (noise, False)):
        positions = np.arange(min(2000, len(asked)))
        p = model.probs(asked, positions, leave_one_out).astype(float)
        assert np.abs(p.sum(1) - 1).max() < 1e-5 and p.min() > 0


def test_bytes_are_taken_wherever_data_is():
    array = np.frombuffer(TEXT, np.uint8)
    a, b = ngram.NGram(5).fit(TEXT), ngram.NGram(5).fit(array)
    for leave_one_out in (False, True):
        positions = np.arange(len(TEXT))
        p = a.probs(TEXT, positions, leave_one_out)
        assert np.array_equal(p, b.probs(array, positions, leave_one_out))
        assert a.bits_per_byte(TEXT, None, leave_one_out) == pytest.approx(
            -np.log2(p[positions, array].astype(float)).mean())


def test_contexts_are_found_by_the_56_bits_of_their_hash():
    grams = [(9, 97), (5, 98), (5, 97), (5, 98)]
    events = np.array([context << 8 | byte for context, byte in grams], np.uint64)
    counts = ngram.Counts(events)
    asked = np.array([5 << 8 | 1, 9 << 8 | 255, 6 << 8, 0, 2**64 - 1], np.uint64)
    assert counts.find(asked).tolist() == [0, 1, -1, -1, -1]
    first, of, byte, count = counts.followers(np.array([1, 0]))
    assert (first.tolist(), of.tolist()) == ([0, 1], [0, 1, 1])
    assert (byte.tolist(), count.tolist()) == ([97, 97, 98], [1, 1, 2])


def test_before_the_text_stands_an_end():
    model = ngram.NGram(5).fit(TEXT)
    assert np.array_equal(model.probs(b"", [0]), model.probs(b"\0", [1]))
    assert np.array_equal(model.probs(b"", [0]), model.probs(b"the", [0]))
    assert model.probs(b"", []).shape == (0, 256)


def test_more_context_predicts_better(stories):
    train, valid = stories
    scores = [ngram.NGram(order).fit(train).bits_per_byte(valid) for order in (1, 2, 4, 8)]
    assert scores == sorted(scores, reverse=True)


def test_discounts_are_chen_and_goodmans():
    count = np.repeat([1, 2, 3, 4, 9], [40, 20, 10, 5, 7])
    y = 40 / (40 + 2 * 20)
    modified = [0, 1 - 2 * y * 20 / 40, 2 - 3 * y * 10 / 20, 3 - 4 * y * 5 / 10]
    assert ngram.discounts("modified-kneser-ney", count) == pytest.approx(modified)
    assert ngram.discounts("absolute", count) == pytest.approx([0, y, y, y])
    for c, discount in enumerate(ngram.discounts("modified-kneser-ney", np.array([1]))):
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
    slope = (p / (p @ weights)[:, None]).mean(0)  # at the best, no model is worth more than 1
    assert slope.max() < 1 + 2e-5
    assert ngram.mixture_weights(np.zeros((5, 2))) == pytest.approx([0.5, 0.5])


def test_mixture_weights_are_fast():
    p = np.random.default_rng(0).random((300_000, 4)) ** [[1, 2, 3, 4]]
    began = time.process_time()
    ngram.mixture_weights(p)
    assert time.process_time() - began < 10


def test_jelinek_mercers_shares_are_the_best(stories):
    """Any other share for the highest order is worse on other positions, with each left out."""
    train, _ = stories
    model = ngram.NGram(8, "jelinek-mercer").fit(train)
    some = np.arange(0, len(train), 7)
    learned = model.constants[8, 0]
    best = model.bits_per_byte(train, some, leave_one_out=True)
    for share in set(ngram.SHARES) - {learned}:
        model.constants[8] = share
        assert model.bits_per_byte(train, some, leave_one_out=True) > best


def test_generate_repeats_itself_and_stops_at_the_end_of_a_story(stories):
    model = ngram.NGram(5).fit(stories[0])
    story = model.generate(b"Once upon", 3000, 0.5, seed=3)
    assert story == model.generate(b"Once upon", 3000, 0.5, seed=3)
    assert story != model.generate(b"Once upon", 3000, 0.5, seed=4)
    assert story.startswith(b"Once upon") and b"\0" not in story and len(story) < 3000
    assert len(model.generate(b"Once upon", 5)) == 14  # length counts what is generated
    assert model.generate() == model.generate(b"\0")[1:]  # both are the beginning of a story


def test_the_class_needs_its_file_and_numpy_alone(tmp_path):
    shutil.copy(ngram.__file__, tmp_path)
    code = ("import sys, ngram; p = ngram.NGram(3).fit(b'a cat ' * 9).probs(b'a ca', [4]);"
            "print(p.argmax()); sys.exit(any(x in sys.modules for x in ('data', 'torch', 'tqdm')))")
    result = script("-c", code, cwd=tmp_path, env={"PYTHONPATH": ""})
    assert result.returncode == 0 and result.stdout.strip() == str(ord("t")), result.stderr


@pytest.mark.parametrize("order, smoothing", [(0, "absolute"), (256, "absolute"), (3, "unknown")])
def test_what_cannot_be_counted_is_refused(order, smoothing):
    with pytest.raises(ValueError, match="must be"):
        ngram.NGram(order, smoothing)
    with pytest.raises(ValueError, match="empty"):
        ngram.NGram().fit(b"")
    with pytest.raises(ValueError, match="uint8"):  # tokens, say
        ngram.NGram().fit(np.array([1000, 2000]))


@pytest.mark.parametrize("option", ["--orders=0", "--orders=256", "--temperature=nan", "--sw"])
def test_bad_options_of_ngram_get_one_line(option):
    refused(script("ngram.py", option), option.split("=")[0])


def test_any_prompt_is_continued(stories_file):
    def story(prompt):
        command = ("ngram.py", "--data", stories_file, "--orders", 6, "--prompt", prompt)
        result = script(*command)
        assert result.returncode == 0, result.stderr
        return result.stdout.partition("peak memory")[2].partition("\n\n")[2].strip()

    beginning = story("")
    assert beginning
    assert story("<|endoftext|>") == "<|endoftext|>\n" + beginning
    assert len(story("x" * 2000)) > 2000
    assert story(b"\xff\xfe".decode("utf-8", "surrogateescape")).startswith("\ufffd\ufffd")


# ---- tiny.py: the model --------------------------------------------------------------------------

def random_net(plain):
    """A net with every weight random: the zeros it starts with would hide mistakes."""
    torch.manual_seed(0)
    net = tiny.GPT(layers=2, heads=2, width=16, context=32, rows=64, plain=plain)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if not plain:
        torch.nn.init.normal_(net.memory.table, std=0.3)
        net.memory.count.random_(0, 2)  # some contexts are known, some not
    return net


@pytest.fixture(params=[False, True], ids=["words", "plain"])
def model(request):
    return random_net(plain=request.param)


def windows(B):
    """(B, 32) bytes in which words come again, and some bytes that are no text at all"""
    words = [b"Lily ", b"Li, ", b"the ", b"then\n", b"Tim's ", b"\0", b"\xc3\xa9t ", b"\"he.\" "]
    random = np.random.default_rng(0)
    texts = [b"".join(words[i] for i in random.integers(len(words), size=32)) for _ in range(B)]
    return torch.tensor([list(text[:32]) for text in texts])


def context_names(text, i):
    """The contexts that byte i of a text completes, spelled out in plain Python."""
    def is_letter(j):
        return chr(text[j]).isalpha() or text[j] >= 128 or text[j] == ord("'")

    def word_before(end):  # where the word that ends before `end` starts
        while end > 0 and is_letter(end - 1):
            end -= 1
        return end

    names = [text[max(0, i - n + 1) : i + 1].rjust(n, b"\0") for n in tiny.GRAMS]
    start = word_before(i + 1)
    word = text[start : i + 1] or text[i : i + 1]  # the word so far, or the mark that ended it
    before = []
    for _ in range(2):
        end = start
        while end > 0 and not is_letter(end - 1):
            end -= 1
        start = word_before(end)
        before.append(text[start:end])
    one, two = before
    return names + [(word, "word"), (word, one), (word, one, two), (word, two, "skip")]


def test_contexts_are_the_same_exactly_where_the_text_is():
    text = (b"\0The cat's hat. The cats sat, and the cat's hat sat: \"The cat's mat!\" the "
            b"cat's hat sat. \xc3\xa9t\xc3\xa9 the cat")
    hashes = tiny.contexts(torch.tensor([list(text)]), len(text))[0]
    assert torch.equal(tiny.contexts(torch.tensor([list(text)]), 5)[0], hashes[-5:])
    names = [context_names(text, i) for i in range(len(text))]
    for kind in range(tiny.KINDS):
        by_name = {names[i][kind]: hashes[i, kind].item() for i in range(len(text))}
        assert [by_name[row[kind]] for row in names] == hashes[:, kind].tolist()
        assert len(set(by_name.values())) == len(by_name)


def test_memory_learns_as_adagrad_on_the_rows_of_known_contexts():
    memory = tiny.Memory(width=4, rows=8)
    torch.nn.init.normal_(memory.table)
    memory.count.random_(0, 2).mul_(3)
    memory.later_epoch = True  # nothing is counted below
    table = memory.table.clone().requires_grad_()
    squares = torch.full((8,), 0.03)
    for _ in range(3):
        slots = torch.randint(0, 2**tiny.COUNTER_BITS, (5, tiny.KINDS))
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


@pytest.mark.parametrize("rows", [0, 1000, 2**25])
def test_a_memory_has_a_power_of_two_rows(rows):
    with pytest.raises(ValueError, match="power of 2"):
        tiny.Memory(4, rows)


def test_memory_knows_of_a_context_only_what_was_learned_elsewhere():
    memory = tiny.Memory(width=2, rows=8)
    torch.nn.init.ones_(memory.table)
    hashes = torch.arange(tiny.KINDS)[None] << (64 - tiny.COUNTER_BITS)  # one position

    def visit():
        """-> the share of contexts looked up when learning from them, and after that"""
        out = memory(hashes)
        out.grad = torch.zeros_like(out)
        memory.step(0.0)
        with torch.no_grad():
            return [x[0, 0].item() / tiny.KINDS for x in (out, memory(hashes))]

    assert visit() == [0, 1]  # new: nothing is known; from now on it is
    assert visit() == [1, 1]
    memory.later_epoch = True
    assert visit() == [0, 1]  # counted twice, one of them here: a single other place
    memory.later_epoch = False
    visit()
    memory.later_epoch = True
    assert visit() == [1, 1] and memory.count.max() == 3  # later epochs count nothing


def test_words_are_complete_at_the_first_byte_behind_them():
    words_done, end = tiny.find_words(torch.tensor([list(b"Once she, "), list(b"\0It's.\"\0 a")]))
    assert words_done.tolist() == [[0] * 4 + [1] * 4 + [2] * 2, [1] * 5 + [2] * 2 + [3] * 3]
    assert end.tolist() == [[4, 8, 0], [0, 5, 7]]


def test_a_word_is_as_likely_as_its_copies_and_its_spelling_together():
    """The pointer, from its definition: the letters of a word have the probability a_0 p(letters)
    plus the shares of all earlier words that begin with them."""
    torch.manual_seed(0)
    text = b" Lily saw Tim, the tree and the tall toy. Lily, the tall one, saw Ti"
    ids = torch.tensor([list(text)])
    T = len(text)
    pointer = tiny.Pointer(width=16)
    torch.nn.init.normal_(pointer.query.weight)
    p = torch.randn(1, T, 256).softmax(-1)
    states = torch.randn(1, T, 16)
    words_done, end = tiny.find_words(ids)
    words = torch.randn(1, end.shape[1], 16)
    prefix_hash = tiny.contexts(ids, T)[:, :, tiny.WORD]
    mixed = pointer(p, states, words, ids, prefix_hash, words_done, end)[0]
    mixed = mixed / mixed.sum(-1, keepdim=True)
    for found in re.finditer(rb"\w+", text):
        start, stop = found.span()
        earlier = re.findall(rb"\w+", text[:start])
        query = pointer.query(states)[0, start - 1]
        score = pointer.key(words)[0, : len(earlier)] @ query[1:] / 8**0.5
        share = torch.cat((query[:1] + 4, score)).softmax(0)
        want = share[0]
        got = 1.0
        for t in range(start, stop):
            want = want * p[0, t - 1, text[t]]
            got = got * mixed[t - 1, text[t]]
        copies = [word.startswith(found.group()) for word in earlier]
        want = want + (share[1:] * torch.tensor(copies)).sum()
        assert got.item() == pytest.approx(want.item(), rel=1e-3), found.group()


def test_no_byte_sees_the_future(model):
    ids = windows(1)
    before = model(ids)[0]
    for t in (1, 5, 31):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 256
        after = model(changed)[0]
        assert torch.allclose(before[:, :t], after[:, :t], atol=1e-5)
        assert not torch.allclose(before[:, t], after[:, t], atol=1e-3)


@pytest.mark.parametrize("first", [1, 5, 31])
def test_cached_logits_equal_uncached(model, first):
    ids = windows(3)
    cache = model.new_cache(3)
    with torch.no_grad():
        pieces = [ids[:, :first], *ids[:, first:].split(1, 1)]
        cached = torch.cat([model(piece, cache)[0] for piece in pieces], 1)
    assert torch.allclose(cached, model(ids)[0], atol=1e-4)
    with pytest.raises(ValueError, match="do not fit the context of 32"):
        model(ids[:, :1], cache)


# ---- tiny.py: sampling ---------------------------------------------------------------------------

def test_every_byte_is_generated_from_three_quarters_of_a_context_at_least(model):
    prompt = bytes(range(65, 105))
    words = tiny.generate(model, prompt, temperature=0)
    text = b"\0" + prompt
    fed = len(text) - 24  # the prompt is longer than the context
    for _ in range(30):
        if len(text) - fed + 7 > 32:
            fed = len(text) - 24
        for byte in next(words):
            assert byte == int(model(torch.tensor([list(text[fed:])]))[0][0, -1].argmax())
            text += bytes([byte])


def test_stories_begin_with_their_prompts_and_end_in_time(model):
    prompts = [b"Once", b"A longer beginning", b"", b"Tom"]
    for T in (0, 0.5, 1):
        def write():
            generator = torch.Generator().manual_seed(3)
            return [tiny.write_story(model, p, 80, T, generator=generator) for p in prompts]

        stories = write()
        assert stories == write()
        assert all(story.startswith(prompt) for story, prompt in zip(stories, prompts))
        assert all(len(story) <= 80 and 0 not in story for story in stories)
    tiniest = tiny.write_story(model, b"Once", 30, temperature=1e-40)
    assert tiniest == tiny.write_story(model, b"Once", 30, temperature=0)


class Words:
    """A stub that knows five words, `park` with 0.25 and four with b."""
    context = 64
    chances = {b"park ": 0.25, b"bag ": 0.1875, b"bed ": 0.1875, b"bird ": 0.1875, b"box ": 0.1875}

    def new_cache(self, B):
        return {"bytes": {"ids": torch.zeros(B, 0, dtype=torch.int64)}}

    def rewind(self, cache, row, length):
        ids = cache["bytes"]["ids"]
        cache["bytes"]["ids"] = ids[row, :length].expand(len(ids), length)

    def __call__(self, ids, cache):
        seen = tiny.extend(cache, "ids", ids)
        p = torch.zeros(len(ids), 1, 256)
        for row, text in enumerate(map(bytes, seen.tolist())):
            begun = re.search(rb"\w*$", text.strip(b"\0"))[0]
            for word, chance in self.chances.items():
                if word.startswith(begun):
                    p[row, 0, word[len(begun)]] += chance
            p[row, 0, 0] += 1e-9
        return p.log(), p


def test_a_temperature_is_a_words_not_a_bytes():
    """p(word)^(1/T) for whole words: at T = 1/3 park has 0.372; sharpened byte by byte b would have
    0.964."""
    generator = torch.Generator().manual_seed(0)
    words = tiny.generate(Words(), b"", 1 / 3, candidates=64, generator=generator)
    told = Counter(next(words) for _ in range(600))
    powers = {word: chance**3 for word, chance in Words.chances.items()}
    for word, power in powers.items():
        assert told[word] / 600 == pytest.approx(power / sum(powers.values()), abs=0.06)
    words = tiny.generate(Words(), b"", 1 / 3, candidates=1, generator=generator)
    told = Counter(next(words) for _ in range(300))
    assert told[b"park "] / 300 == pytest.approx(0.036, abs=0.03)


def test_choose_draws_as_often_as_it_should():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(3000, -1)
    generator = torch.Generator().manual_seed(0)

    def draws(**options):
        return Counter(tiny.choose(logits, generator=generator, **options).tolist())

    assert set(draws(temperature=0)) == {0}
    assert draws()[1] == pytest.approx(900, abs=120)
    assert draws(temperature=0.5)[1] == pytest.approx(3000 * 0.09 / 0.365, abs=120)
    assert set(draws(top_p=0.7)) == {0, 1} and set(draws(top_p=0.0001)) == {0}


# ---- tiny.py: learning ---------------------------------------------------------------------------

def test_muon_makes_orthogonal_steps_and_learns():
    singular = torch.linalg.svdvals(tiny.orthogonalize(torch.randn(8, 20)))
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
    with pytest.raises(ValueError, match="for matrices"):
        tiny.Muon([torch.nn.Parameter(torch.zeros(5))])


def test_distillation_loss_is_the_cross_entropy_it_claims():
    logits = torch.randn(7, 256)
    target = torch.randint(0, 256, (7,))
    teacher = torch.softmax(torch.randn(7, 256), -1)
    log_p = torch.log_softmax(logits, -1)
    hard = -log_p[torch.arange(7), target].mean()
    soft = -(teacher * log_p).sum(1).mean()
    loss = tiny.distillation_loss(logits, target, teacher, 0.6)
    assert torch.allclose(loss, 0.4 * hard + 0.6 * soft)


def test_batches_pair_each_byte_with_the_teachers_view_of_it():
    counted = data.encode(data.invent(200))
    teacher = ngram.NGram(6).fit(counted)
    batches = tiny.Batches(counted, 4, 32, 0, teacher)
    for step in range(3):
        ids, q = batches.get(step, taught=True)
        for at, row, distributions in zip(batches.order[4 * step :], ids.numpy(), q.numpy()):
            assert row.astype(np.uint8).tobytes() == (b"\0" + counted.tobytes())[at : at + 33]
            want = teacher.probs(counted, at + np.arange(32), leave_one_out=True)
            assert np.allclose(distributions, want)  # number t is about byte t + 1 of the window


def test_batches_read_everything_once_before_anything_again():
    text = np.random.default_rng(0).integers(1, 256, 4000, dtype=np.uint8)
    whole = b"\0" + text.tobytes()
    orders = []
    for world in (1, 2):
        covered = np.zeros(len(whole))
        for rank in range(world):
            batches = tiny.Batches(text, 4, 32, 1, None, rank, world)
            assert batches.per_epoch == 3969 // (4 * 32 * world)
            for epoch in range(2):
                steps = epoch * batches.per_epoch + np.arange(batches.per_epoch)
                windows = [row for step in steps for row in batches.get(step)[0].tolist()]
                orders.append([whole.find(bytes(row)) for row in windows])
                once = np.zeros(len(whole))
                for at in orders[-1]:
                    once[at : at + 32] += 1
                assert min(orders[-1]) >= 0 and once.max() == 1
                covered += once
        assert (covered[64:-160] >= 1).mean() > 0.9  # what does not fill a step is left out
    assert orders[0] != orders[1] and sorted(orders[0]) != sorted(orders[1])  # cut elsewhere too
    later = tiny.Batches(text, 4, 32, 1).get(5)[0]
    assert later.tolist() == [list(whole[at : at + 33]) for at in orders[0][20:24]]
    tiny.Batches(text[:40], 8, 32, 1).get(0)  # shorter than a batch: some of it several times


def test_evaluate_scores_every_byte_once_with_real_context(model):
    text = np.frombuffer(STORY * 2, np.uint8)
    ids = torch.tensor([0, *text.tolist()])
    nats = 0.0
    for i in range(len(text)):
        start = max(0, (i // 16 - 1) * 16)
        logits = model(ids[None, start : i + 1])[0][0, -1]
        nats -= torch.log_softmax(logits, -1)[text[i]].item()
    state = torch.get_rng_state()
    assert tiny.evaluate(model, text) == pytest.approx(nats / len(text) / math.log(2), rel=1e-4)
    assert all(tiny.evaluate(model, text[:size]) > 0 for size in (1, 5, 16, 17, 33))
    assert torch.equal(state, torch.get_rng_state())


# ---- tiny.py: a run, as a user starts it ---------------------------------------------------------

def test_main_job(finished):
    result, out = finished
    facts = closing_block(result.stdout)
    assert 24 * 0.95 < float(facts["seconds"]) < 24 * 1.05  # ±2 % of five minutes are 6 s
    assert float(facts["val_bpb"]) < 1.5 and float(facts["ngram_bpb"]) < 0.6
    assert int(facts["bytes_seen"]) == int(facts["steps"]) * 4 * 128
    assert "%|" not in result.stderr and "NOTICE" not in result.stderr  # no bar but on a terminal
    assert result.stdout.rstrip().endswith(f"python sample.py --out {out}")
    assert sorted(os.listdir(out)) == ["log.jsonl", "model.pt"]
    rows = [json.loads(line) for line in open(out / "log.jsonl", encoding="utf-8")]
    due = sum(part > rows[0]["seconds"] / 24 for part in tiny.LOOKS)
    assert max(5, due) <= len(rows) <= len(tiny.LOOKS) and rows[-1]["bpb"] < rows[0]["bpb"]
    _, checkpoint = tiny.load_checkpoint(out)
    assert checkpoint["facts"]["val_bpb"] == float(facts["val_bpb"]) and checkpoint["made_here"]


def test_without_network_or_ngram(tmp_path):
    """The main job on the built-in stories, without --data, when nothing answers."""
    code = ("import sys, data, tiny; data.URL = 'http://127.0.0.1:9'; "
            "data.run(lambda: tiny.main(['--steps', '3', '--order', '0', *sys.argv[1:]]))")
    result = script("-c", code, *SHORT_STORY, *SMALL[:3], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "MEAN NOTHING" in result.stderr and "ngram_bpb: None" in result.stdout


@pytest.fixture
def tiny_runs(monkeypatch, tmp_path, stories_file):
    """A function that calls tiny.main in this process with a small net. -> the weights it saved"""
    monkeypatch.setattr(tiny, "GPT", functools.partial(tiny.GPT, rows=2**10))
    monkeypatch.setattr(tiny, "LOOKS", (0.1, 0.5))

    def train(name, *options):
        where = ["--data", stories_file, "--out", tmp_path / name, *SMALL, "--minutes", 0.2]
        if "--data" in options:
            where = where[2:]
        if "--steps" in options:
            where += SHORT_STORY
        if "--resume" in options:
            where = []
        tiny.main([str(option) for option in (*where, *options)])
        return torch.load(tmp_path / name / "model.pt", weights_only=True)["weights"]

    yield train
    shutil.rmtree(tmp_path, ignore_errors=True)  # each run leaves 17 MB


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_steps_repeat_exactly_and_evaluating_changes_nothing(tiny_runs, monkeypatch):
    first = tiny_runs("a", "--steps", 12, "--distill", 0.5)
    monkeypatch.setattr(tiny, "LOOKS", ())
    assert same(first, tiny_runs("b", "--steps", 12, "--distill", 0.5))


def stop_at(monkeypatch, step, number):
    """Send this process a signal in the middle of a step."""
    train_step = tiny.train_step
    count = []

    def stopping(*rest):
        count.append(1)
        if len(count) == step:
            os.kill(os.getpid(), number)
        return train_step(*rest)

    monkeypatch.setattr(tiny, "train_step", stopping)
    return count


@pytest.mark.parametrize("cut, plain", [(1, []), (4, []), (8, ["--plain"]), (9, []), (15, [])])
def test_interrupted_and_resumed_equals_uninterrupted(tiny_runs, monkeypatch, tmp_path, cut, plain,
                                                      capsys):
    """Bit for bit, in the phase with a teacher, at its end and after it."""
    options = ["--steps", 16, "--distill", 0.5, *plain]
    whole = tiny_runs("whole", *options)
    number = (signal.SIGTERM, signal.SIGINT)[cut % 2]
    count = stop_at(monkeypatch, cut, number)
    with pytest.raises(SystemExit) as ended:
        tiny_runs("cut", *options)
    assert ended.value.code == 128 + number
    assert f"interrupted after {cut} steps" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tiny.main(["--resume", str(tmp_path / "cut"), "--steps", "17"])
    assert "leave out --steps" in capsys.readouterr().err
    assert same(whole, tiny_runs("cut", "--resume", tmp_path / "cut"))
    assert len(count) == 16
    with pytest.raises(data.Problem, match="is complete"):
        tiny.main(["--resume", str(tmp_path / "cut")])


def test_the_plain_transformer_is_told_apart_and_runs_everywhere(tiny_runs, tmp_path, capsys):
    weights = tiny_runs("p+q", "--plain", "--steps", 20)
    assert not any(name.startswith(("memory", "pointer", "film")) for name in weights)
    assert "weights and a memory of 0 on cpu" in capsys.readouterr().out
    out = str(tmp_path / "p+q")
    model, _ = tiny.load_checkpoint(out)
    assert model.config["plain"] and len(model.blocks) == 3
    text = np.frombuffer(b"Once upon a time.", np.uint8)
    assert 1 < tiny.evaluate(model, text) < 8
    sample.main(["--out", out, "--n", "1", "--length", "30", "--fuse", "cache"])
    assert len(capsys.readouterr().out) > 30
    library = sample.Library(sample.parse_arguments(["--out", out, "--n", "1"]))
    assert len(library.stories(out)) == 1  # a folder, not "p" with a head "q"


def test_a_text_that_the_run_was_not_trained_on_is_told(finished, stories_file, long_file, capsys):
    _, out = finished
    for name, notices in ((stories_file, 1), (long_file, 0)):
        options = ["--out", out, "--data", name, "--valid", out.with_name("valid.txt")]
        options = list(map(str, options))
        sample.Library(sample.parse_arguments(options)).fusion(str(out), [])
        assert capsys.readouterr().err.count("was trained on another text") == notices


def test_the_checksum_says_whether_a_text_is_the_runs(tiny_runs, monkeypatch, tmp_path,
                                                      stories_file):
    moved = tmp_path / "moved.txt"
    moved.write_bytes(stories_file.read_bytes())
    other = tmp_path / "other.txt"
    other.write_bytes(data.invent(300))
    stop_at(monkeypatch, 5, signal.SIGINT)
    with pytest.raises(SystemExit):
        tiny_runs("r", "--steps", 9)
    for options in (["--data", other], ["--data", moved, "--valid", other]):
        with pytest.raises(data.Problem, match="not the one"):
            tiny_runs("r", "--resume", tmp_path / "r", *options)
    tiny_runs("r", "--resume", tmp_path / "r", "--data", moved)
    assert tiny.load_checkpoint(tmp_path / "r")[1]["facts"]["steps"] == 9


def test_no_run_ever_touches_another(tiny_runs, monkeypatch, tmp_path, capsys):
    first = tiny_runs("a", "--steps", 2)
    tiny_runs("a", "--steps", 3)
    assert f"this run goes to {tmp_path / 'a'}-2" in capsys.readouterr().err
    assert same(first, torch.load(tmp_path / "a" / "model.pt", weights_only=True)["weights"])
    assert tiny.load_checkpoint(tmp_path / "a-2")[1]["facts"]["steps"] == 3
    stop_at(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(SystemExit):
        tiny_runs("b", "--steps", 9)
    (tmp_path / "c").mkdir()
    tiny_runs("c", "--steps", 2)  # an empty folder is nobody's
    held = data.lock(tmp_path / "b" / "log.jsonl")  # as the run itself would hold it
    with pytest.raises(data.Problem, match="still going"):
        tiny_runs("b", "--resume", tmp_path / "b")
    held.close()
    os.utime(tmp_path / "b" / "model.pt", (1, 1))  # some file systems' clocks are coarse
    args, before = tiny.parse_arguments(["--resume", str(tmp_path / "b")])
    tiny_runs("b", "--resume", tmp_path / "b")  # ends while another is starting up
    with pytest.raises(data.Problem, match="still going"):
        tiny.train(args, time.monotonic(), before)
    assert tiny.load_checkpoint(tmp_path / "b")[1]["facts"]["steps"] == 9


def test_of_two_that_make_a_folder_each_gets_its_own(tmp_path):
    with multiprocessing.pool.ThreadPool(4) as pool:
        for i in range(30):
            names = pool.map(lambda _: tiny.new_folder(tmp_path / f"{i}", "log.jsonl"), range(4))
            assert len(set(names)) == 4


def test_a_run_whose_folder_was_moved_goes_on_in_another(tiny_runs, monkeypatch, tmp_path):
    train_step = tiny.train_step

    def moving(*rest):
        if not (tmp_path / "kept").exists():
            (tmp_path / "a").rename(tmp_path / "kept")
            tiny.new_folder(tmp_path / "a", "theirs")
        return train_step(*rest)

    monkeypatch.setattr(tiny, "train_step", moving)
    tiny.main([str(x) for x in ("--data", HERE + "/README.md", "--out", tmp_path / "a", *SMALL,
                                *SHORT_STORY, "--steps", 2)])
    assert os.listdir(tmp_path / "a") == ["theirs"]
    assert sorted(os.listdir(tmp_path / "a-2")) == ["log.jsonl", "model.pt"]


def test_options_may_be_repeated():
    args, _ = tiny.parse_arguments("--set width=16 --data a b --set layers=1 --data c".split())
    assert args.set == {"width": 16, "layers": 1} and args.data == ["a", "b", "c"]


def test_a_notice_that_nobody_reads_stops_nothing(monkeypatch):
    def write(words):
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=write, flush=lambda: None))
    data.notice("hello")


def test_one_run_of_a_series_may_fail(monkeypatch, tmp_path, capsys):
    def train(args, start):
        if args.seed == 2:
            raise data.Problem("the disk is full")
        return {"val_bpb": 1.0, "steps": 3}

    monkeypatch.setattr(tiny, "train", train)
    tiny.main(["--seeds", "3", "--out", str(tmp_path / "a")])
    assert len((tmp_path / "a" / "runs.tsv").read_text().splitlines()) == 2
    assert "the disk is full (run 2 of 3: {'seed': 2})" in capsys.readouterr().err
    tiny.main(["--seeds", "3", "--out", str(tmp_path / "a")])  # another series, another folder
    assert (tmp_path / "a-2" / "runs.tsv").exists()


@slow
def test_killed_at_any_moment_leaves_a_whole_checkpoint_or_none(tmp_path, stories_file):
    """It saves after every step and is killed at ten moments."""
    code = ("import functools, sys, tiny; tiny.GPT = functools.partial(tiny.GPT, rows=2**10); "
            "tiny.SAVE_EVERY = 0; tiny.main(sys.argv[1:])")
    random = np.random.default_rng(0)
    env = os.environ | {"PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}

    def start(out):
        command = [sys.executable, "-c", code, "--data", stories_file, "--out", out, *SMALL]
        command += ["--order", 0, "--minutes", 5]
        return subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL)

    loaded = 0
    for i in range(5):  # two at a time, as most of it is starting up
        runs = {out: start(out) for out in (tmp_path / f"{i}a", tmp_path / f"{i}b")}
        for out, run in runs.items():
            awaited = out
            if i % 2 == 0:  # in the other rounds it may be killed before its first step
                awaited = out / "model.pt"
            while not awaited.exists() and run.poll() is None:
                time.sleep(0.01)
            time.sleep(random.uniform(0.3, 1.5))
            run.kill()
            run.wait()
            if (out / "model.pt").exists():
                model, checkpoint = tiny.load_checkpoint(out)
                assert checkpoint["training"]["state"]["step"] > 0
                assert all(p.isfinite().all() for p in model.parameters())
                loaded += 1
    assert loaded > 3


def test_nan_gradients_are_skipped_and_counted(tiny_runs, monkeypatch, tmp_path, capsys):
    get = tiny.Batches.get
    bad = {3, 5}

    def poisoned(self, step, taught):
        ids, teacher = get(self, step, taught)
        if step in bad:
            teacher[0, 0] = math.nan
        return ids, teacher

    monkeypatch.setattr(tiny.Batches, "get", poisoned)
    ctrl_c = signal.getsignal(signal.SIGINT)
    weights = tiny_runs("a", "--steps", 12, "--distill", 1)
    assert "skipped_steps: 2\n" in capsys.readouterr().out
    assert all(w.isfinite().all() for w in weights.values())
    bad.update(range(6, 100))
    with pytest.raises(data.Problem, match="rate=0.5"):
        tiny_runs("b", "--steps", 40, "--distill", 1)
    model, checkpoint = tiny.load_checkpoint(tmp_path / "b")
    assert checkpoint["training"]["state"]["step"] == 5 + tiny.MOST_NANS
    assert all(p.isfinite().all() for p in model.parameters())
    # A notebook lives on: Ctrl-C is its own again, and so is the run's folder.
    assert signal.getsignal(signal.SIGINT) is ctrl_c
    data.lock(tmp_path / "b" / "log.jsonl").close()


@pytest.mark.parametrize("options, words", [
    (["--minutes", 1e-3], "steps were made"), (["--minutes", 1e-3], "s instead of 0.1"),
    (["--steps", 8, "--set", "rate=1e5"], "diverged"),
    (["--steps", 9, "--set", "rate=1e20"], "diverged"),
    (["--minutes", 1, "--set", "rate=1e3", "batch=64"], "diverged"),  # ends after two epochs
])
def test_figures_that_mean_nothing_are_said_to(tiny_runs, monkeypatch, capsys, options, words):
    train_step = tiny.train_step

    def unhurried(*rest):
        time.sleep(0.01)
        return train_step(*rest)

    monkeypatch.setattr(tiny, "train_step", unhurried)
    tiny_runs("a", "--order", 0, *options)
    assert words in capsys.readouterr().err


def test_a_full_disk_at_the_end_costs_no_figures(tiny_runs, monkeypatch, capsys):
    def full(path, content):
        open(path, "xb").close()  # the state of a minute before
        raise data.Problem("cannot write model.pt: No space left on device")

    monkeypatch.setattr(tiny, "save", full)
    with pytest.raises(data.Problem, match="No space left.*; free .*, then go on with --resume"):
        tiny_runs("a", "--steps", 3)
    assert "val_bpb: " in capsys.readouterr().out
    stop_at(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(SystemExit):
        tiny_runs("b", "--steps", 9)
    assert "all is saved" not in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_disk_under_the_output_is_reported(tmp_path, stories_file):
    command = ["tiny.py", "--data", stories_file, *SMALL, "--out", tmp_path / "a", "--steps", 3]
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, *map(str, command)], cwd=HERE, text=True,
                             stdout=full, stderr=subprocess.PIPE)
    assert run.returncode == 0 and run.stderr.count("NOTICE: cannot print: No space left") == 1
    assert tiny.load_checkpoint(tmp_path / "a")[1]["facts"]["steps"] == 3


def test_a_full_disk_in_the_middle_stops_nothing(tiny_runs, monkeypatch, capsys):
    save = data.save
    full = [True] * 3

    def failing(*rest):
        if full and full.pop():
            raise data.Problem("cannot write model.pt: No space left on device")
        save(*rest)

    monkeypatch.setattr(tiny, "save", failing)
    monkeypatch.setattr(tiny, "SAVE_EVERY", 0)
    tiny_runs("a", "--steps", 6)
    told = "no checkpoint was written (cannot write model.pt: No space left on device)"
    assert capsys.readouterr().err.count(told) == 3


def test_a_second_signal(monkeypatch):
    """Ctrl-C does what it did before the run; a terminal may say twice that it is gone."""
    monkeypatch.setattr(tiny, "mute", lambda descriptor: None)
    handlers = {signal.SIGINT: signal.default_int_handler}
    for number, second in (*handlers.items(), (signal.SIGHUP, signal.SIG_IGN)):
        before = signal.getsignal(number)
        other = signal.getsignal(signal.SIGTERM)
        run = types.SimpleNamespace(handlers=handlers)
        tiny.Run.interrupt(run, number, None)
        assert run.signal == number and signal.signal(number, before) == second
        signal.signal(signal.SIGTERM, other)


@pytest.fixture
def hangup():
    """SIGHUP as usual: nohup would have it ignored, by children too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@slow
def test_a_closed_terminal_is_survived(tmp_path, stories_file, monkeypatch, hangup):
    """As `| head -2`: the reader goes away, the training does not. SIGHUP ends it like SIGTERM."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "tiny.py", "--data", stories_file, *SMALL, "--out", tmp_path / "a"]
    command = [str(x) for x in (*command, *SHORT_STORY, "--steps", 60)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=HERE) as run:
        run.stdout.readline()
        run.stdout.close()
        assert run.wait(60) == 0
    assert tiny.load_checkpoint(tmp_path / "a")[1]["facts"]["steps"] == 60
    command[-5:] = [tmp_path / "b", "--minutes", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=HERE) as run:
        while b"bits per byte |" not in (line := run.stdout.readline()):
            assert line
        run.send_signal(signal.SIGHUP)
        assert b"go on: python tiny.py --resume" in run.stdout.read()  # it may be a file
        assert run.wait(60) == 128 + signal.SIGHUP
    assert tiny.load_checkpoint(tmp_path / "b")[1]["training"] is not None


@pytest.fixture
def factors(monkeypatch):
    """The factor of the learning rates at each step, in the order of the steps."""
    train_step = tiny.train_step
    seen = []

    def watched(*rest):
        seen.append(rest[-1])
        return train_step(*rest)

    monkeypatch.setattr(tiny, "train_step", watched)
    monkeypatch.setattr(tiny, "LEAST", 10**9)  # the little text may be read again and again
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside busy processes several would wait for each other
    yield seen
    torch.set_num_threads(threads)


@pytest.mark.parametrize("place", ["look", "save"])
def test_a_pause_does_not_count_wherever_it_falls(tiny_runs, monkeypatch, capsys, factors, place):
    """The clock jumps by an hour inside each look, or inside each save."""
    real = time.monotonic
    slept = [0.0]
    method = getattr(tiny.Run, place)

    def sleepy(self):
        slept[0] += 3600
        method(self)

    monkeypatch.setattr(time, "monotonic", lambda: real() + slept[0])
    monkeypatch.setattr(tiny.Run, place, sleepy)
    monkeypatch.setattr(tiny, "SAVE_EVERY", 2)
    tiny_runs("a", "--minutes", 0.1)
    assert slept[0] and 4 < float(closing_block(capsys.readouterr().out)["seconds"]) < 8
    assert factors[-1] < 0.11


def test_the_rate_falls_to_0_though_a_look_took_long(tiny_runs, monkeypatch, factors):
    evaluate = tiny.evaluate

    def slow_look(model, text, every=1):
        time.sleep(2.0 * (len(factors) > 20 and every > 1))
        return evaluate(model, text, every)

    monkeypatch.setattr(tiny, "evaluate", slow_look)
    tiny_runs("a", "--minutes", 0.1, "--order", 0)
    assert factors[0] == 1 and factors[-1] < 0.11
    assert max(a - b for a, b in zip(factors, factors[1:])) < 0.11


def test_a_run_ends_when_it_has_read_its_text_twice(tiny_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny, "LEAST", 0)
    path = tmp_path / "short.txt"
    path.write_bytes(data.invent(100))
    tiny_runs("o", "--minutes", 5, "--data", path)
    out, err = capsys.readouterr()
    size = len(data.load([path]).train)
    assert int(closing_block(out)["steps"]) == 2 * ((size + 1 - 64) // (8 * 64))
    assert "had read its text 2.0 times" in err


def test_a_gpu_is_used_if_it_computes_the_same_and_is_faster(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def pick(mps, name="auto"):
        results = {"cpu": (0.010, 7.5), "mps": mps}
        monkeypatch.setattr(tiny, "try_steps", lambda device: results[str(device)])
        return tiny.pick_device(name).type

    assert pick((0.001, 7.5)) == "mps" and pick((0.1, 7.5)) == "cpu"
    assert pick((0.1, 7.5), "mps") == "mps"  # asked for
    assert "10 ms on the CPU, 100 ms on mps" in capsys.readouterr().err
    assert pick((0.001, 7.0)) == "cpu" and pick((0.001, math.nan)) == "cpu"
    assert "another loss" in capsys.readouterr().err
    monkeypatch.setattr(tiny, "try_steps", lambda device: 1 / 0 if device == "cpu" else None)
    assert tiny.pick_device("cpu").type == "cpu"  # nothing is timed


@slow
def test_seeds_and_sweep(tmp_path, stories_file):
    command = [os.path.join(HERE, "tiny.py"), "--steps", 4, *SHORT_STORY, "--order", 0,
               "--data", stories_file]
    sweep = [*command, "--out", "sweep", "--sweep", 2, "--set"]
    result, refusal, swept = scripts(
        [*command, "--seeds", 2, "--out", "seeds", *SMALL[:3]],
        [*sweep, "width=34", "heads=4"],
        [*sweep, "heads=4"], cwd=tmp_path)  # drawn widths that it must mend
    rows = (tmp_path / "seeds" / "runs.tsv").read_text().splitlines()
    assert len(rows) == 2 and all(row in result.stdout for row in rows), result.stderr
    bpb = [float(row.split("\t")[0]) for row in rows]
    assert f"2 runs: {np.mean(bpb):.4f} ± {np.std(bpb, ddof=1):.4f}" in result.stdout
    assert (tmp_path / "seeds" / "2" / "model.pt").exists()
    with pytest.raises(data.Problem, match="several runs; name one of them: .*seeds/1"):
        tiny.load_checkpoint(tmp_path / "seeds")
    recipe = tiny.load_checkpoint(tmp_path / "seeds" / "2")[1]["recipe"]
    assert recipe["seeds"] is None and recipe["seed"] == 2  # --resume goes on with this run alone
    assert refusal.returncode == 2 and "multiple of 2 x heads" in refusal.stderr
    assert swept.returncode == 0 and swept.stdout.count("'heads': 4") == 2, swept.stderr


@slow
def test_ends_on_time_under_load(tmp_path, long_file):
    (tmp_path / "valid.txt").write_bytes(data.invent(20, seed=1))
    texts = ["--data", long_file, "--valid", tmp_path / "valid.txt"]
    command = ["tiny.py", *texts, *SMALL, "--minutes", 0.3, "--out", tmp_path / "o"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    run = subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, env=env,
                           encoding="utf-8", stdout=subprocess.PIPE)
    while " | " not in (line := run.stdout.readline()):  # the first look; set-up took what it took
        assert line
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        output, _ = run.communicate()
    finally:
        for hog in hogs:
            hog.kill()
    assert run.returncode == 0
    assert 18 * 0.8 < float(closing_block(output)["seconds"]) < 18 * 1.2


def test_a_gpu_is_tried_before_its_group_is_joined(monkeypatch):
    """NCCL serves GPUs alone: no step on the CPU may go through such a group."""
    calls = []

    def try_steps(device):
        calls.append(f"try {device}")
        return 1.0, 8.0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(f"set {device}"))
    monkeypatch.setattr(tiny, "try_steps", try_steps)
    monkeypatch.setattr(tiny.dist, "init_process_group", lambda name, **_: calls.append(name))
    ranks = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    args, _ = tiny.parse_arguments([])
    with pytest.raises(ValueError, match="group"):  # there is none, after all
        tiny.train(args, time.monotonic())
    assert calls == ["set cuda:1", "try cpu", "try cuda:1", "nccl"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # one GPU for two processes
    assert tiny.pick_device("auto").type == "cpu"
    with pytest.raises(data.Problem, match="none here"):
        tiny.pick_device("cuda")


def test_a_run_goes_on_with_as_many_processes():
    run = types.SimpleNamespace(checksums=[1, 2], world=1, args=None)
    with pytest.raises(data.Problem, match="--nproc_per_node=2"):
        tiny.Run.check(run, dict(checksums=[1, 2], world=2))


JOINT = """
import sys, torch, tiny
rank, world = tiny.join_processes(torch.device("cpu"))
torch.manual_seed(0)
model = net = tiny.GPT(width=16, context=32, rows=2**10)
if world > 1:
    net = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
optimizers = tiny.make_optimizers(model)
windows = torch.randint(1, 256, (3, 8, 33), generator=torch.Generator().manual_seed(1))
for ids in (*windows, *windows):  # the memory knows a context from its second time on
    tiny.train_step(net, optimizers, ids[rank * 8 // world : (rank + 1) * 8 // world], None, 1.0)
if rank == 0:
    torch.save(model.state_dict(), sys.argv[1])
if world > 1:  # together: a process that leaves on its own can pull the other one down
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0",
            "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--local_addr=127.0.0.1"]


def torchrun(*command, cwd, **env):
    """One start of torchrun in thirty is aborted here (SIGABRT), before anything of ours runs."""
    for _ in range(3):
        result = script(*command, cwd=cwd, env=env)
        if result.returncode != -signal.SIGABRT and "SIGABRT" not in result.stderr:
            return result
    return result


@slow
def test_two_processes_learn_what_one_learns_from_the_joint_batch(tmp_path):
    (tmp_path / "joint.py").write_text(JOINT)
    for command in (["joint.py", "one.pt"], [*TORCHRUN, "joint.py", "two.pt"]):
        result = torchrun(*command, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert all((one[name].float() - two[name].float()).abs().mean() < 1e-5 for name in one)
    assert one["head.weight"].abs().max() > 0.005 and one["memory.table"].abs().max() > 0.005


@slow
def test_two_processes_make_one_run(tmp_path, stories_file):
    command = [os.path.join(HERE, "tiny.py"), "--data", stories_file, *SMALL, *SHORT_STORY]
    command += ["--steps", 12]
    result = torchrun(*TORCHRUN, *command, "--out", "both", cwd=tmp_path)
    facts = closing_block(result.stdout)
    assert result.returncode == 0 and result.stdout.count("val_bpb:") == 1, result.stderr
    assert int(facts["bytes_seen"]) == 2 * 8 * 64 * 12


# ---- tiny.py: files from elsewhere ---------------------------------------------------------------

class Evil:
    """A pickle that would create a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_damaged_or_foreign_checkpoint_is_refused(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_runs("a", "--steps", 2)
    path = tmp_path / "a" / "model.pt"
    whole = path.read_bytes()
    good = torch.load(path, weights_only=True)
    for part in range(8):
        path.write_bytes(whole[: len(whole) * part // 8])
        with pytest.raises(data.Problem, match="not a checkpoint"):
            tiny.load_checkpoint(tmp_path / "a")
    deep = good | {"config": good["config"] | {"layers": 10**9}}
    wide = good | {"config": good["config"] | {"width": 2**20}}
    wide["weights"] = good["weights"] | {"head.weight": torch.zeros(1, 1).expand(256, 2**20)}
    small = good | {"config": good["config"] | {"context": 2}}
    strange = [Evil(), {"weights": 3}, good | {"version": "\x1b[2J"}, good | {"recipe": "x"}]
    for content in (*strange, deep, wide, small):
        torch.save(content, path)
        with pytest.raises(data.Problem, match="not a checkpoint") as refusal:
            tiny.load_checkpoint(tmp_path / "a")
        assert "\x1b" not in str(refusal.value)
    assert not os.path.exists("ran")


def test_a_copied_run_may_not_name_files_of_this_machine(tiny_runs, monkeypatch, tmp_path):
    stop_at(monkeypatch, 2, signal.SIGINT)
    with pytest.raises(SystemExit):
        tiny_runs("a", "--steps", 4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert not tiny.load_checkpoint(tmp_path / "b")[1]["made_here"]
    forged = torch.load(tmp_path / "b" / "model.pt", weights_only=True)
    forged["folder"] = torch.tensor(math.inf, dtype=torch.float16)  # equals every large number
    torch.save(forged, tmp_path / "b" / "model.pt")
    assert not tiny.load_checkpoint(tmp_path / "b")[1]["made_here"]
    with pytest.raises(data.Problem, match="made elsewhere; name its text with --data"):
        tiny.main(["--resume", str(tmp_path / "b")])


def test_the_budget_begins_at_the_call():
    """As in a notebook, some time after the import."""
    start = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "START", time.monotonic() - 1000)
        patch.setattr(tiny, "train", lambda args, begun, before: start.append(begun))
        tiny.main([])
    assert time.monotonic() - start[0] < 10


# ---- sample.py -----------------------------------------------------------------------------------

NARROW = ["--set", "width=32", "--order", 0, "--minutes", 0.1, "--device", "cpu"]


@pytest.fixture(scope="module")
def fused(tmp_path_factory, stories_file):
    """All heads on a run that leaves them something to add. -> (Fusion, validation text)"""
    out = tmp_path_factory.mktemp("run") / "out"
    result = script("tiny.py", "--steps", 150, "--data", stories_file, "--out", out, *NARROW)
    assert result.returncode == 0, result.stderr
    library = sample.Library(sample.parse_arguments(["--out", str(out)]))
    text = library.text()  # found through the run's recipe
    model, _ = library.model(str(out))
    counting = ngram.NGram(5).fit(text.train)
    fusion = sample.Fusion(model, sample.Fusion.NAMES, counting, text.train[:20_000])
    return fusion, text.valid[:6_000]


def test_every_head_and_mixture_is_a_distribution(fused):
    fusion, valid = fused
    for moment, target in fusion.moments(valid[:700]):
        heads = fusion.distributions(moment)
        assert heads.shape == (4, len(target), 256) and heads.min() > 0
        assert torch.allclose(heads.sum(-1), torch.ones(heads.shape[:2]), atol=1e-5)


def test_fused_is_better_than_each_head(fused):
    fusion, valid = fused
    scored, held = valid[:3000], valid[3000:]
    fusion.fit(held)
    assert fusion.weights.sum() == pytest.approx(1) and fusion.weights.min() >= 0
    p = fusion.target_probs(held, "")
    assert -np.log2(p @ fusion.weights).mean() <= -np.log2(p).mean(0).min() + 1e-6
    p = fusion.target_probs(scored, "")
    alone = -np.log2(p).mean(0)
    assert len(p) == 3000 and -np.log2(p @ fusion.weights).mean() < alone.min() + 0.01
    assert alone[0] == pytest.approx(tiny.evaluate(fusion.model, scored), rel=1e-4)
    counting = fusion.heads["ngram"].keywords["ngram"]
    assert alone[1] == pytest.approx(counting.bits_per_byte(scored), rel=1e-4)


def test_generation_asks_the_heads_what_scoring_asked(fused, monkeypatch):
    """A byte's distribution is the same whether a text is scored in windows or drawn, candidates
    and all."""
    monkeypatch.setattr(sample, "NEIGHBORS", 10**6)  # which is the last of 64 rounding may decide
    fusion, valid = fused
    fusion.weights = np.array([0.1, 0.2, 0.3, 0.4])
    asked = []

    def spy(p, states, ids):
        asked.append((ids, fusion(p, states, ids)))
        return asked[-1][1]

    generator = torch.Generator().manual_seed(0)
    words = tiny.generate(fusion.model, bytes(valid[:100]), 0.5, 1.0, 3, generator, spy)
    for _ in range(5):
        next(words)
    for ids, mixed in asked[::4]:
        for text, p in zip(ids.numpy(), mixed):
            *_, (moment, _) = fusion.moments(np.append(text[1:], 0).astype(np.uint8))
            want = torch.tensor(fusion.weights).float() @ fusion.distributions(moment)[:, -1]
            assert torch.allclose(p, want, atol=1e-4)


def test_cache_and_knn_vote_for_what_followed():
    """Checked by eye: the state is like that at position 2, where 12 (or 22) followed."""
    states = torch.eye(8)[None] * 8
    followed = torch.tensor([[10, 11, 12, 13, -1]])
    even = torch.full((1, 256), 1 / 256)
    moment = sample.Moment(even, states[:, 2], states[:, :5], followed, None)
    assert sample.cache_head(moment).argmax() == 12
    nothing = moment._replace(followed=torch.full((1, 5), -1))
    assert torch.allclose(sample.cache_head(nothing), even)
    p = sample.knn_head(moment, states[0, :5], torch.tensor([20, 21, 22, 22, 24]))
    assert p.argmax() == 22 and p.sum() == pytest.approx(1)
    assert p[0, 99] == pytest.approx(0.01 / 256)


def test_weights_are_learned_on_other_bytes_than_are_scored():
    for n, scored, held in ((1_000_000, 100_000, 300_000), (5_000, 2_500, 2_500)):
        a, b = sample.split_validation(np.arange(n))
        assert len(a) == scored == len(b) and a[0] == 0 and b[0] == held


def test_context_gain_is_what_the_beginning_says_about_the_end():
    """A model that knows the story's first byte again at its end, and one that looks at nothing."""
    stories = [bytes([letter]) * 600 for letter in b"abcdefgh"]
    valid = np.frombuffer(b"\0".join(stories), np.uint8)

    def knows(ids):
        return F.one_hot(ids[:, 1:2], 256).float().expand(-1, ids.shape[1], -1) * 10, None

    def blind(ids):
        return torch.zeros(*ids.shape, 256), None

    knows.context = blind.context = 512
    assert sample.context_gain(knows, valid) == pytest.approx(10 / math.log(2), rel=1e-4)
    assert sample.context_gain(blind, valid) == 0
    knows.context = 199  # sees none of the first 300 bytes
    assert sample.context_gain(knows, valid) == 0
    blind.context = 99
    assert math.isnan(sample.context_gain(blind, valid))


@pytest.fixture(scope="module")
def reference():
    return sample.Reference(data.encode(data.invent(2000)))


GOOD = """Once upon a time, there was a happy girl named Lily. Lily had a kite. She took the kite \
to the park.
"I can help you," said Tom. Tom used a rope while Lily helped.
Lily and Tom the dog played with the kite until the sun went down."""


@pytest.mark.parametrize("row, broken", [
    ("doubled", GOOD.replace("had a", "had had a").replace("time,", "time,,")),
    ("quotes_close", GOOD.replace('you,"', "you,")),
    ("names_return", GOOD.replace("Lily and Tom", "Mia and Ben")),
    ("repeated_4", GOOD + GOOD),
    ("copied_8", GOOD.replace("there was a", "there is a")),
    ("ends", GOOD * 3),
])
def test_each_row_tells_good_from_broken(reference, row, broken):
    function, better = next((f, better) for f, better in sample.ROWS if f.__name__ == row)
    good = function(GOOD, reference)
    bad = function(broken[: sample.LENGTH], reference)
    assert good != bad
    assert better == "as real" or (good > bad) == (better == "more")
    function("", reference)  # an empty story is no crash


def test_copied_8_is_the_share_that_stands_in_the_training_text():
    ref = sample.Reference(data.encode(b"one two three four five six seven eight nine ten"))
    assert sample.copied_8("Two three, four five six seven eight nine.", ref) == 100
    assert sample.copied_8("one two three four five six seven eight nine TEN eleven", ref) == 75
    assert sample.copied_8("nine eight seven six five four three two one", ref) == 0


def shuffled(stories):
    """A control, fluent but without a thread: sentence i of story s comes from story s + i."""
    split = [re.findall(r"[^.!?]+[.!?]+[\"']?\s*", story) or [story] for story in stories]
    mixed = []
    for s, own in enumerate(split):
        others = [split[(s + i) % len(split)] for i in range(len(own))]
        mixed.append("".join(other[i % len(other)] for i, other in enumerate(others)))
    return mixed


def test_one_story_says_nothing_of_its_error():
    ref = sample.Reference(data.encode(data.invent(10)))
    value, error = sample.rubric(["Tom ran and ran."], ref)["doubled"]
    assert value == 0 and np.isnan(error)


def test_the_text_is_that_of_the_first_run_that_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["--rubric", "stories.txt", f"{tmp_path}+ngram", "other"]
    assert sample.parse_arguments(command).out == str(tmp_path)
    assert sample.parse_arguments(["--rubric", "ngram"]).out == "out"


def test_rubric_passes_its_own_check():
    """Real stories lead wherever a row claims that more or less is better."""
    train, held = data.split(data.encode(data.invent(4000)))
    ref = sample.Reference(train)
    real = [story[: sample.LENGTH].decode() for story in data.split_stories(held)[:60]]
    mixed = shuffled(real)
    assert mixed != real and abs(len("".join(mixed)) / len("".join(real)) - 1) < 0.1
    counting = ngram.NGram(6).fit(train)
    counted = []
    for i, story in enumerate(real):
        text = counting.generate(story[:25].encode(), len(story) - 25, 0.8, i)
        counted.append(text.decode("utf-8", "ignore"))
    best = sample.rubric(real, ref)
    for stories in (mixed, counted):
        table = sample.rubric(stories, ref)
        for row, better in sample.ROWS:
            lead = best[row.__name__][0] - table[row.__name__][0]
            assert better == "as real" or lead * {"more": 1, "less": -1}[better] > -1e-9, row
    lost, error = sample.rubric(mixed, ref)["names_return"]
    assert best["names_return"][0] - lost > 3 * error


@pytest.mark.parametrize("story, prompt", [
    (b"One day, a cat sat down. " * 20, b"One day, a cat sat"),
    (b"Anna\r\nBob\r\nEmil\r\nFritz\r\nGustav\r\n" * 20, b"Anna\r\nBob\r\nEmil\r\nFritz\r\nGustav"),
    ("从前有一只猫坐在垫子上。".encode() * 20, ("从前有一只猫坐在垫子上。" * 2).encode()[:60]),
    ("x".encode() + "é".encode() * 300, b"x" + "é".encode() * 29),  # ends at a whole character
])
def test_prompts_are_five_words_of_sixty_bytes_at_most(tmp_path, story, prompt):
    path = tmp_path / "stories.txt"
    path.write_bytes(b"\n<|endoftext|>\n".join([story] * 40))
    options = ["--data", str(path), "--n", "2"]
    library = sample.Library(sample.parse_arguments(options))
    prompts, real = library.prompts()
    assert prompts == [prompt] * len(real) and 1 <= len(real) <= 2


def test_sign_test_is_exact():
    assert sample.sign_test(5, 5) == 1 and sample.sign_test(0, 0) == 1
    assert sample.sign_test(10, 0) == pytest.approx(2 / 1024)
    assert sample.sign_test(np.int64(70), np.int64(30)) == pytest.approx(7.85e-5, rel=0.01)
    assert sample.sign_test(8, 2) == sample.sign_test(2, 8) == pytest.approx(2 * 56 / 1024)


@pytest.fixture
def two_runs(tmp_path):
    """Two files of five stories, the second's always longer. -> arguments of a judging"""
    for name, story in (("a.txt", "A cat sat."), ("b.txt", "A cat sat on a long mat.")):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(f"{story} {i}" for i in range(5)))
    return ["--judge", "a.txt", "b.txt", "--n", "5", "--data", "a.txt", "--valid", "b.txt"]


def test_judging_in_the_terminal_can_be_interrupted(two_runs, tmp_path):
    def judge(keys):
        result = script(os.path.join(HERE, "sample.py"), *two_runs, cwd=tmp_path, input=keys)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "ties: 1" in judge("1\nx\n=\nq\n")
    answers = tmp_path / "answers.jsonl"
    kept = [json.loads(line)["answer"] for line in answers.read_text().split("\n") if line]
    assert kept == ["1", "="]
    answers.write_text(answers.read_text() + '\n{"id": "cut o')  # killed while writing
    second = judge("1\n1\n1\n")
    assert second.count("Which is better?") == 3 and "p: " in second
    third = judge("")
    assert "Which" not in third and third.splitlines()[-6:] == second.splitlines()[-6:]


def test_export_keeps_the_key_apart(two_runs, tmp_path):
    command = [os.path.join(HERE, "sample.py"), *two_runs, "--export", "pairs.txt"]
    result = script(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "pairs.txt").read_text()
    key = json.loads((tmp_path / "pairs.txt.key.json").read_text())
    assert len(key) == 5 and ".txt" not in text
    for number, sides in key.items():
        first = text.split("#### A\n")[int(number)].split("#### B")[0]
        assert sides["A"] == ("b.txt" if "long" in first else "a.txt")
    assert {sides["A"] for sides in key.values()} == {"a.txt", "b.txt"}


@pytest.fixture
def endpoint(two_runs, tmp_path, monkeypatch, capsys):
    """A server that prefers long stories, after the given faults. -> judge(*faults), requests"""
    seen = []
    faults = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.headers["Authorization"], body["model"]))
            content = body["messages"][0]["content"]
            longer = "1" if "long" in content.split("Story 2:")[0] else "2"
            fault = faults.pop(0) if faults else f"Because.\n**ANSWER:** {longer}"
            if isinstance(fault, int):  # what is shown of it ends within the second key
                return self.answer(fault, b"out of luck, sk-secret" + 265 * b"-" + b"sk-secret")
            if isinstance(fault, bytes):
                return self.answer(200, fault)
            reply = {"choices": [{"message": {"content": fault}}]}
            self.answer(200, json.dumps(reply).encode())

        def do_GET(self):  # where a redirect leads
            seen.append((self.headers["Authorization"], "redirected"))
            self.answer(200, b"{}")

        def answer(self, status, body):
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"http://127.1:{self.server.server_port}/x")
            self.send_header("Content-Length", str(len(body) + 9 * (body == b"cut")))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    def judge(*new_faults, path="v1"):
        faults[:] = new_faults
        sample.main([*two_runs, "--judge-url", f"http://127.0.0.1:{server.server_port}/{path}/"])
        return capsys.readouterr().out

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    # Not time.sleep itself: the clocks of earlier tests would never sleep again.
    monkeypatch.setattr(sample, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("JUDGE_MODEL", "stub")
    monkeypatch.setenv("JUDGE_KEY", "sk-secret\n")
    monkeypatch.setenv("no_proxy", "*")
    yield judge, seen
    server.shutdown()


@pytest.mark.parametrize("answer, verdicts", [
    ("Because.\n**ANSWER:** 1", ["1"]), ("**Answer**: Story 2.", ["2"]), ("ANSWER:=", ["="]),
    ("Story 1 is longer. ANSWER: none", []), ("ANSWER: 12", []),
    ("ANSWER: 2\n\nGood night!", ["2"]),
    ("You want ANSWER: 1, ANSWER: 2 or ANSWER: =. I cannot tell.", []),
    (f"{sample.QUESTION}\nI prefer the second.", []),
])
def test_verdicts_are_read_tolerantly(answer, verdicts):
    assert sample.VERDICT.findall(answer) == verdicts


def test_a_language_model_judges_and_faults_are_survived(endpoint, tmp_path, monkeypatch):
    judge, seen = endpoint
    result = judge(429, b"<html>", b"cut", None)
    assert "b.txt: 5 wins" in result and "order: 0" in result and "p: 0.0625" in result
    assert seen == [("Bearer sk-secret", "stub")] * (4 + 10)
    assert judge() == result and len(seen) == 4 + 10  # nothing is asked twice
    assert judge(path="v2") == result and len(seen) == 4 + 10 + 10  # but another judge is,
    monkeypatch.setattr(sample, "CRITERIA", "Which is shorter?")  # and another question
    assert judge() == result and len(seen) == 4 + 10 + 10 + 10
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"sk-secret" not in written


def test_a_pair_without_an_answer_is_skipped_and_counted(endpoint):
    judge, _ = endpoint
    result = judge(503, b"[" * 100_000, *["hm"] * 3, 400)
    assert "b.txt: 3 wins" in result and "without an answer: 2" in result
    assert "b.txt: 5 wins" in judge()
    parts = [{"type": "text", "text": "ANSWER: 1"}]  # whichever stands first
    assert "with the order: 1" in judge(parts, parts, path="v3")


@pytest.mark.parametrize("before", [[], ["ANSWER: ="] * 2])
def test_three_pairs_without_an_answer_end_it_in_the_servers_words(endpoint, before):
    judge, seen = endpoint
    with pytest.raises(data.Problem, match=r"HTTP 401 out of luck, JUDGE_KEY.*are kept") as found:
        judge(*before, 401, 401, 401)
    assert len(seen) == len(before) + 3 and "sk-" not in str(found.value)


def test_the_key_does_not_follow_a_redirect(endpoint):
    judge, seen = endpoint
    judge(302)
    assert (None, "redirected") in seen and ("Bearer sk-secret", "redirected") not in seen


def test_texts_of_a_foreign_checkpoint_are_not_opened(stories_file, monkeypatch):
    library = sample.Library(sample.parse_arguments(["--out", "."]))
    recipe = {"data": [str(stories_file)], "valid": None, "megabytes": 100, "cache": "cache"}
    checkpoint = {"recipe": recipe, "made_here": False}
    monkeypatch.setattr(sample, "load_checkpoint", lambda *_: (None, checkpoint))
    with pytest.raises(data.Problem, match="name its text with --data"):
        library.text()
    library.args.data = [str(stories_file)]
    assert len(library.text().train) > 100_000


def test_the_commands_of_sample(finished, tmp_path):
    _, out = finished
    sample_py = ["sample.py", "--out", out]
    (tmp_path / "other.txt").write_bytes(data.invent(40, seed=9))
    score, other, table = scripts(
        [*sample_py, "--score"],
        [*sample_py, "--score", "--valid", tmp_path / "other.txt", "--fuse", "ngram,cache"],
        [*sample_py, "--rubric", out, "--n", 5, "--candidates", 1])
    facts = closing_block(score.stdout)
    assert float(facts["transformer_bpb"]) < 1.5 and "context_gain" in facts, score.stderr
    facts = closing_block(other.stdout)
    alone = [float(facts[f"{name}_bpb"]) for name in ("transformer", "ngram", "cache")]
    assert float(facts["fused_bpb"]) < min(alone) + 0.01, other.stderr
    assert abs(int(facts["scored_bytes"]) - len(data.invent(40, seed=9)) / 2) < 400
    assert "| names_return | more |" in table.stdout, table.stderr
    assert "| copied_8 | as real |" in table.stdout


@pytest.mark.parametrize("prompt, shown", [
    ("", ""), ("<|endoftext|>", ""), ("Once<|endoftext|>Then", "Once\n<|endoftext|>\nThen"),
    (b"\xff caf\xc3\xa9 \x1b[2J".decode("utf-8", "surrogateescape"), "\ufffd café \ufffd[2J"),
    ("two\r\nlines", "two\nlines"), ("longer than the length " * 5, "longer than the length " * 5),
])
def test_length_counts_bytes_after_any_prompt(fused, capsys, prompt, shown):
    options = ["--n", "1", "--length", "20", "--prompt", prompt]
    library = sample.Library(sample.parse_arguments(options))
    library.model = lambda out: (fused[0].model, None)
    sample.tell(library, library.args)
    told = capsys.readouterr().out.removesuffix("\n")
    assert told and told.startswith(shown) and len(told) - len(shown) <= 20


def test_stories_from_the_same_prompt_differ(fused):
    library = sample.Library(sample.parse_arguments(["--n", "3"]))
    library.fusion = lambda out, names: fused[0]
    library.prompts = lambda: ([b"Once upon a time"] * 3, [])
    assert len(set(library.stories("run"))) == 3


# ---- what users do wrong -------------------------------------------------------------------------

BAD = [  # command, words of the one line that answers it
    ("tiny.py --data missing.txt", ["cannot read missing.txt", "name another file"]),
    ("tiny.py --data short.txt", ["training text has 9 bytes", "at least 513"]),
    ("tiny.py --minutes 0", ["--minutes"]), ("tiny.py --minutes nan", ["--minutes"]),
    ("tiny.py --seeds 2 --sweep 2", ["--sweep", "not allowed"]),
    ("tiny.py --steps 0", ["--steps"]), ("tiny.py --distill 1.5", ["--distill"]),
    ("tiny.py --order 300", ["--order"]), ("tiny.py --order 0 --distill 0.5", ["no teacher"]),
    ("tiny.py --set width=30 heads=4", ["multiple of 2 x heads"]),
    ("tiny.py --set wide=3", ["--set"]),
    ("tiny.py --set context=7000", ["--set"]), ("tiny.py --set context=33", ["context even"]),
    ("tiny.py --set context=2", ["at least 8"]),
    ("tiny.py --set rate=0", ["--set"]), ("tiny.py --device cuda", ["--device cuda"]),
    ("tiny.py --data stories.txt --out short.txt/run", ["cannot write short.txt/run"]),
    ("tiny.py --data stories.txt --out .", ["--out . is not empty"]),
    ("tiny.py --resume short.txt", ["short.txt/model.pt", "name the folder"]),
    ("tiny.py --resume nowhere", ["no nowhere/model.pt", "train a model first"]),
    ("tiny.py --resume broken", ["not a checkpoint"]), ("tiny.py --sw 2", ["--sw"]),
    ("sample.py --out nowhere", ["nowhere/model.pt", "train a model first"]),
    ("sample.py --out broken", ["not a checkpoint"]), ("sample.py --out isfolder", ["isfolder"]),
    ("sample.py --device cuda", ["--device cuda"]), ("sample.py --export x", ["--judge RUN RUN"]),
    ("sample.py --judge a b --export stories.txt", ["stories.txt is there already"]),
    ("sample.py --judge a b --export pairs", ["pairs.key.json is there already"]),
    ("sample.py --fuse nonsense", ["no head 'nonsense'", "ngram, knn, cache"]),
    ("sample.py --judge out out --data stories.txt", ["model.pt", "train a model first"]),
    ("sample.py --judge a b --judge-url host", ["--judge-url host", "https://"]),
    ("sample.py --rubric --data stories.txt --valid short.txt", ["validation text"]),
    ("sample.py --judge missing.txt real --data stories.txt", ["missing.txt"]),
    ("sample.py --n 0", ["--n"]), ("sample.py --length 0", ["--length"]),
    ("sample.py --temperature -1", ["--temperature"]), ("sample.py --top-p 1.5", ["--top-p"]),
    ("sample.py --tem 1", ["--tem"]),
]


@pytest.mark.parametrize("command, words", BAD)
def test_bad_input_gets_one_line(tmp_path, command, words, monkeypatch, capsys):
    """In this process, with what data.run makes of it; nothing is written."""
    (tmp_path / "short.txt").write_bytes(b"Too short.")
    (tmp_path / "stories.txt").write_bytes(data.invent(50))
    (tmp_path / "pairs.key.json").write_bytes(b"{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.pt").write_bytes(b"no checkpoint")
    (tmp_path / "isfolder" / "model.pt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = sorted(map(str, tmp_path.rglob("*")))
    name, *options = command.split()
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(SystemExit) as ended:
        data.run({"tiny.py": tiny, "sample.py": sample}[name].main)
    line = str(ended.value.code)
    if ended.value.code == 2:  # argparse has printed it
        line = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in line and all(word in line for word in words), line
    assert sorted(map(str, tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("error", [MemoryError("32 GiB"), RuntimeError("can't allocate memory")])
def test_out_of_memory_is_one_line(error):
    def fail():
        raise error

    with pytest.raises(SystemExit, match="error: not enough memory; try a smaller model"):
        data.run(fail)


def test_help_has_an_example():
    names = ["data.py", "ngram.py", "tiny.py", "sample.py"]
    for name, result in zip(names, scripts(*([name, "--help"] for name in names))):
        assert result.returncode == 0 and "example: python " + name in result.stdout


# ---- README.md -----------------------------------------------------------------------------------

README = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()
PIECES = re.findall(r"```python\n# ?(.*?); (.*?)\n(.*?)```", README, re.DOTALL)
ONLY = """
import builtins, os
os.chdir(os.path.dirname(os.path.abspath(__file__)))
def only(name, globals=None, *rest, imported=builtins.__import__, **more):
    own = os.path.dirname((globals or {}).get("__file__", "")) == os.getcwd()
    if own and name in {"numpy", "torch", "tqdm", "pytest"} - set(%r.split()):
        raise ImportError(name + " is not among what this piece says it needs")
    return imported(name, globals, *rest, **more)
builtins.__import__ = only
"""


def part(of, file):
    """A part of a file as the README names it: `section 1`, or functions and classes by name."""
    text = open(os.path.join(HERE, file), encoding="utf-8").read()
    sections = re.findall(r"(# ---- (\d+)\..*?)(?=# ---- |# ====)", text, re.DOTALL)
    source = {f"section {number}": section for section, number in sections}
    for node in ast.parse(text).body:
        names = [getattr(node, "name", "")]
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        source |= dict.fromkeys(names, ast.get_source_segment(text, node))
    wanted = re.findall(r"section \d+|\w+", of.replace(" and ", " "))
    return "\n\n".join(source[name] for name in wanted) + "\n"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Run all examples. -> {takes: result}"""
    url = Server(data.invent(3000)).url
    folders = []
    for packages, takes, code in PIECES:
        folders.append(tmp_path_factory.mktemp("piece"))
        for take in takes.split("; "):
            if take.startswith("the file "):
                shutil.copy(os.path.join(HERE, take[9:]), folders[-1])
            else:
                code = code.replace("\n...\n", f"\n{part(*take.split(' of '))}\n")
        code = re.sub(r"https://\S+(?=\")", url, code)
        (folders[-1] / "piece.py").write_text(ONLY % packages + code, encoding="utf-8")
    results = scripts(*([folder / "piece.py"] for folder in folders), env={"PYTHONPATH": ""})
    return {takes: result for (_, takes, _), result in zip(PIECES, results)}


@pytest.mark.parametrize("takes", [takes for _, takes, _ in PIECES])
def test_each_piece_works_alone(pieces, takes):
    assert pieces[takes].returncode == 0 and pieces[takes].stdout.strip(), pieces[takes].stderr
    assert len(PIECES) == 10


def test_links_lead_to_the_line_they_name():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", README)
    for name, file, line in links:
        lines = open(os.path.join(HERE, file), encoding="utf-8").read().splitlines()
        found = [n for n, text in enumerate(lines, 1) if name in text]
        assert name in lines[int(line) - 1], f"{name} is in line {found} of {file}, not in {line}"
    assert len(links) == 11
