"""The second half of `make test-serve`: vLLM generates what transformers generated, token by token.

Run where vLLM is: `python tests/serve/serve.py FOLDER NAME PROCESSES`. eckart is not there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def main(folder: Path, name: str, processes: int) -> None:
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    if processes == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process starts faster
    else:  # a core each: by default each has a NUMA node
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[i % len(cores)]) for i in range(processes))
    import torch
    import transformers
    import vllm

    assert importlib.util.find_spec("eckart") is None, "this environment must not have eckart"
    wanted = json.loads((folder / f"{name}.json").read_text())
    prompts, length = wanted["prompts"], len(wanted["generated"][0])

    here = transformers.AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True)
    for prompt, generated in zip(prompts, wanted["generated"], strict=True):
        made = here.generate(torch.tensor([prompt]), max_new_tokens=length, min_new_tokens=length, do_sample=False)
        assert made[0, len(prompt) :].tolist() == generated, f"transformers {transformers.__version__}: other tokens"
    print(f"{name}: the same tokens in transformers {transformers.__version__}")

    engine = vllm.LLM(
        str(folder / name), trust_remote_code=True, dtype="float32", max_model_len=128, max_num_seqs=4,
        tensor_parallel_size=processes,
    )  # fmt: skip
    chosen = vllm.SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    made = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], chosen, use_tqdm=False)
    for one, generated in zip(made, wanted["generated"], strict=True):
        found = list(one.outputs[0].token_ids)
        assert found == generated, f"vLLM {vllm.__version__}: {found} instead of {generated}"
    print(f"{name}: the same tokens in vLLM {vllm.__version__}, {processes} process(es)")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2], int(sys.argv[3]))
