"""jlora's speed and memory beside its peers': one command a question, see docs/benchmarks.md.

Every side runs in a process of its own and in its own environment, does one round when told to, and
the rounds of all sides alternate, so that a machine whose speed drifts is fair to everybody.
"""
