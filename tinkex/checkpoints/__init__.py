"""Checkpoints as files on this machine: download, export, merge."""
