"""Files and folders that survive a kill: journal, cache, locks, atomic publishing, shards."""
