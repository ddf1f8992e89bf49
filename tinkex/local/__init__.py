"""The training server: what `pip install tinkex[local]` adds. Nothing is imported here."""
