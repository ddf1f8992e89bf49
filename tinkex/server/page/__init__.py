"""The web page of the server: what runs, how it goes, and a conversation with the result."""
