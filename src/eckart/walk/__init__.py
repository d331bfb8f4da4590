"""Walking a model block by block: its own forward with stand-ins for the blocks that are done."""

from eckart.walk.blocks import Order, UnwalkableError, all_blocks, block_of, blocks_of, order_of, split_by_block
from eckart.walk.check import take_apart
from eckart.walk.gather import Groups, Window, gather_walking, not_done, split_by_segment
from eckart.walk.walk import Store, Walk

__all__ = [
    "Groups",
    "Order",
    "Store",
    "UnwalkableError",
    "Walk",
    "Window",
    "all_blocks",
    "block_of",
    "blocks_of",
    "gather_walking",
    "not_done",
    "order_of",
    "split_by_block",
    "split_by_segment",
    "take_apart",
]
