"""jlora's speed and memory compared with its peers'; see docs/benchmarks.md.

Every side runs in a process of its own and in its own environment and does one round of work on
request. The rounds of all sides alternate, so that changes in the machine's speed affect all alike.
"""
