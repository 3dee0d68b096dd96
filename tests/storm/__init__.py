"""Storms over the whole product: fuzzed inputs, damaged files, processes that are killed, and processes that meet.

python tests/storm                                   # everything in full, an hour or more
python tests/storm --scale 0.01                      # a hundredth of every part's cases
python tests/storm --only kills-inference --seed 17  # one case alone, with what it printed

A part is a number of cases, and a case follows from its part's name and its number, the seed; nothing is bounded by time.
"""
