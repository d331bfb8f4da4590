"""Walking a model block by block: its own forward with stand-ins for the blocks that are done."""

from eckart.calibration.layerwise.blocks import (
    BlockSchedule,
    LayerwiseError,
    all_blocks,
    block_of,
    blocks_of,
    schedule_of,
    split_by_block,
)
from eckart.calibration.layerwise.gather import Groups, StatisticsWindow, gather_layerwise, not_done, split_by_segment
from eckart.calibration.layerwise.runner import HiddenStateStore, LayerwiseRunner
from eckart.calibration.layerwise.trace import trace_blocks

__all__ = [
    "BlockSchedule",
    "Groups",
    "HiddenStateStore",
    "LayerwiseError",
    "LayerwiseRunner",
    "StatisticsWindow",
    "all_blocks",
    "block_of",
    "blocks_of",
    "gather_layerwise",
    "not_done",
    "schedule_of",
    "split_by_block",
    "split_by_segment",
    "trace_blocks",
]
