"""What the training step costs and reaches on a GPU, in slices of a few minutes. Run by `make bench-gpu`.

A slice is a list of variants. Each variant's result is written as soon as it is there, into one JSON file
for each slice, and the next call goes on with what is missing. Without a GPU everything runs at toy size: the
same code, on other sizes, and its results are kept apart, because they say nothing about speed.
"""
