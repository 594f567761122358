"""Token ids to log-probs: load, pack, attend, head, shard, export."""
