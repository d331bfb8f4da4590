"""The first half of `make test-serve`: compressed models as remote code, and what they generate in transformers.

Run with eckart's environment: `python tests/serve/write_models.py FOLDER`. The second half, `serve.py`, runs where vLLM
is, which needs an older transformers than eckart does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from mixed_forms import ATTENTION, GATED, mixed_llama, put_form
from tiny import DEMO, llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from eckart.checkpoint.description import attach_config
from eckart.checkpoint.save import save
from eckart.exports.pipeline import export

# The sizes of a small model of books; heads of 64, which the attention of vLLM on a CPU takes.
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
PROMPTS = ("It was a bright day", "She said nothing and walked on, for the night was cold", "Chapter one")
NEW_TOKENS = 16
MARGIN = 5e-5
"""Least distance of the two largest logits, as a part of the larger: engines round in other orders, by 1e-6 or so."""


def drawn_llama(**more: Any) -> LlamaForCausalLM:
    """A model of these sizes, with the same numbers each time."""
    return llama(**SIZES, **more).eval()


def split_llama() -> LlamaForCausalLM:
    """A layer of each form that can be split among processes, and one that was left as it is."""
    model = drawn_llama(num_hidden_layers=4)
    for part in (*ATTENTION, *GATED, "self_attn.o_proj", "mlp.down_proj"):
        put_form(model, [f"model.layers.0.{part}"], "lowrank")
    for layer, form in ((1, "joint"), (2, "pivoted-joint")):
        for group in (ATTENTION, GATED):
            put_form(model, [f"model.layers.{layer}.{part}" for part in group], form)
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            put_form(model, [f"model.layers.{layer}.{part}"], "pivoted")
    attach_config(model)
    return model


def write(folder: Path, name: str, model: LlamaForCausalLM, prompts: list[list[int]]) -> None:
    """Write what the model generates, to be compared."""
    generated = []
    for prompt in prompts:
        made: Any = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        for logits in made.logits:
            first, second = logits[0].topk(2).values.tolist()
            if first - second < MARGIN * abs(first):
                sys.exit(f"{name}: two tokens are too near each other ({first}, {second}): draw another model")
        generated.append(made.sequences[0, len(prompt) :].tolist())
    (folder / f"{name}.json").write_text(json.dumps({"prompts": prompts, "generated": generated}))
    print(f"{name}: written, {sum(map(len, generated))} tokens generated in transformers")


def main(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    for name, model in (("mixed", mixed_llama(drawn_llama(num_hidden_layers=8))), ("split", split_llama())):
        save(model, folder / f"{name}-checkpoint", tokenizer=tokenizer, overwrite=True)
        export(folder / f"{name}-checkpoint", folder / name, format="remote-code", overwrite=True)
        write(folder, name, model, prompts)
    # Rounded numbers are another model: what it generates is asked of what was written.
    rounded = folder / "split-int8"
    export(folder / "split-checkpoint", rounded, format="remote-code", quantize="int8", overwrite=True)
    model = AutoModelForCausalLM.from_pretrained(rounded, trust_remote_code=True, dtype=torch.float32)
    write(folder, rounded.name, model, prompts)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
