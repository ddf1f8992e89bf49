"""How a call reaches a server and its result comes back. Private: nothing here is public API."""
