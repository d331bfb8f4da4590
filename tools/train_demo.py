r"""Train the demo model that ships with eckart: a small Llama on the Python standard library's own source.

The learning rate follows the elapsed share of a wall-clock budget, so a run always ends fully
annealed, however fast the machine is; for the same reason two runs with one seed agree closely but
not bit for bit. The model in the repository was made by one run of

    OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 \
        python tools/train_demo.py --compile

where the MALLOC settings keep glibc from handing memory back after every step.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # The thread pools below read these once, at import.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.path.insert(0, str(ROOT / "src"))

import sysconfig

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eckart.data.stdlib import documents, family, is_held, read_text

EOS = "<|endoftext|>"
VOCAB_SIZE = 8192
WINDOW = 256
MAX_FOLDER_BYTES = 16_000_000

# A newline and the indentation after it form one piece, so that a whole "\n        " can become one
# token; words keep the space before them and their underscores; digits stay single.
PIECES = r"\n[\n ]*| ?_*\p{L}+_*| ?\p{N}| ?[^\s\p{L}\p{N}_]+| ?_+|[^\S\n]+(?!\S)|\s"


@dataclass
class Corpus:
    """Token streams, every document followed by an end-of-text token."""

    source: torch.Tensor
    tests: torch.Tensor
    held: torch.Tensor
    source_modules: int
    test_modules: int
    held_modules: int


def test_documents() -> list[tuple[str, str]]:
    """Return the standard library's own tests of training modules (empty where they are not installed).

    Returns:
        Pairs of module name and text, sorted by name.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) / "test"
    held = {family(name) for name, _ in documents("held")}
    found = []
    for path in root.rglob("test_*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        subject = parts[0].removeprefix("test_")
        # `test_xml_etree` tests `xml`: its subject may be a held-out name with more behind it.
        leads = {"_".join(subject.split("_")[:n]) for n in range(1, subject.count("_") + 2)}
        if not parts[0].startswith("test_") or is_held(subject) or leads & held:
            continue
        text = read_text(path)
        if text is not None:
            found.append((".".join(parts), text))
    return sorted(found)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE tokenizer.

    Args:
        texts: The text to learn merges from.

    Returns:
        The tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Turn documents into one stream of tokens, and check that nothing is lost on the way.

    Args:
        tokenizer: The tokenizer.
        texts: The documents.

    Returns:
        A vector of token ids with an end-of-text token after every document.
    """
    ids: list[int] = []
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(encoded) != text:
            raise AssertionError("the tokenizer does not give back the text it was given")
        ids += [*encoded, tokenizer.eos_token_id]
    return torch.tensor(ids)


def load_corpus(tokenizer: PreTrainedTokenizerFast) -> Corpus:
    """Read and encode all text.

    Args:
        tokenizer: The tokenizer.

    Returns:
        The corpus.
    """
    source, tests, held = documents("train"), test_documents(), documents("held")
    return Corpus(
        *(encode(tokenizer, [text for _, text in part]) for part in (source, tests, held)),
        *(len(part) for part in (source, tests, held)),
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model.

    Args:
        tokenizer: The tokenizer it will be used with.

    Returns:
        The model, in float32.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    # Layers that write to the residual stream start smaller, so that its size does not grow with depth.
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    return model


def batches(corpus: Corpus, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield shuffled windows for ever.

    The library's own source, the text the model is judged by, is seen twice for every pass over the tests.

    Args:
        corpus: The corpus.
        size: Windows in a batch.
        seed: The seed of offsets and order.

    Yields:
        Matrices of `size` rows of `WINDOW + 1` token ids.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = []
        for stream in (corpus.source, corpus.source, corpus.tests):
            if stream.numel() <= 2 * WINDOW:
                continue
            # Windows start elsewhere in every pass, so that no cut between two of them stays.
            offset = int(torch.randint(WINDOW, (), generator=generator))
            rows.append(stream[offset:].unfold(0, WINDOW + 1, WINDOW))
        order = torch.randperm(sum(map(len, rows)), generator=generator)
        yield from torch.cat(rows)[order].split(size)[:-1]


def token_losses(model: LlamaForCausalLM, window: torch.Tensor) -> torch.Tensor:
    """Return the loss of every token of some windows but the first.

    Args:
        model: The model.
        window: Rows of token ids.

    Returns:
        A flat tensor of negative log-likelihoods, in nats.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten(), reduction="none")


