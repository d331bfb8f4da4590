"""Load what was published in a fresh process, as anyone would, and hold it against the model in memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from eckart.demo.held_out import HeldOutText
from eckart.errors import EckartError

PROMPT = "class Reader:\n    def __init__(self"
NEW_TOKENS = 56
TOLERANCE = 1e-4
"""Relative difference of the two perplexities that is no error."""

PROGRAM = """
import json, sys
import eckart
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from eckart.demo.held_out import HeldOutText
order = json.loads(sys.argv[1])
torch.set_num_threads(order["threads"])
model = AutoModelForCausalLM.from_pretrained(order["folder"])
tokenizer = AutoTokenizer.from_pretrained(order["folder"])
inputs = tokenizer(order["prompt"], return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=order["new_tokens"], do_sample=False,
                         repetition_penalty=1.2, pad_token_id=tokenizer.eos_token_id)
text = tokenizer.decode(written[0], skip_special_tokens=True)
found = HeldOutText(order["tokens"], order["window"]).measure(model, tokenizer)
print(json.dumps({"perplexity": found, "text": text}))
"""


@dataclass(frozen=True)
class ReloadedModel:
    """What a fresh process found in the published folder.

    Attributes:
        perplexity: on the held-out text.
        text: what the model writes after the prompt.
        bytes: size of the weights on disk.
    """

    perplexity: float
    text: str
    bytes: int


def reload_in_fresh_process(folder: Path, held_out: HeldOutText) -> ReloadedModel:
    """Load a folder with transformers, write some code with it, and measure it.

    Raises:
        EckartError: with the last lines that the process wrote, if it fails.
    """
    order = {
        "folder": str(folder),
        "prompt": PROMPT,
        "new_tokens": NEW_TOKENS,
        "tokens": held_out.tokens,
        "window": held_out.window,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(order)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise EckartError(f"{folder} could not be loaded in a fresh process; please report this: {last}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return ReloadedModel(found["perplexity"], found["text"], size)


def check_same(here: float, there: float, folder: Path) -> None:
    """Compare the perplexity in a fresh process with that of the model in memory.

    Raises:
        EckartError: they differ.
    """
    if not math.isclose(here, there, rel_tol=TOLERANCE):
        raise EckartError(
            f"{folder} has perplexity {there:.4f} in a fresh process and {here:.4f} in this one: what was saved is "
            "not what was measured. Please report this with the output of `pip list`."
        )
