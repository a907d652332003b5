"""Read stories from a trained model, one byte after the other.

By the end of this file you know how text comes out of a model that only ever predicts the next byte. The one command:

    python sample.py --prompt "One day, a cat" --n 3
"""
import argparse
import codecs
import sys

import torch

from data import END, SEPARATOR, Problem, printable, run
from tiny import load_checkpoint, pick_device


def write_story(model, prompt, length, temperature, top_p, generator, write):
    """Call write(str) with the prompt and then with each piece of its continuation as it comes, until END or `length` bytes in all.

    Bytes are not characters: the decoder waits for the rest of a character of several bytes, and what is no UTF-8 becomes U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    show = lambda text: write(printable(text))
    show(decoder.decode(prompt))
    count = len(prompt)
    for byte in model.generate(prompt, temperature, top_p, generator):
        if byte == END or count >= length:
            break
        show(decoder.decode(bytes([byte])))
        count += 1
    show(decoder.decode(b"", final=True))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Let a trained model tell stories.",
                                     epilog='example: python sample.py --prompt "One day, a cat" --n 3 --temperature 0.7')
    parser.add_argument("--out", default="out", metavar="DIR", help="the folder tiny.py saved the model in (default: %(default)s)")
    parser.add_argument("--prompt", default="Once upon a time", help="how each story begins (default: %(default)s)")
    parser.add_argument("--n", type=int, default=5, help="how many stories (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2000, help="bytes after which a story is cut (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="below 1: safer, above 1: wilder, 0: always the likeliest (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw only from the likeliest bytes with this much probability (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="cpu", help="one byte at a time is fastest on the %(default)s")
    args = parser.parse_args(argv)
    if args.n < 1:
        raise Problem(f"--n {args.n}: give at least 1")
    if not 0 <= args.temperature <= 100:
        raise Problem(f"--temperature {args.temperature:g}: give 0 (no chance) to 100; 0.8 is usual")
    if not 0 < args.top_p <= 1:
        raise Problem(f"--top-p {args.top_p:g}: give a probability above 0, at most 1")
    model, _ = load_checkpoint(args.out, pick_device(args.device))
    generator = torch.Generator().manual_seed(args.seed)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?" instead of stopping the story
    for i in range(args.n):
        if i:
            print(f"\n{SEPARATOR.decode()}")

        def write(text):
            sys.stdout.write(text)
            sys.stdout.flush()

        prompt = args.prompt.encode("utf-8", "surrogateescape")  # a prompt in another encoding arrives as the bytes that were typed
        write_story(model, prompt, args.length, args.temperature, args.top_p, generator, write)
    print()


if __name__ == "__main__":
    run(main)
