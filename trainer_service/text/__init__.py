"""The text of a training run, from files and data sets to tokens."""
