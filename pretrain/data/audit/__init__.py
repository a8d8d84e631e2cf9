"""Full audits of shards, and their repair.

finding.py    what is wrong, and the audit that lists it
content.py    a shard's bytes on their way: unpacked, hashed, copied
shard.py      audit one shard from end to end
folder.py     what is known of a folder before a shard is opened
compare.py    what only shows across shards: copies, labels, the layout of a run
verify.py     audit a folder
assemble.py   which members of a shard make sound samples
rewrite.py    one shard written anew from its sound samples
repair.py     a folder written anew
work.py       shards side by side, in processes or threads
"""
