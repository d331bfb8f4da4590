"""Run a model block by block: its own forward, with stand-ins for the blocks that are done."""

from eckart.calibration.layerwise.blocks import (
    BlockSchedule,
    LayerwiseError,
    all_blocks,
    block_of,
    blocks_of,
    schedule_of,
    split_by_block,
)
from eckart.calibration.layerwise.branches import Branch, run_branches
from eckart.calibration.layerwise.gather import (
    Groups,
    StatisticsWindow,
    gather_layerwise,
    groups_to_gather,
    split_by_segment,
)
from eckart.calibration.layerwise.hidden_states import HiddenStateStore
from eckart.calibration.layerwise.kept_tensors import KeptTensors, replaying
from eckart.calibration.layerwise.runner import LayerwiseRunner
from eckart.calibration.layerwise.start import start_runner
from eckart.calibration.layerwise.trace import trace_blocks

__all__ = [
    "BlockSchedule",
    "Branch",
    "Groups",
    "HiddenStateStore",
    "KeptTensors",
    "LayerwiseError",
    "LayerwiseRunner",
    "StatisticsWindow",
    "all_blocks",
    "block_of",
    "blocks_of",
    "gather_layerwise",
    "groups_to_gather",
    "replaying",
    "run_branches",
    "schedule_of",
    "split_by_block",
    "split_by_segment",
    "start_runner",
    "trace_blocks",
]