def held_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Return the loss of every predicted token of held-out windows.

    Args:
        model: The model.
        windows: Rows of token ids.

    Returns:
        A flat tensor of negative log-likelihoods, in nats.
    """
    model.eval()
    with torch.no_grad():
        losses = torch.cat([token_losses(model, rows) for rows in windows.split(16)])
    model.train()
    return losses


def rate(elapsed: float) -> float:
    """Return the learning rate's share of its peak: a linear warmup, then a cosine down to 5 %.

    Args:
        elapsed: The elapsed share of the budget, 0 to 1.

    Returns:
        The share of the peak rate.
    """
    warmup = 0.02
    if elapsed < warmup:
        return max(elapsed / warmup, 0.01)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (elapsed - warmup) / (1 - warmup))))


def train(
    model: LlamaForCausalLM,
    corpus: Corpus,
    options: argparse.Namespace,
    log: Callable[[dict[str, float]], None],
) -> int:
    """Train a model in place until the wall-clock budget is spent.

    Args:
        model: The model.
        corpus: The corpus.
        options: The command line.
        log: Called with a record every few minutes.

    Returns:
        The number of tokens trained on.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95), fused=True)
    # At this window plain attention, once compiled, is faster than the fused kernel's backward pass.
    model.set_attn_implementation("eager" if options.compile else "sdpa")
    losses_of = torch.compile(token_losses) if options.compile else token_losses

    windows = corpus.held.unfold(0, WINDOW, WINDOW)
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:128]
    sample = windows[chosen]
    budget = 60 * options.minutes
    start = time.monotonic()
    next_log, next_checkpoint = min(30.0, budget / 4), 600.0
    seen, recent = 0, []
    model.train()
    for step, batch in enumerate(batches(corpus, options.batch, options.seed)):
        elapsed = time.monotonic() - start
        if elapsed >= budget:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.rate * rate(elapsed / budget)
        loss = losses_of(model, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += batch[:, 1:].numel()
        recent.append(loss.item())
        if elapsed >= next_log:
            next_log = elapsed + min(180.0, budget / 4)
            log(
                {
                    "minute": elapsed / 60,
                    "step": step,
                    "tokens": seen,
                    "train": sum(recent) / len(recent),
                    "held": held_loss(model, sample).mean().item(),
                }
            )
            recent = []
        if elapsed >= next_checkpoint:
            next_checkpoint += 600
            torch.save(model.state_dict(), options.checkpoint_dir / f"weights-{elapsed / 60:03.0f}min.pt")
    model.set_attn_implementation("sdpa")
    return seen


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held: torch.Tensor) -> dict[str, float]:
    """Measure a model on the whole held-out split.

    Args:
        model: The model.
        tokenizer: The tokenizer.
        held: The held-out stream.

    Returns:
        Perplexity at windows of `WINDOW` tokens, bits per byte, and bytes per token.
    """
    # A byte-level token has one character per byte; the end of a text stands for none.
    names = tokenizer.convert_ids_to_tokens(list(range(VOCAB_SIZE)))
    lengths = torch.tensor([0 if name == EOS else len(name) for name in names])
    windows = held.unfold(0, WINDOW, WINDOW)
    losses = held_loss(model, windows).double()
    size = lengths[windows[:, 1:]].sum().item()
    return {
        "perplexity": math.exp(losses.mean().item()),
        "bits_per_byte": losses.sum().item() / math.log(2) / size,
        "bytes_per_token": size / losses.numel(),
    }


