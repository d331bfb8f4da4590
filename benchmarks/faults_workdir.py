"""Tiny models and commands for :mod:`faults`: made in a second, run in forks of a process that has imported it all."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SENTENCE = "The quick brown fox jumps over the lazy dog while seven wizards count copper coins in the rain. "
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MEMORY = 6 << 30
"""Bytes of address space that a command may take."""


@dataclass(frozen=True)
class Unfinished:
    """A run that was killed.

    Attributes:
        folder: its journal.
        words: of its command, without the output.
    """

    folder: Path
    words: list[Any]


@dataclass
class Workdir:
    """Where the models and the text lie.

    Attributes:
        folder: that holds all of them.
        unfinished: runs that were killed, all of one command.
        expected: what that command publishes.
    """

    folder: Path
    unfinished: list[Unfinished] = field(default_factory=list)
    expected: dict[str, Any] = field(default_factory=dict)

    @property
    def causal(self) -> Path:
        """A Llama."""
        return self.folder / "causal"

    @property
    def sharded(self) -> Path:
        """The same in shards."""
        return self.folder / "sharded"

    @property
    def classifier(self) -> Path:
        """A BERT that tells two classes apart."""
        return self.folder / "classifier"

    @property
    def factored(self) -> Path:
        """The Llama, compressed."""
        return self.folder / "factored"

    @property
    def text(self) -> Path:
        """Running text."""
        return self.folder / "text.txt"


def make_workdir(folder: Path) -> Workdir:
    """Make the models and the text; ends by compressing one model."""
    workdir = Workdir(folder)
    workdir.text.write_text(SENTENCE * 100)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(
        [SENTENCE], trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "max_position_embeddings": 128}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SMALL, **ids, num_key_value_heads=2, bos_token_id=1, eos_token_id=2))
    for model, place, more in (
        (llama, workdir.causal, {}),
        (llama, workdir.sharded, {"max_shard_size": "60KB"}),
        (BertForSequenceClassification(BertConfig(**SMALL, **ids)), workdir.classifier, {}),
    ):
        _save(model, place, tokenizer, **more)
    done = run(["compress", workdir.causal, "--method", "svd", "--keep", "0.5", "--output-dir", workdir.factored])
    assert done.code == 0, done.said
    return workdir


def _save(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast, **more: Any) -> None:
    model.save_pretrained(folder, **more)
    tokenizer.save_pretrained(folder)


# -- commands ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code: of the process; minus the signal that killed it.
        said: on stdout and stderr.
    """

    code: int
    said: str


def warm_up() -> None:
    """Import what commands import when they run, so that no fork has to, and what they would start processes for."""
    torch.set_num_threads(1)
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama  # noqa: F401

    import eckart.checkpoint.read_back as reading
    import eckart.cli.app
    import eckart.compression.pipeline
    import eckart.evaluation.pipeline
    import eckart.recovery.pipeline  # noqa: F401

    # In this process: a fresh one spends seconds on imports.
    _program()
    reading.run_fresh = lambda folder, trust: reading.read_back(folder, trust_remote_code=trust).as_dict()


@cache
def _program() -> Any:
    """The command line, put together once: that takes longer than most refusals."""
    import typer

    from eckart.cli.app import app

    return typer.main.get_command(app)


def command(words: Sequence[Any]) -> int:
    """Run a command in this process; returns its exit code."""
    try:
        _program()(list(map(str, words)))
    except SystemExit as left:
        return int(left.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


def start(job: Callable[[], int], log: Path) -> int:
    """Start something in a fork, with its streams in a file; returns the id of the process."""
    child = os.fork()
    if not child:
        code = 98
        try:
            send_streams_to(log)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)  # renews what forking broke
            code = job()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return child


def send_streams_to(log: Path) -> None:
    """Let stdout and stderr of this process lead to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def wait(child: int, log: Path) -> Done:
    """Wait for the end of a fork."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Done(code, log.read_text(encoding="utf-8", errors="replace"))


def run(words: Sequence[Any], log: Path | None = None) -> Done:
    """Run a command in a fork, to its end."""
    log = log or Path(f"{os.environ['TMPDIR']}/log")
    return wait(start(lambda: command(words), log), log)
