"""The training server: HTTP, keys, storage, scheduling. Needs the extra `local`."""