def card(corpus: Corpus, seen: int, minutes: float, threads: int, parameters: int, score: dict[str, float]) -> str:
    """Write the model card.

    Args:
        corpus: The corpus.
        seen: Tokens trained on.
        minutes: Minutes of training.
        threads: Threads used.
        parameters: The number of parameters.
        score: What `evaluate` returned.

    Returns:
        Markdown text.
    """
    once = 2 * corpus.source.numel() + corpus.tests.numel()
    return f"""---
license: apache-2.0
language: code
library_name: transformers
---

# eckart demo model

A very small Llama ({parameters / 1e6:.1f} million parameters, tied embeddings, {VOCAB_SIZE} byte-level
BPE entries), trained from scratch on the source of the Python standard library. It is here so that
`eckart` can be tried and tested without a download. It is **not a useful code model**: it writes text
that looks like Python, and no more.

| | |
|---|---|
| Text | standard library of {platform.python_implementation()} {platform.python_version()} |
| Training modules | {corpus.source_modules} ({corpus.source.numel():,} tokens) |
| Test modules, for training only | {corpus.test_modules} ({corpus.tests.numel():,} tokens) |
| Held-out modules, never trained on | {corpus.held_modules} ({corpus.held.numel():,} tokens) |
| Tokens seen | {seen:,} |
| Passes | {2 * seen / once:.1f} over the modules, {seen / once:.1f} over the tests |
| Training time | {minutes:.0f} minutes on {threads} CPU thread{"" if threads == 1 else "s"} |
| Held-out perplexity (windows of {WINDOW} tokens) | {score["perplexity"]:.2f} |
| Held-out bits per byte | {score["bits_per_byte"]:.3f} |
| Held-out bytes per token | {score["bytes_per_token"]:.2f} |

The held-out modules are those `eckart.data.stdlib.documents("held")` returns: chosen by a hash of
their name, with packages kept whole. The measure is taken on the weights as stored (bfloat16), over
windows that do not overlap. The model was trained on windows of {WINDOW} tokens and falls apart soon
beyond them, though its configuration admits 1024: measure and use it within {WINDOW} tokens.

`tools/train_demo.py` in the eckart repository makes this folder.

## Licence

The weights are released under Apache-2.0. The text they were trained on is the Python standard
library, which is under the Python Software Foundation License; it is not included here.
"""


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    seen: int,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Round the weights to bfloat16, measure them, and write the folder.

    Args:
        model: The trained model.
        tokenizer: The tokenizer.
        corpus: The corpus.
        seen: Tokens trained on.
        options: The command line.

    Returns:
        What `evaluate` returned.
    """
    model = model.to(torch.bfloat16).eval()
    score = evaluate(model, tokenizer, corpus.held)
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    text = card(corpus, seen, options.minutes, options.threads, parameters, score)
    (folder / "README.md").write_text(text, encoding="utf-8")
    for path in folder.iterdir():
        # The weights come out readable by their owner alone, and would be packaged so.
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MAX_FOLDER_BYTES:
        raise AssertionError(f"the model folder holds {size:,} bytes; at most {MAX_FOLDER_BYTES:,} may ship")
    return {**score, "folder_bytes": size}


def main() -> None:
    """Train, measure and write the demo model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60, help="wall-clock budget of the training loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "src" / "eckart" / "demo" / "model")
    parser.add_argument("--checkpoint-dir", type=Path, help="default: a new temporary folder")
    parser.add_argument("--batch", type=int, default=16, help=f"windows of {WINDOW} tokens in a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    options = parser.parse_args()
    if options.checkpoint_dir is None:
        options.checkpoint_dir = Path(tempfile.mkdtemp(prefix="train_demo-"))
    options.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    def log(record: dict[str, float]) -> None:
        print(json.dumps({key: round(value, 4) for key, value in record.items()}), flush=True)

    tokenizer = train_tokenizer([text for _, text in documents("train")])
    corpus = load_corpus(tokenizer)
    log({"source": corpus.source.numel(), "tests": corpus.tests.numel(), "held": corpus.held.numel()})
    model = build_model(tokenizer)
    seen = train(model, corpus, options, log)
    log({"tokens": seen, **save(model, tokenizer, corpus, seen, options)})


if __name__ == "__main__":
    main()
