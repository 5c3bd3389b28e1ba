"""What makes data out of many images: input shards in, one file each out, on any number of processes.

::

    00000.tar ... 00999.tar  --find_shards-->  Shard --pairs--> Pair (an image and its texts)
                                                            | chunks of a batch, decoded by workers
    OUT/00000.jsonl          <--ShardWriter--  rows  <------- Work.rows (a network, or none)
    OUT/counts/00000.json        what was in the shard, and what could not be read
    OUT/manifest.json            what it was made with
    OUT/report.json              counts over all shards

A shard belongs to one process, which keeps its rows until it is through with it: the file is whole or not there. What
is there is not made again. Chunks end where shards do, and what is drawn belongs to a sample, so that a file does not
depend on how many processes there are.
"""

from vlm.procedures.shards.inputs import Pair, Shard, find_shards, join_shards
from vlm.procedures.shards.options import add_shard_options, shards_of
from vlm.procedures.shards.rows import Text, read_rows
from vlm.procedures.shards.running import Work, run_shards

__all__ = [
    "Pair",
    "Shard",
    "Text",
    "Work",
    "add_shard_options",
    "find_shards",
    "join_shards",
    "read_rows",
    "run_shards",
    "shards_of",
]
