"""Train a small language model on stories within a few minutes, on the machine at hand, and hear one.

By the end of this file you know every part of a GPT (embedding, rotary positions, attention, MLP, head), how it is trained against the
clock instead of for a number of steps, and how a model that only counts (ngram.py) can teach one that learns. The one command:

    python tiny.py --minutes 5

Axes: B windows of text in a batch, T bytes in a window, C the model's width, H attention heads, D = C / H the width of a head.
"""
import time

START = time.monotonic()  # the budget counts everything, the slow imports below included

import argparse
import io
import math
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import END, Problem, add_arguments, printable, run, save, text_from
from ngram import NGram


# ---- 1. The model --------------------------------------------------------------------------------------------------------------------

def norm(x):
    """Scale each vector to a root mean square of 1 (RMSNorm, Zhang & Sennrich 2019; without the learned gain, which gained nothing here)."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): turn each pair of numbers by an angle that grows with the position, so that the product of a
    query and a key depends on how far apart they are, not on where they are. x (B, H, T, D); cos, sin (T, D/2) -> (B, H, T, D)"""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Block(nn.Module):
    """One layer: every byte looks at the bytes before it (attention), then thinks about what it saw (MLP). Vaswani et al. 2017, pre-norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.out.weight)  # at step 0 each layer adds nothing, so that the gradient reaches the embedding undisturbed
        nn.init.zeros_(self.down.weight)

    def forward(self, x, cos, sin, past=None):
        """x (B, T, C); past: keys and values of earlier bytes, each (B, H, P, D), or None -> x, and keys and values with these T added"""
        B, T, C = x.shape
        q, k, v = self.qkv(norm(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D)
        # Normed queries and keys (QK-norm, Henry et al. 2020) cannot grow, which is what lets the learning rate be high.
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        mask = None
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # (B, H, P + T, D)
            mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)  # query t sees keys up to P + t
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)  # (B, H, T, D)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.relu(self.up(norm(x))).square()), (k, v)  # ReLU squared: So et al. 2021


class GPT(nn.Module):
    """A byte-level GPT with a large, cheap memory: hashed n-gram embeddings.

    In five minutes a small net sees too few bytes to learn spelling by gradient descent through attention. So each position also looks
    up a vector for each of the n-grams that end there (n = 2..6), in a table with more rows than will be seen often: one row per hash,
    collisions and all (Svenstrup et al. 2017). A look-up costs nothing, and a row that is not used is not updated.
    """
    GRAMS = range(2, 7)

    def __init__(self, layers=2, heads=2, width=64, context=256, rows=2**16):
        super().__init__()
        self.config = dict(layers=layers, heads=heads, width=width, context=context, rows=rows)
        self.context, self.rows = context, rows
        self.byte = nn.Embedding(256, width)
        self.grams = nn.EmbeddingBag(len(self.GRAMS) * rows, width, mode="sum", sparse=True)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)
        nn.init.zeros_(self.grams.weight)
        nn.init.zeros_(self.head.weight)  # step 0 predicts 1/256 for every byte: 8 bits per byte
        pairs = width // heads // 2
        angle = torch.arange(context)[:, None] * 10000.0 ** (-torch.arange(pairs) / pairs)  # (T, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def gram_rows(self, ids, before):
        """Which rows the n-grams ending at each byte have. ids (B, T), before (B, 5): the bytes that precede them -> (B * T, 5) int64"""
        T = ids.shape[1]
        text = torch.cat((before, ids), 1)  # (B, 5 + T)
        h, rows = ids, []
        for i, n in enumerate(self.GRAMS):
            h = (h * 257 + text[:, len(self.GRAMS) + 1 - n :][:, :T] + 1) * 0x2545F491 & 0x7FFFFFFF
            rows.append((h >> 7) % self.rows + i * self.rows)
        return torch.stack(rows, -1).view(-1, len(self.GRAMS))

    def forward(self, ids, cache=None):
        """ids (B, T) int64, T <= context -> logits (B, T, 256) float32 for the byte after each one, in nats.

        cache: a dict, empty at first, that remembers what later bytes need of earlier ones (keys, values, the last bytes), so that a text
        can be fed piece by piece, each byte once; at most `context` bytes in all.
        """
        B, T = ids.shape
        cache = {} if cache is None else cache
        P = cache["layers"][0][0].shape[2] if cache else 0
        if P + T > self.context:
            raise ValueError(f"{P + T} bytes do not fit the context of {self.context}")
        before = cache["before"] if cache else ids.new_zeros(B, len(self.GRAMS))
        x = self.byte(ids) + self.grams(self.gram_rows(ids, before)).view(B, T, -1)  # (B, T, C)
        x = norm(x)
        cos, sin = self.cos[P : P + T], self.sin[P : P + T]
        layers = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, cos, sin, cache["layers"][i] if cache else None)
            layers.append(kv)
        cache.update(layers=layers, before=torch.cat((before, ids), 1)[:, -len(self.GRAMS) :])
        return self.head(norm(x)).float()  # (B, T, 256)

    @torch.no_grad()
    def generate(self, prompt, temperature=1.0, top_p=1.0, generator=None):
        """Yield the bytes that follow prompt, one at a time, without end. prompt (t,) bytes; the story's END is put before it. -> int

        Each byte is fed once (cache). When the context is full, its second half is fed again as a new one: a byte then costs twice as
        much on average, however long the story, and sees between half a context and a whole one, as in `evaluate`.
        """
        ids = [END, *prompt]
        cache, new = {}, ids[-self.context // 2 :]
        while True:
            if cache and cache["layers"][0][0].shape[2] + len(new) > self.context:
                cache, new = {}, ids[-self.context // 2 :]
            logits = self(torch.tensor([new], device=self.cos.device), cache)[0, -1].cpu()  # (256,)
            ids.append(choose(logits, temperature, top_p, generator))
            new = ids[-1:]
            yield new[0]


def choose(logits, temperature=1.0, top_p=1.0, generator=None):
    """Draw a byte. logits (256,) nats. temperature 0 takes the likeliest; top_p < 1 draws from the likeliest bytes that together have that
    probability (nucleus sampling, Holtzman et al. 2020). -> int"""
    if temperature == 0:
        return int(logits.argmax())
    p, byte = torch.softmax(logits / temperature, -1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0  # what comes before a byte is already enough
    return int(byte[torch.multinomial(p, 1, generator=generator)])


# ---- 2. The optimizer ----------------------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024): every direction of a weight matrix moves by the same amount, not only
    the few that dominate the gradient. For matrices inside the net; embeddings and the head are better off with Adam.

    Newton-Schulz in float32 (torch.optim.Muon uses bfloat16, very slow on a CPU without such units), all matrices of a shape in one batch.
    """

    def __init__(self, parameters, lr=0.02, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for w in group["params"]:
                shapes.setdefault(w.shape, []).append(w)
            for shape, weights in shapes.items():
                for w in weights:
                    self.state[w].setdefault("momentum", torch.zeros_like(w)).lerp_(w.grad, 1 - group["momentum"])
                update = torch.stack([w.grad.lerp(self.state[w]["momentum"], group["momentum"]) for w in weights])  # (matrices, rows, columns)
                update = orthogonalize(update) * max(1, shape[0] / shape[1]) ** 0.5
                for w, u in zip(weights, update):
                    w.sub_(u, alpha=group["lr"])


def orthogonalize(x):
    """Push all singular values of each matrix towards 1 with five Newton-Schulz steps (coefficients: Jordan et al. 2024). (n, r, c) float32

    x -> a x + b (x x') x + c (x x')^2 x leaves the singular vectors alone and sends each singular value s to a s + b s^3 + c s^5.
    """
    wide = x if x.shape[1] <= x.shape[2] else x.mT
    wide = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide if x.shape[1] <= x.shape[2] else wide.mT


# ---- 3. What is trained on, and how it is judged -------------------------------------------------------------------------------------

class Batches:
    """Random windows of the text, and what the teacher says about them. Made one ahead by a thread, while the net computes."""

    def __init__(self, text, batch, context, teacher, seed):
        self.text = np.concatenate((np.zeros(1, np.uint8), text))  # END before the first story as before all others
        self.batch, self.context, self.teacher = batch, context, teacher
        self.starts = np.flatnonzero(self.text[: -context - 1] == END)
        self.random = np.random.default_rng(seed)
        self.pool = ThreadPoolExecutor(1)
        self.next = None

    def make(self, taught):
        """-> bytes (B, T + 1) int64; the teacher's distributions (B * T, 256) float32 or None"""
        at = self.random.integers(0, len(self.text) - self.context, self.batch)
        if len(self.starts):  # one window in a batch begins where a story begins, as every story that is told later does
            at[0] = self.random.choice(self.starts)
        position = at[:, None] + np.arange(self.context + 1)  # (B, T + 1)
        window = torch.from_numpy(self.text[position].astype(np.int64))
        if not taught:
            return window, None
        # The teacher has counted this very text; asked plainly it would recite it, hence leave_one_out. Its text has no END in front.
        return window, torch.from_numpy(self.teacher.probs(self.text[1:], position[:, 1:].ravel() - 1, leave_one_out=True))

    def get(self, taught):
        """The next batch; `taught` says whether the one after it will need the teacher."""
        window, teacher = self.next.result() if self.next else self.make(taught)
        self.next = self.pool.submit(self.make, taught)
        return window, teacher


def distillation_loss(logits, target, teacher, weight):
    """(1 - weight) x cross-entropy to the byte that came + weight x cross-entropy to the teacher's distribution (Hinton et al. 2015).

    One byte says what came; the teacher's 256 probabilities say what else could have come and how likely, so each position teaches more.
    logits (N, 256) nats, target (N,) int64, teacher (N, 256) probabilities -> scalar, nats per byte
    """
    return (1 - weight) * F.cross_entropy(logits, target) + weight * F.cross_entropy(logits, teacher)


@torch.no_grad()
def evaluate(model, text, every=1):
    """Bits per byte of text, (n,) uint8: each byte predicted once, from at least half a context of real bytes before it where there are any.

    Windows overlap by half and only their second half counts (in the first window, all). every: take one window in `every`, for a quick
    look. No random numbers are used, so evaluating changes nothing.
    """
    T = model.context
    padded = torch.from_numpy(np.concatenate((np.zeros(1, np.uint8), text, np.zeros(T, np.uint8))).astype(np.int64))
    starts = np.arange(0, max(1, len(text) - T // 2), T // 2)[::every]
    nats = count = 0
    for i in range(0, len(starts), 16):
        start = torch.from_numpy(starts[i : i + 16])[:, None]
        at = start + torch.arange(T)  # (b, T) positions of the bytes given; the next ones are asked for
        asked = (at < len(text)) & ((at >= start + T // 2) | (start == 0))
        logits = model(padded[at].to(model.cos.device))
        loss = F.cross_entropy(logits.flatten(0, 1).cpu(), padded[at + 1].flatten(), reduction="none").view_as(at)
        nats, count = nats + loss[asked].double().sum().item(), count + asked.sum().item()
    return nats / count / math.log(2)


# ---- 4. Showing what happens ---------------------------------------------------------------------------------------------------------

def scales(curve, level):
    """The highest and lowest bpb, the last second, and how far down a bpb is drawn, from 0 (top) to 1; logarithmic, as the fall is steep."""
    values = [b for _, b in curve] + ([level] if level else [])
    top, low = max(values), min(values)
    return top, low, max(curve[-1][0], 1e-9), lambda b: math.log(top / b) / max(math.log(top / low), 1e-9)


def picture(curve, level, width=64, height=12):
    """The learning curve for the terminal. curve: [(seconds, bpb), ...]; level: the n-gram's bpb, drawn as a line, or None. -> str"""
    top, low, end, down = scales(curve, level)
    row = lambda b: round((height - 1) * down(b))
    grid = [[" "] * (width + 1) for _ in range(height)]
    if level:
        grid[row(level)] = ["-"] * (width + 1)
    for seconds, b in curve:
        grid[row(b)][round(width * seconds / end)] = "o"
    names = {0: f"{top:.2f}", height - 1: f"{low:.2f}"} | ({row(level): f"n-gram {level:.2f}"} if level else {})
    lines = [f"{names.get(i, ''):>12} |{''.join(line)}" for i, line in enumerate(grid)]
    return "\n".join(["bits per byte", *lines, f"{'':>12} +{'-' * width}", f"{'':>13}0{f'{end:.0f} s':>{width}}"])


def svg(curve, level):
    """The same as a picture file, (seconds, bpb) points -> SVG text."""
    top, low, end, down = scales(curve, level)
    x, y = lambda s: 60 + 520 * s / end, lambda b: 20 + 240 * down(b)
    points = " ".join(f"{x(s):.1f},{y(b):.1f}" for s, b in curve)
    parts = [f'<polyline points="{points}" fill="none" stroke="#06c" stroke-width="2"/>']
    parts += [f'<circle cx="{x(s):.1f}" cy="{y(b):.1f}" r="3" fill="#06c"/>' for s, b in curve]
    parts += [f'<text x="52" y="{y(b) + 4:.0f}" text-anchor="end">{b:.2f}</text>' for b in (top, low)]
    if level:
        parts.append(f'<path d="M60 {y(level):.1f}H580" stroke="#c60" stroke-dasharray="6 4"/>')
        parts.append(f'<text x="580" y="{y(level) - 6:.0f}" text-anchor="end" fill="#c60">n-gram {level:.3f}</text>')
    parts.append('<path d="M60 20V260H580" fill="none" stroke="#888"/>')
    parts.append(f'<text x="320" y="285" text-anchor="middle">validation bits per byte over {end:.0f} seconds</text>')
    body = "\n".join(parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="600" height="300" font-family="sans-serif" font-size="13">\n'
            f'<rect width="600" height="300" fill="white"/>\n{body}\n</svg>\n')


def tell(model, prompt, length, seed, temperature=0.8):
    """prompt and the model's continuation up to END or `length` bytes. prompt: bytes -> str"""
    generator, out = torch.Generator().manual_seed(seed), bytearray(prompt)
    for byte in model.generate(prompt, temperature, generator=generator):
        if byte == END or len(out) >= length:
            return printable(out.decode("utf-8", "replace"))
        out.append(byte)


# ---- 5. The checkpoint ---------------------------------------------------------------------------------------------------------------

def save_checkpoint(path, model, facts):
    """Everything that sampling needs, as plain tensors and numbers. The file is always a whole one, old or new (data.save)."""
    content = io.BytesIO()
    torch.save({"config": model.config, "weights": model.state_dict(), "facts": facts}, content)
    save(path, content.getbuffer())


def load_checkpoint(out, device="cpu"):
    """The model in the folder `out` -> (GPT, facts). Raises Problem if there is none or it is not one of ours."""
    path = os.path.join(out, "model.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(**checkpoint["config"])
        model.load_state_dict(checkpoint["weights"])
        return model.to(device), checkpoint["facts"]
    except FileNotFoundError:
        raise Problem(f"no model in {out}; train one first: python tiny.py --minutes 5 --out {out}") from None
    except Exception as error:
        raise Problem(f"{path} is not a checkpoint of tiny.py ({type(error).__name__}); train again with --out {out}") from None


# ---- 6. Training against the clock ---------------------------------------------------------------------------------------------------

SHOW = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)  # at these parts of the training: evaluate, and continue PROMPT
PROMPT = b"Once upon a time, there was a little"
JUDGED = 300_000  # bytes of the validation text that the closing figures are about
DISTILL_WEIGHT = 0.6


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'mps' -> torch.device. Raises Problem if it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    if not there[name]:
        raise Problem(f"--device {name}: there is none here; use --device cpu, or leave the option out")
    return torch.device(name)


def optimizers(model, device):
    """Muon for the matrices inside, AdamW for embedding and head, SparseAdam for the n-gram table, of which a step touches few rows."""
    matrices = list(model.blocks.parameters())
    sparse = device.type == "cpu"  # elsewhere sparse gradients are slow or missing, and updating the whole table is nothing
    model.grams.sparse = sparse
    table = torch.optim.SparseAdam if sparse else torch.optim.Adam
    found = [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW([model.byte.weight, model.head.weight], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
        table([model.grams.weight], lr=9e-3, betas=(0.9, 0.95)),
    ]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def learning_rate(progress):
    """Full speed for half the budget, then down to 0 in a straight line; 0 <= progress <= 1 -> factor for every optimizer's rate."""
    return min(1.0, 2 * (1 - progress))


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a byte-level language model on stories against the clock, watch it learn, read a story.",
        epilog="example: python tiny.py --minutes 5 --data stories.txt --out run1",
    )
    parser.add_argument("--minutes", type=float, default=5, help="the budget; all but the download counts (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="train for so many steps instead, exactly repeatable")
    parser.add_argument("--distill", type=float, default=0.8, metavar="FRACTION",
                        help="part of the budget in which the n-gram teaches; 0: none (default: %(default)s)")
    parser.add_argument("--order", type=int, default=12, help="order of the n-gram; 0: do not count one (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--heads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="numbers per position (default: %(default)s)")
    parser.add_argument("--context", type=int, default=256, help="bytes in a window (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--out", default="out", metavar="DIR", help="where the model goes (default: %(default)s)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if not 0 < args.minutes < math.inf:
        raise Problem(f"--minutes {args.minutes:g}: give a number above 0, such as 5")
    if args.steps is not None and args.steps < 1:
        raise Problem(f"--steps {args.steps}: give at least 1")
    if not 0 <= args.distill <= 1:
        raise Problem(f"--distill {args.distill:g}: give a part of the budget, from 0 (no teacher) to 1")
    if not 0 <= args.order <= 255:
        raise Problem(f"--order {args.order}: give 0 (no n-gram) to 255; 12 is usual")
    if args.order == 0 and args.distill > 0:
        raise Problem("--order 0 leaves no teacher: add --distill 0")
    for name in ("layers", "heads", "width", "batch"):
        if getattr(args, name) < 1:
            raise Problem(f"--{name} {getattr(args, name)}: give at least 1")
    if args.width % (2 * args.heads):
        raise Problem(f"--width {args.width}: give a multiple of 2 x --heads, {2 * args.heads}")
    if args.context < 16:
        raise Problem(f"--context {args.context}: give at least 16")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    text = text_from(args, least=args.context + 1)
    start = START + text.waited
    elapsed = lambda: time.monotonic() - start
    budget = 60 * args.minutes
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    judged = text.valid[:JUDGED]
    print(f"{text.source}: {len(text.train):,} bytes to learn from, {len(judged):,} to be judged on", flush=True)

    # The n-gram first: it takes seconds, tells the first story, and sets the level that the net has to beat.
    ngram = level = None
    if args.order:
        ngram = NGram(args.order).fit(text.train)
        level = float(ngram.bits_per_byte(judged))
        print(f"\n{elapsed():6.1f} s  n-gram of order {args.order}: {level:.3f} bits per byte")
        print(printable(ngram.generate(PROMPT, 300, 0.8, args.seed).decode("utf-8", "replace")), flush=True)

    model = GPT(args.layers, args.heads, args.width, args.context).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{elapsed():6.1f} s  net with {parameters:,} parameters on {device}, {torch.get_num_threads()} threads", flush=True)
    opts = optimizers(model, device)
    batches = Batches(text.train, args.batch, args.context, ngram, args.seed)

    stop = []  # Ctrl-C: stop at the next step, then evaluate and save as usual; a second one leaves at once

    def interrupt(number, frame):
        stop.append(number)
        signal.signal(number, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)

    curve, step, average, closing = [], 0, 8.0, 0.01 * budget
    trained = time.monotonic()
    begun = 0 if args.steps else elapsed() / budget
    show = [begun + (1 - begun) * part for part in SHOW]
    bar = tqdm(total=args.steps or round(budget), unit=" steps" if args.steps else "s", file=sys.stderr, disable=not sys.stderr.isatty(),
               bar_format="{l_bar}{bar}| {n:.0f}/{total}{unit}{postfix}")
    while not stop:
        progress = step / args.steps if args.steps else elapsed() / (budget - closing)
        if progress >= 1:
            break
        window, teacher = batches.get(progress < args.distill)
        window = window.to(device)
        logits = model(window[:, :-1]).flatten(0, 1)  # (B * T, 256)
        target = window[:, 1:].flatten()  # (B * T,)
        if teacher is None:
            loss = F.cross_entropy(logits, target)
        else:
            loss = distillation_loss(logits, target, teacher.to(device), DISTILL_WEIGHT)
        loss.backward()
        for optimizer in opts:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1

        if step % 20 == 0:
            average += 0.1 * (loss.item() / math.log(2) - average)
            bar.n = step if args.steps else min(elapsed(), bar.total)
            rate = step * args.batch * args.context / (time.monotonic() - trained)
            bar.set_postfix_str(f" loss {average:.3f} bits, {rate / 1e3:.0f} kB/s")
        if show and progress >= show[0]:
            before = time.monotonic()
            curve.append((elapsed(), evaluate(model, judged, every=4)))
            closing = 4 * (time.monotonic() - before) + 1  # to keep back for the end: a whole evaluation, saving, a story
            show = [part for part in show if part > progress]
            said = tell(model, PROMPT, 120, args.seed).replace("\n", " ")
            bar.write(f"{elapsed():6.1f} s  step {step:6,}  {curve[-1][1]:.3f} bits per byte | {said}", file=sys.stdout)
            sys.stdout.flush()
    bar.close()

    val = evaluate(model, judged)
    curve.append((elapsed(), val))
    facts = dict(val_bpb=round(val, 4), ngram_bpb=level and round(level, 4), seconds=round(elapsed(), 1), steps=step,
                 bytes_seen=step * args.batch * args.context, parameters=parameters, device=str(device), seed=args.seed, out=args.out)
    save_checkpoint(os.path.join(args.out, "model.pt"), model, facts)
    save(os.path.join(args.out, "curve.svg"), svg(curve, level).encode())
    story = tell(model, b"Once upon a time", 1000, args.seed)
    print(f"\n{picture(curve, level)}\n")
    facts["seconds"] = round(elapsed(), 1)
    for key, value in facts.items():
        print(f"{key}: {'none' if value is None else value}")
    print(f"\n{story}\n\nmore: python sample.py --out {args.out}")


if __name__ == "__main__":
    run(main)
