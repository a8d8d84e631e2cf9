"""Reads a run folder, live or dead, and says in plain words what is wrong with the run and what to do."""
